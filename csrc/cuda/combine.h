/* Arithmetic on latents between two passes, as a C interface: device pointers, a count and a stream. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* out[i] = a x[i] + b y[i] for i < count, fp32, each product and the sum rounded once. out may be x or y. Returns a
 * cudaError_t: cudaErrorMisalignedAddress where an array does not start on 16 bytes. */
int cfrt_combine(float* out, const float* x, float a, const float* y, float b, int64_t count, void* stream);

#ifdef __cplusplus
}
#endif
