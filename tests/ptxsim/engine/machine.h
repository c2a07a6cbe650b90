// The machine that runs a kernel: what a lane, a warp, a block and a launch hold. One instruction acts on all lanes of
// a warp whose bits are set in `mask`; lanes lie side by side, so that handlers are loops that a compiler vectorises.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "shadow.h"

namespace ptxsim {

using i8 = std::int8_t;
using i16 = std::int16_t;
using i32 = std::int32_t;
using i64 = std::int64_t;
using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

constexpr int kLanes = 32;
constexpr u32 kAllLanes = ~0u;

// Where generic addresses of each space start. Global addresses are the host's own.
constexpr u64 kParamWindow = 0x5000'0000'0000'0000;
constexpr u64 kLocalWindow = 0x6000'0000'0000'0000;
constexpr u64 kSharedWindow = 0x7000'0000'0000'0000;

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, u32 mask);

// A place in a warp's registers (`slot` counts bytes of one lane; 4 or 8 wide) and, for an address, what is added.
struct Operand {
    i32 slot;
    i32 width;
    i64 offset;
};

// What the schedule must know about an instruction; everything else is its handler's business.
enum class Flow : i32 { kNext, kBranch, kIndexedBranch, kExit, kBarrier };

struct Instruction {
    Handler run;
    Flow flow;
    i32 line;
    i32 guard;  // slot of the predicate, or -1
    i32 negated;
    i32 arg[6];  // by the opcode: opcodes.py writes them, the handler reads them
    const Operand* operand;
    i32 count;
    i32 index;
};

// Dynamic counts of one instruction; the layout is report.py's.
struct Counters {
    u64 warps, lanes, wavefronts, ideal_wavefronts, sectors, ideal_sectors;
};

enum class Kind : i32 { kBounds, kAlignment, kRace, kUninitialised, kDivergence, kBarrier, kLimit };

// One thing found wrong; of the same kind at the same instruction only the first is kept. The layout is report.py's.
struct Finding {
    i32 kind, instruction;
    i32 block[3];
    i32 thread;
    u64 count;
    char text[200];
};

// Thrown where going on makes no sense. The finding is already recorded.
struct Trap : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A range of global memory that the kernel may touch; `written` has one byte per byte, or is null when all is defined.
struct Buffer {
    u64 address, bytes;
    u8* written;
};

enum class Order : i32 { kSequential, kReversed, kRandom };
enum class Async : i32 { kEager, kLazy, kMixed };

struct Options {
    i32 schedule, async;
    u64 seed, max_instructions;
    i32 races, fp8_accumulator_bits;
};

struct Program {
    std::vector<Operand> operands;
    std::vector<Instruction> code;
    std::vector<u8> registers;  // the initial file of one warp: poison, and the constants
    std::vector<i32> special;   // slots of the special registers, in types.py's order
    u32 shared = 0, dynamic_at = 0, local = 0;
    u32 shared_grain = 4, global_grain = 4;  // bytes: the smallest access the code has in each space
};

struct AsyncCopy {
    u32 to;
    const u8* from;
    int bytes, valid, group;
    bool done;
};

struct Block;

struct Warp {
    Block* block;
    int index;
    std::vector<u8> registers;
    u32 pc[kLanes];
    u32 started, live;
    enum { kReady, kWaiting, kDone } state;
    int waits_at;  // the instruction of the barrier
    std::vector<AsyncCopy> copies[kLanes];
    int group[kLanes];

    template <class T>
    T* lanes(const Operand& o) {
        return reinterpret_cast<T*>(registers.data() + o.slot * kLanes);
    }
    int thread(int lane) const { return index * kLanes + lane; }
};

struct Launch;

struct Block {
    Launch* launch;
    u32 id[3];
    u64 number;
    std::vector<u8> shared, local;
    SharedShadow shadow;
    std::vector<Warp> warps;
};

struct Launch {
    const Program* program;
    Options options;
    u32 grid[3], threads[3];
    u32 dynamic_shared;
    std::vector<u8> parameters;
    std::vector<Buffer> buffers;  // sorted by address
    GlobalShadow global_shadow;
    std::vector<Counters> counters;
    std::vector<Finding> findings;
    std::unordered_map<u64, size_t> known;
    u64 random, executed = 0;

    u64 draw() {  // xorshift64
        random ^= random << 13;
        random ^= random >> 7;
        return random ^= random << 17;
    }
};

__attribute__((format(printf, 5, 6))) void report(Warp& warp, const Instruction& at, Kind kind, int lane,
                                                  const char* format, ...);
// Records and throws.
[[noreturn]] void trap(Warp& warp, const Instruction& at, Kind kind, int lane, const std::string& text);

// The mnemonics that the engine knows.
struct Entry {
    Handler run;
    Flow flow = Flow::kNext;
    std::string widths;  // of the operands' lanes, a digit each; empty where the handler looks for itself
};
std::unordered_map<std::string, Entry>& handlers();
void register_arithmetic();
void register_conversions();
void register_memory();
void register_matrix();
void register_control();

void run_launch(Launch& launch);

}  // namespace ptxsim
