// Attention on a pool of threads, and the checks that the kernels leave out.
#pragma once

#include <cstddef>

#include "kernels.h"
#include "threads.h"

namespace cfrt {

// Refuses a call that does not fit together. `queries` of it are not looked at: they may not exist yet.
void check_attention(const Attention& call);

// Bytes of scratch, aligned to 64, that `attend` needs with `threads` threads.
std::size_t attention_scratch(const Kernels& kernels, const Attention& call, int threads);

// On all threads where that is worth it. The bytes of the result do not depend on the number of threads.
void attend(const Kernels& kernels, Threads& threads, const Attention& call, void* scratch);

}  // namespace cfrt
