// Runs a launch: blocks one after another, a block's warps in the chosen order, a warp until a barrier or its quantum
// ends. Lanes that diverged run separately, the ones with the smallest instruction first, and join where they meet.
#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <numeric>

#include "machine.h"

namespace ptxsim {

void report(Warp& warp, const Instruction& at, Kind kind, int lane, const char* format, ...) {
    Launch& launch = *warp.block->launch;
    const u64 key = u64(at.index) << 8 | u64(kind);
    if (auto seen = launch.known.find(key); seen != launch.known.end()) {
        launch.findings[seen->second].count++;
        return;
    }
    launch.known[key] = launch.findings.size();
    Finding finding{};
    finding.kind = i32(kind);
    finding.instruction = at.index;
    for (int k = 0; k < 3; ++k) finding.block[k] = i32(warp.block->id[k]);
    finding.thread = lane < 0 ? -1 : warp.thread(lane);
    finding.count = 1;
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(finding.text, sizeof finding.text, format, arguments);
    va_end(arguments);
    launch.findings.push_back(finding);
}

void trap(Warp& warp, const Instruction& at, Kind kind, int lane, const std::string& text) {
    report(warp, at, kind, lane, "%s; the launch ends here", text.c_str());
    throw Trap(text);
}

namespace {

u32 lanes_where(Warp& warp, const Instruction& at) {
    const u32* p = warp.lanes<u32>(Operand{at.guard, 4, 0});
    u32 mask = 0;
    for (int l = 0; l < kLanes; ++l) mask |= u32((p[l] != 0) != bool(at.negated)) << l;
    return mask;
}

// A barrier of the block: who has come, and what they know of each other's time.
struct Barrier {
    u32 expected = 0, arrived = 0;  // in threads
    int line = -1;
    Clock known{};
    std::vector<Warp*> waiting;
};

class BlockRun {
  public:
    BlockRun(Launch& launch, u64 number) : launch_(launch), program_(*launch.program) { start(number); }

    void run() {
        for (;;) {
            Warp* next = choose();
            if (!next) break;
            const bool random = launch_.options.schedule == i32(Order::kRandom);
            step(*next, random ? 1 + int(launch_.draw() >> 40 & 63) : 1 << 30);
        }
        for (Warp& warp : block_.warps)
            if (warp.state == Warp::kWaiting)
                trap(warp, program_.code[std::size_t(warp.waits_at)], Kind::kBarrier, -1,
                     "this barrier is waited at for ever: not all threads that it expects come");
    }

  private:
    void start(u64 number);
    void start_warp(Warp& warp, u32 threads);
    Warp* choose();
    void step(Warp& warp, int quantum);
    bool barrier(Warp& warp, const Instruction& at, u32 mask);
    void release(Barrier& barrier);

    struct Group {  // lanes that run together, and where the next other lane waits
        int pc = 0, meets = 0;
        u32 mask = 0;
    };
    static Group group_of(const Warp& warp);

    Launch& launch_;
    const Program& program_;
    Block block_;
    Barrier barriers_[16];
};

void BlockRun::start(u64 number) {
    block_.launch = &launch_;
    block_.number = number;
    block_.id[0] = u32(number % launch_.grid[0]);
    block_.id[1] = u32(number / launch_.grid[0] % launch_.grid[1]);
    block_.id[2] = u32(number / launch_.grid[0] / launch_.grid[1]);
    const u32 threads = launch_.threads[0] * launch_.threads[1] * launch_.threads[2], warps = (threads + 31) / 32;
    const u32 shared = std::max(program_.shared, program_.dynamic_at + launch_.dynamic_shared);
    block_.shared.assign(shared, 0xff);
    block_.local.assign(std::size_t(warps) * kLanes * program_.local, 0xff);
    block_.shadow.reset(shared, program_.shared_grain, int(warps));
    block_.warps.resize(warps);
    for (u32 w = 0; w < warps; ++w) {
        block_.warps[w].index = int(w);
        start_warp(block_.warps[w], threads);
    }
}

void BlockRun::start_warp(Warp& warp, u32 threads) {
    const u32 first = u32(warp.index) * kLanes, here = std::min(threads - first, u32(kLanes));
    warp.block = &block_;
    warp.registers = program_.registers;
    warp.started = warp.live = here == kLanes ? kAllLanes : (1u << here) - 1;
    warp.state = Warp::kReady;
    const u32 *n = launch_.threads, *g = launch_.grid;
    for (u32 l = 0; l < kLanes; ++l) {
        warp.pc[l] = 0;
        warp.group[l] = 0;
        const u32 t = first + l, below = (1u << l) - 1;
        const u32 special[] = {t % n[0],
                               t / n[0] % n[1],
                               t / n[0] / n[1],
                               n[0],
                               n[1],
                               n[2],
                               block_.id[0],
                               block_.id[1],
                               block_.id[2],
                               g[0],
                               g[1],
                               g[2],
                               l,
                               u32(warp.index),
                               u32(block_.warps.size()),
                               below,
                               below | 1u << l,
                               1u << l,
                               ~below,
                               ~(below | 1u << l),
                               u32(block_.number % 128),
                               launch_.dynamic_shared};
        for (std::size_t k = 0; k < program_.special.size(); ++k)
            if (program_.special[k] >= 0) warp.lanes<u32>(Operand{program_.special[k], 4, 0})[l] = special[k];
    }
}

Warp* BlockRun::choose() {
    auto& warps = block_.warps;
    const std::size_t n = warps.size();
    const auto order = Order(launch_.options.schedule);
    const std::size_t first = order == Order::kRandom ? launch_.draw() % n : 0;
    for (std::size_t k = 0; k < n; ++k) {
        Warp& warp = warps[order == Order::kReversed ? n - 1 - k : (first + k) % n];
        if (warp.state == Warp::kReady) return &warp;
    }
    return nullptr;
}

BlockRun::Group BlockRun::group_of(const Warp& warp) {
    Group group{.pc = 1 << 30, .meets = 1 << 30, .mask = 0};
    for (int l = 0; l < kLanes; ++l)
        if (warp.live >> l & 1) group.pc = std::min(group.pc, int(warp.pc[l]));
    for (int l = 0; l < kLanes; ++l) {
        if (!(warp.live >> l & 1)) continue;
        if (int(warp.pc[l]) == group.pc)
            group.mask |= 1u << l;
        else
            group.meets = std::min(group.meets, int(warp.pc[l]));
    }
    return group;
}

void BlockRun::step(Warp& warp, int quantum) {
    Group group = group_of(warp);
    const auto leave = [&](u32 mask, int pc) {
        for (int l = 0; l < kLanes; ++l)
            if (mask >> l & 1) warp.pc[l] = u32(pc);
    };
    while (quantum-- > 0) {
        const Instruction& at = program_.code[std::size_t(group.pc)];
        const u32 mask = at.guard >= 0 ? group.mask & lanes_where(warp, at) : group.mask;
        Counters& count = launch_.counters[std::size_t(group.pc)];
        count.warps += mask != 0;
        count.lanes += u64(std::popcount(mask));
        if (++launch_.executed > launch_.options.max_instructions)
            trap(warp, at, Kind::kLimit, -1, "the launch executed more instructions than Options.max_instructions");
        int next = group.pc + 1;
        bool regroup = false;
        if (at.flow == Flow::kNext) {
            if (mask) at.run(warp, at, mask);
        } else if (at.flow == Flow::kBranch) {
            const int target = int(at.operand[0].offset);
            if (mask == group.mask) {
                next = target;
            } else if (mask) {
                leave(mask, target);
                leave(group.mask & ~mask, next);
                regroup = true;
            }
        } else if (at.flow == Flow::kIndexedBranch) {
            const u32* index = warp.lanes<u32>(at.operand[0]);
            leave(group.mask & ~mask, next);
            for (int l = 0; l < kLanes; ++l)
                if (mask >> l & 1) warp.pc[l] = u32(at.operand[1 + std::min(index[l], u32(at.count - 2))].offset);
            regroup = true;
        } else if (at.flow == Flow::kExit) {
            leave(group.mask & ~mask, next);
            warp.live &= ~mask;
            if (!warp.live) {
                warp.state = Warp::kDone;
                return;
            }
            regroup = true;
        } else if (mask) {
            leave(group.mask, next);
            if (barrier(warp, at, mask)) return;
            regroup = true;
        }
        if (!regroup && next >= group.meets) {
            leave(group.mask, next);
            regroup = true;
        }
        if (regroup)
            group = group_of(warp);
        else
            group.pc = next;
    }
    leave(group.mask, group.pc);
}

// bar.sync a[, b], bar.arrive a, b. arg: 1 where it only arrives. True when the warp has to wait.
bool BlockRun::barrier(Warp& warp, const Instruction& at, u32 mask) {
    const int first = std::countr_zero(mask);
    const u32 id = warp.lanes<u32>(at.operand[0])[first];
    const u32 all = launch_.threads[0] * launch_.threads[1] * launch_.threads[2];
    const u32 expected = at.count > 1 ? warp.lanes<u32>(at.operand[1])[first] : (all + 31) / 32 * 32;
    char text[160];
    if (mask != warp.live) {
        std::snprintf(text, sizeof text, "barrier reached by lanes %08x of %08x", mask, warp.live);
        trap(warp, at, Kind::kDivergence, -1, text);
    }
    if (warp.live != warp.started)
        report(warp, at, Kind::kBarrier, -1, "barrier reached after lanes %08x have exited", warp.started & ~warp.live);
    if (id > 15 || expected % 32 || expected == 0) {
        std::snprintf(text, sizeof text, "expected a barrier 0 to 15 and a multiple of 32 threads, got %u and %u", id,
                      expected);
        trap(warp, at, Kind::kBarrier, -1, text);
    }
    Barrier& barrier = barriers_[id];
    if (barrier.arrived && barrier.expected != expected)
        trap(warp, at, Kind::kBarrier, -1, "warps expect different numbers of threads at one barrier");
    if (at.count == 1 && barrier.arrived && barrier.line != at.line)
        report(warp, at, Kind::kBarrier, -1, "warps meet at different barriers: others wait at PTX line %d",
               barrier.line);
    barrier.expected = expected;
    barrier.line = at.line;
    barrier.arrived += kLanes;
    SharedShadow& shadow = block_.shadow;
    shadow.tick(warp.index);
    for (int w = 0; w < kMaxWarps; ++w)
        barrier.known.seen[w] = std::max(barrier.known.seen[w], shadow.clock(warp.index).seen[w]);
    if (!at.arg[0]) {
        warp.state = Warp::kWaiting;
        warp.waits_at = at.index;
        barrier.waiting.push_back(&warp);
    }
    if (barrier.arrived == expected) release(barrier);
    return !at.arg[0];
}

void BlockRun::release(Barrier& barrier) {
    for (Warp* warp : barrier.waiting) {
        warp->state = Warp::kReady;
        for (int w = 0; w < kMaxWarps; ++w) {
            u32& seen = block_.shadow.clock(warp->index).seen[w];
            seen = std::max(seen, barrier.known.seen[w]);
        }
    }
    barrier = {};
}

}  // namespace

void run_launch(Launch& launch) {
    const u64 blocks = u64(launch.grid[0]) * launch.grid[1] * launch.grid[2];
    std::vector<u64> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    if (launch.options.schedule == i32(Order::kReversed)) std::reverse(order.begin(), order.end());
    if (launch.options.schedule == i32(Order::kRandom))
        for (u64 k = blocks; k > 1; --k) std::swap(order[k - 1], order[launch.draw() % k]);
    try {
        for (const u64 number : order) BlockRun(launch, number).run();
    } catch (const Trap&) {  // recorded as a finding
    }
}

}  // namespace ptxsim
