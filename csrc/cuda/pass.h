/* What differs from one unit of a stream to the next, as a record in device memory.
 *
 * A CUDA graph keeps the arguments that its kernels were captured with. A call that is given the address of a record
 * (`pass`) reads the ring's positions and lengths, the time and the noise's unit from there instead of from its own
 * fields, and so one graph serves every unit:
 *
 *     once        allocate sizeof(cfrt_pass) bytes on the device; capture append, attention and re-noise with that
 *                 address and with the `splits` that a full window wants
 *     each unit   fill a record on the host (CudaRing::open, or Ring.open(unit).record in Python), copy it to that
 *                 address on the graph's stream, from memory that stays as it is until the copy is done; launch
 *
 * Grids do not change. While the window fills, blocks of an attention for which no keys are left end at once, and the
 * merge leaves their parts out. Records are read at the start of a kernel and where its keys go on to another piece. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { CFRT_MOST_PIECES = 128, CFRT_MOST_FRAMES = 32 };

typedef struct {
    int32_t start; /* granule or row */
    int32_t rows;  /* at least one */
} cfrt_piece;

typedef struct {
    uint64_t seed;                    /* of the noise */
    uint32_t unit;                    /* of the noise */
    int32_t granules, sink_granules;  /* in all pieces, and in those that are sinks: of the ring's own size */
    int32_t piece_count, sink_pieces; /* the pieces that the unit sees, sinks first, the unit itself last */
    int32_t frames;                   /* of the unit */
    int64_t first_frame;              /* its position in time */
    int32_t place[CFRT_MOST_FRAMES];  /* the granule at which each of its frames starts */
    cfrt_piece pieces[CFRT_MOST_PIECES];
} cfrt_pass;

#ifdef __cplusplus
}
#endif
