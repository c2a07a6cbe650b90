// The causal Wan2.1 DiT of one stream: its text, its ring of past keys and values, and the passes over a unit.
// cfrt/nn/dit.py is the definition (`CausalDiT.step` and `commit` with batch 1, without gradients).
//
// A pass is one sweep through the layers; everything it needs lies in one arena, made with the object, so that after
// the first passes no memory is asked for. Units are swept alone, or two together: a clean one (t = 0), whose keys and
// values stay, and the first denoising pass of the next, the rows of one above those of the other. Since no kernel's
// row depends on the other rows of its call, and the ring keeps what one reads apart from what the other writes, the
// two together give the bits that they give one after the other, at any level, precision and number of threads.
//
// Latents are fp32 [F][channels][height][width]. Errors are cfrt::Error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "dit_weights.h"
#include "ring.h"

namespace cfrt {

class Dit {
  public:
    // `threads` is used by one pass at a time, and must outlive the object.
    Dit(const DitConfig& config, const Kernels& kernels, Precision precision, Threads& threads, const ReadTensor& read);
    // Another stream with the weights of this one, which has heard and seen nothing yet.
    Dit(const Dit& other, Threads& threads);

    const DitConfig& config() const { return config_; }
    Ring& ring() { return ring_; }
    // Of weights, ring, text and arena.
    std::size_t bytes() const;

    // The keys and values of one held frame, fp32 [layers][2][N][heads][head padded]: exact, and so is putting them
    // back, after which they count as committed.
    void read(std::int64_t frame, float* kv) const;
    void write(std::int64_t frame, const float* kv);
    std::int64_t frame_numbers() const { return 2 * config_.depth * side_numbers(); }

    // rows [text_rows][text_width], which every later pass reads.
    void set_text(const float* rows);
    // x0 = x - s v of `unit` at t = 1000 s. `clean`, if not null, are the final latents of the unit before, committed
    // in the same sweep. x0 may be x.
    void denoise(float* x0, const float* x, double t, std::int64_t unit, const float* clean);
    // Leaves the keys and values of a finished unit in the ring: the sweep at t = 0, cut short after the last layer's
    // keys, since nothing else of that layer is ever seen. A unit that the ring still holds may be committed again.
    void commit(const float* x, std::int64_t unit);

  private:
    // What is computed once per noise level: the embedding e [width], and what modulates blocks, [6][width].
    struct Time {
        double t;
        float *e, *time;
    };
    static constexpr std::size_t kTimes = 8;  // kept; step lists are shorter

    // One unit of a sweep: its latents, its noise level, its place in the ring and what it looks at there.
    struct Unit {
        const float* x;
        const Time* time;
        double t;
        std::int64_t unit;
        const RingPass* pass;
    };

    // Rows run over the tokens of the units of a sweep.
    struct Workspace {
        Rows patches;
        float* stream;                 // the residual, [rows][width]
        Rows normed;                   // what the products of the stream read
        float *q, *q_sink, *kv;        // [rows][heads padded]; kv: twice that
        Handover attended, hidden;     // for the products behind attention and within the feed-forward
        float* modulation;             // [units][6][width]
        float *turn, *sink_turn;       // [rows][2][head padded]
        std::int64_t *place, *frames;  // of each row in the ring; positions of a unit's frames
        Rows head_normed;
        float *head_modulation, *velocity;  // [2][width], [tokens of a unit][numbers of a patch]
        Handover time_features, time_middle, time_silu;
        Time times[kTimes];
        Rows text_rows;
        Handover text_middle, text_embedded;
        float* text_kv;
        std::int64_t* text_place;
        std::byte* scratch;  // of the attention
    };

    Dit(const DitConfig& config, const Machine& machine, std::shared_ptr<const DitWeights> weights);
    std::int64_t side_numbers() const { return config_.frame_tokens() * weights_.heads.width(); }

    void lay_out(Arena& arena);
    std::size_t scratch_bytes() const;

    void begin();
    void forget_ahead_of(std::int64_t unit);
    void add(const float* x, double t, std::int64_t unit);
    const Time& time(double t);

    void sweep(float* x0);
    void embed();
    void turn();
    void modulate(const DitLayer& layer);
    void norm(std::int64_t first, int part);
    void remember(const DitLayer& layer, std::int64_t index);
    void look_back(const DitLayer& layer, std::int64_t index, std::int64_t first);
    void look_at_text(const DitLayer& layer, std::int64_t index, std::int64_t first);
    void feed_forward(const DitLayer& layer, std::int64_t first);
    void answer(const Unit& unit, float* x0);

    void layer_norm(const Rows& out, const float* x, std::int64_t m, const float* gain, const float* shift,
                    std::int64_t group_rows, std::int64_t group_stride);
    void ask(const Linear& linear, const std::vector<float>& weight, std::int64_t first, const float* turn,
             const float* sink_turn);
    void attend_to(const KeyValues& kv, const Span* ranges, int count, std::int64_t sink_rows, std::int64_t row,
                   std::int64_t m);

    std::int64_t unit_rows() const { return config_.unit_tokens(); }
    std::int64_t rows() const { return unit_count_ * unit_rows(); }
    // Are sinks looked at with turns of their own?
    bool far_sinks() const { return config_.relative_sinks && config_.geometry.sinks > 0; }

    DitConfig config_;
    Machine machine_;
    std::shared_ptr<const DitWeights> shared_;
    const DitWeights& weights_;
    Ring ring_;
    std::vector<KeyValueStore> text_;  // of each layer
    bool heard_ = false;
    Unit units_[2];  // of the sweep that is running
    RingPass passes_[2];
    std::int64_t unit_count_ = 0;
    std::size_t next_time_ = 0;
    Workspace w_;
    Arena arena_;
};

}  // namespace cfrt
