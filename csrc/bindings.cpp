// The extension module `_cfrt`: checks, then calls. The only file that knows Python.
// cfrt::Error is a std::invalid_argument, which pybind11 raises as ValueError.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
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

}  // namespace

PYBIND11_MODULE(_cfrt, m) {
    m.doc() = "Native core of cfrt. Private: import cfrt.engines instead.";
    m.def("build_info", &build_info, "Compiler, instruction sets of this CPU, and CUDA toolkit and architectures or None.");
    bind_plan(m);
}
