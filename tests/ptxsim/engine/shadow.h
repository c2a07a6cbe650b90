// Happens-before for memory: who wrote and who read each cell, and when. Time is per warp; it steps at each barrier.
// `seen[w]` of a warp is the first time of warp w whose accesses are not yet ordered before what comes now. Only
// bar.sync, bar.arrive and bar.warp.sync order accesses; shuffles, votes and mma do not (PTX ISA, memory model).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ptxsim {

constexpr int kMaxWarps = 32;

struct Clock {
    std::uint32_t seen[kMaxWarps];
};

// What an access found. `other` is the thread it conflicts with.
enum class Hazard { kNone, kInFlight, kWrite, kRead, kUninitialised };
struct Verdict {
    Hazard hazard = Hazard::kNone;
    int other = -1;
};

// Shared memory of one block, in cells of `grain` bytes.
class SharedShadow {
  public:
    void reset(std::uint32_t bytes, std::uint32_t grain, int warps);
    void tick(int warp) { clock_[warp].seen[warp]++; }
    Clock& clock(int warp) { return clock_[warp]; }

    Verdict read(std::uint32_t at, std::uint32_t bytes, int thread);
    Verdict write(std::uint32_t at, std::uint32_t bytes, int thread, bool atomic = false);
    // A cp.async writes from issue to wait: nobody may touch the cells between the two.
    Verdict issue(std::uint32_t at, std::uint32_t bytes, int thread);
    void complete(std::uint32_t at, std::uint32_t bytes, int thread);

  private:
    struct Cell {
        std::uint32_t time;
        std::uint16_t writer;     // thread + 1, 0 before the first write
        std::uint16_t in_flight;  // thread + 1 of a cp.async
        bool atomic;
    };
    bool ordered(int thread, int other, std::uint32_t time) const {
        return thread == other || time < clock_[thread / 32].seen[other / 32];
    }
    Verdict unordered_read(std::uint32_t cell, int thread) const;

    std::uint32_t grain_ = 4;
    int warps_ = 0;
    std::vector<Cell> cells_;
    std::vector<std::uint32_t> reads_;  // [cell][warp]: time * 64 + lane, lane 32 for several
    Clock clock_[kMaxWarps];
};

// Global memory of one launch: what one block writes no other block may touch (nothing orders blocks), and within a
// block the rules are those of shared memory, with the last reader only.
class GlobalShadow {
  public:
    void add(std::uint64_t address, std::uint64_t bytes, std::uint32_t grain);
    Verdict read(std::size_t buffer, std::uint64_t at, std::uint32_t bytes, std::uint64_t block, int thread,
                 const Clock& clock);
    Verdict write(std::size_t buffer, std::uint64_t at, std::uint32_t bytes, std::uint64_t block, int thread,
                  const Clock& clock, bool atomic = false);
    static constexpr int kOtherBlock = -2;  // as Verdict::other

  private:
    struct Cell {
        std::uint32_t write_block, write_time;  // block + 1, 0 for none
        std::uint32_t read_block, read_time;    // kMany for several blocks
        std::uint16_t writer, reader;
        bool atomic;
    };
    static constexpr std::uint32_t kMany = ~0u;
    struct Range {
        std::uint64_t address;
        std::uint32_t grain;
        std::vector<Cell> cells;
    };
    std::vector<Range> ranges_;
};

}  // namespace ptxsim
