#include "isa.h"

#include <algorithm>
#include <cstdlib>

#include "../check.h"

namespace cfrt {
namespace {

constexpr const char* kNames[] = {"plain", "avx2", "avx512", "avx512bf16"};

template <class Range, class Name>
std::string listed(const Range& range, Name name) {
    std::string list;
    for (const auto& item : range) list.append(list.empty() ? "" : ", ").append(name(item));
    return list;
}

}  // namespace

const char* isa_name(Isa isa) {
    return kNames[static_cast<int>(isa)];
}

std::vector<Isa> supported_isas() {
    std::vector<Isa> found{Isa::plain};
#ifdef CFRT_X86_LEVELS
    __builtin_cpu_init();
    // __builtin_cpu_supports also asks whether the system saves the registers.
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return found;
    found.push_back(Isa::avx2);
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl")))
        return found;
    found.push_back(Isa::avx512);
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) found.push_back(Isa::avx512bf16);
#endif
    return found;
}

Isa best_isa() {
    return supported_isas().back();
}

Isa find_isa(const std::optional<std::string>& name) {
    const char* forced = std::getenv("CFRT_ISA");
    if (!name && (!forced || !*forced)) return best_isa();
    const std::string wanted = name ? *name : forced;
    const std::string source = name ? "isa" : "the environment variable CFRT_ISA";
    const auto level = std::find(std::begin(kNames), std::end(kNames), wanted);
    check(level != std::end(kNames), "expected ", source, " to be one of ",
          listed(kNames, [](const char* text) { return text; }), ", got '", wanted, "'");
    const Isa isa = static_cast<Isa>(level - std::begin(kNames));
    const std::vector<Isa> has = supported_isas();
    check(std::find(has.begin(), has.end(), isa) != has.end(), "expected ", source,
          " to be a level that this CPU has (", listed(has, isa_name), "), got ", wanted);
    return isa;
}

}  // namespace cfrt
