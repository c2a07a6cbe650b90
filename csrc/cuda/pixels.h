/* The last step of a decoder: planes of numbers to interleaved bytes. */
#pragma once

#include <stdint.h>

#include "renoise.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out[f][p][c] = x[f][c][p] * gain + offset, cut to [0, 1], in 255 steps to nearest even: x [frames][3][plane] of
 * dtype, out uint8 [frames][plane][3]. A NaN becomes 0. Returns a cudaError_t. */
int cfrt_pixels(uint8_t* out, const void* x, cfrt_dtype dtype, int64_t frames, int64_t plane, float gain, float offset,
                void* stream);

#ifdef __cplusplus
}
#endif
