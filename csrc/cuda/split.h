// Into how many parts to deal the keys of an attention. Pure arithmetic, for the host.
#pragma once

#include <algorithm>
#include <cstdint>

namespace cfrt {

struct Balance {
    std::int32_t splits;
    double share;  // of the time in which all multiprocessors work, rows of padding among the queries counted as idle
};

// `blocks` of equal work over `granules` keys each, on `processors`. A multiprocessor's time is that of its blocks,
// however many it runs at once, since they share its tensor cores. Beginning and ending a block costs about as much as
// kFixed granules, and merging the parts kMerge for each.
inline Balance balance(std::int64_t queries, std::int64_t heads, std::int64_t granules, std::int64_t processors,
                       std::int64_t block_rows, std::int64_t most) {
    constexpr double kFixed = 3, kMerge = 1;
    const auto up = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
    const std::int64_t tiles = up(queries, block_rows), blocks = tiles * heads;
    const double rows = static_cast<double>(queries) / static_cast<double>(tiles * block_rows);
    Balance best{1, 0};
    double least = 0;
    for (std::int64_t wanted = 1; wanted <= std::min(most, granules); ++wanted) {
        const std::int64_t part = up(granules, wanted), splits = up(granules, part);
        const auto turns = static_cast<double>(up(blocks * splits, processors));
        const double time = turns * (static_cast<double>(part) + kFixed) + (splits > 1 ? kMerge * turns : 0);
        if (best.share > 0 && time >= least) continue;
        least = time;
        const double work = static_cast<double>(blocks * granules) / static_cast<double>(processors);
        best = {static_cast<std::int32_t>(splits), rows * work / (turns * static_cast<double>(part))};
    }
    return best;
}

}  // namespace cfrt
