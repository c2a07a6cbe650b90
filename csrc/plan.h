// The ring plan: who sees whom, and where a key lives. The C++/CUDA mirror of cfrt/blocks.py, which is the definition;
// tests/test_native_plan.py proves the two equal for any geometry. Integers only; no memory is touched here.
//
// Units: F latent frames are denoised together. Everything is counted in latent frames from the start of the stream.
#pragma once

#include <cstdint>

#include "check.h"
#include "host_device.h"

namespace cfrt {

// Half-open range [start, stop).
struct Span {
    std::int64_t start, stop;
};

// A short list without a heap: what a kernel takes by value.
template <int Capacity>
struct Spans {
    Span items[Capacity];
    int count = 0;

    CFRT_HD void add(Span span) {
        if (span.start < span.stop) items[count++] = span;
    }
    CFRT_HD const Span* begin() const { return items; }
    CFRT_HD const Span* end() const { return items + count; }
};

// Unit F, window W (the current unit included, sinks excluded) and sinks K.
struct Geometry {
    std::int64_t unit, window, sinks;

    // Frames that the ring has room for: one unit more than is seen, so that a fused pass can hold two units.
    CFRT_HD std::int64_t capacity() const { return sinks + window + unit; }

    CFRT_HD std::int64_t unit_end(std::int64_t u) const { return (u + 1) * unit; }

    CFRT_HD bool visible(std::int64_t u, std::int64_t frame) const {
        const std::int64_t end = unit_end(u);
        return 0 <= frame && frame < end && (frame < sinks || frame >= end - window);
    }

    // The frames that unit u sees, in order: the sinks, then the rest of the window.
    CFRT_HD Spans<2> visible_frames(std::int64_t u) const {
        const std::int64_t end = unit_end(u), oldest = end - window;
        Spans<2> spans;
        spans.add({0, sinks < end ? sinks : end});
        spans.add({oldest > sinks ? oldest : sinks, end});
        return spans;
    }

    // Sinks keep their slot for ever; the other frames go round the remaining W + F.
    CFRT_HD std::int64_t slot(std::int64_t frame) const {
        return frame < sinks ? frame : sinks + (frame - sinks) % (window + unit);
    }

    // The slots of visible_frames(u), in frame order. A window is shorter than its part of the ring, so it wraps once.
    CFRT_HD Spans<3> slots(std::int64_t u) const {
        Spans<3> spans;
        for (const Span& frames : visible_frames(u)) {
            const std::int64_t first = slot(frames.start), stop = first + (frames.stop - frames.start);
            spans.add({first, stop < capacity() ? stop : capacity()});
            spans.add({sinks, sinks + (stop - capacity())});
        }
        return spans;
    }
};

// A geometry that blocks.Geometry would accept, or an error in its words.
inline Geometry make_geometry(std::int64_t unit, std::int64_t window, std::int64_t sinks) {
    check(unit >= 1 && sinks >= 0, "expected unit >= 1 and sinks >= 0 latent frames, got unit=", unit,
          ", sinks=", sinks);
    check(window >= unit, "expected window >= unit, since the window includes the current unit; got window=", window,
          ", unit=", unit);
    return {unit, window, sinks};
}

}  // namespace cfrt
