/* Re-noise on the GPU, as a C interface: device pointers, a count and a stream. No allocation, no synchronisation. */
#pragma once

#include <stdint.h>

#include "pass.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { CFRT_FLOAT32 = 0, CFRT_FLOAT16 = 1, CFRT_BFLOAT16 = 2 } cfrt_dtype;

/* out[i] = (1 - s) x0[i] + s e[i] for i < count, computed in fp32 and rounded once to dtype. e is the noise that
 * (seed, unit, step, purpose) name (cfrt/noise.py); seed and unit are those of `pass`, a record in device memory
 * (pass.h), where that is not NULL. out may be x0. Both are contiguous device arrays of dtype, stream
 * is a cudaStream_t or NULL. Returns a cudaError_t: 0 when the work was put on the stream. */
int cfrt_renoise(void* out, const void* x0, int64_t count, cfrt_dtype dtype, double s, uint64_t seed, uint32_t unit,
                 uint32_t step, uint32_t purpose, const cfrt_pass* pass, void* stream);

/* What a cudaError_t means, in CUDA's words. */
const char* cfrt_cuda_error(int code);

#ifdef __cplusplus
}
#endif
