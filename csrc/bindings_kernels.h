// Parts of the binding that live in files of their own; bindings.cpp calls them.
#pragma once

#include <pybind11/pybind11.h>

namespace cfrt {

void bind_kernels(pybind11::module_& parent);
void bind_attention(pybind11::module_& kernels);
void bind_autoencoder(pybind11::module_& kernels);
void bind_engine(pybind11::module_& parent);  // after bind_kernels, which binds Threads

}  // namespace cfrt
