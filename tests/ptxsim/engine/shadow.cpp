#include "shadow.h"

#include <algorithm>

namespace ptxsim {

namespace {
constexpr std::uint32_t kSeveral = 32;  // lanes
}

void SharedShadow::reset(std::uint32_t bytes, std::uint32_t grain, int warps) {
    grain_ = grain;
    warps_ = warps;
    const std::size_t cells = (bytes + grain - 1) / grain;
    cells_.assign(cells, Cell{});
    reads_.assign(cells * warps, 0);
    for (int w = 0; w < warps; ++w) {
        std::fill_n(clock_[w].seen, kMaxWarps, 1u);  // time starts at 1: nothing is ordered before, nothing was done
    }
}

Verdict SharedShadow::read(std::uint32_t at, std::uint32_t bytes, int thread) {
    const int warp = thread / 32;
    const std::uint32_t now = clock_[warp].seen[warp], mine = now * 64 + thread % 32;
    Verdict verdict;
    for (std::uint32_t c = at / grain_; c < (at + bytes + grain_ - 1) / grain_; ++c) {
        const Cell& cell = cells_[c];
        if (cell.in_flight) return {Hazard::kInFlight, cell.in_flight - 1};
        if (!cell.writer)
            verdict = {Hazard::kUninitialised, -1};
        else if (!ordered(thread, cell.writer - 1, cell.time))
            return {Hazard::kWrite, cell.writer - 1};
        std::uint32_t& last = reads_[c * warps_ + warp];
        last = last / 64 == now && last != mine ? now * 64 + kSeveral : mine;
    }
    return verdict;
}

Verdict SharedShadow::unordered_read(std::uint32_t c, int thread) const {
    const int warp = thread / 32;
    for (int w = 0; w < warps_; ++w) {
        const std::uint32_t last = reads_[c * warps_ + w], lane = last % 64;
        if (last / 64 < clock_[warp].seen[w] || (w == warp && int(lane) == thread % 32)) continue;
        return {Hazard::kRead, w * 32 + int(lane == kSeveral ? 0 : lane)};
    }
    return {};
}

Verdict SharedShadow::write(std::uint32_t at, std::uint32_t bytes, int thread, bool atomic) {
    const std::uint32_t now = clock_[thread / 32].seen[thread / 32];
    for (std::uint32_t c = at / grain_; c < (at + bytes + grain_ - 1) / grain_; ++c) {
        Cell& cell = cells_[c];
        if (cell.in_flight) return {Hazard::kInFlight, cell.in_flight - 1};
        if (atomic && !cell.writer) return {Hazard::kUninitialised, -1};
        const bool both_atomic = atomic && cell.atomic;
        if (cell.writer && !both_atomic && !ordered(thread, cell.writer - 1, cell.time))
            return {Hazard::kWrite, cell.writer - 1};
        if (const Verdict verdict = unordered_read(c, thread); verdict.hazard != Hazard::kNone) return verdict;
        cell = {now, std::uint16_t(thread + 1), 0, atomic};
    }
    return {};
}

Verdict SharedShadow::issue(std::uint32_t at, std::uint32_t bytes, int thread) {
    const Verdict verdict = write(at, bytes, thread);
    for (std::uint32_t c = at / grain_; c < (at + bytes) / grain_; ++c) cells_[c].in_flight = std::uint16_t(thread + 1);
    return verdict;
}

void SharedShadow::complete(std::uint32_t at, std::uint32_t bytes, int thread) {
    const std::uint32_t now = clock_[thread / 32].seen[thread / 32];
    for (std::uint32_t c = at / grain_; c < (at + bytes) / grain_; ++c)
        cells_[c] = {now, std::uint16_t(thread + 1), 0, false};
}

void GlobalShadow::add(std::uint64_t address, std::uint64_t bytes, std::uint32_t grain) {
    ranges_.push_back({address, grain, std::vector<Cell>((bytes + grain - 1) / grain)});
}

Verdict GlobalShadow::read(std::size_t buffer, std::uint64_t at, std::uint32_t bytes, std::uint64_t block, int thread,
                           const Clock& clock) {
    Range& range = ranges_[buffer];
    const std::uint32_t me = std::uint32_t(block) + 1;
    const std::uint64_t first = at - range.address;
    for (std::uint64_t c = first / range.grain; c <= (first + bytes - 1) / range.grain; ++c) {
        Cell& cell = range.cells[c];
        if (cell.write_block && cell.write_block != me) return {Hazard::kWrite, kOtherBlock};
        if (cell.write_block && cell.writer != thread && cell.write_time >= clock.seen[cell.writer / 32])
            return {Hazard::kWrite, cell.writer};
        cell.read_block = cell.read_block && cell.read_block != me ? kMany : me;
        cell.reader = std::uint16_t(thread);
        cell.read_time = clock.seen[thread / 32];
    }
    return {};
}

Verdict GlobalShadow::write(std::size_t buffer, std::uint64_t at, std::uint32_t bytes, std::uint64_t block, int thread,
                            const Clock& clock, bool atomic) {
    Range& range = ranges_[buffer];
    const std::uint32_t me = std::uint32_t(block) + 1;
    const std::uint64_t first = at - range.address;
    for (std::uint64_t c = first / range.grain; c <= (first + bytes - 1) / range.grain; ++c) {
        Cell& cell = range.cells[c];
        if (cell.write_block && !(atomic && cell.atomic)) {
            if (cell.write_block != me) return {Hazard::kWrite, kOtherBlock};
            if (cell.writer != thread && cell.write_time >= clock.seen[cell.writer / 32])
                return {Hazard::kWrite, cell.writer};
        }
        if (cell.read_block && cell.read_block != me) return {Hazard::kRead, kOtherBlock};
        if (cell.read_block && cell.reader != thread && cell.read_time >= clock.seen[cell.reader / 32])
            return {Hazard::kRead, cell.reader};
        cell.write_block = me;
        cell.writer = std::uint16_t(thread);
        cell.write_time = clock.seen[thread / 32];
        cell.atomic = atomic;
    }
    return {};
}

}  // namespace ptxsim
