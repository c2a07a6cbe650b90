#include "frames.h"

#include <algorithm>
#include <sstream>

#include "check.h"

namespace cfrt {
namespace {

constexpr std::int64_t kEmpty = -1;

}  // namespace

std::string listed(const std::vector<std::int64_t>& frames) {
    std::ostringstream text;
    for (const std::int64_t frame : frames) text << (text.tellp() > 0 ? ", " : "[") << frame;
    return frames.empty() ? "[]" : text.str() + "]";
}

Frames::Frames(const Geometry& geometry)
    : geometry_(geometry), held_(static_cast<std::size_t>(geometry.capacity()), kEmpty) {}

void Frames::open(std::int64_t unit, std::vector<std::int64_t>& seen) {
    check(unit >= 0, "expected unit >= 0, got ", unit);
    const std::int64_t start = unit * geometry_.unit, end = geometry_.unit_end(unit);
    check(start <= next_frame_, "unit ", unit, " starts at frame ", start, ", but the ring is committed up to frame ",
          next_frame_, ": commit the units in order");
    for (std::int64_t frame = start; frame < end; ++frame)
        if (held_[slot(frame)] > frame)
            check(false, "unit ", unit, " has left the ring, which holds frames ", listed(held()),
                  ": open a later unit");
    seen.clear();
    for (const Span& frames : geometry_.visible_frames(unit))
        for (std::int64_t frame = frames.start; frame < frames.stop; ++frame)
            if (frame >= start || holds(frame)) seen.push_back(frame);
    for (std::int64_t frame = start; frame < end; ++frame) held_[slot(frame)] = kEmpty;
}

void Frames::commit(std::int64_t unit) {
    const std::int64_t end = geometry_.unit_end(unit);
    for (std::int64_t frame = unit * geometry_.unit; frame < end; ++frame) hold(frame);
}

void Frames::hold(std::int64_t frame) {
    held_[slot(frame)] = frame;
    next_frame_ = std::max(next_frame_, frame + 1);
}

void Frames::rewind(std::int64_t unit) {
    const std::int64_t start = unit * geometry_.unit;
    check(start <= next_frame_, "cannot rewind from frame ", next_frame_, " to unit ", unit, " (frame ", start,
          "): it lies ahead");
    std::vector<std::int64_t> lost;
    for (const Span& frames : geometry_.visible_frames(unit))
        for (std::int64_t frame = frames.start; frame < frames.stop && frame < start; ++frame)
            if (!holds(frame)) lost.push_back(frame);
    check(lost.empty(), "cannot rewind from frame ", next_frame_, " to unit ", unit, " (frame ", start, "): frames ",
          listed(lost), " have left the ring");
    for (std::int64_t& frame : held_)
        if (frame >= start) frame = kEmpty;
    next_frame_ = start;
}

void Frames::clear() {
    std::fill(held_.begin(), held_.end(), kEmpty);
    next_frame_ = 0;
}

std::vector<std::int64_t> Frames::held() const {
    std::vector<std::int64_t> held;
    for (const std::int64_t frame : held_)
        if (frame != kEmpty) held.push_back(frame);
    std::sort(held.begin(), held.end());
    return held;
}

void Frames::save(std::int64_t* state) const {
    *state = next_frame_;
    std::copy(held_.begin(), held_.end(), state + 1);
}

void Frames::load(const std::int64_t* state) {
    next_frame_ = *state;
    std::copy(state + 1, state + state_size(), held_.begin());
}

}  // namespace cfrt
