// Handlers from functions of one lane: `define<D, S...>("add.s32", f)` is d = f(s...) on every active lane.
#pragma once

#include <type_traits>
#include <utility>

#include "machine.h"

namespace ptxsim {

// Registers narrower than 32 bits, and predicates, lie in 32-bit lanes. Whoever reads one looks at its own bits only; a
// signed result fills the lane with its sign, as PTX wants where the register is wider than the type.
template <class T>
using Stored = std::conditional_t<(sizeof(T) < 4), u32, T>;

template <class T>
T unpack(Stored<T> bits) {
    if constexpr (std::is_same_v<T, bool>)
        return bits != 0;
    else
        return static_cast<T>(bits);
}

template <class T>
Stored<T> pack(T value) {
    return static_cast<Stored<T>>(value);  // a conversion of a signed T extends its sign
}

template <class F>
inline void for_lanes(u32 mask, F f) {
    if (mask == kAllLanes) {
        for (int l = 0; l < kLanes; ++l) f(l);
    } else {
        for (int l = 0; l < kLanes; ++l)
            if (mask >> l & 1) f(l);
    }
}

template <class D, class... S, class F, std::size_t... I>
void apply(Warp& warp, const Instruction& at, u32 mask, F f, std::index_sequence<I...>) {
    auto* d = warp.lanes<Stored<D>>(at.operand[0]);
    for_lanes(mask, [&](int l) { d[l] = pack<D>(f(unpack<S>(warp.lanes<Stored<S>>(at.operand[1 + I])[l])...)); });
}

template <class D, class... S, class F>
void define(const std::string& name, F) {
    static_assert(std::is_empty_v<F>, "a handler's function must not capture");
    constexpr char kWidths[] = {sizeof(Stored<D>) + '0', char(sizeof(Stored<S>) + '0')..., 0};
    Entry& entry = handlers()[name];
    entry.widths = kWidths;
    entry.run = [](Warp& warp, const Instruction& at, u32 mask) {
        apply<D, S...>(warp, at, mask, F{}, std::index_sequence_for<S...>{});
    };
}

}  // namespace ptxsim
