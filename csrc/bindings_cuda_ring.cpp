// `_cfrt.cuda.Ring`: where keys and values lie on the device. Needs no CUDA, since it touches no memory.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "bindings_kernels.h"
#include "cuda/ring.h"

namespace py = pybind11;
using namespace py::literals;

namespace cfrt {
namespace {

CudaRing make_ring(const Geometry& geometry, std::int64_t frame_tokens, std::int64_t layers, std::int64_t heads,
                   std::int64_t dim, bool int8) {
    return CudaRing({geometry, frame_tokens, layers, heads, dim, int8});
}

py::tuple layer(const CudaRing& ring, std::int64_t i) {
    const CudaRing::Layer layer = ring.layer(i);
    return py::make_tuple(layer.k, layer.v, layer.k_scale);
}

std::vector<std::pair<std::int32_t, std::int32_t>> pieces(const cfrt_pass& pass) {
    std::vector<std::pair<std::int32_t, std::int32_t>> pieces;
    for (std::int32_t i = 0; i < pass.piece_count; ++i) pieces.emplace_back(pass.pieces[i].start, pass.pieces[i].rows);
    return pieces;
}

std::vector<std::int32_t> place(const cfrt_pass& pass) {
    return {pass.place, pass.place + pass.frames};
}

py::bytes record(const cfrt_pass& pass) {
    return {reinterpret_cast<const char*>(&pass), sizeof pass};
}

}  // namespace

void bind_cuda_ring(py::module_& m) {
    py::class_<cfrt_pass>(m, "Pass", "What a pass over one unit reads and writes; cuda/pass.h.")
        .def_property_readonly("pieces", &pieces, "(first granule, rows) of each frame that the unit sees, sinks first")
        .def_readonly("sink_pieces", &cfrt_pass::sink_pieces, "how many of them are sinks")
        .def_property_readonly("place", &place, "the granule at which each of the unit's own frames starts")
        .def_readonly("first_frame", &cfrt_pass::first_frame, "the position of the first of them")
        .def_readonly("unit", &cfrt_pass::unit)
        .def_readonly("seed", &cfrt_pass::seed)
        .def_property_readonly("record", &record, "a cfrt_pass, to be copied to the device: `record_bytes` bytes");
    m.attr("record_bytes") = sizeof(cfrt_pass);
    py::class_<CudaRing>(m, "Ring", "Where keys and values lie in a ring of granules, and who sees them; cuda/ring.h.")
        .def(py::init(&make_ring), "geometry"_a, py::kw_only(), "frame_tokens"_a, "layers"_a, "heads"_a, "dim"_a,
             "int8"_a = false)
        .def_property_readonly("bytes", &CudaRing::bytes, "of the allocation, to be zeroed once")
        .def("layer", &layer, "layer"_a,
             "Bytes from the start to the layer's keys, values and, in 8 bits, scales of keys.")
        .def("open", &CudaRing::open, "unit"_a, "seed"_a = 0, "Begins a pass over a unit; ValueError out of order.")
        .def(
            "commit", [](CudaRing& ring, std::int64_t unit) { ring.frames().commit(unit); }, "unit"_a)
        .def(
            "rewind", [](CudaRing& ring, std::int64_t unit) { ring.frames().rewind(unit); }, "unit"_a)
        .def(
            "hold", [](CudaRing& ring, std::int64_t frame) { ring.frames().hold(frame); }, "frame"_a,
            "Declares that a frame's slot has been written, as when a rewind brings it back from elsewhere.")
        .def(
            "clear", [](CudaRing& ring) { ring.frames().clear(); }, "Forgets all frames.")
        .def("held", [](const CudaRing& ring) { return ring.frames().held(); })
        .def_property_readonly("next_frame", [](const CudaRing& ring) { return ring.frames().next_frame(); })
        .def("state", &CudaRing::state, "The bookkeeping of an exact snapshot; the other half is the allocation.")
        .def("load", &CudaRing::load, "state"_a);
}

}  // namespace cfrt
