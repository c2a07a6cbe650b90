// Parts of the binding that live in files of their own; bindings.cpp calls them.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/kernels/gemm.h"

namespace cfrt {

// "fp32", "bf16" or "int8"; an Error for another name.
Precision precision_of(const std::string& name);

void bind_kernels(pybind11::module_& parent);
void bind_attention(pybind11::module_& kernels);
void bind_cuda(pybind11::module_& cuda);
void bind_cuda_ring(pybind11::module_& cuda);
void bind_autoencoder(pybind11::module_& kernels);
void bind_engine(pybind11::module_& parent);  // after bind_kernels, which binds Threads

}  // namespace cfrt
