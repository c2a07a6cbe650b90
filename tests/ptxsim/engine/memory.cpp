#include "memory.h"

#include <algorithm>
#include <bit>
#include <cinttypes>
#include <cmath>
#include <cstdio>

#include "floats.h"
#include "lanes.h"

namespace ptxsim {
namespace {

enum Space { kGeneric, kGlobal, kShared, kParam, kLocal };

const char* name_of(Access access) {
    return access == Access::kRead     ? "read"
           : access == Access::kAtomic ? "atomic"
           : access == Access::kWrite  ? "write"
                                       : "cp.async write";
}

void report_hazard(Warp& warp, const Instruction& at, int lane, const char* space, u64 address, Access access,
                   Verdict verdict) {
    char other[60];
    if (verdict.other == GlobalShadow::kOtherBlock)
        std::snprintf(other, sizeof other, "another block");
    else
        std::snprintf(other, sizeof other, "thread %d", verdict.other);
    switch (verdict.hazard) {
        case Hazard::kNone:
            return;
        case Hazard::kUninitialised:
            return report(warp, at, Kind::kUninitialised, lane, "%s of %s 0x%" PRIx64 ", which nothing has written",
                          name_of(access), space, address);
        case Hazard::kInFlight:
            return report(warp, at, Kind::kRace, lane, "%s of %s 0x%" PRIx64 " while a cp.async of %s is in flight",
                          name_of(access), space, address, other);
        case Hazard::kWrite:
        case Hazard::kRead:
            return report(warp, at, Kind::kRace, lane,
                          "%s of %s 0x%" PRIx64 ", which %s has %s with no barrier between", name_of(access), space,
                          address, other, verdict.hazard == Hazard::kWrite ? "written" : "read");
    }
}

bool aligned(Warp& warp, const Instruction& at, int lane, const char* space, u64 address, int bytes) {
    if (address % u64(bytes) == 0) return true;
    report(warp, at, Kind::kAlignment, lane, "%s 0x%" PRIx64 " is not a multiple of %d", space, address, bytes);
    return false;
}

}  // namespace

u8* shared_at(Warp& warp, const Instruction& at, int lane, u64 address, int bytes, Access access) {
    Block& block = *warp.block;
    if (address >= kSharedWindow) address -= kSharedWindow;
    if (!aligned(warp, at, lane, "shared", address, bytes)) return nullptr;
    if (address + u64(bytes) > block.shared.size()) {
        report(warp, at, Kind::kBounds, lane, "%s of %d bytes at shared 0x%" PRIx64 ", of %zu bytes", name_of(access),
               bytes, address, block.shared.size());
        return nullptr;
    }
    if (block.launch->options.races) {
        const u32 a = u32(address), n = u32(bytes);
        const int thread = warp.thread(lane);
        SharedShadow& shadow = block.shadow;
        const Verdict verdict = access == Access::kRead         ? shadow.read(a, n, thread)
                                : access == Access::kAsyncWrite ? shadow.issue(a, n, thread)
                                                                : shadow.write(a, n, thread, access == Access::kAtomic);
        report_hazard(warp, at, lane, "shared", address, access, verdict);
    }
    return block.shared.data() + address;
}

u8* global_at(Warp& warp, const Instruction& at, int lane, u64 address, int bytes, Access access) {
    Launch& launch = *warp.block->launch;
    auto& buffers = launch.buffers;
    auto after =
        std::upper_bound(buffers.begin(), buffers.end(), address, [](u64 a, const Buffer& b) { return a < b.address; });
    if (after == buffers.begin() || address + u64(bytes) > std::prev(after)->address + std::prev(after)->bytes) {
        char where[80] = "before the first buffer";
        if (after != buffers.begin()) {
            const Buffer& b = *std::prev(after);
            std::snprintf(where, sizeof where, "%" PRId64 " bytes from the end of a buffer of %" PRIu64 " bytes",
                          i64(address - b.address - b.bytes), b.bytes);
        }
        report(warp, at, Kind::kBounds, lane, "%s of %d bytes at global 0x%" PRIx64 ", %s", name_of(access), bytes,
               address, where);
        return nullptr;
    }
    if (!aligned(warp, at, lane, "global", address, bytes)) return nullptr;
    const Buffer& buffer = *std::prev(after);
    if (launch.options.races) {
        const auto which = std::size_t(std::prev(after) - buffers.begin());
        const Block& block = *warp.block;
        const Clock& clock = warp.block->shadow.clock(warp.index);
        const Verdict verdict =
            access == Access::kRead
                ? launch.global_shadow.read(which, address, u32(bytes), block.number, warp.thread(lane), clock)
                : launch.global_shadow.write(which, address, u32(bytes), block.number, warp.thread(lane), clock,
                                             access == Access::kAtomic);
        report_hazard(warp, at, lane, "global", address, access, verdict);
    }
    if (buffer.written) {
        u8* written = buffer.written + (address - buffer.address);
        if (access != Access::kWrite && std::memchr(written, 0, std::size_t(bytes)))
            report_hazard(warp, at, lane, "global", address, access, {Hazard::kUninitialised, -1});
        if (access != Access::kRead) std::memset(written, 1, std::size_t(bytes));
    }
    return reinterpret_cast<u8*>(address);
}

void count_wavefronts(Warp& warp, const Instruction& at, const u64* address, u32 mask, int bytes) {
    Counters& count = warp.block->launch->counters[std::size_t(at.index)];
    const int lanes = bytes == 16 ? 8 : bytes == 8 ? 16 : 32, words = std::max(1, bytes / 4);
    for (int first = 0; first < kLanes; first += lanes) {
        u64 in_bank[32][kLanes];  // the distinct words of each bank
        int distinct[32] = {}, worst = 0;
        for (int l = first; l < first + lanes; ++l) {
            if (!(mask >> l & 1)) continue;
            for (int k = 0; k < words; ++k) {
                const u64 word = address[l] / 4 + u64(k), bank = word % 32;
                u64* known = in_bank[bank];
                if (std::find(known, known + distinct[bank], word) != known + distinct[bank]) continue;
                known[distinct[bank]++] = word;
                worst = std::max(worst, distinct[bank]);
            }
        }
        count.wavefronts += u64(worst);
        count.ideal_wavefronts += worst > 0;
    }
}

void count_sectors(Warp& warp, const Instruction& at, const u64* address, u32 mask, int bytes) {
    Counters& count = warp.block->launch->counters[std::size_t(at.index)];
    u64 starts[kLanes], sectors[2 * kLanes];
    int lanes = 0, n = 0;
    for (int l = 0; l < kLanes; ++l) {
        if (!(mask >> l & 1)) continue;
        starts[lanes++] = address[l];
        sectors[n++] = address[l] / 32;
        sectors[n++] = (address[l] + u64(bytes) - 1) / 32;
    }
    std::sort(sectors, sectors + n);
    std::sort(starts, starts + lanes);
    const auto distinct = std::unique(starts, starts + lanes) - starts;
    count.sectors += u64(std::unique(sectors, sectors + n) - sectors);
    count.ideal_sectors += u64(distinct * bytes + 31) / 32;
}

namespace {

// One lane's access in a space that the opcode, or a generic address, names.
struct Place {
    u8* bytes;
    Space space;
};

Place place_of(Warp& warp, const Instruction& at, Space space, int lane, u64 address, int bytes, Access access) {
    if (space == kGeneric) {
        space = address < kParamWindow    ? kGlobal
                : address < kLocalWindow  ? kParam
                : address < kSharedWindow ? kLocal
                                          : kShared;
    }
    Launch& launch = *warp.block->launch;
    if (space == kGlobal) return {global_at(warp, at, lane, address, bytes, access), space};
    if (space == kShared) return {shared_at(warp, at, lane, address, bytes, access), space};
    const bool local = space == kLocal;
    if (address >= kParamWindow) address -= local ? kLocalWindow : kParamWindow;
    const std::size_t size = local ? launch.program->local : launch.parameters.size();
    const char* name = local ? "local" : "param";
    if (address + u64(bytes) > size) {
        report(warp, at, Kind::kBounds, lane, "%s of %d bytes at %s 0x%" PRIx64 ", of %zu bytes", name_of(access),
               bytes, name, address, size);
        return {nullptr, space};
    }
    if (!aligned(warp, at, lane, name, address, bytes)) return {nullptr, space};
    if (local) return {warp.block->local.data() + std::size_t(warp.thread(lane)) * size + address, space};
    return {launch.parameters.data() + address, space};
}

void count_access(Warp& warp, const Instruction& at, const u64* address, const u32* in_space, int bytes) {
    if (in_space[kShared]) count_wavefronts(warp, at, address, in_space[kShared], bytes);
    if (in_space[kGlobal]) count_sectors(warp, at, address, in_space[kGlobal], bytes);
}

// arg of ld and st: space, bytes of an element, signed, elements. Operands: of ld the elements and the address, of st
// the address and the elements.
void load(Warp& warp, const Instruction& at, u32 mask) {
    const auto space = Space(at.arg[0]);
    const int size = at.arg[1], elements = at.arg[3], bytes = size * elements;
    u64 address[kLanes];
    u32 in_space[5] = {};
    for_lanes(mask, [&](int l) {
        address[l] = address_of(warp, at.operand[elements], l);
        const Place place = place_of(warp, at, space, l, address[l], bytes, Access::kRead);
        if (place.bytes) in_space[place.space] |= 1u << l;
        for (int k = 0; k < elements; ++k) {
            const Operand& d = at.operand[k];
            u64 value = ~u64(0) >> (64 - 8 * size);
            if (place.bytes) std::memcpy(&value, place.bytes + k * size, std::size_t(size));
            const int unused = 64 - 8 * size;
            if (at.arg[2]) value = u64(i64(value << unused) >> unused);
            if (d.slot < 0) continue;
            if (d.width == 8)
                warp.lanes<u64>(d)[l] = value;
            else
                warp.lanes<u32>(d)[l] = u32(value);
        }
    });
    count_access(warp, at, address, in_space, bytes);
}

void store(Warp& warp, const Instruction& at, u32 mask) {
    const auto space = Space(at.arg[0]);
    const int size = at.arg[1], elements = at.arg[3], bytes = size * elements;
    u64 address[kLanes];
    u32 in_space[5] = {};
    for_lanes(mask, [&](int l) {
        address[l] = address_of(warp, at.operand[0], l);
        const Place place = place_of(warp, at, space, l, address[l], bytes, Access::kWrite);
        if (!place.bytes) return;
        in_space[place.space] |= 1u << l;
        for (int k = 0; k < elements; ++k) {
            const Operand& s = at.operand[1 + k];
            const u64 value = s.width == 8 ? warp.lanes<u64>(s)[l] : warp.lanes<u32>(s)[l];
            std::memcpy(place.bytes + k * size, &value, std::size_t(size));
        }
    });
    count_access(warp, at, address, in_space, bytes);
}

// ------------------------------------------------------------------------------------------------------------- atomics

// atom d, [a], b[, c] and red [a], b. arg: space, results (1 or 0). Lanes go one after another.
template <class T, class F>
void atomic(Warp& warp, const Instruction& at, u32 mask) {
    const int first = at.arg[1];
    u64 address[kLanes];
    u32 in_space[5] = {};
    for_lanes(mask, [&](int l) {
        address[l] = address_of(warp, at.operand[first], l);
        const Place place = place_of(warp, at, Space(at.arg[0]), l, address[l], sizeof(T), Access::kAtomic);
        if (!place.bytes) return;
        in_space[place.space] |= 1u << l;
        T old;
        std::memcpy(&old, place.bytes, sizeof old);
        const T b = warp.lanes<T>(at.operand[first + 1])[l];
        const T c = at.count > first + 2 ? warp.lanes<T>(at.operand[first + 2])[l] : T{};
        const T now = F{}(old, b, c);
        std::memcpy(place.bytes, &now, sizeof now);
        if (first && at.operand[0].slot >= 0) warp.lanes<T>(at.operand[0])[l] = old;
    });
    count_access(warp, at, address, in_space, sizeof(T));
}

template <class T, class F>
void define_atomic(const std::string& name, F) {
    handlers()["atom." + name].run = atomic<T, F>;
}

template <class T>
void integer_atomics(const std::string& type) {
    if constexpr (sizeof(T) == 4 || std::is_unsigned_v<T>)
        define_atomic<T>("add." + type, [](T a, T b, T) { return T(u64(a) + u64(b)); });
    define_atomic<T>("min." + type, [](T a, T b, T) { return std::min(a, b); });
    define_atomic<T>("max." + type, [](T a, T b, T) { return std::max(a, b); });
    if constexpr (std::is_unsigned_v<T>) {
        const std::string bits = "b" + type.substr(1);
        define_atomic<T>("and." + bits, [](T a, T b, T) { return a & b; });
        define_atomic<T>("or." + bits, [](T a, T b, T) { return a | b; });
        define_atomic<T>("xor." + bits, [](T a, T b, T) { return a ^ b; });
        define_atomic<T>("exch." + bits, [](T, T b, T) { return b; });
        define_atomic<T>("cas." + bits, [](T a, T b, T c) { return a == b ? c : a; });
    }
}

// ------------------------------------------------------------------------------------------------------------ cp.async

void finish(Block& block, AsyncCopy& copy) {
    if (copy.done) return;
    std::memcpy(block.shared.data() + copy.to, copy.from, std::size_t(copy.valid));
    std::memset(block.shared.data() + copy.to + copy.valid, 0, std::size_t(copy.bytes - copy.valid));
    copy.done = true;
}

// cp.async [to], [from], bytes[, valid]: the first `valid` bytes are copied, the rest is zero. arg: whether valid is
// there.
void copy_async(Warp& warp, const Instruction& at, u32 mask) {
    Block& block = *warp.block;
    Launch& launch = *block.launch;
    const int bytes = i32(warp.lanes<u32>(at.operand[2])[0]);
    u64 to[kLanes], from[kLanes];
    u32 read = 0, written = 0;
    for_lanes(mask, [&](int l) {
        to[l] = address_of(warp, at.operand[0], l);
        from[l] = address_of(warp, at.operand[1], l);
        int valid = at.arg[0] ? i32(warp.lanes<u32>(at.operand[3])[l]) : bytes;
        if (valid < 0 || valid > bytes) {
            report(warp, at, Kind::kBounds, l, "cp.async of %d of %d bytes", valid, bytes);
            valid = 0;
        }
        if (!aligned(warp, at, l, "global", from[l], bytes)) valid = 0;
        const u8* source =
            valid ? global_at(warp, at, l, from[l], valid == bytes ? bytes : std::bit_floor(u32(valid)), Access::kRead)
                  : nullptr;
        if (valid && valid < bytes && !global_at(warp, at, l, from[l] + u64(valid) - 1, 1, Access::kRead))
            source = nullptr;
        if (!source) valid = 0;
        u8* bytes_to = shared_at(warp, at, l, to[l], bytes, Access::kAsyncWrite);
        if (!bytes_to) return;
        written |= 1u << l;
        if (valid) read |= 1u << l;
        AsyncCopy copy{u32(bytes_to - block.shared.data()), source, bytes, valid, warp.group[l], false};
        const auto policy = Async(launch.options.async);
        if (policy == Async::kEager || (policy == Async::kMixed && launch.draw() >> 40 & 1))
            finish(block, copy);
        else
            std::memset(bytes_to, 0xff, std::size_t(bytes));
        warp.copies[l].push_back(copy);
    });
    if (written) count_wavefronts(warp, at, to, written, bytes);
    if (read) count_sectors(warp, at, from, read, bytes);
}

void commit_group(Warp& warp, const Instruction&, u32 mask) {
    for_lanes(mask, [&](int l) { warp.group[l]++; });
}

// arg[0]: the groups that may stay in flight; -1 for wait_all, which also waits for what is not committed.
void wait_group(Warp& warp, const Instruction& at, u32 mask) {
    Block& block = *warp.block;
    for_lanes(mask, [&](int l) {
        if (at.arg[0] < 0) warp.group[l]++;
        const int first_kept = warp.group[l] - std::max(at.arg[0], 0);
        std::erase_if(warp.copies[l], [&](AsyncCopy& copy) {
            if (copy.group >= first_kept) return false;
            finish(block, copy);
            if (block.launch->options.races) block.shadow.complete(copy.to, u32(copy.bytes), warp.thread(l));
            return true;
        });
    });
}

// cvta: arg[0] is what a generic address adds to this space's, arg[1] whether to take it off.
void convert_address(Warp& warp, const Instruction& at, u32 mask) {
    const u64 window = at.arg[0] == kShared  ? kSharedWindow
                       : at.arg[0] == kLocal ? kLocalWindow
                       : at.arg[0] == kParam ? kParamWindow
                                             : 0;
    u64* d = warp.lanes<u64>(at.operand[0]);
    const u64* s = warp.lanes<u64>(at.operand[1]);
    for_lanes(mask, [&](int l) { d[l] = at.arg[1] ? s[l] - window : s[l] + window; });
}

}  // namespace

void register_memory() {
    auto& table = handlers();
    table["ld"].run = load;
    table["st"].run = store;
    integer_atomics<u32>("u32"), integer_atomics<i32>("s32");
    integer_atomics<u64>("u64"), integer_atomics<i64>("s64");
    define_atomic<float>("add.f32", [](float a, float b, float) { return a + b; });
    define_atomic<double>("add.f64", [](double a, double b, double) { return a + b; });
    table["cp.async"].run = copy_async;
    table["cp.async.commit_group"].run = commit_group;
    table["cp.async.wait_group"].run = wait_group;
    table["cvta"].run = convert_address;
}

}  // namespace ptxsim
