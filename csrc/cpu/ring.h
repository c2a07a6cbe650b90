// The ring: keys and values of the frames that a unit can still see, in place for ever, as the attention reads them.
//
// Per layer one KeyValues (kernels/attention.h) of capacity K + W + F slots; a slot is the N tokens of one latent
// frame, and slots follow each other without padding, so that neighbouring frames are one range of rows. Where a frame
// lives and who sees it is csrc/plan.h; this class holds the memory and remembers which frame each slot holds. It
// behaves as RingCache of cfrt/nn/ring.py does without gradients, which is its definition.
//
// All levels and thread counts use the same layout; a snapshot moves between them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../frames.h"
#include "buffer.h"
#include "kernels.h"

namespace cfrt {

struct RingShape {
    Geometry geometry;
    std::int64_t frame_tokens, layers, heads, dim;
    Precision precision;  // fp32 or bf16
};

// What one pass over a unit reads and writes, in rows of every layer. Used again, it allocates nothing.
struct RingPass {
    std::vector<Span> ranges;          // what the unit sees: sinks first, then the window in order, itself included
    std::int64_t sink_rows = 0;        // of those read, the first that many are sinks'
    std::vector<std::int64_t> frames;  // the same as frames
    std::vector<std::int64_t> place;   // where each of the unit's own F N tokens is written
};

class Ring {
  public:
    explicit Ring(const RingShape& shape);

    const RingShape& shape() const { return shape_; }
    const KeyValues& layer(std::int64_t i) const { return layers_[static_cast<std::size_t>(i)]; }
    std::size_t bytes() const { return data_.size(); }

    // A pass over `unit`, as Frames::open has it. A fused pass is open(u), commit(u), open(u + 1), and then one sweep
    // through the layers: the spare unit of the ring keeps all that unit u reads out of the way of what unit u + 1
    // writes.
    void open(std::int64_t unit, RingPass& pass);
    void commit(std::int64_t unit) { frames_.commit(unit); }
    void rewind(std::int64_t unit) { frames_.rewind(unit); }
    void hold(std::int64_t frame) { frames_.hold(frame); }
    void clear() { frames_.clear(); }

    bool holds(std::int64_t frame) const { return frames_.holds(frame); }
    std::vector<std::int64_t> held() const { return frames_.held(); }
    std::int64_t next_frame() const { return frames_.next_frame(); }

    // One frame of one layer as plain fp32 [N][heads][dim]: exact for fp32 and bf16 both ways. `read` wants it held.
    void write(const Kernels& kernels, std::int64_t layer, std::int64_t frame, const float* k, const float* v);
    void read(std::int64_t layer, std::int64_t frame, float* k, float* v) const;

    // Everything, raw: exact, and for rings of the same shape; `load` refuses another's.
    std::size_t state_bytes() const;
    void save(std::byte* state) const;
    void load(const std::byte* state, std::size_t size);

  private:
    std::int64_t first_row(std::int64_t frame) const { return shape_.geometry.slot(frame) * shape_.frame_tokens; }
    std::vector<std::int64_t> header() const;

    RingShape shape_;
    Buffer data_;
    std::vector<KeyValues> layers_;
    Frames frames_;
};

// Memory for keys and values alone, of a text for example: `rows` is rounded up to whole pairs.
class KeyValueStore {
  public:
    KeyValueStore(Precision precision, std::int64_t heads, std::int64_t dim, std::int64_t rows);
    const KeyValues& view() const { return view_; }
    std::size_t bytes() const { return data_.size(); }

  private:
    Buffer data_;
    KeyValues view_;
};

}  // namespace cfrt
