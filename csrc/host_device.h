// The one macro that lets a header serve both compilers: nvcc (host and device) and any C++20 compiler (host only).
#pragma once

#ifdef __CUDACC__
#define CFRT_HD __host__ __device__ __forceinline__
#else
#define CFRT_HD inline
#endif
