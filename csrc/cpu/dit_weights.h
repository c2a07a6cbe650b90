// The weights of a causal Wan2.1 DiT, packed once for a level and a precision. cfrt/config.py and cfrt/nn/dit.py define
// sizes and names.
//
// Which layers a precision reaches. The projections of the blocks, where all the time goes, have the precision itself.
// Text is read once a prompt, by bf16 where the blocks have int8. Patches, time and head are fp32 always: together they
// are under 1 % of a pass, time is computed once per noise level, and their errors are not averaged out by any later
// sum. Keys and values are bf16 unless all is fp32; the residual stream, norms and softmax are fp32 always.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../plan.h"
#include "latents.h"
#include "linear.h"
#include "tables.h"

namespace cfrt {

struct DitConfig {
    std::int64_t width, depth, heads, ffn, time_width, text_width, text_rows;
    Patches patches;
    Geometry geometry;
    std::array<std::int64_t, 3> rope_pairs;  // time, height, width
    double rope_theta;
    bool relative_sinks;
    std::int64_t trained_frames;
    float eps;

    std::int64_t frame_tokens() const { return patches.tokens(); }
    std::int64_t unit_tokens() const { return geometry.unit * patches.tokens(); }
    std::int64_t unit_numbers() const { return geometry.unit * patches.channels * patches.height * patches.width; }
};

// Heads in memory: the attention takes multiples of 16 numbers, so a head of fewer is filled up with zeros. They add
// nothing to any product; a norm over all heads is told, through its weight and eps, how many numbers there really are.
struct Heads {
    std::int64_t count, dim, padded;

    static Heads of(const DitConfig& config);
    std::int64_t width() const { return count * padded; }
    float norm_eps(float eps) const { return eps * static_cast<float>(dim) / static_cast<float>(padded); }
};

// A tensor by its name, `size` numbers, as fp32; throws where there is none.
using ReadTensor = std::function<std::vector<float>(const std::string& name, std::int64_t size)>;

struct DitLayer {
    Linear q, kv, o;  // kv: keys, then values
    Linear text_q, text_kv, text_o;
    Linear ffn_in, ffn_out;
    std::vector<float> norm_q, norm_k, text_norm_q, text_norm_k;  // [heads][padded]
    std::vector<float> norm3_gain, norm3_shift;                   // [width]
    std::vector<float> modulation;                                // [6][width]: shift, scale, gate, twice
};

struct DitWeights {
    std::unique_ptr<Shelf> shelf;  // of all packed weights
    Heads heads;
    Precision blocks, text, memory;  // of the blocks' projections, of what reads the text, of keys and values
    Linear patch_embedding;
    Linear text_in, text_out;
    Linear time_in, time_out, time_projection;
    std::vector<DitLayer> layers;
    std::vector<float> head_modulation;  // [2][width]: shift, scale
    Linear head;

    std::size_t bytes() const;
};

// Reads each tensor once and keeps what is packed. An Error where the sizes make no sense.
DitWeights load_dit(const DitConfig& config, Precision precision, const Machine& machine, const ReadTensor& read);

}  // namespace cfrt
