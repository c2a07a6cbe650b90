#include "dit_weights.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "../check.h"

namespace cfrt {
namespace {

using Numbers = std::vector<float>;

std::size_t as_size(std::int64_t n) {
    return static_cast<std::size_t>(n);
}

// Blocks of `dim` numbers with zeros up to `padded` behind each.
Numbers padded(const Numbers& x, std::int64_t dim, std::int64_t room) {
    if (dim == room) return x;
    const std::int64_t blocks = static_cast<std::int64_t>(x.size()) / dim;
    Numbers wide(as_size(blocks * room));
    for (std::int64_t i = 0; i < blocks; ++i) std::copy_n(x.begin() + i * dim, dim, wide.begin() + i * room);
    return wide;
}

Numbers joined(Numbers first, const Numbers& second) {
    first.insert(first.end(), second.begin(), second.end());
    return first;
}

// Reads and packs layers by their names.
struct Loader {
    const DitConfig& config;
    const Machine& machine;
    const ReadTensor& read;
    Heads heads;
    Shelf& shelf;

    Linear linear(Precision precision, const std::string& name, std::int64_t n, std::int64_t k) const {
        return {machine, shelf, precision, read(name + ".weight", n * k), read(name + ".bias", n)};
    }
    // From the stream to heads.
    Numbers into_heads(const std::string& name, std::int64_t k) const {
        return padded(read(name, config.width * k), heads.dim * k, heads.padded * k);
    }
    Linear to_heads(Precision precision, const std::string& name) const {
        return {machine, shelf, precision, into_heads(name + ".weight", config.width), into_heads(name + ".bias", 1)};
    }
    Linear to_heads(Precision precision, const std::string& name, const std::string& second) const {
        return {machine, shelf, precision,
                joined(into_heads(name + ".weight", config.width), into_heads(second + ".weight", config.width)),
                joined(into_heads(name + ".bias", 1), into_heads(second + ".bias", 1))};
    }
    // And back.
    Linear from_heads(Precision precision, const std::string& name) const {
        return {machine, shelf, precision,
                padded(read(name + ".weight", config.width * config.width), heads.dim, heads.padded),
                read(name + ".bias", config.width)};
    }
    // mean(x^2) of the padded row is dim / padded of the true one.
    Numbers norm(const std::string& name) const {
        Numbers weight = into_heads(name + ".weight", 1);
        const float share = std::sqrt(static_cast<float>(heads.dim) / static_cast<float>(heads.padded));
        for (float& w : weight) w *= share;
        return weight;
    }

    DitLayer layer(std::int64_t index, Precision blocks, Precision text) const {
        const std::string at = "blocks." + std::to_string(index) + ".", own = at + "self_attn.",
                          other = at + "cross_attn.";
        const std::int64_t d = config.width;
        return {to_heads(blocks, own + "q"),
                to_heads(blocks, own + "k", own + "v"),
                from_heads(blocks, own + "o"),
                to_heads(blocks, other + "q"),
                to_heads(text, other + "k", other + "v"),
                from_heads(blocks, other + "o"),
                linear(blocks, at + "ffn.0", config.ffn, d),
                linear(blocks, at + "ffn.2", d, config.ffn),
                norm(own + "norm_q"),
                norm(own + "norm_k"),
                norm(other + "norm_q"),
                norm(other + "norm_k"),
                read(at + "norm3.weight", d),
                read(at + "norm3.bias", d),
                read(at + "modulation", 6 * d)};
    }

    std::vector<DitLayer> layers(Precision blocks, Precision text) const {
        std::vector<DitLayer> all;
        for (std::int64_t i = 0; i < config.depth; ++i) all.push_back(layer(i, blocks, text));
        in_order_of_use(all);
        return all;
    }

    // As a sweep reads them, the last one before the first of the next sweep.
    static void in_order_of_use(std::vector<DitLayer>& layers) {
        Linear* before = &layers.back().ffn_out;
        for (DitLayer& l : layers)
            for (Linear* linear : {&l.kv, &l.q, &l.o, &l.text_q, &l.text_o, &l.ffn_in, &l.ffn_out}) {
                before->precede(*linear);
                before = linear;
            }
    }
};

void check_config(const DitConfig& c) {
    check(c.width >= 1 && c.depth >= 1 && c.heads >= 1 && c.ffn >= 1 && c.text_width >= 1 && c.text_rows >= 1,
          "expected sizes of at least 1, got width ", c.width, ", depth ", c.depth, ", heads ", c.heads, ", ffn ",
          c.ffn, ", text ", c.text_rows, " x ", c.text_width);
    check(c.width % (2 * c.heads) == 0, "expected a width that is a multiple of 2 * heads, got ", c.width, " and ",
          c.heads, " heads");
    check(c.time_width >= 2 && c.time_width % 2 == 0, "expected an even time width, got ", c.time_width);
    const Patches& p = c.patches;
    check(p.channels >= 1 && p.ph >= 1 && p.pw >= 1 && p.tokens() >= 1 && p.height % p.ph == 0 && p.width % p.pw == 0,
          "expected a grid of whole patches, got ", p.height, " x ", p.width, " in patches of ", p.ph, " x ", p.pw);
    const std::int64_t pairs = c.rope_pairs[0] + c.rope_pairs[1] + c.rope_pairs[2];
    check(*std::min_element(c.rope_pairs.begin(), c.rope_pairs.end()) >= 0 && 2 * pairs * c.heads == c.width,
          "expected the rotary pairs of a head to add up to ", c.width / c.heads / 2, ", got ", pairs);
    check(c.trained_frames >= 1, "expected trained_frames >= 1, got ", c.trained_frames);
}

}  // namespace

Heads Heads::of(const DitConfig& config) {
    const std::int64_t dim = config.width / config.heads;
    return {config.heads, dim, (dim + 15) / 16 * 16};
}

std::size_t DitWeights::bytes() const {
    std::size_t bytes = 0;
    for (const Linear* linear : {&patch_embedding, &text_in, &text_out, &time_in, &time_out, &time_projection, &head})
        bytes += linear->bytes();
    for (const DitLayer& l : layers)
        for (const Linear* linear : {&l.q, &l.kv, &l.o, &l.text_q, &l.text_kv, &l.text_o, &l.ffn_in, &l.ffn_out})
            bytes += linear->bytes();
    return bytes;
}

DitWeights load_dit(const DitConfig& c, Precision precision, const Machine& machine, const ReadTensor& read) {
    check_config(c);
    auto shelf = std::make_unique<Shelf>();
    const Loader load{c, machine, read, Heads::of(c), *shelf};
    const Precision text = precision == Precision::int8 ? Precision::bf16 : precision, fp32 = Precision::fp32;
    const std::int64_t d = c.width;
    return {std::move(shelf),
            load.heads,
            precision,
            text,
            text,
            load.linear(fp32, "patch_embedding", d, c.patches.size()),
            load.linear(text, "text_embedding.0", d, c.text_width),
            load.linear(text, "text_embedding.2", d, d),
            load.linear(fp32, "time_embedding.0", d, c.time_width),
            load.linear(fp32, "time_embedding.2", d, d),
            load.linear(fp32, "time_projection.1", 6 * d, d),
            load.layers(precision, text),
            read("head.modulation", 2 * d),
            load.linear(fp32, "head.head", c.patches.size(), d)};
}

}  // namespace cfrt
