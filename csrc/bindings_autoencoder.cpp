// `_cfrt.kernels.Autoencoder`: the small autoencoder on numpy arrays, for tests and benchmarks.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <variant>

#include "bindings_kernels.h"
#include "check.h"
#include "cpu/autoencoder.h"

namespace py = pybind11;
using namespace py::literals;

namespace cfrt {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Tensors = std::map<std::string, Array<float>>;

template <class Shape>
std::string text(const Shape& shape) {
    std::string all;
    for (const auto size : shape) all.append(all.empty() ? "[" : ", ").append(std::to_string(size));
    return all + "]";
}

void check_shape(const std::string& name, const py::array& a, std::initializer_list<std::int64_t> shape) {
    const std::vector<std::int64_t> got(a.shape(), a.shape() + a.ndim());
    if (!std::equal(got.begin(), got.end(), shape.begin(), shape.end()))
        check(false, "expected ", name, " ", text(shape), ", got ", text(got));
}

// A number of threads of its own, or threads that it shares with what else its caller runs.
using Pool = std::variant<Threads*, int>;

struct BoundAutoencoder {
    std::shared_ptr<Threads> threads;
    Autoencoder autoencoder;

    static std::shared_ptr<Threads> take(const Pool& pool) {
        if (const int* count = std::get_if<int>(&pool)) return std::make_shared<Threads>(*count);
        return {std::get<Threads*>(pool), [](Threads*) {}};  // kept alive by the binding
    }

    BoundAutoencoder(const Tensors& tensors, std::int64_t channels, std::pair<std::int64_t, std::int64_t> grid,
                     std::array<std::int64_t, 6> widths, const std::string& precision, std::int64_t frames,
                     const Pool& pool, const std::optional<std::string>& isa)
        : threads(take(pool)),
          autoencoder(
              kernels(find_isa(isa)), precision_of(precision),
              {channels, grid.first, grid.second, {widths[0], widths[1], widths[2], widths[3], widths[4], widths[5]}},
              [&](const std::string& name, std::initializer_list<std::int64_t> shape) {
                  const auto found = tensors.find(name);
                  check(found != tensors.end(), "expected a tensor named ", name);
                  check_shape(name, found->second, shape);
                  return found->second.data();
              },
              frames, *threads) {}

    BoundAutoencoder(const BoundAutoencoder& of, const Pool& pool)
        : threads(take(pool)), autoencoder(of.autoencoder, *threads) {}

    Array<std::uint8_t> decode(const Array<float>& latents, const std::optional<Array<float>>& previous) {
        const AutoencoderShape& s = autoencoder.shape();
        check(latents.ndim() == 4 && latents.shape(0) >= 1, "expected latents [frames, channels, rows, columns]");
        const std::int64_t count = latents.shape(0);
        check_shape("latents", latents, {count, s.channels, s.rows, s.columns});
        if (previous) check_shape("previous", *previous, {s.channels, s.rows, s.columns});
        const std::int64_t frames = s.kTemporal * count - (previous ? 0 : s.kTemporal - 1);
        Array<std::uint8_t> pixels({frames, s.rows * s.kSpatial, s.columns * s.kSpatial, std::int64_t{3}});
        std::uint8_t* to = pixels.mutable_data();
        const float* before = previous ? previous->data() : nullptr;
        py::gil_scoped_release release;
        autoencoder.decode(to, latents.data(), count, before);
        return pixels;
    }

    Array<float> encode(const Array<std::uint8_t>& picture) {
        const AutoencoderShape& s = autoencoder.shape();
        check_shape("picture", picture, {s.rows * s.kSpatial, s.columns * s.kSpatial, 3});
        Array<float> latent({s.channels, s.rows, s.columns});
        float* to = latent.mutable_data();
        py::gil_scoped_release release;
        autoencoder.encode(to, picture.data());
        return latent;
    }
};

}  // namespace

void bind_autoencoder(py::module_& m) {
    py::class_<BoundAutoencoder>(m, "Autoencoder", "The small autoencoder; see csrc/cpu/autoencoder.h.")
        .def(py::init<const Tensors&, std::int64_t, std::pair<std::int64_t, std::int64_t>, std::array<std::int64_t, 6>,
                      const std::string&, std::int64_t, const Pool&, const std::optional<std::string>&>(),
             "tensors"_a, py::kw_only(), "channels"_a, "grid"_a, "widths"_a, "precision"_a, "frames"_a = 1,
             "threads"_a = 1, "isa"_a = py::none(), py::keep_alive<1, 8>())
        .def("decode", &BoundAutoencoder::decode, "latents"_a, "previous"_a = py::none(),
             "Pixels [f, H, W, 3] uint8 of latents [n, C, h, w]; without `previous` the first gives one frame.")
        .def("encode", &BoundAutoencoder::encode, "picture"_a, "The latent frame [C, h, w] of a picture [H, W, 3].")
        .def(
            "twin",
            [](const BoundAutoencoder& a, const Pool& pool) { return std::make_unique<BoundAutoencoder>(a, pool); },
            "threads"_a = 1, py::keep_alive<0, 2>(), "Another one with the same weights, which are in memory once.")
        .def_property_readonly("bytes", [](const BoundAutoencoder& a) { return a.autoencoder.bytes(); });
}

}  // namespace cfrt
