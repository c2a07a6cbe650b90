// The embedded student's video autoencoder (cfrt/nn/autoencoder.py, which defines it): latents to pixels, and a picture
// to a latent frame. 16 pixels a latent cell, four frames a latent frame, one for the first.
//
// Every convolution is a product over gathered rows (kernels/conv.h). Positions lie in the order of their latent cell,
// then of their quarter of it, then of the quarter's quarter: so a pixel shuffle moves nothing, it renames one position
// of 4 C channels as four of C, and the tables of neighbours know who is beside whom. The residual stream is fp32 in
// every precision.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "threads.h"
#include "weights.h"

namespace cfrt {

struct AutoencoderShape {
    std::int64_t channels;       // of a latent
    std::int64_t rows, columns;  // of the latent grid
    std::int64_t widths[6];      // encoder at 1/4, 1/8, 1/16, decoder at 1/16, 1/8, 1/4 of the picture

    static constexpr std::int64_t kSpatial = 16, kTemporal = 4;

    std::int64_t latents() const { return channels * rows * columns; }               // numbers of a latent frame
    std::int64_t bytes() const { return rows * columns * kSpatial * kSpatial * 3; }  // of a pixel frame
};

// The tensor of that name, without gaps; throws where there is none of that shape.
using FindTensor = std::function<const float*(const std::string& name, std::initializer_list<std::int64_t> shape)>;

// One call at a time: the scratch memory is the object's. After construction nothing is allocated. The same latents
// give the same bytes, however many threads and however they are cut into calls.
class Autoencoder {
  public:
    // Names are those of cfrt.nn.autoencoder ("decoder.0.weight"); the tensors are not needed afterwards. `frames`
    // latent frames are decoded side by side. `threads` must outlive the object.
    Autoencoder(const Kernels& kernels, Precision precision, const AutoencoderShape& shape, const FindTensor& find,
                std::int64_t frames, Threads& threads);
    // For another stream: the packed weights are in memory once.
    Autoencoder(const Autoencoder& of, Threads& threads);

    // Pixels of `count` latent frames, [count * 4][H][W][3], or 3 frames fewer where `previous` is null: there the
    // stream starts. latents [count][channels][rows][columns], normalised; `previous` is the latent frame before them.
    void decode(std::uint8_t* pixels, const float* latents, std::int64_t count, const float* previous);

    // The latent frame [channels][rows][columns], normalised, of a picture [H][W][3] that starts a stream.
    void encode(float* latent, const std::uint8_t* picture);

    Autoencoder(const Autoencoder&) = delete;
    Autoencoder& operator=(const Autoencoder&) = delete;

    const AutoencoderShape& shape() const { return shape_; }
    std::int64_t bytes() const;  // of packed weights

  private:
    // Who takes part in row m of a product: positions [rows][taps].
    struct Table {
        std::int64_t rows, taps;
        std::vector<std::int32_t> positions;
    };
    struct Conv {
        Weights weights;
        std::vector<float> bias;
        const Table* table;
        std::int64_t in, out;  // channels that a tap brings, and of a row of the result
        std::int64_t pieces;   // positions that such a row stands for
    };
    struct Residual {
        Conv first, second;
    };
    struct Encoder {
        Conv in;
        Residual quarter;
        Conv to_eighth;
        Residual eighth;
        Conv to_sixteenth;
        Residual sixteenth;
        Conv out;
    };
    struct Decoder {
        Conv in;
        Residual sixteenth;
        Conv to_eighth;
        Residual eighth[2];
        Conv to_quarter;
        Residual quarter[2];
        Conv out;
    };
    enum class Next { copy, silu };  // of the residual stream, on its way to the next product
    // What a thread works in.
    struct Scratch {
        Buffer rows;    // gathered
        Buffer scale;   // of each, int8 only
        Buffer pixels;  // before they are rounded
    };
    struct Loader;
    // What all streams of a model read.
    struct Model {
        Model(const Autoencoder& of, const FindTensor& find);
        Model(const Model&) = delete;  // the convolutions point to the tables
        Model& operator=(const Model&) = delete;

        const Table near[3], raster, alone, four;  // by level: 1/16, 1/8, 1/4 of the picture
        const Encoder encoder;
        const Decoder decoder;
        const std::vector<float> mean, deviation;
    };

    Table neighbours(int level, std::int64_t frames, bool raster) const;
    static Table groups(std::int64_t rows, std::int64_t taps);
    void reserve();
    template <class Visit>
    void for_each_conv(Visit visit) const;

    std::int64_t sites(int level) const { return shape_.rows * shape_.columns << 2 * level; }  // positions of a frame
    std::int64_t pitch(std::int64_t channels) const;
    std::int64_t words(std::int64_t elements) const;
    float* plane(int which) { return planes_[which].as<float>() + margin_; }

    template <class Work>
    void share(std::int64_t items, const Work& work);
    void product(const Conv& conv, std::int64_t begin, std::int64_t end, Scratch& scratch, Gemm g);
    void activate(std::int64_t begin, std::int64_t end, std::int64_t width, Next next);
    void enter(std::int64_t rows, std::int64_t width);
    void to_stream(const Conv& conv, Epilogue epilogue, std::int64_t rows, Next next);
    void to_plane(const Conv& conv, std::int64_t rows);
    void through(const Residual& block, std::int64_t rows, Next next);
    void decode_some(std::uint8_t* pixels, const float* latents, std::int64_t count, const float* previous);
    void to_pixels(std::uint8_t* pixels, std::int64_t count, bool starts);

    const Kernels& kernels_;
    const Precision precision_;
    const AutoencoderShape shape_;
    const std::int64_t frames_;
    Threads& threads_;
    const std::shared_ptr<const Model> model_;
    std::int64_t margin_ = 0;       // words before a plane: the zeros that position -1 stands for
    int at_ = 0;                    // the plane that the next product reads; it writes the other one
    Buffer planes_[2];              // positions as the next product's rows want them; fp32 for int8
    Buffer stream_;                 // the residual stream, fp32
    std::vector<Scratch> scratch_;  // of each thread
};

}  // namespace cfrt
