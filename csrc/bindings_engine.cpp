// `_cfrt.engine`: what cfrt/engines/native.py is made of. Arrays are taken as they are and checked; passes run without
// the interpreter's lock.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings_kernels.h"
#include "check.h"
#include "cpu/dit.h"

namespace py = pybind11;
using namespace py::literals;

namespace cfrt {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Maybe = std::optional<Array<float>>;

// Tensors by name out of a mapping, one at a time, so that no more than one is in memory twice.
class Tensors {
  public:
    explicit Tensors(py::object mapping) : mapping_(std::move(mapping)) {}

    std::vector<float> read(const std::string& name, std::int64_t size) const {
        const py::gil_scoped_acquire hold;
        const auto array = Array<float>::ensure(mapping_[py::str(name)]);
        if (!array) throw py::error_already_set();
        check(array.size() == size, "expected ", name, " to have ", size, " numbers, got ", array.size());
        return {array.data(), array.data() + size};
    }

  private:
    py::object mapping_;
};

// A pass reads and writes latents of this many numbers.
void check_latents(const char* name, const Array<float>& x, std::int64_t numbers) {
    check(x.size() == numbers, "expected ", name, " of ", numbers, " numbers, one unit of latents, got ", x.size());
}

std::unique_ptr<Dit> make_dit(const DitConfig& config, const py::object& tensors, const std::string& precision,
                              Threads& threads, const std::optional<std::string>& isa) {
    const Precision wanted = precision_of(precision);
    const Kernels& level = kernels(find_isa(isa));
    const Tensors source(tensors);
    const py::gil_scoped_release release;
    return std::make_unique<Dit>(config, level, wanted, threads,
                                 [&](const std::string& name, std::int64_t size) { return source.read(name, size); });
}

void set_text(Dit& dit, const Array<float>& rows) {
    const DitConfig& c = dit.config();
    check(rows.ndim() == 2 && rows.shape(0) == c.text_rows && rows.shape(1) == c.text_width, "expected text rows [",
          c.text_rows, ", ", c.text_width, "], got ", rows.size(), " numbers in ", rows.ndim(), " dimensions");
    const float* data = rows.data();
    const py::gil_scoped_release release;
    dit.set_text(data);
}

void denoise(Dit& dit, const Array<float>& x, double t, std::int64_t unit, Array<float>& out, const Maybe& clean) {
    const std::int64_t numbers = dit.config().unit_numbers();
    check_latents("x", x, numbers);
    check_latents("out", out, numbers);
    if (clean) check_latents("clean", *clean, numbers);
    const float *from = x.data(), *before = clean ? clean->data() : nullptr;
    float* to = out.mutable_data();
    const py::gil_scoped_release release;
    dit.denoise(to, from, t, unit, before);
}

void commit(Dit& dit, const Array<float>& x, std::int64_t unit) {
    check_latents("x", x, dit.config().unit_numbers());
    const float* from = x.data();
    const py::gil_scoped_release release;
    dit.commit(from, unit);
}

py::bytes state(Dit& dit) {
    std::string state(dit.ring().state_bytes(), '\0');
    dit.ring().save(reinterpret_cast<std::byte*>(state.data()));
    return state;
}

void load(Dit& dit, const py::bytes& state) {
    const std::string_view view = state;
    dit.ring().load(reinterpret_cast<const std::byte*>(view.data()), view.size());
}

py::object read(Dit& dit, std::int64_t frame) {
    if (frame < 0 || !dit.ring().holds(frame)) return py::none();
    const RingShape& s = dit.ring().shape();
    py::array_t<float> kv({s.layers, std::int64_t{2}, s.frame_tokens, s.heads, s.dim});
    dit.read(frame, kv.mutable_data());
    return std::move(kv);
}

void write(Dit& dit, std::int64_t frame, const Array<float>& kv) {
    check(frame >= 0, "expected frame >= 0, got ", frame);
    check(kv.size() == dit.frame_numbers(), "expected keys and values of ", dit.frame_numbers(), " numbers, got ",
          kv.size(), ": they are another model's");
    dit.write(frame, kv.data());
}

void bind_config(py::module_& m) {
    using Pair = std::pair<std::int64_t, std::int64_t>;
    py::class_<DitConfig>(m, "DitConfig", "Sizes of a causal Wan2.1 DiT; cfrt.config.ModelConfig documents them.")
        .def(
            py::init([](std::int64_t width, std::int64_t depth, std::int64_t heads, std::int64_t ffn,
                        std::int64_t time_width, std::int64_t text_width, std::int64_t text_rows, std::int64_t channels,
                        Pair grid, Pair patch, const Geometry& geometry, std::array<std::int64_t, 3> rope_pairs,
                        double rope_theta, bool relative_sinks, std::int64_t trained_frames, float eps) {
                check(patch.first >= 1 && patch.second >= 1, "expected a patch of at least 1 x 1");
                return DitConfig{width,          depth,
                                 heads,          ffn,
                                 time_width,     text_width,
                                 text_rows,      {channels, grid.first, grid.second, patch.first, patch.second},
                                 geometry,       rope_pairs,
                                 rope_theta,     relative_sinks,
                                 trained_frames, eps};
            }),
            py::kw_only(), "width"_a, "depth"_a, "heads"_a, "ffn"_a, "time_width"_a, "text_width"_a, "text_rows"_a,
            "channels"_a, "grid"_a, "patch"_a, "geometry"_a, "rope_pairs"_a, "rope_theta"_a, "relative_sinks"_a,
            "trained_frames"_a, "eps"_a);
}

void bind_dit(py::module_& m) {
    py::class_<Dit>(m, "Dit", "The network of one stream with its ring and its text; see csrc/cpu/dit.h.")
        .def(py::init(&make_dit), "config"_a, "tensors"_a, "precision"_a, "threads"_a, py::kw_only(),
             "isa"_a = py::none(), py::keep_alive<1, 5>(), "tensors: Wan's names to fp32 arrays, each read once.")
        .def("set_text", &set_text, "rows"_a.noconvert())
        .def("denoise", &denoise, "x"_a.noconvert(), "t"_a, "unit"_a, "out"_a.noconvert(), "clean"_a.noconvert(),
             "out = x - s v of a unit; clean: the unit before, committed in the same sweep, or None.")
        .def("commit", &commit, "x"_a.noconvert(), "unit"_a)
        .def(
            "rewind", [](Dit& dit, std::int64_t unit) { dit.ring().rewind(unit); }, "unit"_a)
        .def_property_readonly("next_frame", [](Dit& dit) { return dit.ring().next_frame(); })
        .def_property_readonly("bytes", &Dit::bytes)
        .def(
            "twin", [](const Dit& dit, Threads& threads) { return std::make_unique<Dit>(dit, threads); }, "threads"_a,
            py::keep_alive<0, 2>(), "Another stream with the same weights, which are in memory once.")
        .def("read", &read, "frame"_a,
             "Keys and values of a frame, fp32 [layers, 2, tokens, heads, padded head], exact; None when it is not "
             "held.")
        .def("write", &write, "frame"_a, "kv"_a.noconvert(), "Puts back what `read` gave; the frame counts as held.")
        .def("state", &state)
        .def("load", &load, "state"_a);
}

}  // namespace

void bind_engine(py::module_& parent) {
    py::module_ m =
        parent.def_submodule("engine", "The native engine's parts. One thread at a time may call an object.");
    bind_config(m);
    bind_dit(m);
}

}  // namespace cfrt
