// The extension module `_cfrt`: checks, then calls. It and bindings_*.cpp alone know Python.
// cfrt::Error is a std::invalid_argument, which pybind11 raises as ValueError.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "bindings_kernels.h"
#include "build_info.h"
#include "cpu/noise.h"
#include "plan.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

py::dict build_info() {
    py::object cuda = py::none();
    if (!cfrt::cuda_version().empty())
        cuda = py::dict("version"_a = cfrt::cuda_version(), "archs"_a = cfrt::cuda_architectures());
    return py::dict("compiler"_a = cfrt::compiler(), "isa"_a = cfrt::instruction_sets(), "cuda"_a = cuda);
}

template <int N>
py::list to_list(const cfrt::Spans<N>& spans) {
    py::list list;
    for (const cfrt::Span& span : spans) list.append(py::make_tuple(span.start, span.stop));
    return list;
}

std::int64_t not_negative(const char* name, std::int64_t value) {
    cfrt::check(value >= 0, "expected ", name, " >= 0, got ", value);
    return value;
}

void bind_plan(py::module_& m) {
    using cfrt::Geometry;
    py::class_<Geometry>(m, "Geometry", "The ring plan in C++; mirrors cfrt.blocks.Geometry, which documents it.")
        .def(py::init(&cfrt::make_geometry), py::kw_only(), "unit"_a, "window"_a, "sinks"_a = 0)
        .def_readonly("unit", &Geometry::unit)
        .def_readonly("window", &Geometry::window)
        .def_readonly("sinks", &Geometry::sinks)
        .def_property_readonly("capacity", &Geometry::capacity)
        .def(
            "visible",
            [](const Geometry& g, std::int64_t unit, std::int64_t frame) {
                return g.visible(not_negative("unit", unit), frame);
            },
            "unit"_a, "frame"_a)
        .def(
            "visible_frames",
            [](const Geometry& g, std::int64_t unit) { return to_list(g.visible_frames(not_negative("unit", unit))); },
            "unit"_a)
        .def(
            "slot", [](const Geometry& g, std::int64_t frame) { return g.slot(not_negative("frame", frame)); },
            "frame"_a)
        .def(
            "slots", [](const Geometry& g, std::int64_t unit) { return to_list(g.slots(not_negative("unit", unit))); },
            "unit"_a);
}

// C-contiguous, and taken as it is: a copy would swallow what is written into it.
template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
Array<T> noise_array(std::int64_t count, void (*fill)(T*, std::int64_t, const cfrt::NoiseKey&),
                     const cfrt::NoiseKey& noise) {
    Array<T> out(static_cast<py::ssize_t>(not_negative("count", count)));
    T* data = out.mutable_data();
    {
        py::gil_scoped_release release;
        fill(data, count, noise);
    }
    return out;
}

void renoise(const Array<float>& x0, double s, const cfrt::NoiseKey& noise, Array<float>& out) {
    cfrt::check(out.size() == x0.size(), "expected out with as many elements as x0, ", x0.size(), ", got ", out.size());
    const float* from = x0.data();
    float* to = out.mutable_data();
    const std::int64_t count = x0.size();
    py::gil_scoped_release release;
    cfrt::renoise(to, from, count, cfrt::make_renoise(s, noise));
}

void bind_noise(py::module_& m) {
    py::class_<cfrt::NoiseKey>(m, "Noise", "Which noise: seed, unit, step and purpose; see cfrt/noise.py.")
        .def(py::init([](std::uint64_t seed, std::uint32_t unit, std::uint32_t step, std::uint32_t purpose) {
                 return cfrt::NoiseKey{seed, unit, step, purpose};
             }),
             "seed"_a, "unit"_a, "step"_a, "purpose"_a)
        .def(
            "bits",
            [](const cfrt::NoiseKey& noise, std::int64_t count) { return noise_array(count, cfrt::fill_bits, noise); },
            "count"_a, "The first `count` random words, uint32.")
        .def(
            "normal",
            [](const cfrt::NoiseKey& noise, std::int64_t count) {
                return noise_array(count, cfrt::fill_normal, noise);
            },
            "count"_a, "The first `count` standard normal numbers, float32.");
    m.def("renoise", &renoise, "x0"_a.noconvert(), "s"_a, "noise"_a, "out"_a.noconvert(),
          "out = (1 - s) x0 + s e over contiguous float32 arrays of equal size; out may be x0.");
}

}  // namespace

PYBIND11_MODULE(_cfrt, m) {
    m.doc() = "Native core of cfrt. Private: import cfrt.engines instead.";
    m.def("build_info", &build_info,
          "Compiler, instruction sets of this CPU, and CUDA toolkit and architectures or None.");
    bind_plan(m);
    bind_noise(m);
    cfrt::bind_kernels(m);
    py::module_ cuda = m.def_submodule("cuda", "The CUDA kernels, on device pointers and a stream.");
    cfrt::bind_cuda_ring(cuda);
    cfrt::bind_cuda(cuda);
    cfrt::bind_engine(m);
}
