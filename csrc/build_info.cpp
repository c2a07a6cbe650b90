#include "build_info.h"

#include <sstream>

namespace cfrt {

std::string compiler() {
#if defined(__clang__)
    return "clang++ " __clang_version__;
#elif defined(__GNUC__)
    return "g++ " __VERSION__;
#else
    return "unknown compiler";
#endif
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    // __builtin_cpu_supports takes a literal, hence the macro. It also asks whether the system saves the registers.
#define CFRT_ISA(name) \
    if (__builtin_cpu_supports(name)) found.emplace_back(name)
    CFRT_ISA("avx2");
    CFRT_ISA("fma");
    CFRT_ISA("avx512f");
    CFRT_ISA("avx512bw");
    CFRT_ISA("avx512vl");
    CFRT_ISA("avx512vnni");
    CFRT_ISA("avx512bf16");
#undef CFRT_ISA
#elif defined(__aarch64__)
    found.emplace_back("neon");
#endif
    return found;
}

std::string cuda_version() {
    return CFRT_CUDA_VERSION;
}

std::vector<int> cuda_architectures() {
    std::vector<int> archs;
    std::istringstream list(CFRT_CUDA_ARCHS);
    for (std::string arch; std::getline(list, arch, ',');) archs.push_back(std::stoi(arch));
    return archs;
}

}  // namespace cfrt
