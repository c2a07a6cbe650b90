// Memory as a kernel sees it: spaces, bounds, alignment, and what the shadows say. Where an access is refused, the
// finding is recorded, a load gives poison (all ones) and a store is dropped.
#pragma once

#include "machine.h"

namespace ptxsim {

enum class Access { kRead, kWrite, kAtomic, kAsyncWrite };

inline u64 address_of(Warp& warp, const Operand& o, int lane) {
    const u64 base = o.width == 8 ? warp.lanes<u64>(o)[lane] : warp.lanes<u32>(o)[lane];
    return base + u64(o.offset);
}

// The bytes behind an address, or null when the access is refused.
u8* shared_at(Warp& warp, const Instruction& at, int lane, u64 address, int bytes, Access access);
u8* global_at(Warp& warp, const Instruction& at, int lane, u64 address, int bytes, Access access);

// Shared memory has 32 banks of 4 bytes. A wavefront serves one word of each bank; 8-byte accesses go half a warp at a
// time, 16-byte accesses a quarter, and that many wavefronts are ideal.
void count_wavefronts(Warp& warp, const Instruction& at, const u64* address, u32 mask, int bytes);

// Global memory moves in sectors of 32 bytes; the bytes asked for, each once, over 32 is ideal.
void count_sectors(Warp& warp, const Instruction& at, const u64* address, u32 mask, int bytes);

}  // namespace ptxsim
