// The loop of the attention kernels: queries into shared memory, then keys and values, a granule at a time.
#pragma once

#include "keys.cuh"

namespace cfrt {

// The block's queries, kRowBytes bytes of one head each, as they will be read by ldmatrix; zeros past the last one.
template <int kRowBytes, class Element>
__device__ __forceinline__ void copy_queries(const Call& call, const void* from, SharedAddress to) {
    constexpr int kChunks = kRowBytes / 16, kStepRows = kThreads / kChunks;
    const int copy_row = threadIdx.x / kChunks, copy_chunk = threadIdx.x % kChunks;
    const Element* rows =
        static_cast<const Element*>(from) + (blockIdx.y * kChunks + copy_chunk) * (16 / sizeof(Element));
    to += swizzled<kRowBytes>(copy_row, copy_chunk);
#pragma unroll
    for (int i = 0; i < kBlockRows / kStepRows; ++i) {
        const int row = blockIdx.x * kBlockRows + copy_row + i * kStepRows;
        copy_async(to + i * kStepRows * kRowBytes, rows + row * call.a.q_stride, row < call.a.queries);
    }
}

// Over the granules of `part`: K of the next one is on its way while the softmax and the product with V run, V of this
// one during the product with K. The copies of the queries, started before, are waited for with those of the first K.
template <class Block>
__device__ __forceinline__ void walk(Block& block, Granules part) {
    typename Block::At at(block.call, block.head, part.first);
    block.copy_keys(at);
    commit_copies();
    for (int left = part.last - part.first; left > 0; --left) {
        wait_for_copies();
        __syncthreads();  // K is here for all, and the last V has been used by all
        block.copy_values(at);
        commit_copies();
        block.score(at);
        if (left > 1) at.advance(block.call, block.head);
        wait_for_copies();
        __syncthreads();  // V is here for all, and K has been used by all
        if (left > 1) block.copy_keys(at);
        commit_copies();
        block.weigh();
        block.multiply_by_values();
    }
}

}  // namespace cfrt
