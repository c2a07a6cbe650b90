// The calls of `_cfrt.cuda` in a module whose CUDA runtime is ptxsim's (tests/simulated_cuda.py).

#include <pybind11/pybind11.h>

#include "bindings_kernels.h"

PYBIND11_MODULE(_cfrt_simulated, m) {
    cfrt::bind_cuda(m);
}
