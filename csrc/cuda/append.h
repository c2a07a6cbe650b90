/* From the rows of the q, k and v projections to rotated queries and a longer ring, as a C interface. RMS norm over the
 * full width (Wan2.1), rotation in three axes, and the write into the ring's granules (attention.h), fused.
 *
 * Angles are computed, and never large: cfrt_turns gives each pair's turn per step of position as a fraction of a whole
 * turn in units of 2^-64, so that position * turn, modulo 2^64, is the phase, for any position. */
#pragma once

#include <stdint.h>

#include "pass.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { CFRT_MOST_PAIRS = 64 };

typedef struct {
    const void *q, *k, *v;           /* bf16 [frames * rows * columns][heads * dim] */
    int64_t stride;                  /* elements from token to token */
    const void *q_weight, *k_weight; /* bf16 [heads * dim], of the norms */
    void *q_out, *q_sink_out;        /* like q, contiguous: bf16, or int8 beside the next two; q_sink_out or NULL */
    float *q_scale, *q_sink_scale;   /* [token][head]: 8-bit only */
    void *k_out, *v_out;             /* the ring: bf16 granules, or K int8 and V e4m3 */
    float* k_scale;                  /* [granule][head]: 8-bit only */
    const float* v_scale;            /* [head][dim]: 8-bit only, of all granules; values beyond 448 of it are cut */
    void* scratch;                   /* 8-bit only: bf16 [tokens][heads * dim] */
    const cfrt_pass* pass; /* on the device: its first_frame and place instead of those below (pass.h); or NULL */
    int64_t first_frame, last_sink_view; /* position of the first frame; sinks are looked at from no later than that */
    int32_t heads, dim;                  /* dim 64 or 128, heads * dim <= 8192 */
    int32_t frames, rows, columns;       /* the unit's frames, and a frame's tokens, row by row */
    int32_t pairs[3];                    /* of time, height, width: dim / 2 together */
    float eps;
    int32_t granules[CFRT_MOST_FRAMES]; /* where each frame's slot starts in the ring */
    uint64_t turns[CFRT_MOST_PAIRS];    /* from cfrt_turns */
} cfrt_append;

/* turns[j] of each axis: theta^(-j / pairs) radians a step, in 2^-64 of a turn. */
void cfrt_turns(uint64_t* turns, const int32_t pairs[3], double theta);

/* Each returns a cudaError_t as those of attention.h do. */
int cfrt_append_bf16(const cfrt_append* call, void* stream);

/* Two launches: queries and keys to int8 queries and the scratch, then keys and values to the ring. */
int cfrt_append_int8_fp8(const cfrt_append* call, void* stream);

#ifdef __cplusplus
}
#endif
