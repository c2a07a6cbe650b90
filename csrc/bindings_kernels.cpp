// `_cfrt.kernels`: the CPU kernels one by one on numpy arrays, for tests and benchmarks. bf16 travels as uint16.

#include "bindings_kernels.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>

#include "check.h"
#include "cpu/buffer.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cpu/weights.h"

namespace py = pybind11;
using namespace py::literals;

namespace cfrt {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
T choice(const char* what, const std::string& name, std::initializer_list<std::pair<const char*, T>> choices) {
    std::string names;
    for (const auto& [known, value] : choices) {
        if (name == known) return value;
        names.append(names.empty() ? "" : ", ").append(known);
    }
    check(false, "expected ", what, " to be one of ", names, ", got '", name, "'");
    return {};
}

Precision find_precision(const std::string& name) {
    return choice<Precision>("precision", name,
                             {{"fp32", Precision::fp32}, {"bf16", Precision::bf16}, {"int8", Precision::int8}});
}

const char* precision_name(Precision precision) {
    return precision == Precision::fp32 ? "fp32" : precision == Precision::bf16 ? "bf16" : "int8";
}

Epilogue find_epilogue(const std::string& name) {
    return choice<Epilogue>("epilogue", name,
                            {{"none", Epilogue::none},
                             {"gelu", Epilogue::gelu},
                             {"silu", Epilogue::silu},
                             {"add", Epilogue::add},
                             {"gate", Epilogue::gate}});
}

void check_matrix(const char* name, const py::array& a) {
    check(a.ndim() == 2, "expected ", name, " to have two dimensions, got ", a.ndim());
}

// Weights with the kernels they are packed for.
struct BoundWeights {
    const Kernels& kernels;
    Weights weights;

    static std::unique_ptr<BoundWeights> make(const Array<float>& w, const std::string& precision,
                                              const std::optional<std::string>& isa, Threads* threads) {
        check_matrix("w", w);
        const Kernels& k = cfrt::kernels(find_isa(isa));
        Threads alone(1);
        return std::unique_ptr<BoundWeights>(new BoundWeights{
            k, Weights(k, find_precision(precision), w.data(), w.shape(0), w.shape(1), threads ? *threads : alone)});
    }
};

// Rows of activations in the format of a level and precision.
struct Rows {
    const Kernels& kernels;
    Precision precision;
    std::int64_t m, k, depth, stride;
    Buffer data, scale;

    static std::unique_ptr<Rows> make(const Array<float>& x, const std::string& precision,
                                      const std::optional<std::string>& isa) {
        check_matrix("x", x);
        const Kernels& kernels = cfrt::kernels(find_isa(isa));
        const Precision p = find_precision(precision);
        const std::int64_t m = x.shape(0), k = x.shape(1);
        std::unique_ptr<Rows> rows(
            new Rows{kernels, p, m, k, row_depth(kernels, p, k), row_stride(kernels, p, k), Buffer(), Buffer()});
        rows->data = Buffer(static_cast<std::size_t>(m * rows->stride * kernels.product(p).element));
        rows->scale = Buffer(static_cast<std::size_t>(m) * sizeof(float));
        rows->fill(x.data(), 0, m);
        return rows;
    }

    void fill(const float* x, std::int64_t begin, std::int64_t end) {
        if (precision == Precision::fp32) {
            for (std::int64_t row = begin; row < end; ++row)
                std::copy_n(x + row * k, k, data.as<float>() + row * stride);
        } else if (precision == Precision::bf16) {
            kernels.rows.to_bf16(data.as<std::uint16_t>(), stride, x, k, k, depth, begin, end);
        } else {
            kernels.rows.to_int8(data.data(), stride, scale.as<float>(), x, k, k, depth, begin, end);
        }
    }

    // What an element stands for; int8: the whole number.
    float value(std::int64_t row, std::int64_t i) const {
        const std::int64_t at = row * stride + i;
        const GemmKernel& kernel = kernels.product(precision);
        if (precision == Precision::bf16) {
            const std::uint32_t bits = std::uint32_t{data.as<std::uint16_t>()[at]} << 16;
            float x;
            std::memcpy(&x, &bits, sizeof x);
            return x;
        }
        if (kernel.element == 1) return static_cast<float>(data.as<std::uint8_t>()[at] - kernel.offset);
        if (kernel.element == 2) return static_cast<float>(data.as<std::int16_t>()[at]);
        return data.as<float>()[at];
    }

    // Zeros behind the row included.
    Array<float> values() const {
        Array<float> out({m, depth});
        for (std::int64_t row = 0; row < m; ++row)
            for (std::int64_t i = 0; i < depth; ++i) out.mutable_at(row, i) = value(row, i);
        return out;
    }

    Array<float> scales() const { return Array<float>(static_cast<py::ssize_t>(m), scale.as<float>()); }
};

void gemm(const Rows& rows, const BoundWeights& weights, py::array out, const std::optional<Array<float>>& bias,
          const std::string& epilogue, const std::optional<Array<float>>& gate, std::int64_t gate_rows,
          Threads* threads) {
    const PackedWeights& w = weights.weights.view();
    check(&rows.kernels == &weights.kernels && rows.precision == w.precision, "expected rows for ",
          isa_name(weights.kernels.isa), " and ", precision_name(w.precision), " as the weights are, got ",
          isa_name(rows.kernels.isa), " and ", precision_name(rows.precision));
    check(rows.k == w.k, "expected rows of ", w.k, " elements, as the weights take, got ", rows.k);
    check_matrix("out", out);
    check(out.shape(0) == rows.m && out.shape(1) >= w.n, "expected out [", rows.m, ", ", w.n, "], got [", out.shape(0),
          ", ", out.shape(1), "]");
    check(py::isinstance<Array<float>>(out) || py::isinstance<Array<std::uint16_t>>(out),
          "expected out to be contiguous and float32 or uint16");
    check(!bias || bias->size() == w.n, "expected a bias of ", w.n, " elements, got ", bias ? bias->size() : 0);
    Gemm g{};
    g.w = &w, g.a = rows.data.data(), g.m = rows.m, g.stride = rows.stride;
    g.a_scale = w.precision == Precision::int8 ? rows.scale.as<float>() : nullptr;
    g.bias = bias ? bias->data() : nullptr;
    g.epilogue = find_epilogue(epilogue);
    g.out = out.mutable_data(), g.out_stride = out.shape(1), g.out_bf16 = out.itemsize() == 2;
    if (gate) {
        check_matrix("gate", *gate);
        check(gate_rows >= 1 && gate->shape(0) * gate_rows >= rows.m && gate->shape(1) == w.n, "expected a gate [",
              "at least ", rows.m, " / gate_rows, ", w.n, "], got [", gate->shape(0), ", ", gate->shape(1),
              "] with gate_rows=", gate_rows);
        g.gate = gate->data(), g.gate_rows = gate_rows, g.gate_stride = gate->shape(1);
    }
    check_gemm(weights.kernels, g);
    const GemmKernel& kernel = weights.kernels.product(w.precision);
    py::gil_scoped_release release;
    const std::int64_t tiles = kernel.tiles(g);
    if (threads)
        threads->split(tiles, [&](std::int64_t begin, std::int64_t end) { kernel.run(g, begin, end); });
    else
        kernel.run(g, 0, tiles);
}

}  // namespace

Precision precision_of(const std::string& name) {
    return find_precision(name);
}

void bind_kernels(py::module_& parent) {
    py::module_ m = parent.def_submodule("kernels", "The CPU kernels one by one, for tests and benchmarks.");
    m.def(
        "isas",
        [] {
            std::vector<std::string> names;
            for (Isa isa : supported_isas()) names.emplace_back(isa_name(isa));
            return names;
        },
        "The levels that this CPU can run, lowest first.");
    m.def(
        "isa", [](const std::optional<std::string>& name) { return isa_name(find_isa(name)); }, "name"_a = py::none(),
        "The level of that name, of CFRT_ISA, or the best; ValueError where the CPU lacks it.");
    py::class_<Threads>(m, "Threads", "A thread pool; the caller is one of the threads.")
        .def(py::init<int>(), "count"_a)
        .def_property_readonly("count", &Threads::count)
        .def(
            "fork_join",
            [](Threads& threads, std::int64_t rounds) {
                py::gil_scoped_release release;
                for (std::int64_t round = 0; round < rounds; ++round) threads.run([](int) {});
            },
            "rounds"_a, "Empty calls, one after the other: what a call costs.");
    m.def(
        "ceiling",
        [](const std::string& precision, std::int64_t rounds, const std::optional<std::string>& isa) {
            check(rounds >= 1, "expected rounds >= 1, got ", rounds);
            const Kernels& k = cfrt::kernels(find_isa(isa));
            const CeilingKernel& ceiling = k.ceilings[static_cast<int>(find_precision(precision))];
            py::gil_scoped_release release;
            ceiling.run(rounds);
            return ceiling.operations * rounds;
        },
        "precision"_a, "rounds"_a, py::kw_only(), "isa"_a = py::none(),
        "Multiply-adds on registers alone; gives how many operations that were, two each.");
    py::class_<BoundWeights>(m, "Weights", "w [N, K] packed for a level and a precision.")
        .def(py::init(&BoundWeights::make), "w"_a, "precision"_a, py::kw_only(), "isa"_a = py::none(),
             "threads"_a = py::none())
        .def_property_readonly("bytes", [](const BoundWeights& w) { return w.weights.bytes(); });
    py::class_<Rows>(m, "Rows", "x [M, K] in the row format of a level and a precision.")
        .def(py::init(&Rows::make), "x"_a, "precision"_a, py::kw_only(), "isa"_a = py::none())
        .def_property_readonly("values", &Rows::values, "What was stored, [M, depth]; whole numbers for int8.")
        .def_property_readonly("scale", &Rows::scales, "Of each row, int8 only.");
    m.def("gemm", &gemm, "rows"_a, "weights"_a, "out"_a, py::kw_only(), "bias"_a = py::none(), "epilogue"_a = "none",
          "gate"_a = py::none(), "gate_rows"_a = 1, "threads"_a = py::none(),
          "out [M, N] = epilogue(rows W^T + bias), float32, or uint16 for bf16; see csrc/cpu/kernels/gemm.h.");
    bind_attention(m);
    bind_autoencoder(m);
}

}  // namespace cfrt
