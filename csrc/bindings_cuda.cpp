// `_cfrt.cuda`: the CUDA kernels on device pointers, and whether they can run. Always there, so that what is missing is
// said in words; without nvcc the calls are errors. Pointers are integers, 0 for NULL.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "bindings_kernels.h"
#include "build_info.h"
#include "check.h"
#include "cuda/append.h"
#include "cuda/attention.h"
#include "cuda/combine.h"
#include "cuda/pixels.h"
#include "cuda/quantise.h"
#include "cuda/query.h"
#include "cuda/renoise.h"
#include "philox.h"

namespace py = pybind11;
using namespace py::literals;

namespace cfrt {
namespace {

using Pointer = std::uintptr_t;
using Pieces = std::vector<std::pair<std::int32_t, std::int32_t>>;

constexpr const char* kMissing =
    "this _cfrt was built without CUDA; reinstall cfrt with CFRT_CUDA=ON in the environment";

// The first CUDA driver branch that runs programs of this toolkit, in NVIDIA's release notes.
int least_driver() {
    const std::string version = cuda_version();
    return version.empty() ? 0 : version.substr(0, 3) == "13." ? 580 : version.substr(0, 3) == "12." ? 525 : 450;
}

bool is_int8(const std::string& storage) {
    check(storage == "bf16" || storage == "int8", "expected storage bf16 or int8, got ", storage);
    return storage == "int8";
}

#ifdef CFRT_HAS_CUDA

template <class T = void>
T* at(Pointer address) {
    return reinterpret_cast<T*>(address);
}

void demand(int code, const char* what) {
    if (code != 0) throw std::runtime_error(std::string("CUDA refused ") + what + ": " + cfrt_cuda_error(code));
}

using Pointers = std::initializer_list<std::pair<const char*, Pointer>>;

void demand_given(Pointers pointers) {
    for (const auto& [name, pointer] : pointers) check(pointer != 0, "expected the address of ", name, ", got 0");
}

// Each is there, and where the kernels can read and write 16 bytes at once.
void demand_placed(Pointers pointers) {
    demand_given(pointers);
    for (const auto& [name, pointer] : pointers) {
        std::ostringstream got;
        got << "0x" << std::hex << pointer;
        check(pointer % 16 == 0, "expected ", name, " at a multiple of 16 bytes, got ", got.str());
    }
}

void demand_shape(std::int32_t heads, std::int32_t dim) {
    check(heads >= 1, "expected at least one head, got ", heads);
    check(dim == 64 || dim == 128, "expected heads of 64 or 128 numbers, got ", dim);
}

cfrt_dtype dtype_of(const std::string& name) {
    static const std::map<std::string, cfrt_dtype> dtypes{
        {"float32", CFRT_FLOAT32}, {"float16", CFRT_FLOAT16}, {"bfloat16", CFRT_BFLOAT16}};
    const auto found = dtypes.find(name);
    check(found != dtypes.end(), "expected dtype float32, float16 or bfloat16, got ", name);
    return found->second;
}

std::string capability_of(const cfrt_device& device) {
    return std::to_string(device.capability / 10) + "." + std::to_string(device.capability % 10);
}

// Why the kernels cannot run on a device, or None.
py::object refusal(std::int32_t index, const std::string& storage) {
    cfrt_device device;
    const int code = cfrt_query_device(index, &device);
    const std::string built = "these kernels are of CUDA " + cuda_version() + ", which wants an NVIDIA driver of " +
                              std::to_string(least_driver()) + " or newer";
    if (device.driver == 0) return py::str("there is no NVIDIA driver here; " + built);
    if (device.devices == 0)
        return py::str("the driver shows no GPU (" + std::string(cfrt_cuda_error(code)) + "); " + built);
    if (code != 0) return py::str("device " + std::to_string(index) + ": " + cfrt_cuda_error(code));
    const int least = is_int8(storage) ? std::max(89, cuda_architectures().front()) : cuda_architectures().front();
    if (device.capability >= least) return py::none();
    return py::str("device " + std::to_string(index) + " has compute capability " + capability_of(device) + "; the " +
                   storage + " kernels are for sm_" + std::to_string(least) + " and newer");
}

std::int32_t processors(std::int32_t index) {
    cfrt_device device;
    demand(cfrt_query_device(index, &device), "to describe the device");
    return device.processors;
}

void set_pieces(cfrt_attention& call, const Pieces& pieces) {
    check(!pieces.empty() && pieces.size() <= CFRT_MOST_PIECES, "expected 1 to ", int{CFRT_MOST_PIECES},
          " pieces of keys, got ", pieces.size());
    for (const auto& [start, rows] : pieces) call.pieces[call.piece_count++] = {start, rows};
}

// (parts to deal the keys into, floats of scratch that they need).
std::pair<std::int32_t, std::int64_t> plan(std::int32_t queries, std::int32_t heads, std::int32_t dim,
                                           const Pieces& pieces, std::int32_t count) {
    cfrt_attention call{};
    call.queries = queries, call.heads = heads;
    set_pieces(call, pieces);
    const std::int32_t splits = cfrt_attention_splits(&call, count);
    return {splits, cfrt_attention_scratch(queries, heads, dim, splits)};
}

void attention(const std::string& storage, Pointer q, Pointer q_sink, Pointer k, Pointer v, Pointer out,
               Pointer scratch, Pointer q_scale, Pointer q_sink_scale, Pointer k_scale, Pointer v_scale,
               std::int64_t q_stride, std::int64_t out_stride, std::int64_t row_stride, std::int32_t queries,
               std::int32_t heads, std::int32_t dim, std::int32_t splits, const Pieces& pieces,
               std::int32_t sink_pieces, Pointer record, float scale, const std::string& accumulate, Pointer stream) {
    const bool int8 = is_int8(storage), half = accumulate == "fp16";
    demand_shape(heads, dim);
    demand_placed({{"q", q}, {"k", k}, {"v", v}, {"out", out}});
    if (splits != 1) demand_placed({{"scratch", scratch}});
    if (int8) demand_given({{"q_scale", q_scale}, {"k_scale", k_scale}, {"v_scale", v_scale}});
    if (int8 && q_sink) demand_given({{"q_sink_scale", q_sink_scale}});
    check(half || accumulate == "fp32", "expected sums in fp32 or fp16, got ", accumulate);
    check(int8 || !half, "expected sums in fp32 with bf16 storage, got fp16");
    cfrt_attention call{};
    call.q = at(q), call.q_sink = at(q_sink), call.k = at(k), call.v = at(v), call.out = at(out);
    call.scratch = at<float>(scratch);
    call.q_scale = at<float>(q_scale), call.q_sink_scale = at<float>(q_sink_scale);
    call.k_scale = at<float>(k_scale), call.v_scale = at<float>(v_scale);
    call.q_stride = q_stride, call.out_stride = out_stride, call.row_stride = row_stride;
    call.queries = queries, call.heads = heads, call.dim = dim, call.splits = splits;
    call.sink_pieces = sink_pieces, call.scale = scale, call.pass = at<const cfrt_pass>(record);
    if (record == 0) set_pieces(call, pieces);
    py::gil_scoped_release release;
    demand(int8 ? cfrt_attention_int8_fp8(&call, half ? CFRT_ACCUMULATE_FP16 : CFRT_ACCUMULATE_FP32, at(stream))
                : cfrt_attention_bf16(&call, at(stream)),
           "the attention");
}

void append(const std::string& storage, Pointer q, Pointer k, Pointer v, std::int64_t stride, Pointer q_weight,
            Pointer k_weight, Pointer q_out, Pointer q_sink_out, Pointer k_out, Pointer v_out, Pointer q_scale,
            Pointer q_sink_scale, Pointer k_scale, Pointer v_scale, Pointer scratch, std::int32_t heads,
            std::int32_t dim, std::int32_t frames, std::int32_t rows, std::int32_t columns,
            const std::vector<std::int32_t>& place, std::int64_t first_frame, std::int64_t last_sink_view,
            Pointer record, const std::vector<std::int32_t>& pairs, double theta, float eps, Pointer stream) {
    const bool int8 = is_int8(storage);
    demand_shape(heads, dim);
    demand_placed({{"q", q}, {"k", k}, {"v", v}, {"q_weight", q_weight}, {"k_weight", k_weight}});
    demand_placed({{"q_out", q_out}, {"k_out", k_out}, {"v_out", v_out}});
    if (int8) demand_given({{"q_scale", q_scale}, {"k_scale", k_scale}, {"v_scale", v_scale}});
    if (int8 && q_sink_out) demand_given({{"q_sink_scale", q_sink_scale}});
    if (int8) demand_placed({{"scratch", scratch}});
    check(pairs.size() == 3 && 2 * (pairs[0] + pairs[1] + pairs[2]) == dim, "expected three numbers of pairs, ",
          dim / 2, " together");
    check(frames >= 1 && frames <= CFRT_MOST_FRAMES, "expected 1 to ", int{CFRT_MOST_FRAMES}, " frames, got ", frames);
    check(record != 0 || place.size() == static_cast<std::size_t>(frames), "expected a place for each of ", frames,
          " frames, got ", place.size());
    cfrt_append call{};
    call.q = at(q), call.k = at(k), call.v = at(v), call.stride = stride;
    call.q_weight = at(q_weight), call.k_weight = at(k_weight);
    call.q_out = at(q_out), call.q_sink_out = at(q_sink_out), call.k_out = at(k_out), call.v_out = at(v_out);
    call.q_scale = at<float>(q_scale), call.q_sink_scale = at<float>(q_sink_scale);
    call.k_scale = at<float>(k_scale), call.v_scale = at<float>(v_scale), call.scratch = at(scratch);
    call.heads = heads, call.dim = dim, call.frames = frames, call.rows = rows, call.columns = columns;
    call.first_frame = first_frame, call.last_sink_view = last_sink_view, call.eps = eps;
    call.pass = at<const cfrt_pass>(record);
    if (record == 0) std::copy(place.begin(), place.end(), call.granules);
    std::copy(pairs.begin(), pairs.end(), call.pairs);
    cfrt_turns(call.turns, call.pairs, theta);
    py::gil_scoped_release release;
    demand(int8 ? cfrt_append_int8_fp8(&call, at(stream)) : cfrt_append_bf16(&call, at(stream)), "to append");
}

void renoise(Pointer out, Pointer x0, std::int64_t count, const std::string& dtype, double s, const NoiseKey& noise,
             Pointer record, Pointer stream) {
    check(count >= 0, "expected count >= 0, got ", count);
    demand(cfrt_renoise(at(out), at(x0), count, dtype_of(dtype), s, noise.seed, noise.unit, noise.step, noise.purpose,
                        at<const cfrt_pass>(record), at(stream)),
           "to re-noise");
}

void combine(Pointer out, Pointer x, float a, Pointer y, float b, std::int64_t count, Pointer stream) {
    check(count >= 0, "expected count >= 0, got ", count);
    demand_placed({{"out", out}, {"x", x}, {"y", y}});
    demand(cfrt_combine(at<float>(out), at<float>(x), a, at<float>(y), b, count, at(stream)), "to combine latents");
}

void pixels(Pointer out, Pointer x, const std::string& dtype, std::int64_t frames, std::int64_t plane, float gain,
            float offset, Pointer stream) {
    demand(cfrt_pixels(at<std::uint8_t>(out), at(x), dtype_of(dtype), frames, plane, gain, offset, at(stream)),
           "to write pixels");
}

void quantise_rows(Pointer out, Pointer scale, Pointer x, std::int64_t rows, std::int64_t width, std::int64_t stride,
                   Pointer stream) {
    demand_given({{"scale", scale}});
    demand_placed({{"out", out}, {"x", x}});
    demand(cfrt_quantise_rows(at<std::int8_t>(out), at<float>(scale), at(x), rows, width, stride, at(stream)),
           "to quantise rows");
}

void value_scales(Pointer scale, Pointer v, std::int64_t rows, std::int64_t width, std::int64_t stride, float limit,
                  Pointer stream) {
    demand_given({{"scale", scale}});
    demand_placed({{"v", v}});
    demand(cfrt_value_scales(at<float>(scale), at(v), rows, width, stride, limit, at(stream)), "to scale values");
}

#endif

}  // namespace

void bind_cuda(py::module_& m) {
    m.def("least_driver", &least_driver, "The oldest NVIDIA driver branch that runs them; 0 where there are none.");
    m.attr("fp16_limit") = CFRT_FP16_LIMIT;
#ifdef CFRT_HAS_CUDA
    m.def("refusal", &refusal, "device"_a, "storage"_a = "bf16", "Why the kernels cannot run on that device, or None.");
    m.def("processors", &processors, "device"_a, "Multiprocessors of a device.");
    m.def("plan", &plan, py::kw_only(), "queries"_a, "heads"_a, "dim"_a, "pieces"_a, "processors"_a,
          "(parts to deal the keys into, floats of scratch that they need).");
    m.def("attention", &attention, py::kw_only(), "storage"_a = "bf16", "q"_a, "q_sink"_a = 0, "k"_a, "v"_a, "out"_a,
          "scratch"_a = 0, "q_scale"_a = 0, "q_sink_scale"_a = 0, "k_scale"_a = 0, "v_scale"_a = 0, "q_stride"_a,
          "out_stride"_a, "row_stride"_a = 0, "queries"_a, "heads"_a, "dim"_a, "splits"_a, "pieces"_a = Pieces(),
          "sink_pieces"_a = 0, "record"_a = 0, "scale"_a, "accumulate"_a = "fp32", "stream"_a,
          "See csrc/cuda/attention.h; `record` is its pass, instead of pieces and sink_pieces.");
    m.def("append", &append, py::kw_only(), "storage"_a = "bf16", "q"_a, "k"_a, "v"_a, "stride"_a, "q_weight"_a,
          "k_weight"_a, "q_out"_a, "q_sink_out"_a = 0, "k_out"_a, "v_out"_a, "q_scale"_a = 0, "q_sink_scale"_a = 0,
          "k_scale"_a = 0, "v_scale"_a = 0, "scratch"_a = 0, "heads"_a, "dim"_a, "frames"_a, "rows"_a, "columns"_a,
          "place"_a = std::vector<std::int32_t>(), "first_frame"_a = 0, "last_sink_view"_a = 0, "record"_a = 0,
          "pairs"_a, "theta"_a, "eps"_a, "stream"_a,
          "See csrc/cuda/append.h; `record` is its pass, instead of place and first_frame.");
    m.def("renoise", &renoise, "out"_a, "x0"_a, "count"_a, "dtype"_a, "s"_a, "noise"_a, "record"_a = 0, "stream"_a = 0,
          "out = (1 - s) x0 + s e; `record` gives seed and unit instead of `noise`. See csrc/cuda/renoise.h.");
    m.def("combine", &combine, py::kw_only(), "out"_a, "x"_a, "a"_a, "y"_a, "b"_a, "count"_a, "stream"_a,
          "out = a x + b y, fp32. See csrc/cuda/combine.h.");
    m.def("pixels", &pixels, py::kw_only(), "out"_a, "x"_a, "dtype"_a, "frames"_a, "plane"_a, "gain"_a, "offset"_a,
          "stream"_a, "See csrc/cuda/pixels.h.");
    m.def("quantise_rows", &quantise_rows, py::kw_only(), "out"_a, "scale"_a, "x"_a, "rows"_a, "width"_a, "stride"_a,
          "stream"_a, "See csrc/cuda/quantise.h.");
    m.def("value_scales", &value_scales, py::kw_only(), "scale"_a, "v"_a, "rows"_a, "width"_a, "stride"_a, "limit"_a,
          "stream"_a, "See csrc/cuda/quantise.h.");
#else
    m.def("refusal", [](std::int32_t, const std::string&) { return kMissing; }, "device"_a, "storage"_a = "bf16");
    for (const char* name :
         {"processors", "plan", "attention", "append", "combine", "renoise", "pixels", "quantise_rows", "value_scales"})
        m.def(name, [](const py::args&, const py::kwargs&) { throw std::runtime_error(kMissing); });
#endif
}

}  // namespace cfrt
