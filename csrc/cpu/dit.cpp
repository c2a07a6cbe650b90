#include "dit.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "../check.h"
#include "attention.h"

namespace cfrt {
namespace {

constexpr std::int64_t kUnits = 2;               // in a sweep, at most
constexpr unsigned kScales = 1u << 1 | 1u << 4;  // of a block's modulation: they get one added
constexpr unsigned kHeadScale = 1u << 1;
constexpr double kTimeScale = 1000.0;  // t = 1000 s

float* numbers(const Handover& fp32) {
    return reinterpret_cast<float*>(fp32.rows.data);
}

RingShape ring_shape(const DitConfig& c, const DitWeights& weights) {
    return {c.geometry, c.frame_tokens(), c.depth, c.heads, weights.heads.padded, weights.memory};
}

std::vector<KeyValueStore> text_stores(const DitConfig& c, const DitWeights& weights) {
    std::vector<KeyValueStore> stores;
    for (std::int64_t i = 0; i < c.depth; ++i)
        stores.emplace_back(weights.memory, c.heads, weights.heads.padded, c.text_rows);
    return stores;
}

}  // namespace

// --------------------------------------------------------------------------------------------------------------------
// memory

Dit::Dit(const DitConfig& config, const Kernels& kernels, Precision precision, Threads& threads, const ReadTensor& read)
    : Dit(config, {kernels, threads},
          std::make_shared<const DitWeights>(load_dit(config, precision, {kernels, threads}, read))) {}

Dit::Dit(const Dit& other, Threads& threads) : Dit(other.config_, {other.machine_.kernels, threads}, other.shared_) {}

Dit::Dit(const DitConfig& config, const Machine& machine, std::shared_ptr<const DitWeights> weights)
    : config_(config),
      machine_(machine),
      shared_(std::move(weights)),
      weights_(*shared_),
      ring_(ring_shape(config, weights_)),
      text_(text_stores(config, weights_)),
      arena_([this](Arena& arena) { lay_out(arena); }) {
    for (Time& time : w_.times) time.t = std::nan("");
    std::iota(w_.text_place, w_.text_place + config_.text_rows, 0);
    for (RingPass& pass : passes_) {
        pass.place.reserve(static_cast<std::size_t>(unit_rows()));
        pass.ranges.reserve(static_cast<std::size_t>(config_.geometry.capacity()) + 1);
    }
}

void Dit::lay_out(Arena& arena) {
    const DitConfig& c = config_;
    const Kernels& kernels = machine_.kernels;
    const Precision blocks = weights_.blocks, text = weights_.text, fp32 = Precision::fp32;
    const std::int64_t unit = unit_rows(), m = kUnits * unit, d = c.width, inner = weights_.heads.width();
    w_.patches = Rows::take(arena, kernels, fp32, m, c.patches.size());
    arena.take(w_.stream, m * d);
    w_.normed = Rows::take(arena, kernels, blocks, m, d);
    arena.take(w_.q, m * inner);
    arena.take(w_.q_sink, m * inner);
    arena.take(w_.kv, m * 2 * inner);
    w_.attended = Handover::take(arena, kernels, blocks, m, inner);
    w_.hidden = Handover::take(arena, kernels, blocks, m, c.ffn);
    arena.take(w_.modulation, kUnits * 6 * d);
    arena.take(w_.turn, m * 2 * weights_.heads.padded);
    arena.take(w_.sink_turn, m * 2 * weights_.heads.padded);
    arena.take(w_.place, m);
    arena.take(w_.frames, c.geometry.unit);
    w_.head_normed = Rows::take(arena, kernels, fp32, unit, d);
    arena.take(w_.head_modulation, 2 * d);
    arena.take(w_.velocity, unit * c.patches.size());
    w_.time_features = Handover::take(arena, kernels, fp32, 1, c.time_width);
    w_.time_middle = Handover::take(arena, kernels, fp32, 1, d);
    w_.time_silu = Handover::take(arena, kernels, fp32, 1, d);
    for (Time& time : w_.times) {
        arena.take(time.e, d);
        arena.take(time.time, 6 * d);
    }
    w_.text_rows = Rows::take(arena, kernels, text, c.text_rows, c.text_width);
    w_.text_middle = Handover::take(arena, kernels, text, c.text_rows, d);
    w_.text_embedded = Handover::take(arena, kernels, text, c.text_rows, d);
    arena.take(w_.text_kv, c.text_rows * 2 * inner);
    arena.take(w_.text_place, c.text_rows);
    arena.take(w_.scratch, static_cast<std::int64_t>(scratch_bytes()));
}

// Of the largest calls: a unit at the whole ring, a sweep at the text.
std::size_t Dit::scratch_bytes() const {
    const auto bytes = [&](const KeyValues& kv, std::int64_t m) {
        const Span all{0, kv.rows};
        Attention call{};
        call.kv = &kv, call.ranges = &all, call.range_count = 1, call.sink_rows = kv.rows, call.m = m;
        return attention_scratch(machine_.kernels, call, machine_.threads.count());
    };
    return std::max(bytes(ring_.layer(0), unit_rows()), bytes(text_[0].view(), kUnits * unit_rows()));
}

void Dit::read(std::int64_t frame, float* kv) const {
    for (std::int64_t layer = 0; layer < config_.depth; ++layer, kv += 2 * side_numbers())
        ring_.read(layer, frame, kv, kv + side_numbers());
}

void Dit::write(std::int64_t frame, const float* kv) {
    for (std::int64_t layer = 0; layer < config_.depth; ++layer, kv += 2 * side_numbers())
        ring_.write(machine_.kernels, layer, frame, kv, kv + side_numbers());
    ring_.hold(frame);
}

// --------------------------------------------------------------------------------------------------------------------
// what the engine calls

void Dit::set_text(const float* rows) {
    const std::int64_t m = config_.text_rows, inner = weights_.heads.width();
    convert(machine_, w_.text_rows, rows, config_.text_width, m);
    multiply(machine_, weights_.text_in, w_.text_rows, m, Result::to(w_.text_middle, Epilogue::gelu));
    multiply(machine_, weights_.text_out, w_.text_middle.rows, m, Result::to(w_.text_embedded));
    for (std::size_t i = 0; i < text_.size(); ++i) {
        const DitLayer& layer = weights_.layers[i];
        multiply(machine_, layer.text_kv, w_.text_embedded.rows, m, {w_.text_kv, 2 * inner});
        const Append append{
            {w_.text_kv, 2 * inner, layer.text_norm_k.data(), weights_.heads.norm_eps(config_.eps), nullptr},
            w_.text_kv + inner,
            2 * inner,
            &text_[i].view(),
            w_.text_place};
        machine_.share(m, 4 * inner, [&](std::int64_t begin, std::int64_t end) {
            machine_.kernels.pointwise.append(append, begin, end);
        });
    }
    heard_ = true;
}

void Dit::denoise(float* x0, const float* x, double t, std::int64_t unit, const float* clean) {
    begin();
    if (clean != nullptr) {
        check(unit >= 1, "expected a unit before this one to commit, got unit ", unit);
        forget_ahead_of(unit - 1);
        add(clean, 0.0, unit - 1);
        ring_.commit(unit - 1);
    }
    add(x, t, unit);
    sweep(x0);
}

void Dit::commit(const float* x, std::int64_t unit) {
    begin();
    forget_ahead_of(unit);
    add(x, 0.0, unit);
    sweep(nullptr);
    ring_.commit(unit);
}

void Dit::begin() {
    check(heard_, "expected set_text before the first pass");
    unit_count_ = 0;
}

// A unit that is committed again must not see what the next unit has overwritten, whether it already has or not.
void Dit::forget_ahead_of(std::int64_t unit) {
    const std::int64_t upcoming = ring_.next_frame() / config_.geometry.unit;
    if (unit < upcoming) ring_.open(upcoming, passes_[0]);
}

void Dit::add(const float* x, double t, std::int64_t unit) {
    RingPass& pass = passes_[unit_count_];
    ring_.open(unit, pass);
    std::copy(pass.place.begin(), pass.place.end(), w_.place + rows());
    units_[unit_count_++] = {x, &time(t), t, unit, &pass};
}

std::size_t Dit::bytes() const {
    std::size_t text = 0;
    for (const KeyValueStore& store : text_) text += store.bytes();
    return weights_.bytes() + ring_.bytes() + text + arena_.bytes();
}

// --------------------------------------------------------------------------------------------------------------------
// the sweep

void Dit::sweep(float* x0) {
    embed();
    turn();
    const std::int64_t last = config_.depth - 1;
    for (std::int64_t i = 0; i <= last; ++i) {
        const DitLayer& layer = weights_.layers[static_cast<std::size_t>(i)];
        // The last layer's output is wanted of the unit that is denoised, of one that is committed only the keys.
        const std::int64_t first = i < last ? 0 : x0 == nullptr ? rows() : rows() - unit_rows();
        modulate(layer);
        norm(0, 0);
        remember(layer, i);
        if (first == rows()) return;
        look_back(layer, i, first);
        look_at_text(layer, i, first);
        feed_forward(layer, first);
    }
    answer(units_[unit_count_ - 1], x0);
}

void Dit::embed() {
    const Patches& patches = config_.patches;
    for (std::int64_t i = 0; i < unit_count_; ++i)
        patchify(reinterpret_cast<float*>(w_.patches.from(i * unit_rows()).data), w_.patches.stride, units_[i].x,
                 patches, config_.geometry.unit);
    multiply(machine_, weights_.patch_embedding, w_.patches, rows(), {w_.stream, config_.width});
}

// Rotary turns of every row, and those at which it looks at sinks: no further than the last frame of a training clip.
void Dit::turn() {
    const auto& pairs = config_.rope_pairs;
    const Patches& p = config_.patches;
    const Heads& heads = weights_.heads;
    const Rotary rotary{p.height / p.ph,
                        p.width / p.pw,
                        {pairs[0], pairs[1], pairs[2]},
                        config_.rope_theta,
                        (heads.padded - heads.dim) / 2};
    const std::int64_t frames = config_.geometry.unit, numbers = frames * rotary.tokens() * 2 * rotary.dim();
    for (std::int64_t i = 0; i < unit_count_; ++i) {
        std::iota(w_.frames, w_.frames + frames, units_[i].unit * frames);
        fill_turns(w_.turn + i * numbers, rotary, w_.frames, frames);
        if (!far_sinks()) continue;
        for (std::int64_t f = 0; f < frames; ++f) w_.frames[f] = std::min(w_.frames[f], config_.trained_frames - 1);
        fill_turns(w_.sink_turn + i * numbers, rotary, w_.frames, frames);
    }
}

// Shift, scale and gate of self-attention, then of the feed-forward, for each unit.
void Dit::modulate(const DitLayer& layer) {
    const std::int64_t d = config_.width;
    for (std::int64_t i = 0; i < unit_count_; ++i) {
        const Modulation modulation{units_[i].time->time,     6 * d, d, layer.modulation.data(), 6, d, kScales,
                                    w_.modulation + i * 6 * d};
        machine_.kernels.pointwise.modulation(modulation, 0, 1);
    }
}

// Rows from `first` on, normed, then scaled and shifted by parts `part` and `part` + 1 of their unit's modulation.
void Dit::norm(std::int64_t first, int part) {
    const std::int64_t d = config_.width;
    const float* shift = w_.modulation + first / unit_rows() * 6 * d + part * d;
    layer_norm(w_.normed.from(first), w_.stream + first * d, rows() - first, shift + d, shift, unit_rows(), 6 * d);
}

void Dit::layer_norm(const Rows& out, const float* x, std::int64_t m, const float* gain, const float* shift,
                     std::int64_t group_rows, std::int64_t group_stride) {
    const std::int64_t d = config_.width;
    const LayerNorm norm{
        x,        d,          d,         gain,     shift, group_rows, group_stride, config_.eps, out.precision,
        out.data, out.stride, out.depth, out.scale};
    machine_.share(m, 8 * d, [&](std::int64_t begin, std::int64_t end) {
        machine_.kernels.pointwise.layer_norm(norm, begin, end);
    });
}

// Keys and values of all rows go into the ring.
void Dit::remember(const DitLayer& layer, std::int64_t index) {
    const std::int64_t inner = weights_.heads.width();
    multiply(machine_, layer.kv, w_.normed, rows(), {w_.kv, 2 * inner});
    const Append append{{w_.kv, 2 * inner, layer.norm_k.data(), weights_.heads.norm_eps(config_.eps), w_.turn},
                        w_.kv + inner,
                        2 * inner,
                        &ring_.layer(index),
                        w_.place};
    machine_.share(rows(), 8 * inner, [&](std::int64_t begin, std::int64_t end) {
        machine_.kernels.pointwise.append(append, begin, end);
    });
}

// Self-attention of the rows from `first` on: each unit looks at what its own pass opened.
void Dit::look_back(const DitLayer& layer, std::int64_t index, std::int64_t first) {
    const std::int64_t d = config_.width;
    ask(layer.q, layer.norm_q, first, w_.turn, far_sinks() ? w_.sink_turn : nullptr);
    for (std::int64_t i = first / unit_rows(); i < unit_count_; ++i) {
        const RingPass& pass = *units_[i].pass;
        const std::int64_t row = i * unit_rows();
        attend_to(ring_.layer(index), pass.ranges.data(), static_cast<int>(pass.ranges.size()), pass.sink_rows, row,
                  unit_rows());
    }
    const Handover attended = w_.attended.from(first);
    attended.settle(machine_, rows() - first);
    const float* gate = w_.modulation + (first / unit_rows() * 6 + 2) * d;
    multiply(machine_, layer.o, attended.rows, rows() - first,
             {w_.stream + first * d, d, Epilogue::gate, false, gate, unit_rows(), 6 * d});
}

void Dit::look_at_text(const DitLayer& layer, std::int64_t index, std::int64_t first) {
    const std::int64_t d = config_.width, m = rows() - first;
    layer_norm(w_.normed.from(first), w_.stream + first * d, m, layer.norm3_gain.data(), layer.norm3_shift.data(), m,
               0);
    ask(layer.text_q, layer.text_norm_q, first, nullptr, nullptr);
    const Span all{0, config_.text_rows};
    attend_to(text_[static_cast<std::size_t>(index)].view(), &all, 1, 0, first, m);
    const Handover attended = w_.attended.from(first);
    attended.settle(machine_, m);
    multiply(machine_, layer.text_o, attended.rows, m, {w_.stream + first * d, d, Epilogue::add});
}

// Queries of the rows from `first` on: projected, normed, turned.
void Dit::ask(const Linear& linear, const std::vector<float>& weight, std::int64_t first, const float* turn,
              const float* sink_turn) {
    const Heads& heads = weights_.heads;
    const std::int64_t inner = heads.width(), m = rows() - first, skip = first * 2 * heads.padded;
    float* q = w_.q + first * inner;
    multiply(machine_, linear, w_.normed.from(first), m, {q, inner});
    const Queries queries{{q, inner, weight.data(), heads.norm_eps(config_.eps), turn ? turn + skip : nullptr},
                          heads.count,
                          heads.padded,
                          q,
                          inner,
                          sink_turn ? sink_turn + skip : nullptr,
                          w_.q_sink + first * inner};
    machine_.share(m, 8 * inner, [&](std::int64_t begin, std::int64_t end) {
        machine_.kernels.pointwise.queries(queries, begin, end);
    });
}

void Dit::attend_to(const KeyValues& kv, const Span* ranges, int count, std::int64_t sink_rows, std::int64_t row,
                    std::int64_t m) {
    const std::int64_t inner = weights_.heads.width();
    const Handover out = w_.attended.from(row);
    const float* q = w_.q + row * inner;
    const Attention call{&kv,
                         ranges,
                         count,
                         sink_rows,
                         q,
                         far_sinks() ? w_.q_sink + row * inner : q,
                         m,
                         inner,
                         1.0f / std::sqrt(static_cast<float>(weights_.heads.dim)),
                         out.out(),
                         out.stride(),
                         out.bf16()};
    attend(machine_.kernels, machine_.threads, call, w_.scratch);
}

void Dit::feed_forward(const DitLayer& layer, std::int64_t first) {
    const std::int64_t d = config_.width, m = rows() - first;
    norm(first, 3);
    const Handover hidden = w_.hidden.from(first);
    multiply(machine_, layer.ffn_in, w_.normed.from(first), m, Result::to(hidden, Epilogue::gelu));
    hidden.settle(machine_, m);
    const float* gate = w_.modulation + (first / unit_rows() * 6 + 5) * d;
    multiply(machine_, layer.ffn_out, hidden.rows, m,
             {w_.stream + first * d, d, Epilogue::gate, false, gate, unit_rows(), 6 * d});
}

// The head: from the rows of the last unit to v, and with it x0.
void Dit::answer(const Unit& unit, float* x0) {
    const std::int64_t d = config_.width, m = unit_rows(), first = rows() - m, size = config_.patches.size();
    const Modulation modulation{unit.time->e,      d, 0, weights_.head_modulation.data(), 2, d, kHeadScale,
                                w_.head_modulation};
    machine_.kernels.pointwise.modulation(modulation, 0, 1);
    layer_norm(w_.head_normed, w_.stream + first * d, m, w_.head_modulation + d, w_.head_modulation, m, 0);
    multiply(machine_, weights_.head, w_.head_normed, m, {w_.velocity, size});
    estimate_x0(x0, unit.x, w_.velocity, size, static_cast<float>(unit.t / kTimeScale), config_.patches,
                config_.geometry.unit);
}

// The few noise levels of a step list come again with every unit.
const Dit::Time& Dit::time(double t) {
    for (const Time& known : w_.times)
        if (known.t == t) return known;
    Time& time = w_.times[next_time_++ % kTimes];
    const std::int64_t d = config_.width;
    fill_time_features(numbers(w_.time_features), t, config_.time_width);
    multiply(machine_, weights_.time_in, w_.time_features.rows, 1, Result::to(w_.time_middle, Epilogue::silu));
    multiply(machine_, weights_.time_out, w_.time_middle.rows, 1, {time.e, d});
    machine_.kernels.pointwise.silu(numbers(w_.time_silu), time.e, 0, d);
    multiply(machine_, weights_.time_projection, w_.time_silu.rows, 1, {time.time, 6 * d});
    time.t = t;
    return time;
}

}  // namespace cfrt
