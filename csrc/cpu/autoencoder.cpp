#include "autoencoder.h"

#include <algorithm>
#include <limits>

#include "../check.h"

namespace cfrt {
namespace {

constexpr float kGray = 0.3f, kContrast = 2.0f;  // of cfrt/nn/autoencoder.py, as is kFold
constexpr std::int64_t kFold = 4, kPicture = 3 * kFold * kFold, kPixels = AutoencoderShape::kTemporal * kPicture;

// Rows of a product gathered at once: whole tiles of every level, and few enough to stay in the second-level cache.
constexpr std::int64_t kBlock = 56;

// The number of cell (y, x) of a grid that divides each latent cell in 2^level x 2^level.
std::int64_t position(int level, std::int64_t columns, std::int64_t y, std::int64_t x) {
    if (level == 0) return y * columns + x;
    return 4 * position(level - 1, columns, y / 2, x / 2) + 2 * (y % 2) + x % 2;
}

// Calls work(begin, end) for pieces of [begin, end) of at most `most`, as equal as can be.
template <class Work>
void in_pieces(std::int64_t begin, std::int64_t end, std::int64_t most, const Work& work) {
    const std::int64_t items = end - begin, pieces = (items + most - 1) / most;
    for (std::int64_t i = 0; i < pieces; ++i) work(begin + items * i / pieces, begin + items * (i + 1) / pieces);
}

AutoencoderShape checked(const AutoencoderShape& s, std::int64_t frames) {
    check(s.channels >= 1 && s.rows >= 1 && s.columns >= 1, "expected at least one channel, row and column, got ",
          s.channels, ", ", s.rows, ", ", s.columns);
    for (std::int64_t width : s.widths) check(width >= 1, "expected widths >= 1, got ", width);
    check(frames >= 1, "expected at least one frame at a time, got ", frames);
    check(frames * s.rows * s.columns <= std::numeric_limits<std::int32_t>::max() / 64,
          "expected a grid whose positions 32 bits can number, got ", frames, " x ", s.rows, " x ", s.columns);
    return s;
}

}  // namespace

// -------------------------------------------------------------------------------------------------------------- tables

Autoencoder::Table Autoencoder::neighbours(int level, std::int64_t frames, bool raster) const {
    const std::int64_t height = shape_.rows << level, width = shape_.columns << level;
    Table table{frames * height * width, 9, {}};
    table.positions.resize(static_cast<std::size_t>(table.rows * 9));
    for (std::int64_t frame = 0; frame < frames; ++frame) {
        const std::int64_t first = frame * height * width;
        for (std::int64_t y = 0; y < height; ++y)
            for (std::int64_t x = 0; x < width; ++x) {
                const std::int64_t row = raster ? y * width + x : position(level, shape_.columns, y, x);
                for (std::int64_t tap = 0; tap < 9; ++tap) {
                    const std::int64_t ny = y + tap / 3 - 1, nx = x + tap % 3 - 1;
                    const bool inside = 0 <= ny && ny < height && 0 <= nx && nx < width;
                    table.positions[static_cast<std::size_t>((first + row) * 9 + tap)] = static_cast<std::int32_t>(
                        inside ? first + position(level, shape_.columns, ny, nx) : std::int64_t{-1});
                }
            }
    }
    return table;
}

Autoencoder::Table Autoencoder::groups(std::int64_t rows, std::int64_t taps) {
    Table table{rows, taps, {}};
    for (std::int64_t i = 0; i < rows * taps; ++i) table.positions.push_back(static_cast<std::int32_t>(i));
    return table;
}

// ------------------------------------------------------------------------------------------------------------- weights

struct Autoencoder::Loader {
    const Autoencoder& to;
    const Model& model;
    const FindTensor& find;

    // value(out, tap, in) is a weight, source(out) the number of a bias.
    template <class Value, class Source>
    Conv pack(const float* bias, std::int64_t out, std::int64_t in, const Table& table, std::int64_t pieces,
              Value value, Source source) const {
        const std::int64_t pitch = to.pitch(in), depth = table.taps * pitch;
        std::vector<float> matrix(static_cast<std::size_t>(out * depth));
        std::vector<float> shift(static_cast<std::size_t>(out));
        for (std::int64_t o = 0; o < out; ++o) {
            shift[static_cast<std::size_t>(o)] = bias[source(o)];
            for (std::int64_t tap = 0; tap < table.taps; ++tap)
                for (std::int64_t i = 0; i < in; ++i)
                    matrix[static_cast<std::size_t>(o * depth + tap * pitch + i)] = value(o, tap, i);
        }
        return {Weights(to.kernels_, to.precision_, matrix.data(), out, depth, to.threads_),
                std::move(shift),
                &table,
                in,
                out,
                pieces};
    }

    // 3 x 3
    Conv conv(const std::string& name, std::int64_t out, std::int64_t in, const Table& table) const {
        const float* w = find(name + ".weight", {out, in, 3, 3});
        return pack(
            find(name + ".bias", {out}), out, in, table, 1,
            [=](auto o, auto tap, auto i) { return w[(o * in + i) * 9 + tap]; }, [](auto o) { return o; });
    }

    // The first of the encoder. In a picture that starts a stream all frames of the latent are the same one, so their
    // weights add up.
    Conv still(const std::string& name, std::int64_t out) const {
        const float* w = find(name + ".weight", {out, kPixels, 3, 3});
        const auto value = [=](auto o, auto tap, auto i) {
            double sum = 0;
            for (std::int64_t frame = 0; frame < AutoencoderShape::kTemporal; ++frame)
                sum += w[(o * kPixels + frame * kPicture + i) * 9 + tap];
            return static_cast<float>(sum);
        };
        return pack(find(name + ".bias", {out}), out, kPicture, model.near[2], 1, value, [](auto o) { return o; });
    }

    // 1 x 1 behind a pixel unshuffle: channel 4 i + q is channel i of the quarter q.
    Conv gather(const std::string& name, std::int64_t out, std::int64_t in) const {
        const float* w = find(name + ".weight", {out, 4 * in, 1, 1});
        return pack(
            find(name + ".bias", {out}), out, in, model.four, 1,
            [=](auto o, auto tap, auto i) { return w[o * 4 * in + 4 * i + tap]; }, [](auto o) { return o; });
    }

    // 1 x 1 before a pixel shuffle to `out` channels.
    Conv scatter(const std::string& name, std::int64_t out, std::int64_t in) const {
        const float* w = find(name + ".weight", {4 * out, in, 1, 1});
        const auto source = [=](auto o) { return o % out * 4 + o / out; };
        return pack(
            find(name + ".bias", {4 * out}), 4 * out, in, model.alone, 4,
            [=](auto o, auto, auto i) { return w[source(o) * in + i]; }, source);
    }

    Residual residual(const std::string& name, std::int64_t width, const Table& table) const {
        return {conv(name + ".conv1", width, width, table), conv(name + ".conv2", width, width, table)};
    }

    Encoder encoder() const {
        const std::int64_t* w = to.shape_.widths;
        const Table* near = model.near;
        return {still("encoder.0", w[0]),
                residual("encoder.1", w[0], near[2]),
                gather("encoder.3", w[1], w[0]),
                residual("encoder.4", w[1], near[1]),
                gather("encoder.6", w[2], w[1]),
                residual("encoder.7", w[2], near[0]),
                conv("encoder.9", to.shape_.channels, w[2], near[0])};
    }

    Decoder decoder() const {
        const std::int64_t* w = to.shape_.widths + 3;
        const Table* near = model.near;
        return {conv("decoder.0", w[0], 2 * to.shape_.channels, near[0]),
                residual("decoder.1", w[0], near[0]),
                scatter("decoder.2", w[1], w[0]),
                {residual("decoder.4", w[1], near[1]), residual("decoder.5", w[1], near[1])},
                scatter("decoder.6", w[2], w[1]),
                {residual("decoder.8", w[2], near[2]), residual("decoder.9", w[2], near[2])},
                conv("decoder.11", kPixels, w[2], model.raster)};
    }

    std::vector<float> channel(const std::string& name) const {
        const std::int64_t channels = to.shape_.channels;
        const float* values = find(name, {channels, 1, 1});
        return std::vector<float>(values, values + channels);
    }
};

Autoencoder::Model::Model(const Autoencoder& of, const FindTensor& find)
    : near{of.neighbours(0, of.frames_, false), of.neighbours(1, of.frames_, false),
           of.neighbours(2, of.frames_, false)},
      raster(of.neighbours(2, of.frames_, true)),
      alone(groups(of.frames_ * of.sites(1), 1)),
      four(groups(of.sites(1), 4)),
      encoder(Loader{of, *this, find}.encoder()),
      decoder(Loader{of, *this, find}.decoder()),
      mean(Loader{of, *this, find}.channel("latent_mean")),
      deviation(Loader{of, *this, find}.channel("latent_std")) {}

Autoencoder::Autoencoder(const Kernels& kernels, Precision precision, const AutoencoderShape& shape,
                         const FindTensor& find, std::int64_t frames, Threads& threads)
    : kernels_(kernels),
      precision_(precision),
      shape_(checked(shape, frames)),
      frames_(frames),
      threads_(threads),
      model_(std::make_shared<const Model>(*this, find)) {
    reserve();
}

Autoencoder::Autoencoder(const Autoencoder& of, Threads& threads)
    : kernels_(of.kernels_),
      precision_(of.precision_),
      shape_(of.shape_),
      frames_(of.frames_),
      threads_(threads),
      model_(of.model_) {
    reserve();
}

template <class Visit>
void Autoencoder::for_each_conv(Visit visit) const {
    const Encoder& e = model_->encoder;
    const Decoder& d = model_->decoder;
    for (const Conv* conv : {&e.in, &e.to_eighth, &e.to_sixteenth, &e.out, &d.in, &d.to_eighth, &d.to_quarter, &d.out})
        visit(*conv);
    for (const Residual* block :
         {&e.quarter, &e.eighth, &e.sixteenth, &d.sixteenth, &d.eighth[0], &d.eighth[1], &d.quarter[0], &d.quarter[1]})
        visit(block->first), visit(block->second);
}

void Autoencoder::reserve() {
    const std::int64_t *w = shape_.widths, *d = w + 3;
    const std::int64_t most =
        std::max({sites(0) * w[2], sites(0) * shape_.channels, sites(1) * w[1], sites(2) * std::max(w[0], kPicture),
                  frames_ * sites(0) * 2 * shape_.channels, frames_ * sites(0) * d[0], frames_ * sites(1) * d[1],
                  frames_ * sites(2) * d[2]});
    std::int64_t row = 0, in = 0;
    for_each_conv([&](const Conv& conv) {
        row = std::max(row, row_stride(kernels_, precision_, conv.weights.view().k));
        in = std::max(in, conv.in);
    });
    margin_ = (in + 15) / 16 * 16;
    const auto floats = [](std::int64_t count) { return Buffer(static_cast<std::size_t>(count) * sizeof(float)); };
    for (Buffer& plane : planes_) plane = floats(margin_ + most);
    stream_ = floats(most);
    for (int thread = 0; thread < threads_.count(); ++thread) {
        Scratch& scratch = scratch_.emplace_back();
        scratch.rows = floats(kBlock * row);
        scratch.pixels = floats(std::max(kBlock, shape_.columns * kFold) * kPixels);
        if (precision_ == Precision::int8) scratch.scale = floats(kBlock);
    }
}

std::int64_t Autoencoder::bytes() const {
    std::size_t sum = 0;
    for_each_conv([&](const Conv& conv) { sum += conv.weights.bytes(); });
    return static_cast<std::int64_t>(sum);
}

// ------------------------------------------------------------------------------------------------------------ products

// Elements of a position in a plane.
std::int64_t Autoencoder::pitch(std::int64_t channels) const {
    return precision_ == Precision::bf16 ? channels + channels % 2 : channels;
}

// Words of 32 bits of that many elements of a plane.
std::int64_t Autoencoder::words(std::int64_t elements) const {
    return precision_ == Precision::bf16 ? elements / 2 : elements;
}

template <class Work>
void Autoencoder::share(std::int64_t items, const Work& work) {
    threads_.run([&](int thread) {
        const std::int64_t begin = items * thread / threads_.count(), end = items * (thread + 1) / threads_.count();
        if (begin < end) work(begin, end, scratch_[static_cast<std::size_t>(thread)]);
    });
}

// Rows [begin, end) of a convolution of the plane, at most kBlock; g says where to and how.
void Autoencoder::product(const Conv& conv, std::int64_t begin, std::int64_t end, Scratch& scratch, Gemm g) {
    const PackedWeights& w = conv.weights.view();
    const std::int64_t stride = row_stride(kernels_, precision_, w.k);
    const bool whole = precision_ == Precision::int8;
    const Gather gather{
        plane(at_),          words(pitch(conv.in)),          conv.table->positions.data(),    conv.table->taps,
        scratch.rows.data(), whole ? stride : words(stride), whole ? w.depth : words(w.depth)};
    float* scale = scratch.scale.as<float>();
    whole ? kernels_.conv.gather_int8(gather, scale, begin, end) : kernels_.conv.gather(gather, begin, end);
    g.w = &w, g.a = gather.out, g.a_scale = scale, g.m = end - begin, g.stride = stride, g.bias = conv.bias.data();
    const GemmKernel& kernel = kernels_.product(precision_);
    kernel.run(g, 0, kernel.tiles(g));
}

// The residual stream's positions [begin, end) to the plane that is not being read.
void Autoencoder::activate(std::int64_t begin, std::int64_t end, std::int64_t width, Next next) {
    kernels_.conv.activate(
        {stream_.as<float>(), width, next == Next::silu, precision_ == Precision::bf16, plane(1 - at_), pitch(width)},
        begin, end);
}

// The rows that `stream_` was filled with, to the plane.
void Autoencoder::enter(std::int64_t rows, std::int64_t width) {
    activate(0, rows, width, Next::copy);
    at_ = 1 - at_;
}

void Autoencoder::to_stream(const Conv& conv, Epilogue epilogue, std::int64_t rows, Next next) {
    Gemm g{};
    g.epilogue = epilogue, g.out_stride = conv.out;
    share(rows, [&](std::int64_t first, std::int64_t last, Scratch& scratch) {
        in_pieces(first, last, kBlock, [&](std::int64_t begin, std::int64_t end) {
            Gemm piece = g;
            piece.out = stream_.as<float>() + begin * conv.out;
            product(conv, begin, end, scratch, piece);
            activate(begin * conv.pieces, end * conv.pieces, conv.out / conv.pieces, next);
        });
    });
    at_ = 1 - at_;
}

// silu of a convolution, to the plane: nobody else needs it.
void Autoencoder::to_plane(const Conv& conv, std::int64_t rows) {
    Gemm g{};
    g.epilogue = Epilogue::silu, g.out_stride = pitch(conv.out), g.out_bf16 = precision_ == Precision::bf16;
    share(rows, [&](std::int64_t first, std::int64_t last, Scratch& scratch) {
        in_pieces(first, last, kBlock, [&](std::int64_t begin, std::int64_t end) {
            Gemm piece = g;
            piece.out = plane(1 - at_) + begin * words(g.out_stride);
            product(conv, begin, end, scratch, piece);
        });
    });
    at_ = 1 - at_;
}

void Autoencoder::through(const Residual& block, std::int64_t rows, Next next) {
    to_plane(block.first, rows);
    to_stream(block.second, Epilogue::add, rows, next);
}

// -------------------------------------------------------------------------------------------------- decoding, encoding

void Autoencoder::decode(std::uint8_t* pixels, const float* latents, std::int64_t count, const float* previous) {
    for (std::int64_t done = 0; done < count; done += frames_) {
        const float* from = latents + done * shape_.latents();
        const std::int64_t now = std::min(frames_, count - done);
        decode_some(pixels, from, now, done == 0 ? previous : from - shape_.latents());
        pixels +=
            (now * shape_.kTemporal - (done == 0 && previous == nullptr ? shape_.kTemporal - 1 : 0)) * shape_.bytes();
    }
}

void Autoencoder::decode_some(std::uint8_t* pixels, const float* latents, std::int64_t count, const float* previous) {
    const std::int64_t channels = shape_.channels, cells = sites(0);
    float* pair = stream_.as<float>();
    for (std::int64_t frame = 0; frame < count; ++frame) {
        const float* now = latents + frame * shape_.latents();
        const float* before = frame == 0 ? previous : now - shape_.latents();
        for (std::int64_t cell = 0; cell < cells; ++cell) {
            for (std::int64_t c = 0; c < channels; ++c) *pair++ = before == nullptr ? 0.0f : before[c * cells + cell];
            for (std::int64_t c = 0; c < channels; ++c) *pair++ = now[c * cells + cell];
        }
    }
    const Decoder& d = model_->decoder;
    enter(count * cells, 2 * channels);
    to_stream(d.in, Epilogue::none, count * sites(0), Next::silu);
    through(d.sixteenth, count * sites(0), Next::copy);
    to_stream(d.to_eighth, Epilogue::none, count * sites(0), Next::silu);
    through(d.eighth[0], count * sites(1), Next::silu);
    through(d.eighth[1], count * sites(1), Next::copy);
    to_stream(d.to_quarter, Epilogue::none, count * sites(1), Next::silu);
    through(d.quarter[0], count * sites(2), Next::silu);
    through(d.quarter[1], count * sites(2), Next::silu);
    to_pixels(pixels, count, previous == nullptr);
}

// The last convolution, a few rows of the picture at a time, straight to pixels.
void Autoencoder::to_pixels(std::uint8_t* pixels, std::int64_t count, bool starts) {
    const std::int64_t height = shape_.rows * kFold, width = shape_.columns * kFold;
    const std::int64_t most = std::max<std::int64_t>(1, kBlock / width);
    Gemm g{};
    g.epilogue = Epilogue::none, g.out_stride = kPixels;
    share(count * height, [&](std::int64_t first, std::int64_t last, Scratch& scratch) {
        for (std::int64_t row = first; row < last;) {
            const std::int64_t frame = row / height, y = row % height, rows = std::min({most, last - row, height - y});
            const std::int64_t missing = starts && frame == 0 ? shape_.kTemporal - 1 : 0;
            const std::int64_t before = frame * shape_.kTemporal - (starts && frame > 0 ? shape_.kTemporal - 1 : 0);
            in_pieces(row * width, (row + rows) * width, kBlock, [&](std::int64_t begin, std::int64_t end) {
                Gemm piece = g;
                piece.out = scratch.pixels.as<float>() + (begin - row * width) * kPixels;
                product(model_->decoder.out, begin, end, scratch, piece);
            });
            std::uint8_t* to = pixels + before * shape_.bytes() + y * kFold * width * kFold * 3;
            kernels_.pointwise.pixels({scratch.pixels.as<float>(), kPixels, height, width, shape_.kTemporal, missing,
                                       kFold, 1.0f / kContrast, kGray, to},
                                      0, rows);
            row += rows;
        }
    });
}

void Autoencoder::encode(float* latent, const std::uint8_t* picture) {
    const std::int64_t height = shape_.rows * kFold, width = shape_.columns * kFold;
    for (std::int64_t y = 0; y < height; ++y)
        for (std::int64_t x = 0; x < width; ++x) {
            float* to = stream_.as<float>() + position(2, shape_.columns, y, x) * kPicture;
            for (std::int64_t c = 0; c < 3; ++c)
                for (std::int64_t i = 0; i < kFold; ++i)
                    for (std::int64_t j = 0; j < kFold; ++j) {
                        const std::int64_t pixel = (y * kFold + i) * width * kFold + x * kFold + j;
                        *to++ = (static_cast<float>(picture[pixel * 3 + c]) / 255.0f - kGray) * kContrast;
                    }
        }
    const Encoder& e = model_->encoder;
    enter(sites(2), kPicture);
    to_stream(e.in, Epilogue::none, sites(2), Next::silu);
    through(e.quarter, sites(2), Next::copy);
    to_stream(e.to_eighth, Epilogue::none, sites(1), Next::silu);
    through(e.eighth, sites(1), Next::copy);
    to_stream(e.to_sixteenth, Epilogue::none, sites(0), Next::silu);
    through(e.sixteenth, sites(0), Next::silu);
    to_stream(e.out, Epilogue::none, sites(0), Next::copy);
    const float* raw = stream_.as<float>();
    for (std::int64_t c = 0; c < shape_.channels; ++c)
        for (std::int64_t cell = 0; cell < sites(0); ++cell)
            latent[c * sites(0) + cell] =
                (raw[cell * shape_.channels + c] - model_->mean[static_cast<std::size_t>(c)]) /
                model_->deviation[static_cast<std::size_t>(c)];
}

}  // namespace cfrt
