// Instruction set levels. One binary holds the kernels once per level; the CPU, or the user, picks at run time.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace cfrt {

// In rising order. A CPU that has one has all below it.
enum class Isa {
    plain,       // C++ alone, four lanes: any CPU
    avx2,        // AVX2 and FMA, eight lanes
    avx512,      // AVX-512 F, BW and VL, sixteen lanes
    avx512bf16,  // with the dot products of BF16 and VNNI
};

// "plain", "avx2", "avx512", "avx512bf16".
const char* isa_name(Isa isa);

// The levels that this build holds and this CPU, with its operating system, can run; plain is always first.
std::vector<Isa> supported_isas();

// The highest of them.
Isa best_isa();

// The level of that name; an error in words where the name is unknown or the CPU lacks it. Without a name, the
// environment variable CFRT_ISA gives it, and without that it is best_isa().
Isa find_isa(const std::optional<std::string>& name = std::nullopt);

}  // namespace cfrt
