/* Attention over keys read in place, as a C interface: device pointers and a stream. No allocation, no synchronisation.
 *
 *     out = softmax(scale q K^T) V    for every head, without a mask
 *
 * The keys are a list of pieces. A piece is one latent frame of a ring, or any range of rows of a plain array; a query
 * sees all rows of all pieces, so that what a unit sees (csrc/plan.h) is the list and costs nothing in the kernel.
 *
 * Keys and values lie in one of two layouts, D numbers a head:
 *   granules   [granule][head][32][D]: 32 rows of a head are contiguous. A frame is padded to whole granules; the rows
 * of the padding are never looked at, but must be finite. A piece starts at a granule. rows       [row][head][D], rows
 * row_stride elements apart. A piece starts at a row. The 8-bit kernel reads granules only, of 64 rows: K int8
 * [granule][head][64][D] with a scale for each granule and head; V e4m3, transposed, [granule][head][D][64], tokens in
 * the order of cfrt_fp8_position, with a scale for each head and channel. Scales of keys are positive.
 */
#pragma once

#include <stdint.h>

#include "pass.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { CFRT_GRANULE_BF16 = 32, CFRT_GRANULE_INT8 = 64, CFRT_MOST_SPLITS = 32 };

typedef enum { CFRT_ACCUMULATE_FP32 = 0, CFRT_ACCUMULATE_FP16 = 1 } cfrt_accumulate;

typedef struct {
    const void *q, *q_sink;              /* [queries][heads][dim], bf16 or int8; q_sink, or NULL, is for sink pieces */
    const float *q_scale, *q_sink_scale; /* [queries][heads]: 8-bit only */
    const void *k, *v;                   /* see above */
    const float* k_scale;                /* [granule][head]: 8-bit only */
    const float* v_scale;                /* [head][dim]: 8-bit only */
    void* out;                           /* bf16 [queries][heads][dim] */
    float* scratch;                      /* cfrt_attention_scratch floats, or NULL where splits is 1 */
    int64_t q_stride, out_stride;        /* elements from query to query */
    int64_t row_stride;                  /* elements from row to row; 0 for granules */
    int32_t queries, heads, dim;         /* dim 64 or 128 */
    int32_t splits;                      /* parts that the keys are dealt into, from cfrt_attention_splits */
    int32_t piece_count, sink_pieces;    /* the first sink_pieces are looked at by q_sink, where there is one */
    float scale;
    const cfrt_pass* pass; /* on the device: its pieces instead of those below (pass.h); or NULL. Granules only */
    cfrt_piece pieces[CFRT_MOST_PIECES];
} cfrt_attention;

/* Each returns a cudaError_t: 0 when the work was put on the stream; cudaErrorInvalidValue for a call that does not fit
 * together, cudaErrorMisalignedAddress where a pointer or stride is no multiple of 16 bytes. */
int cfrt_attention_bf16(const cfrt_attention* call, void* stream);

/* K int8 and V e4m3, on devices from compute capability 8.9 on; cudaErrorNotSupported elsewhere. Products with V are
 * summed a granule at a time in `accumulate`, then in fp32. Sums in fp16 want |V / v_scale| <= CFRT_FP16_LIMIT. */
int cfrt_attention_int8_fp8(const cfrt_attention* call, cfrt_accumulate accumulate, void* stream);

#define CFRT_FP16_LIMIT 2.25f

/* Into how many parts to deal the keys so that the blocks fill `processors` multiprocessors evenly. */
int32_t cfrt_attention_splits(const cfrt_attention* call, int32_t processors);

/* Floats of scratch that a call with so many parts needs. */
int64_t cfrt_attention_scratch(int32_t queries, int32_t heads, int32_t dim, int32_t splits);

/* Where token 0 <= t < 64 of a granule lies in a row of transposed e4m3 values: the order in which the registers of the
 * product q K^T hold the weights that V is multiplied by. */
int32_t cfrt_fp8_position(int32_t token);

#ifdef __cplusplus
}
#endif
