/* Numbers to 8 bits, as a C interface: device pointers and a stream. No allocation, no synchronisation. Each returns a
 * cudaError_t: cudaErrorInvalidValue for sizes that do not fit, cudaErrorMisalignedAddress where a pointer or stride is
 * no multiple of 16 bytes. Queries and keys of attention.h are quantised where they are made (append.h). */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The rows of an activation: out[r][c] = x[r][c] / scale[r] to nearest even, scale[r] = max |x[r]| / 127. x is bf16
 * [rows][width], rows `stride` elements apart; out int8 [rows][width]; width a multiple of 16. One scale a row, so that
 * it does not matter which rows are computed together. A row of zeros has a small positive scale. */
int cfrt_quantise_rows(int8_t* out, float* scale, const void* x, int64_t rows, int64_t width, int64_t stride,
                       void* stream);

/* Calibrates the scales of V in a ring of e4m3: scale[c] = max(scale[c], max |v[.][c]| / limit), at least a small
 * positive number. v is bf16 [rows][width], width = heads * dim a multiple of 64; scale fp32 [width], zeroed before the
 * first of the calls whose values it shall hold. `limit` is what the largest value becomes: 448 with fp32 sums,
 * CFRT_FP16_LIMIT with fp16 ones. Values that are larger later on are cut (append.h), so leave some headroom in it. */
int cfrt_value_scales(float* scale, const void* v, int64_t rows, int64_t width, int64_t stride, float limit,
                      void* stream);

#ifdef __cplusplus
}
#endif
