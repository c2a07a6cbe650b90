// `_cfrt.cuda`: the CUDA kernels on device pointers, and whether they can run. Always there, so that what is missing is
// said in words; without nvcc the calls are errors.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "bindings_kernels.h"
#include "build_info.h"
#include "check.h"
#include "cuda/attention.h"
#include "cuda/query.h"
#include "cuda/renoise.h"
#include "cuda/ring.h"

namespace py = pybind11;
using namespace py::literals;

namespace cfrt {
namespace {

using Pointer = std::uintptr_t;

constexpr const char* kMissing =
    "this _cfrt was built without CUDA; reinstall cfrt with CFRT_CUDA=ON in the environment";

// The first CUDA driver branch that runs programs of this toolkit, in NVIDIA's release notes.
int least_driver() {
    const std::string version = cuda_version();
    return version.empty() ? 0 : version.substr(0, 3) == "13." ? 580 : version.substr(0, 3) == "12." ? 525 : 450;
}

#ifdef CFRT_HAS_CUDA

void demand(int code, const char* what) {
    if (code != 0) throw std::runtime_error(std::string("CUDA refused ") + what + ": " + cfrt_cuda_error(code));
}

// Why the kernels cannot run on a device, or None.
py::object refusal(std::int32_t index) {
    cfrt_device device;
    const int code = cfrt_query_device(index, &device);
    const std::string built = "these kernels are of CUDA " + cuda_version() + ", which wants an NVIDIA driver of " +
                              std::to_string(least_driver()) + " or newer";
    if (device.driver == 0) return py::str("there is no NVIDIA driver here; " + built);
    if (device.devices == 0)
        return py::str("the driver shows no GPU (" + std::string(cfrt_cuda_error(code)) + "); " + built);
    if (code != 0) return py::str("device " + std::to_string(index) + ": " + cfrt_cuda_error(code));
    if (device.capability < cuda_architectures().front())
        return py::str("device " + std::to_string(index) + " has compute capability " +
                       std::to_string(device.capability / 10) + "." + std::to_string(device.capability % 10) +
                       "; the kernels are for sm_" + std::to_string(cuda_architectures().front()) + " and newer");
    return py::none();
}

std::int32_t processors(std::int32_t index) {
    cfrt_device device;
    demand(cfrt_query_device(index, &device), "to describe the device");
    return device.processors;
}

void set_pieces(cfrt_attention& call, const std::vector<std::pair<std::int32_t, std::int32_t>>& pieces) {
    check(!pieces.empty() && pieces.size() <= CFRT_MOST_PIECES, "expected 1 to ", int{CFRT_MOST_PIECES},
          " pieces of keys, got ", pieces.size());
    for (const auto& [start, rows] : pieces) call.pieces[call.piece_count++] = {start, rows};
}

// (parts to deal the keys into, floats of scratch that they need).
std::pair<std::int32_t, std::int64_t> plan(std::int32_t queries, std::int32_t heads, std::int32_t dim,
                                           const std::vector<std::pair<std::int32_t, std::int32_t>>& pieces,
                                           std::int32_t processors) {
    cfrt_attention call{};
    call.queries = queries, call.heads = heads;
    set_pieces(call, pieces);
    const std::int32_t splits = cfrt_attention_splits(&call, processors);
    return {splits, cfrt_attention_scratch(queries, heads, dim, splits)};
}

void attention_bf16(Pointer q, Pointer q_sink, Pointer k, Pointer v, Pointer out, Pointer scratch,
                    std::int64_t q_stride, std::int64_t out_stride, std::int64_t row_stride, std::int32_t queries,
                    std::int32_t heads, std::int32_t dim, std::int32_t splits,
                    const std::vector<std::pair<std::int32_t, std::int32_t>>& pieces, std::int32_t sink_pieces,
                    float scale, Pointer stream) {
    const auto at = [](Pointer address) { return reinterpret_cast<void*>(address); };
    cfrt_attention call{};
    call.q = at(q), call.q_sink = at(q_sink), call.k = at(k), call.v = at(v), call.out = at(out);
    call.scratch = static_cast<float*>(at(scratch));
    call.q_stride = q_stride, call.out_stride = out_stride, call.row_stride = row_stride;
    call.queries = queries, call.heads = heads, call.dim = dim, call.splits = splits;
    call.sink_pieces = sink_pieces, call.scale = scale;
    set_pieces(call, pieces);
    py::gil_scoped_release release;
    demand(cfrt_attention_bf16(&call, at(stream)), "the attention");
}

void bind_calls(py::module_& m) {
    m.def("refusal", &refusal, "device"_a, "Why the kernels cannot run on that device, or None.");
    m.def("processors", &processors, "device"_a, "Multiprocessors of a device.");
    m.def("plan", &plan, py::kw_only(), "queries"_a, "heads"_a, "dim"_a, "pieces"_a, "processors"_a,
          "(parts to deal the keys into, floats of scratch that they need).");
    m.def("attention_bf16", &attention_bf16, py::kw_only(), "q"_a, "q_sink"_a, "k"_a, "v"_a, "out"_a, "scratch"_a,
          "q_stride"_a, "out_stride"_a, "row_stride"_a, "queries"_a, "heads"_a, "dim"_a, "splits"_a, "pieces"_a,
          "sink_pieces"_a, "scale"_a, "stream"_a, "See csrc/cuda/attention.h; pointers as integers, 0 for NULL.");
}

#else

void bind_calls(py::module_& m) {
    m.def("refusal", [](std::int32_t) { return kMissing; }, "device"_a);
    for (const char* name : {"processors", "plan", "attention_bf16"})
        m.def(name, [](const py::args&, const py::kwargs&) { throw std::runtime_error(kMissing); });
}

#endif

void bind_ring(py::module_& m) {
    const auto make = [](const Geometry& geometry, std::int64_t frame_tokens, std::int64_t layers, std::int64_t heads,
                         std::int64_t dim,
                         bool int8) { return CudaRing({geometry, frame_tokens, layers, heads, dim, int8}); };
    py::class_<CudaRing>(m, "Ring", "Where keys and values lie in a ring of granules, and who sees them; cuda/ring.h.")
        .def(py::init(make), "geometry"_a, py::kw_only(), "frame_tokens"_a, "layers"_a, "heads"_a, "dim"_a,
             "int8"_a = false)
        .def_property_readonly("bytes", &CudaRing::bytes)
        .def(
            "layer",
            [](const CudaRing& ring, std::int64_t i) {
                const CudaRing::Layer layer = ring.layer(i);
                return py::make_tuple(layer.k, layer.v, layer.k_scale);
            },
            "layer"_a, "Bytes from the start to the layer's keys, values and, in 8 bits, scales of keys.")
        .def(
            "open",
            [](CudaRing& ring, std::int64_t unit) {
                CudaRingPass pass;
                ring.open(unit, pass);
                std::vector<std::pair<std::int32_t, std::int32_t>> pieces;
                for (const cfrt_piece& piece : pass.pieces) pieces.emplace_back(piece.start, piece.rows);
                return py::make_tuple(pieces, pass.sink_pieces, pass.place);
            },
            "unit"_a, "(pieces to read, sinks among them, the granule at which each of the unit's frames starts)")
        .def(
            "commit", [](CudaRing& ring, std::int64_t unit) { ring.frames().commit(unit); }, "unit"_a)
        .def(
            "rewind", [](CudaRing& ring, std::int64_t unit) { ring.frames().rewind(unit); }, "unit"_a)
        .def("held", [](const CudaRing& ring) { return ring.frames().held(); })
        .def_property_readonly("next_frame", [](const CudaRing& ring) { return ring.frames().next_frame(); })
        .def("state", &CudaRing::state)
        .def("load", &CudaRing::load, "state"_a);
}

}  // namespace

void bind_cuda(py::module_& parent) {
    py::module_ m = parent.def_submodule("cuda", "The CUDA kernels, on device pointers and a stream.");
    m.def("least_driver", &least_driver, "The oldest NVIDIA driver branch that runs them; 0 where there are none.");
    bind_ring(m);
    bind_calls(m);
}

}  // namespace cfrt
