// What lanes do together without memory: shuffles, votes, warp barriers; and the instructions that the schedule acts
// on.
#include <bit>

#include "lanes.h"

namespace ptxsim {
namespace {

// The lanes that the member mask names must be here, all of them.
void members_here(Warp& warp, const Instruction& at, u32 mask, u32 members, const char* what) {
    if ((members & warp.started) == mask) return;
    char text[160];
    std::snprintf(text, sizeof text, "%s with member mask %08x, but the lanes here are %08x", what, members, mask);
    trap(warp, at, Kind::kDivergence, -1, text);
}

enum { kUp, kDown, kButterfly, kIndex };

// shfl.sync d[|p], a, b, c, members (PTX ISA 9.7.9.6). arg: mode, results.
void shuffle(Warp& warp, const Instruction& at, u32 mask) {
    const int results = at.arg[1];
    const Operand* in = at.operand + results;
    members_here(warp, at, mask, warp.lanes<u32>(in[3])[std::countr_zero(mask)], "shfl.sync");
    u32 source[kLanes];
    std::memcpy(source, warp.lanes<u32>(in[0]), sizeof source);
    u32* d = at.operand[0].slot >= 0 ? warp.lanes<u32>(at.operand[0]) : nullptr;
    u32* p = results == 2 && at.operand[1].slot >= 0 ? warp.lanes<u32>(at.operand[1]) : nullptr;
    const u32 *b = warp.lanes<u32>(in[1]), *c = warp.lanes<u32>(in[2]);
    for_lanes(mask, [&](int l) {
        const int segment = c[l] >> 8 & 31, clamp = c[l] & 31, by = b[l] & 31;
        const int low = l & segment, high = low | (clamp & ~segment);
        int from = l;
        bool inside = false;
        switch (at.arg[0]) {
            case kUp:
                from = l - by, inside = from >= high;
                break;
            case kDown:
                from = l + by, inside = from <= high;
                break;
            case kButterfly:
                from = l ^ by, inside = from <= high;
                break;
            default:
                from = low | (by & ~segment), inside = from <= high;
        }
        if (!inside) from = l;
        if (!(mask >> from & 1))
            report(warp, at, Kind::kDivergence, l, "shfl.sync reads lane %d, which does not take part", from);
        if (d) d[l] = source[from];
        if (p) p[l] = inside;
    });
}

enum { kBallot, kAny, kAll, kUniform };

// vote.sync d, p, members. arg: mode, negated source.
void vote(Warp& warp, const Instruction& at, u32 mask) {
    members_here(warp, at, mask, warp.lanes<u32>(at.operand[2])[std::countr_zero(mask)], "vote.sync");
    const u32* p = warp.lanes<u32>(at.operand[1]);
    u32 yes = 0;
    for_lanes(mask, [&](int l) { yes |= u32((p[l] != 0) != bool(at.arg[1])) << l; });
    const u32 result = at.arg[0] == kBallot ? yes
                       : at.arg[0] == kAny  ? yes != 0
                       : at.arg[0] == kAll  ? yes == mask
                                            : yes == mask || !yes;
    u32* d = warp.lanes<u32>(at.operand[0]);
    for_lanes(mask, [&](int l) { d[l] = result; });
}

// redux.sync d, a, members.
template <class T, class F>
void reduce(Warp& warp, const Instruction& at, u32 mask) {
    members_here(warp, at, mask, warp.lanes<u32>(at.operand[2])[std::countr_zero(mask)], "redux.sync");
    const T* a = warp.lanes<T>(at.operand[1]);
    T result = a[std::countr_zero(mask)];
    for (int l = std::countr_zero(mask) + 1; l < kLanes; ++l)
        if (mask >> l & 1) result = F{}(result, a[l]);
    T* d = warp.lanes<T>(at.operand[0]);
    for_lanes(mask, [&](int l) { d[l] = result; });
}

template <class T, class F>
void define_reduction(const std::string& name, F) {
    handlers()["redux.sync." + name].run = reduce<T, F>;
}

void warp_barrier(Warp& warp, const Instruction& at, u32 mask) {
    members_here(warp, at, mask, warp.lanes<u32>(at.operand[0])[std::countr_zero(mask)], "bar.warp.sync");
    if (mask == warp.started) warp.block->shadow.tick(warp.index);  // of fewer lanes: taken as ordering nothing
}

void active_mask(Warp& warp, const Instruction& at, u32 mask) {
    u32* d = warp.lanes<u32>(at.operand[0]);
    for_lanes(mask, [&](int l) { d[l] = mask; });
}

void nothing(Warp&, const Instruction&, u32) {}

void trapped(Warp& warp, const Instruction& at, u32 mask) {
    trap(warp, at, Kind::kBounds, std::countr_zero(mask), "the kernel executed trap");
}

}  // namespace

void register_control() {
    auto& table = handlers();
    table["shfl.sync"].run = shuffle;
    table["vote.sync"].run = vote;
    define_reduction<i32>("add.s32", [](i32 a, i32 b) { return i32(u32(a) + u32(b)); });
    define_reduction<u32>("add.u32", [](u32 a, u32 b) { return a + b; });
    define_reduction<i32>("min.s32", [](i32 a, i32 b) { return std::min(a, b); });
    define_reduction<i32>("max.s32", [](i32 a, i32 b) { return std::max(a, b); });
    define_reduction<u32>("min.u32", [](u32 a, u32 b) { return std::min(a, b); });
    define_reduction<u32>("max.u32", [](u32 a, u32 b) { return std::max(a, b); });
    define_reduction<u32>("and.b32", [](u32 a, u32 b) { return a & b; });
    define_reduction<u32>("or.b32", [](u32 a, u32 b) { return a | b; });
    define_reduction<u32>("xor.b32", [](u32 a, u32 b) { return a ^ b; });
    table["bar.warp.sync"].run = warp_barrier;
    table["activemask.b32"].run = active_mask;
    table["nop"].run = nothing;
    table["trap"].run = trapped;
    table["bra"] = {nothing, Flow::kBranch};
    table["brx.idx"] = {nothing, Flow::kIndexedBranch};
    table["ret"] = {nothing, Flow::kExit};
    table["bar"] = {nothing, Flow::kBarrier};
}

}  // namespace ptxsim
