// cvt between integers, floats and small floats; packing and unpacking with mov (PTX ISA 9.7.9.21).
#include <algorithm>
#include <cmath>
#include <limits>

#include "floats.h"
#include "lanes.h"

namespace ptxsim {
namespace {

using std::string;

enum class To { kNearest, kZero, kDown, kUp };

template <class F>
void with_roundings(const char* suffix, F f) {
    f(string("rn") + suffix, std::integral_constant<To, To::kNearest>{});
    f(string("rz") + suffix, std::integral_constant<To, To::kZero>{});
    f(string("rm") + suffix, std::integral_constant<To, To::kDown>{});
    f(string("rp") + suffix, std::integral_constant<To, To::kUp>{});
}

template <To kTo, class T>
T to_integer(T x) {
    switch (kTo) {
        case To::kNearest:
            return std::nearbyint(x);
        case To::kZero:
            return std::trunc(x);
        case To::kDown:
            return std::floor(x);
        case To::kUp:
            return std::ceil(x);
    }
}

// Out of range clamps; NaN is 0, or the smallest signed value where the source or the result has 64 bits.
template <class D, class S>
D clamp_to(S x) {
    if (std::isnan(x)) return sizeof(D) == 8 || sizeof(S) == 8 ? D(u64(1) << (8 * sizeof(D) - 1)) : D(0);
    const long double wide = x;
    if (wide <= static_cast<long double>(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
    if (wide >= static_cast<long double>(std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
    return D(x);
}

// x to the float type D in the given direction. long double holds every 64-bit integer and every double.
template <To kTo, class D>
D round_to(long double x) {
    D d = static_cast<D>(x);
    const long double infinity = std::numeric_limits<long double>::infinity();
    const bool down = kTo == To::kDown || (kTo == To::kZero && x > 0),
               up = kTo == To::kUp || (kTo == To::kZero && x < 0);
    if (down && d > x) d = std::nextafter(d, static_cast<D>(-infinity));
    if (up && d < x) d = std::nextafter(d, static_cast<D>(infinity));
    return d;
}

template <class D, class S>
D saturate(S x) {
    const auto low = std::numeric_limits<D>::min(), high = std::numeric_limits<D>::max();
    return std::cmp_less(x, low) ? low : std::cmp_greater(x, high) ? high : D(x);
}

// sizeof decides the lane's width, so that 8-bit types, which have no registers of their own, work as they are.
template <class D, class S>
void between_integers(const string& d, const string& s) {
    define<D, S>("cvt." + d + "." + s, [](S x) { return D(x); });
    define<D, S>("cvt.sat." + d + "." + s, [](S x) { return saturate<D>(x); });
}

template <class I>
void integer_and_float(const string& i) {
    with_roundings("i", [&](const string& how, auto to) {
        constexpr To kTo = decltype(to)::value;
        for (const char* sat : {"", "sat."}) {  // clamping is what happens anyway
            const string name = "cvt." + how + ".";
            define<I, float>(name + sat + i + ".f32", [](float x) { return clamp_to<I>(to_integer<kTo>(x)); });
            define<I, float>(name + "ftz." + sat + i + ".f32",
                             [](float x) { return clamp_to<I>(to_integer<kTo>(flush(x))); });
            define<I, double>(name + sat + i + ".f64", [](double x) { return clamp_to<I>(to_integer<kTo>(x)); });
            define<I, u16>(name + sat + i + ".f16",
                           [](u16 x) { return clamp_to<I>(to_integer<kTo>(decoded<F16>()[x])); });
            define<I, u16>(name + sat + i + ".bf16",
                           [](u16 x) { return clamp_to<I>(to_integer<kTo>(bf16_to_float(x))); });
        }
    });
    with_roundings("", [&](const string& how, auto to) {
        constexpr To kTo = decltype(to)::value;
        define<float, I>("cvt." + how + ".f32." + i, [](I x) { return round_to<kTo, float>(x); });
        define<double, I>("cvt." + how + ".f64." + i, [](I x) { return round_to<kTo, double>(x); });
    });
    define<u16, I>("cvt.rn.f16." + i, [](I x) { return u16(F16::encode(double(x))); });
    define<u16, I>("cvt.rn.bf16." + i, [](I x) { return u16(Bf16::encode(double(x))); });
}

template <class I>
void from_integer(const string& d) {
    between_integers<I, i8>(d, "s8"), between_integers<I, u8>(d, "u8");
    between_integers<I, i16>(d, "s16"), between_integers<I, u16>(d, "u16");
    between_integers<I, i32>(d, "s32"), between_integers<I, u32>(d, "u32");
    between_integers<I, i64>(d, "s64"), between_integers<I, u64>(d, "u64");
    integer_and_float<I>(d);
}

float unit(float x) {  // .sat of a float: into [0, 1], NaN to 0
    return std::isnan(x) ? 0.f : std::clamp(x, 0.f, 1.f);
}

void between_floats() {
    define<double, float>("cvt.f64.f32", [](float x) { return double(x); });
    define<double, float>("cvt.ftz.f64.f32", [](float x) { return double(flush(x)); });
    with_roundings("", [](const string& how, auto to) {
        constexpr To kTo = decltype(to)::value;
        define<float, double>("cvt." + how + ".f32.f64", [](double x) { return round_to<kTo, float>(x); });
        define<float, double>("cvt." + how + ".ftz.f32.f64", [](double x) { return flush(round_to<kTo, float>(x)); });
    });
    with_roundings("i", [](const string& how, auto to) {
        constexpr To kTo = decltype(to)::value;
        define<float, float>("cvt." + how + ".f32.f32", [](float x) { return to_integer<kTo>(x); });
        define<float, float>("cvt." + how + ".ftz.f32.f32", [](float x) { return to_integer<kTo>(flush(x)); });
        define<double, double>("cvt." + how + ".f64.f64", [](double x) { return to_integer<kTo>(x); });
    });
    define<float, float>("cvt.sat.f32.f32", [](float x) { return unit(x); });
    define<float, float>("cvt.sat.ftz.f32.f32", [](float x) { return unit(flush(x)); });
    define<float, float>("cvt.ftz.f32.f32", [](float x) { return flush(x); });
    define<float, u16>("cvt.f32.f16", [](u16 x) { return decoded<F16>()[x]; });
    define<float, u16>("cvt.f32.bf16", [](u16 x) { return bf16_to_float(x); });
    define<u16, float>("cvt.rn.f16.f32", [](float x) { return u16(F16::encode(x)); });
    define<u16, float>("cvt.rn.bf16.f32", [](float x) { return u16(float_to_bf16(x)); });
    define<u16, double>("cvt.rn.f16.f64", [](double x) { return u16(F16::encode(x)); });
}

// d = {a, b}: the first source is the upper part.
void pairs() {
    define<u32, float, float>("cvt.rn.f16x2.f32",
                              [](float a, float b) { return F16::encode(a) << 16 | F16::encode(b); });
    define<u32, float, float>("cvt.rn.bf16x2.f32",
                              [](float a, float b) { return float_to_bf16(a) << 16 | float_to_bf16(b); });
    define<u32, float, float>("cvt.rn.relu.bf16x2.f32", [](float a, float b) {
        const auto relu = [](float x) { return x > 0 || std::isnan(x) ? float_to_bf16(x) : 0; };
        return relu(a) << 16 | relu(b);
    });
    define<u16, float, float>("cvt.rn.satfinite.e4m3x2.f32",
                              [](float a, float b) { return u16(E4m3::encode(a, true) << 8 | E4m3::encode(b, true)); });
    define<u16, float, float>("cvt.rn.satfinite.e5m2x2.f32",
                              [](float a, float b) { return u16(E5m2::encode(a, true) << 8 | E5m2::encode(b, true)); });
    define<u16, u32>("cvt.rn.satfinite.e4m3x2.f16x2", [](u32 x) {
        const float* value = decoded<F16>();
        return u16(E4m3::encode(value[x >> 16], true) << 8 | E4m3::encode(value[x & 0xffff], true));
    });
    define<u32, u16>("cvt.rn.f16x2.e4m3x2", [](u16 x) {
        return F16::encode(E4m3::decode(x >> 8)) << 16 | F16::encode(E4m3::decode(x & 255));
    });
    define<u32, u16>("cvt.rn.f16x2.e5m2x2", [](u16 x) {
        return F16::encode(E5m2::decode(x >> 8)) << 16 | F16::encode(E5m2::decode(x & 255));
    });
}

u64 bits_of(Warp& warp, const Operand& o, int lane) {
    return o.width == 8 ? warp.lanes<u64>(o)[lane] : warp.lanes<u32>(o)[lane];
}

// mov d, {a, b, ...}: arg[0] parts of arg[1] bits each, the first the lowest.
void pack_vector(Warp& warp, const Instruction& at, u32 mask) {
    const int parts = at.arg[0], bits = at.arg[1];
    const Operand& d = at.operand[0];
    for_lanes(mask, [&](int l) {
        u64 value = 0;
        for (int k = 0; k < parts; ++k)
            value |= (bits_of(warp, at.operand[1 + k], l) & ((u64(1) << bits) - 1)) << (bits * k);
        if (d.width == 8)
            warp.lanes<u64>(d)[l] = value;
        else
            warp.lanes<u32>(d)[l] = u32(value);
    });
}

void unpack_vector(Warp& warp, const Instruction& at, u32 mask) {
    const int parts = at.arg[0], bits = at.arg[1];
    for_lanes(mask, [&](int l) {
        const u64 value = bits_of(warp, at.operand[parts], l);
        for (int k = 0; k < parts; ++k)
            if (at.operand[k].slot >= 0)  // `_` takes nothing
                warp.lanes<u32>(at.operand[k])[l] = u32(value >> (bits * k) & ((u64(1) << bits) - 1));
    });
}

}  // namespace

void register_conversions() {
    from_integer<i8>("s8"), from_integer<u8>("u8");
    from_integer<i16>("s16"), from_integer<u16>("u16");
    from_integer<i32>("s32"), from_integer<u32>("u32");
    from_integer<i64>("s64"), from_integer<u64>("u64");
    between_floats();
    pairs();
    handlers()["mov.pack"].run = pack_vector;
    handlers()["mov.unpack"].run = unpack_vector;
}

}  // namespace ptxsim
