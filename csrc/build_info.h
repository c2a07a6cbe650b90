// What this module was built with, and what the machine it runs on can do. Facts only; choosing is the engines'
// business.
#pragma once

#include <string>
#include <vector>

namespace cfrt {

// Name and version of the compiler, e.g. "g++ 12.2.0".
std::string compiler();

// Instruction set extensions that our code may dispatch on and that the CPU and the operating system support now.
std::vector<std::string> instruction_sets();

// CUDA toolkit that compiled the kernels, e.g. "13.0.88"; empty when the module is CPU-only.
std::string cuda_version();

// Compute capabilities that the kernels hold machine code for, e.g. {80, 86, 89}; empty when CPU-only.
std::vector<int> cuda_architectures();

}  // namespace cfrt
