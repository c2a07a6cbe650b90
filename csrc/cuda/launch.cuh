// From a call in C to a launch: checks, what a kernel wants to know, and the merge where keys were dealt into parts.
#pragma once

#include "attention_merge.cuh"
#include "device.h"

namespace cfrt {

// What a call of elements of `bytes` bytes must be for the kernels to read only what they may.
inline cudaError_t check(const cfrt_attention& a, std::int64_t bytes) {
    const bool shape = a.queries >= 1 && a.heads >= 1 && a.heads <= 65535 && (a.dim == 64 || a.dim == 128);
    const bool parts = a.splits >= 1 && a.splits <= CFRT_MOST_SPLITS && (a.splits == 1 || a.scratch);
    const bool listed =
        a.piece_count >= 1 && a.piece_count <= CFRT_MOST_PIECES && a.sink_pieces >= 0 && a.sink_pieces <= a.piece_count;
    const bool pieces = a.pass ? a.row_stride == 0 : listed;
    if (!shape || !parts || !pieces || !(a.scale > 0) || !a.q || !a.k || !a.v || !a.out) return cudaErrorInvalidValue;
    for (int i = 0; !a.pass && i < a.piece_count; ++i)
        if (a.pieces[i].start < 0 || a.pieces[i].rows < 1) return cudaErrorInvalidValue;
    const bool whole = (a.q_stride * bytes | a.out_stride * 2 | a.row_stride * bytes) % kAlignment == 0;
    const bool placed =
        aligned(a.q) && aligned(a.q_sink) && aligned(a.k) && aligned(a.v) && aligned(a.out) && aligned(a.pass);
    return whole && placed && aligned(a.scratch) ? cudaSuccess : cudaErrorMisalignedAddress;
}

// Offsets are counted in elements of `granule` elements a granule and head, or in those granules themselves.
template <int kGranule>
Call make_call(const cfrt_attention& a, std::int64_t granule) {
    Call call{};
    call.a = a;
    call.unit = a.row_stride ? a.row_stride : granule * a.heads;
    call.step = a.row_stride ? a.row_stride * kGranule : call.unit;
    call.head = a.row_stride ? a.dim : granule;
    call.scale_log2 = a.scale * 1.44269504f;
    if (a.pass) return call;  // the kernels count for themselves
    for (int i = 0; i < a.piece_count; ++i) {
        call.granules += granules_of<kGranule>(a.pieces[i].rows);
        if (a.q_sink && i < a.sink_pieces) call.sink_granules = call.granules;
    }
    call.split_granules = (call.granules + a.splits - 1) / a.splits;
    call.a.splits = (call.granules + call.split_granules - 1) / call.split_granules;  // no part is empty
    return call;
}

template <int kDim>
cudaError_t launch(const Call& call, void (*kernel)(Call), int shared_bytes, cudaStream_t stream) {
    const auto allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (allowed != cudaSuccess) return allowed;
    const auto tiles = static_cast<unsigned>((call.a.queries + kBlockRows - 1) / kBlockRows);
    kernel<<<dim3(tiles, call.a.heads, call.a.splits), kThreads, shared_bytes, stream>>>(call);
    if (call.a.splits > 1) {
        const std::int64_t threads = static_cast<std::int64_t>(call.a.queries) * call.a.heads * (kDim / 4);
        attention_merge<kDim>
            <<<static_cast<unsigned>((threads + kThreads - 1) / kThreads), kThreads, 0, stream>>>(call);
    }
    return cudaGetLastError();
}

}  // namespace cfrt
