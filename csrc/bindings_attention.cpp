// `_cfrt.kernels`, second half: the ring, attention and pointwise kernels on numpy arrays, for tests and benchmarks,
// and for cfrt.nn.attention. bf16 travels as uint16.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "bindings_kernels.h"
#include "check.h"
#include "cpu/attention.h"
#include "cpu/latents.h"
#include "cpu/ring.h"
#include "cpu/tables.h"
#include "cpu/threads.h"

namespace py = pybind11;
using namespace py::literals;

namespace cfrt {
namespace {

// C-contiguous, and taken as it is.
template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Maybe = std::optional<Array<float>>;
using Isa = std::optional<std::string>;

const Kernels& at(const Isa& isa) {
    return kernels(find_isa(isa));
}

// -1 stands for any size.
template <class Sizes>
std::string shape_text(const Sizes& sizes) {
    std::ostringstream text;
    for (const auto size : sizes) {
        text << (text.tellp() > 0 ? ", " : "[");
        size < 0 ? text << "any" : text << size;
    }
    return text.str() + "]";
}

void check_shape(const char* name, const py::array& a, std::initializer_list<std::int64_t> shape) {
    const std::vector<std::int64_t> got(a.shape(), a.shape() + a.ndim());
    const bool fits = std::equal(got.begin(), got.end(), shape.begin(), shape.end(),
                                 [](std::int64_t size, std::int64_t wanted) { return wanted < 0 || size == wanted; });
    if (!fits) check(false, "expected ", name, " ", shape_text(shape), ", got ", shape_text(got));
}

const float* data_of(const Maybe& array) {
    return array ? array->data() : nullptr;
}

template <class Work>
void split(Threads* threads, std::int64_t items, const Work& work) {
    py::gil_scoped_release release;
    if (threads)
        threads->split(items, work);
    else
        work(std::int64_t{0}, items);
}

// ------------------------------------------------------------------------------------------------------ keys and
// values

// Memory of its own, or a layer of a ring that is kept alive with it.
struct BoundKeyValues {
    std::shared_ptr<const void> owner;
    KeyValues view;

    static BoundKeyValues make(const Array<float>& k, const Array<float>& v, const std::string& precision,
                               const Isa& isa) {
        check_shape("k", k, {-1, -1, -1});
        check_shape("v", v, {k.shape(0), k.shape(1), k.shape(2)});
        const std::int64_t rows = k.shape(0), width = k.shape(1) * k.shape(2);
        const Kernels& kernels = at(isa);
        const auto store = std::make_shared<KeyValueStore>(precision_of(precision), k.shape(1), k.shape(2), rows);
        std::vector<std::int64_t> place(static_cast<std::size_t>(rows));
        std::iota(place.begin(), place.end(), 0);
        Append a{};
        a.k.x = k.data(), a.k.x_stride = width, a.v = v.data(), a.v_stride = width;
        a.to = &store->view(), a.place = place.data();
        kernels.pointwise.append(a, 0, rows);
        return {store, store->view()};
    }
};

std::shared_ptr<Ring> make_ring(const Geometry& geometry, std::int64_t frame_tokens, std::int64_t layers,
                                std::int64_t heads, std::int64_t dim, const std::string& precision) {
    return std::make_shared<Ring>(RingShape{geometry, frame_tokens, layers, heads, dim, precision_of(precision)});
}

std::int64_t layer_of(const Ring& ring, std::int64_t layer) {
    check(0 <= layer && layer < ring.shape().layers, "expected a layer of 0 to ", ring.shape().layers - 1, ", got ",
          layer);
    return layer;
}

std::vector<std::pair<std::int64_t, std::int64_t>> pairs_of(const std::vector<Span>& spans) {
    std::vector<std::pair<std::int64_t, std::int64_t>> pairs;
    for (const Span& span : spans) pairs.emplace_back(span.start, span.stop);
    return pairs;
}

void bind_ring(py::module_& m) {
    py::class_<BoundKeyValues>(m, "KeyValues", "k and v [rows, H, D] laid out for the attention.")
        .def(py::init(&BoundKeyValues::make), "k"_a, "v"_a, "precision"_a, py::kw_only(), "isa"_a = py::none())
        .def_property_readonly("rows", [](const BoundKeyValues& kv) { return kv.view.rows; });
    py::class_<Ring, std::shared_ptr<Ring>>(m, "Ring", "The ring cache; see csrc/cpu/ring.h and cfrt/nn/ring.py.")
        .def(py::init(&make_ring), "geometry"_a, py::kw_only(), "frame_tokens"_a, "layers"_a, "heads"_a, "dim"_a,
             "precision"_a)
        .def(
            "open",
            [](Ring& ring, std::int64_t unit) {
                RingPass pass;
                ring.open(unit, pass);
                return py::make_tuple(pairs_of(pass.ranges), pass.sink_rows, pass.place);
            },
            "unit"_a, "(ranges of rows to read, rows of sinks among them, the row of each token of the unit)")
        .def("commit", &Ring::commit, "unit"_a)
        .def("rewind", &Ring::rewind, "unit"_a)
        .def("hold", &Ring::hold, "frame"_a)
        .def("held", &Ring::held)
        .def("clear", &Ring::clear)
        .def_property_readonly("next_frame", &Ring::next_frame)
        .def_property_readonly("bytes", &Ring::bytes)
        .def(
            "layer",
            [](const std::shared_ptr<Ring>& ring, std::int64_t layer) {
                return BoundKeyValues{ring, ring->layer(layer_of(*ring, layer))};
            },
            "layer"_a)
        .def(
            "write",
            [](Ring& ring, std::int64_t layer, std::int64_t frame, const Array<float>& k, const Array<float>& v,
               const Isa& isa) {
                const RingShape& s = ring.shape();
                check(frame >= 0, "expected frame >= 0, got ", frame);
                check_shape("k", k, {s.frame_tokens, s.heads, s.dim});
                check_shape("v", v, {s.frame_tokens, s.heads, s.dim});
                ring.write(at(isa), layer_of(ring, layer), frame, k.data(), v.data());
            },
            "layer"_a, "frame"_a, "k"_a, "v"_a, py::kw_only(), "isa"_a = py::none())
        .def(
            "read",
            [](const Ring& ring, std::int64_t layer, std::int64_t frame) {
                const RingShape& s = ring.shape();
                check(frame >= 0, "expected frame >= 0, got ", frame);
                Array<float> k({s.frame_tokens, s.heads, s.dim}), v({s.frame_tokens, s.heads, s.dim});
                ring.read(layer_of(ring, layer), frame, k.mutable_data(), v.mutable_data());
                return py::make_tuple(k, v);
            },
            "layer"_a, "frame"_a)
        .def("state",
             [](const Ring& ring) {
                 std::string state(ring.state_bytes(), '\0');
                 ring.save(reinterpret_cast<std::byte*>(state.data()));
                 return py::bytes(state);
             })
        .def(
            "load",
            [](Ring& ring, const py::bytes& state) {
                const std::string_view view = state;
                ring.load(reinterpret_cast<const std::byte*>(view.data()), view.size());
            },
            "state"_a);
}

// ------------------------------------------------------------------------------------------------------------
// attention

void attention(const Array<float>& q, const BoundKeyValues& kv, py::array out,
               const std::vector<std::pair<std::int64_t, std::int64_t>>& ranges, const Maybe& q_sink,
               std::int64_t sink_rows, const Isa& isa, Threads* threads) {
    const std::int64_t heads = kv.view.heads, dim = kv.view.dim;
    check_shape("q", q, {-1, heads, dim});
    if (q_sink) check_shape("q_sink", *q_sink, {q.shape(0), heads, dim});
    check_shape("out", out, {q.shape(0), heads, dim});
    check(py::isinstance<Array<float>>(out) || py::isinstance<Array<std::uint16_t>>(out),
          "expected out to be contiguous and float32 or uint16");
    std::vector<Span> spans;
    for (const auto& [start, stop] : ranges) spans.push_back({start, stop});
    Attention call{};
    call.kv = &kv.view, call.ranges = spans.data(), call.range_count = static_cast<int>(spans.size());
    call.sink_rows = sink_rows;
    call.q = q.data(), call.q_sink = data_of(q_sink), call.m = q.shape(0), call.q_stride = heads * dim;
    call.scale = 1.0f / std::sqrt(static_cast<float>(dim));
    call.out = out.mutable_data(), call.out_stride = heads * dim, call.out_bf16 = out.itemsize() == 2;
    check_attention(call);
    const Kernels& kernels = at(isa);
    py::gil_scoped_release release;
    Threads alone(1);
    Threads& pool = threads ? *threads : alone;
    Buffer scratch(attention_scratch(kernels, call, pool.count()));
    attend(kernels, pool, call, scratch.data());
}

// ------------------------------------------------------------------------------------------------------------
// pointwise

// The rows as stored: float32, uint16 for bf16, or (whole numbers as float32, scale) for int8.
py::object layer_norm(const Array<float>& x, const Array<float>& gain, const Array<float>& shift, float eps,
                      const std::string& precision, std::int64_t group_rows, std::int64_t depth, const Isa& isa,
                      Threads* threads) {
    check_shape("x", x, {-1, -1});
    const std::int64_t m = x.shape(0), width = x.shape(1);
    check(group_rows >= 1, "expected group_rows >= 1, got ", group_rows);
    check_shape("gain", gain, {(m + group_rows - 1) / group_rows, width});
    check_shape("shift", shift, {gain.shape(0), width});
    const Kernels& kernels = at(isa);
    const Precision format = precision_of(precision);
    const std::int64_t stride = depth > width ? depth : width, element = kernels.product(format).element;
    Buffer out(static_cast<std::size_t>(m * stride * element));
    Array<float> scale(static_cast<py::ssize_t>(m));
    LayerNorm a{};
    a.x = x.data(), a.x_stride = width, a.width = width, a.gain = gain.data(), a.shift = shift.data();
    a.group_rows = group_rows, a.group_stride = width, a.eps = eps, a.format = format;
    a.out = out.data(), a.out_stride = stride, a.depth = stride, a.out_scale = scale.mutable_data();
    split(threads, m, [&](std::int64_t begin, std::int64_t end) { kernels.pointwise.layer_norm(a, begin, end); });
    const std::vector<py::ssize_t> shape{m, stride};
    if (format == Precision::fp32) return Array<float>(shape, out.as<float>());
    if (format == Precision::bf16) return Array<std::uint16_t>(shape, out.as<std::uint16_t>());
    Array<float> whole(shape);
    for (std::int64_t i = 0; i < m * stride; ++i)
        whole.mutable_data()[i] = element == 1
                                      ? static_cast<float>(out.as<std::uint8_t>()[i] - kernels.product(format).offset)
                                  : element == 2 ? static_cast<float>(out.as<std::int16_t>()[i])
                                                 : out.as<float>()[i];
    return py::make_tuple(whole, scale);
}

Turned turned(const Array<float>& x, std::int64_t heads, std::int64_t dim, const Maybe& weight, float eps,
              const Maybe& turn) {
    if (weight) check_shape("weight", *weight, {heads * dim});
    if (turn) check_shape("turn", *turn, {x.shape(0), 2, dim});
    return {x.data(), heads * dim, data_of(weight), eps, data_of(turn)};
}

py::tuple queries(const Array<float>& x, std::int64_t heads, const Maybe& weight, float eps, const Maybe& turn,
                  const Maybe& sink_turn, const Isa& isa, Threads* threads) {
    check_shape("x", x, {-1, -1});
    check(heads >= 1 && x.shape(1) % (16 * heads) == 0, "expected heads of a multiple of 16 numbers, got ", x.shape(1),
          " for ", heads, " heads");
    const std::int64_t dim = x.shape(1) / heads;
    Array<float> out({x.shape(0), x.shape(1)}), sink_out({x.shape(0), x.shape(1)});
    if (sink_turn) check_shape("sink_turn", *sink_turn, {x.shape(0), 2, dim});
    const Queries a{turned(x, heads, dim, weight, eps, turn),
                    heads,
                    dim,
                    out.mutable_data(),
                    x.shape(1),
                    data_of(sink_turn),
                    sink_out.mutable_data()};
    const Kernels& kernels = at(isa);
    split(threads, x.shape(0), [&](std::int64_t begin, std::int64_t end) { kernels.pointwise.queries(a, begin, end); });
    return py::make_tuple(out, sink_turn ? py::object(sink_out) : py::none());
}

void append(const BoundKeyValues& kv, const std::vector<std::int64_t>& place, const Array<float>& k,
            const Array<float>& v, const Maybe& weight, float eps, const Maybe& turn, const Isa& isa,
            Threads* threads) {
    const std::int64_t heads = kv.view.heads, dim = kv.view.dim, rows = static_cast<std::int64_t>(place.size());
    check_shape("k", k, {rows, heads * dim});
    check_shape("v", v, {rows, heads * dim});
    for (const std::int64_t row : place)
        check(0 <= row && row < kv.view.rows, "expected places of 0 to ", kv.view.rows - 1, ", got ", row);
    const Append a{turned(k, heads, dim, weight, eps, turn), v.data(), heads * dim, &kv.view, place.data()};
    const Kernels& kernels = at(isa);
    split(threads, rows, [&](std::int64_t begin, std::int64_t end) { kernels.pointwise.append(a, begin, end); });
}

Array<float> modulation(const Array<float>& time, const Array<float>& table, unsigned ones, const Isa& isa) {
    check_shape("table", table, {-1, -1});
    const std::int64_t parts = table.shape(0), width = table.shape(1);
    const bool shared = time.ndim() == 2;
    if (shared)
        check_shape("time", time, {-1, width});
    else
        check_shape("time", time, {-1, parts, width});
    Array<float> out({time.shape(0), parts, width});
    const Modulation a{
        time.data(),       shared ? width : parts * width, shared ? 0 : width, table.data(), parts, width, ones,
        out.mutable_data()};
    at(isa).pointwise.modulation(a, 0, time.shape(0));
    return out;
}

Array<std::uint8_t> pixels(const Array<float>& x, std::int64_t frames, std::int64_t fold, float gain, float offset,
                           std::int64_t first_frame, const Isa& isa, Threads* threads) {
    check(frames >= 1 && fold >= 1 && frames * 3 * fold * fold <= kMostPixelChannels, "expected at most ",
          kMostPixelChannels, " channels, got ", frames, " frames of 3 x ", fold, " x ", fold);
    check(0 <= first_frame && first_frame < frames, "expected a first frame of 0 to ", frames - 1, ", got ",
          first_frame);
    check_shape("x", x, {-1, -1, frames * 3 * fold * fold});
    Array<std::uint8_t> out({static_cast<py::ssize_t>(frames - first_frame),
                             static_cast<py::ssize_t>(x.shape(0) * fold), static_cast<py::ssize_t>(x.shape(1) * fold),
                             py::ssize_t{3}});
    const Pixels a{x.data(),    x.shape(2), x.shape(0), x.shape(1), frames,
                   first_frame, fold,       gain,       offset,     out.mutable_data()};
    const Kernels& kernels = at(isa);
    split(threads, x.shape(0), [&](std::int64_t begin, std::int64_t end) { kernels.pointwise.pixels(a, begin, end); });
    return out;
}

template <auto Map>
Array<float> mapped(const Array<float>& x, const Isa& isa) {
    Array<float> out(static_cast<py::ssize_t>(x.size()));
    (at(isa).pointwise.*Map)(out.mutable_data(), x.data(), 0, x.size());
    return out;
}

Patches patches_of(std::int64_t channels, std::int64_t height, std::int64_t width,
                   std::pair<std::int64_t, std::int64_t> patch) {
    check(patch.first >= 1 && patch.second >= 1 && height % patch.first == 0 && width % patch.second == 0,
          "expected a grid of whole patches ", patch.first, " x ", patch.second, ", got ", height, " x ", width);
    return {channels, height, width, patch.first, patch.second};
}

Array<float> patchify_latents(const Array<float>& latents, std::pair<std::int64_t, std::int64_t> patch) {
    check_shape("latents", latents, {-1, -1, -1, -1});
    const Patches p = patches_of(latents.shape(1), latents.shape(2), latents.shape(3), patch);
    Array<float> rows({latents.shape(0) * p.tokens(), p.size()});
    patchify(rows.mutable_data(), p.size(), latents.data(), p, latents.shape(0));
    return rows;
}

Array<float> x0_of(const Array<float>& x, const Array<float>& rows, float s,
                   std::pair<std::int64_t, std::int64_t> patch) {
    check_shape("x", x, {-1, -1, -1, -1});
    const Patches p = patches_of(x.shape(1), x.shape(2), x.shape(3), patch);
    check_shape("rows", rows, {x.shape(0) * p.tokens(), p.size()});
    Array<float> out({x.shape(0), x.shape(1), x.shape(2), x.shape(3)});
    estimate_x0(out.mutable_data(), x.data(), rows.data(), p.size(), s, p, x.shape(0));
    return out;
}

Array<float> latents_of(const Array<float>& rows, std::int64_t channels, std::pair<std::int64_t, std::int64_t> grid,
                        std::pair<std::int64_t, std::int64_t> patch) {
    const Patches p = patches_of(channels, grid.first, grid.second, patch);
    check_shape("rows", rows, {-1, p.size()});
    check(rows.shape(0) % p.tokens() == 0, "expected whole frames of ", p.tokens(), " rows, got ", rows.shape(0));
    Array<float> out({rows.shape(0) / p.tokens(), channels, grid.first, grid.second});
    unpatchify(out.mutable_data(), rows.data(), p.size(), p, rows.shape(0) / p.tokens());
    return out;
}

Array<float> turns(const std::vector<std::int64_t>& positions, std::pair<std::int64_t, std::int64_t> grid,
                   std::array<std::int64_t, 3> pairs, double theta) {
    const Rotary rotary{grid.first, grid.second, {pairs[0], pairs[1], pairs[2]}, theta};
    check(grid.first >= 1 && grid.second >= 1 && pairs[0] >= 0 && pairs[1] >= 0 && pairs[2] >= 0 && rotary.dim() > 0,
          "expected a grid of tokens and pairs to turn");
    const auto frames = static_cast<std::int64_t>(positions.size());
    Array<float> out({frames * rotary.tokens(), std::int64_t{2}, rotary.dim()});
    fill_turns(out.mutable_data(), rotary, positions.data(), frames);
    return out;
}

Array<float> time_features(double t, std::int64_t width) {
    check(width >= 2 && width % 2 == 0, "expected an even width, got ", width);
    Array<float> out(static_cast<py::ssize_t>(width));
    fill_time_features(out.mutable_data(), t, width);
    return out;
}

}  // namespace

void bind_attention(py::module_& m) {
    const auto isa = "isa"_a = py::none();
    const auto threads = "threads"_a = py::none();
    bind_ring(m);
    m.def("attention", &attention, "q"_a, "kv"_a, "out"_a, py::kw_only(), "ranges"_a, "q_sink"_a = py::none(),
          "sink_rows"_a = 0, isa, threads,
          "out [M, H, D] = softmax(q k^T / sqrt(D)) v over ranges of rows; float32, or uint16 for bf16.");
    m.def("layer_norm", &layer_norm, "x"_a, "gain"_a, "shift"_a, "eps"_a, py::kw_only(), "precision"_a = "fp32",
          "group_rows"_a, "depth"_a = 0, isa, threads);
    m.def("queries", &queries, "x"_a, "heads"_a, py::kw_only(), "weight"_a = py::none(), "eps"_a = 0.0f,
          "turn"_a = py::none(), "sink_turn"_a = py::none(), isa, threads);
    m.def("append", &append, "kv"_a, "place"_a, "k"_a, "v"_a, py::kw_only(), "weight"_a = py::none(), "eps"_a = 0.0f,
          "turn"_a = py::none(), isa, threads);
    m.def("modulation", &modulation, "time"_a, "table"_a, "ones"_a, py::kw_only(), isa);
    m.def("pixels", &pixels, "x"_a, py::kw_only(), "frames"_a, "fold"_a, "gain"_a, "offset"_a, "first_frame"_a = 0, isa,
          threads);
    m.def("silu", &mapped<&PointwiseKernels::silu>, "x"_a, py::kw_only(), isa);
    m.def("gelu", &mapped<&PointwiseKernels::gelu>, "x"_a, py::kw_only(), isa);
    m.def("patchify", &patchify_latents, "latents"_a, "patch"_a);
    m.def("unpatchify", &latents_of, "rows"_a, "channels"_a, "grid"_a, "patch"_a);
    m.def("estimate_x0", &x0_of, "x"_a, "rows"_a, "s"_a, "patch"_a);
    m.def("turns", &turns, "positions"_a, "grid"_a, "pairs"_a, "theta"_a);
    m.def("time_features", &time_features, "t"_a, "width"_a);
}

}  // namespace cfrt
