// Integer, logic and floating-point instructions, comparisons and selections (PTX ISA 9.7.1 to 9.7.8).
#include <algorithm>
#include <bit>
#include <cmath>

#include "floats.h"
#include "lanes.h"

namespace ptxsim {
namespace {

using std::string;

template <class T>
constexpr int kBitsOf = 8 * int(sizeof(T));

template <class T>
T shift_left(T a, u32 n) {
    return n >= u32(kBitsOf<T>) ? T(0) : T(a << n);
}

template <class T>
T shift_right(T a, u32 n) {
    if (n >= u32(kBitsOf<T>)) return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
    return T(a >> n);
}

// What hardware gives for a zero divisor is unspecified; all ones and the dividend are what it is known to give.
template <class T>
T divide(T a, T b) {
    if (b == 0) return T(-1);
    if (std::is_signed_v<T> && b == T(-1)) return T(std::make_unsigned_t<T>(0) - std::make_unsigned_t<T>(a));
    return T(a / b);
}

template <class T>
T remainder(T a, T b) {
    if (b == 0) return a;
    return std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
}

template <class T>
void integers(const string& type) {
    using U = std::make_unsigned_t<T>;
    using W = std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                                 std::conditional_t<std::is_signed_v<T>, i64, u64>>;
    define<T, T, T>("add." + type, [](T a, T b) { return T(U(a) + U(b)); });
    define<T, T, T>("sub." + type, [](T a, T b) { return T(U(a) - U(b)); });
    define<T, T, T>("mul.lo." + type, [](T a, T b) { return T(u64(U(a)) * U(b)); });
    define<T, T, T>("mul.hi." + type, [](T a, T b) { return T(W(a) * W(b) >> kBitsOf<T>); });
    define<T, T, T, T>("mad.lo." + type, [](T a, T b, T c) { return T(u64(U(a)) * U(b) + U(c)); });
    define<T, T, T, T>("mad.hi." + type, [](T a, T b, T c) { return T(U(W(a) * W(b) >> kBitsOf<T>) + U(c)); });
    define<T, T, T>("div." + type, [](T a, T b) { return divide(a, b); });
    define<T, T, T>("rem." + type, [](T a, T b) { return remainder(a, b); });
    define<T, T, T>("min." + type, [](T a, T b) { return std::min(a, b); });
    define<T, T, T>("max." + type, [](T a, T b) { return std::max(a, b); });
    define<T, T, u32>("shr." + type, [](T a, u32 n) { return shift_right(a, n); });
    if constexpr (std::is_signed_v<T>) {
        define<T, T>("neg." + type, [](T a) { return T(U(0) - U(a)); });
        define<T, T>("abs." + type, [](T a) { return a < 0 ? T(U(0) - U(a)) : a; });
    }
    if constexpr (sizeof(T) == 4) {
        define<W, T, T>("mul.wide." + type, [](T a, T b) { return W(W(a) * b); });
        define<W, T, T, W>("mad.wide." + type, [](T a, T b, W c) { return W(u64(W(a) * b) + u64(c)); });
    }
    if constexpr (sizeof(T) == 2) {
        using D = std::conditional_t<std::is_signed_v<T>, i32, u32>;
        define<D, T, T>("mul.wide." + type, [](T a, T b) { return D(D(a) * D(b)); });
        define<D, T, T, D>("mad.wide." + type, [](T a, T b, D c) { return D(u32(D(a) * D(b)) + u32(c)); });
    }
    if constexpr (sizeof(T) >= 4) {
        define<T, T, u32, u32>("bfe." + type, [](T a, u32 p, u32 n) {
            const u32 from = p & 255, length = n & 255, bits = kBitsOf<T>;
            const u32 last = std::min(from + length - 1, bits - 1);
            const U sign = std::is_signed_v<T> && length ? U(a) >> last & 1 : U(0);
            U value = 0;
            for (u32 k = 0; k < bits; ++k)
                value |= (k < length && from + k < bits ? U(a) >> (from + k) & 1 : sign) << k;
            return T(value);
        });
    }
}

template <class T>
void logic(const string& type) {
    define<T, T, T>("and." + type, [](T a, T b) { return T(a & b); });
    define<T, T, T>("or." + type, [](T a, T b) { return T(a | b); });
    define<T, T, T>("xor." + type, [](T a, T b) { return T(a ^ b); });
    if constexpr (std::is_same_v<T, bool>) {
        define<T, T>("not.pred", [](bool a) { return !a; });
    } else {
        define<T, T>("not." + type, [](T a) { return T(~a); });
        define<T, T, u32>("shl." + type, [](T a, u32 n) { return shift_left(a, n); });
        define<T, T, u32>("shr." + type, [](T a, u32 n) { return shift_right(a, n); });
    }
    if constexpr (sizeof(T) >= 4) {
        define<u32, T>("popc." + type, [](T a) { return u32(std::popcount(a)); });
        define<u32, T>("clz." + type, [](T a) { return u32(std::countl_zero(a)); });
        define<T, T>("brev." + type, [](T a) {
            T r = 0;
            for (int k = 0; k < kBitsOf<T>; ++k) r |= (a >> k & 1) << (kBitsOf<T> - 1 - k);
            return r;
        });
        define<T, T, T, u32, u32>("bfi." + type, [](T a, T b, u32 p, u32 n) {
            const u32 from = p & 255, length = n & 255;
            const T ones = length >= u32(kBitsOf<T>) ? ~T(0) : (T(1) << length) - 1;
            const T mask = shift_left(ones, from);
            return T((b & ~mask) | (shift_left(a, from) & mask));
        });
    }
}

u32 permute_bytes(u32 a, u32 b, u32 selector) {
    const u64 bytes = u64(b) << 32 | a;
    u32 result = 0;
    for (int k = 0; k < 4; ++k) {
        const u32 choice = selector >> (4 * k) & 15;
        u32 byte = bytes >> (8 * (choice & 7)) & 255;
        if (choice & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * k);
    }
    return result;
}

void bits() {
    define<u32, u32, u32, u32>("prmt.b32", [](u32 a, u32 b, u32 s) { return permute_bytes(a, b, s); });
    // Funnel shifts: of the 64 bits b:a, the upper (left) or lower (right) half.
    define<u32, u32, u32, u32>("shf.l.wrap.b32",
                               [](u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) << (n & 31) >> 32); });
    define<u32, u32, u32, u32>("shf.r.wrap.b32",
                               [](u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) >> (n & 31)); });
    define<u32, u32, u32, u32>("shf.l.clamp.b32",
                               [](u32 a, u32 b, u32 n) { return n >= 32 ? a : u32((u64(b) << 32 | a) << n >> 32); });
    define<u32, u32, u32, u32>("shf.r.clamp.b32",
                               [](u32 a, u32 b, u32 n) { return n >= 32 ? b : u32((u64(b) << 32 | a) >> n); });
    define<u32, u32, u32, u32, u32>("lop3.b32", [](u32 a, u32 b, u32 c, u32 table) {
        u32 r = 0;
        for (u32 k = 0; k < 8; ++k)
            if (table >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
        return r;
    });
    define<i32, u32, u32, i32>("dp4a.s32.s32", [](u32 a, u32 b, i32 c) {
        for (int k = 0; k < 4; ++k) c = i32(u32(c) + u32(i8(a >> 8 * k) * i8(b >> 8 * k)));
        return c;
    });
}

// The carry flag is a register of the kernel: opcodes.py appends it as the last operand.
template <class T, bool kIn, bool kOut, bool kSubtract>
void add_with_carry(Warp& warp, const Instruction& at, u32 mask) {
    T* d = warp.lanes<T>(at.operand[0]);
    const T *a = warp.lanes<T>(at.operand[1]), *b = warp.lanes<T>(at.operand[2]);
    u32* carry = warp.lanes<u32>(at.operand[3]);
    for_lanes(mask, [&](int l) {
        const T in = kIn ? T(carry[l] != 0) : T(0);
        const T x = a[l], y = b[l];
        d[l] = kSubtract ? T(x - y - in) : T(x + y + in);
        if (kOut) carry[l] = kSubtract ? x < y || (in && x == y) : d[l] < x || (in && d[l] == x);
    });
}

template <bool kHigh, bool kIn, bool kOut>
void multiply_with_carry(Warp& warp, const Instruction& at, u32 mask) {
    u32* d = warp.lanes<u32>(at.operand[0]);
    const u32 *a = warp.lanes<u32>(at.operand[1]), *b = warp.lanes<u32>(at.operand[2]);
    const u32* c = warp.lanes<u32>(at.operand[3]);
    u32* carry = warp.lanes<u32>(at.operand[4]);
    for_lanes(mask, [&](int l) {
        const u64 product = u64(a[l]) * b[l];
        const u64 sum = (kHigh ? product >> 32 : product & 0xffff'ffff) + c[l] + (kIn && carry[l] ? 1 : 0);
        d[l] = u32(sum);
        if (kOut) carry[l] = u32(sum >> 32);
    });
}

void carries() {
    auto& table = handlers();
    for (const char* type : {"u32", "s32"}) {
        const string t = type;
        table["add.cc." + t].run = add_with_carry<u32, false, true, false>;
        table["addc." + t].run = add_with_carry<u32, true, false, false>;
        table["addc.cc." + t].run = add_with_carry<u32, true, true, false>;
        table["sub.cc." + t].run = add_with_carry<u32, false, true, true>;
        table["subc." + t].run = add_with_carry<u32, true, false, true>;
        table["subc.cc." + t].run = add_with_carry<u32, true, true, true>;
    }
    for (const char* type : {"u64", "s64"}) {
        const string t = type;
        table["add.cc." + t].run = add_with_carry<u64, false, true, false>;
        table["addc." + t].run = add_with_carry<u64, true, false, false>;
        table["addc.cc." + t].run = add_with_carry<u64, true, true, false>;
        table["sub.cc." + t].run = add_with_carry<u64, false, true, true>;
        table["subc." + t].run = add_with_carry<u64, true, false, true>;
        table["subc.cc." + t].run = add_with_carry<u64, true, true, true>;
    }
    table["mad.lo.cc.u32"].run = multiply_with_carry<false, false, true>;
    table["mad.hi.cc.u32"].run = multiply_with_carry<true, false, true>;
    table["madc.lo.u32"].run = multiply_with_carry<false, true, false>;
    table["madc.hi.u32"].run = multiply_with_carry<true, true, false>;
    table["madc.lo.cc.u32"].run = multiply_with_carry<false, true, true>;
    table["madc.hi.cc.u32"].run = multiply_with_carry<true, true, true>;
}

// ------------------------------------------------------------------------------------------------------ floating point

template <class T>
T smaller(T a, T b) {  // a number beats NaN, -0 is below +0
    if (std::isnan(a)) return b;
    if (std::isnan(b)) return a;
    return a < b || (a == b && std::signbit(a)) ? a : b;
}

template <class T>
T larger(T a, T b) {
    if (std::isnan(a)) return b;
    if (std::isnan(b)) return a;
    return a > b || (a == b && !std::signbit(a)) ? a : b;
}

// kFlush: subnormal inputs and results are zeros.
template <bool kFlush, class T>
T f(T x) {
    if constexpr (kFlush)
        return flush(x);
    else
        return x;
}

template <class T, bool Z>
void floats(const string& type) {
    const string t = (Z ? "ftz." : "") + type;
    define<T, T, T>("add." + t, [](T a, T b) { return f<Z>(f<Z>(a) + f<Z>(b)); });
    define<T, T, T>("sub." + t, [](T a, T b) { return f<Z>(f<Z>(a) - f<Z>(b)); });
    define<T, T, T>("mul." + t, [](T a, T b) { return f<Z>(f<Z>(a) * f<Z>(b)); });
    define<T, T, T, T>("fma." + t, [](T a, T b, T c) { return f<Z>(std::fma(f<Z>(a), f<Z>(b), f<Z>(c))); });
    define<T, T, T>("div." + t, [](T a, T b) { return f<Z>(f<Z>(a) / f<Z>(b)); });
    define<T, T>("rcp." + t, [](T a) { return f<Z>(T(1) / f<Z>(a)); });
    define<T, T>("sqrt." + t, [](T a) { return f<Z>(std::sqrt(f<Z>(a))); });
    define<T, T, T>("min." + t, [](T a, T b) { return f<Z>(smaller(f<Z>(a), f<Z>(b))); });
    define<T, T, T>("max." + t, [](T a, T b) { return f<Z>(larger(f<Z>(a), f<Z>(b))); });
    define<T, T>("abs." + t, [](T a) { return f<Z>(std::fabs(a)); });
    define<T, T>("neg." + t, [](T a) { return f<Z>(-a); });
}

// Approximate functions give the correctly rounded value: the error that PTX allows is not modelled (README.md).
template <bool Z>
void approximate(const string& z) {
    define<float, float, float>("div.approx." + z + "f32", [](float a, float b) { return f<Z>(f<Z>(a) / f<Z>(b)); });
    define<float, float, float>("div.full." + z + "f32", [](float a, float b) { return f<Z>(f<Z>(a) / f<Z>(b)); });
    define<float, float>("rcp.approx." + z + "f32", [](float a) { return f<Z>(1.f / f<Z>(a)); });
    define<float, float>("sqrt.approx." + z + "f32", [](float a) { return f<Z>(std::sqrt(f<Z>(a))); });
    define<float, float>("rsqrt.approx." + z + "f32",
                         [](float a) { return f<Z>(float(1 / std::sqrt(double(f<Z>(a))))); });
    define<float, float>("ex2.approx." + z + "f32", [](float a) { return f<Z>(std::exp2(f<Z>(a))); });
    define<float, float>("lg2.approx." + z + "f32", [](float a) { return f<Z>(std::log2(f<Z>(a))); });
    define<float, float>("sin.approx." + z + "f32", [](float a) { return f<Z>(std::sin(f<Z>(a))); });
    define<float, float>("cos.approx." + z + "f32", [](float a) { return f<Z>(std::cos(f<Z>(a))); });
}

// The fp64 seeds look at, and give, the upper 32 bits only.
double upper(double x) {
    return std::bit_cast<double>(std::bit_cast<u64>(x) & 0xffff'ffff'0000'0000);
}
double flush64(double x) {
    return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0., x) : x;
}

template <class Format>
u32 pairwise(u32 a, u32 b, u32 c, double (*of)(double, double, double)) {
    const float* value = decoded<Format>();
    const u32 low = Format::encode(of(value[a & 0xffff], value[b & 0xffff], value[c & 0xffff]));
    return low | Format::encode(of(value[a >> 16], value[b >> 16], value[c >> 16])) << 16;
}

// Two halves, or two bf16, in a register. Computed in fp64 and rounded once.
template <class H>
void halves(const string& type) {
    define<u32, u32, u32>("add." + type + "x2", [](u32 a, u32 b) {
        return pairwise<H>(a, b, 0, [](double x, double y, double) { return x + y; });
    });
    define<u32, u32, u32>("sub." + type + "x2", [](u32 a, u32 b) {
        return pairwise<H>(a, b, 0, [](double x, double y, double) { return x - y; });
    });
    define<u32, u32, u32>("mul." + type + "x2", [](u32 a, u32 b) {
        return pairwise<H>(a, b, 0, [](double x, double y, double) { return x * y; });
    });
    define<u32, u32, u32, u32>("fma." + type + "x2", [](u32 a, u32 b, u32 c) {
        return pairwise<H>(a, b, c, [](double x, double y, double z) { return std::fma(x, y, z); });
    });
    define<u32, u32, u32>("min." + type + "x2", [](u32 a, u32 b) {
        return pairwise<H>(a, b, 0, [](double x, double y, double) { return smaller(x, y); });
    });
    define<u32, u32, u32>("max." + type + "x2", [](u32 a, u32 b) {
        return pairwise<H>(a, b, 0, [](double x, double y, double) { return larger(x, y); });
    });
    for (const char* op : {"add.", "sub.", "mul.", "fma.", "min.", "max."})
        handlers()[op + type] = handlers()[op + type + "x2"];  // the upper half of a scalar is zero and ignored
    define<u32, u32>("neg." + type + "x2", [](u32 a) { return a ^ 0x8000'8000; });
    define<u32, u32>("abs." + type + "x2", [](u32 a) { return a & 0x7fff'7fff; });
    define<u16, u16>("neg." + type, [](u16 a) { return u16(a ^ 0x8000); });
    define<u16, u16>("abs." + type, [](u16 a) { return u16(a & 0x7fff); });
}

void floating_point() {
    floats<float, false>("f32");
    floats<float, true>("f32");
    floats<double, false>("f64");
    approximate<false>("");
    approximate<true>("ftz.");
    halves<F16>("f16");
    halves<Bf16>("bf16");
    define<float, float>("tanh.approx.f32", [](float a) { return std::tanh(a); });
    define<float, float, float>("max.NaN.f32", [](float a, float b) {
        return std::isnan(a) || std::isnan(b) ? std::bit_cast<float>(0x7fff'ffffu) : larger(a, b);
    });
    define<float, float, float>("min.NaN.f32", [](float a, float b) {
        return std::isnan(a) || std::isnan(b) ? std::bit_cast<float>(0x7fff'ffffu) : smaller(a, b);
    });
    define<double, double>("rcp.approx.ftz.f64", [](double a) { return upper(flush64(1 / upper(flush64(a)))); });
    define<double, double>("rsqrt.approx.ftz.f64",
                           [](double a) { return upper(flush64(1 / std::sqrt(upper(flush64(a))))); });
    define<float, float, float>("copysign.f32", [](float a, float b) { return std::copysign(b, a); });
    define<double, double, double>("copysign.f64", [](double a, double b) { return std::copysign(b, a); });
    define<bool, float>("testp.infinite.f32", [](float a) { return std::isinf(a); });
    define<bool, float>("testp.notanumber.f32", [](float a) { return std::isnan(a); });
    define<bool, float>("testp.finite.f32", [](float a) { return std::isfinite(a); });
}

// ---------------------------------------------------------------------------------------------- comparison, selection

// setp d[|e], a, b[, p]: d = compare(a, b) combined with p, e = its opposite combined with p.
template <class T, class Compare, int kCombine, bool kFlush>
void set_predicate(Warp& warp, const Instruction& at, u32 mask) {
    const int results = at.arg[0];
    u32* d = warp.lanes<u32>(at.operand[0]);
    u32* e = results == 2 ? warp.lanes<u32>(at.operand[1]) : nullptr;
    const auto* a = warp.lanes<Stored<T>>(at.operand[results]);
    const auto* b = warp.lanes<Stored<T>>(at.operand[results + 1]);
    const u32* p = kCombine ? warp.lanes<u32>(at.operand[results + 2]) : nullptr;
    for_lanes(mask, [&](int l) {
        T x = unpack<T>(a[l]), y = unpack<T>(b[l]);
        if constexpr (kFlush) x = flush(x), y = flush(y);
        const bool yes = Compare{}(x, y), with = kCombine && p[l];
        auto combine = [&](bool c) {
            return kCombine == 0 ? c : kCombine == 1 ? c && with : kCombine == 2 ? c || with : c != with;
        };
        d[l] = combine(yes);
        if (e) e[l] = combine(!yes);
    });
}

template <class T, bool kFlush, class Compare>
void comparison(const string& name, const string& type, Compare) {
    auto& table = handlers();
    const string t = (kFlush ? ".ftz." : ".") + type;
    table["setp." + name + t].run = set_predicate<T, Compare, 0, kFlush>;
    table["setp." + name + ".and" + t].run = set_predicate<T, Compare, 1, kFlush>;
    table["setp." + name + ".or" + t].run = set_predicate<T, Compare, 2, kFlush>;
    table["setp." + name + ".xor" + t].run = set_predicate<T, Compare, 3, kFlush>;
}

template <class T>
void integer_comparisons(const string& type) {
    comparison<T, false>("eq", type, [](T a, T b) { return a == b; });
    comparison<T, false>("ne", type, [](T a, T b) { return a != b; });
    if (type[0] == 'b') return;
    comparison<T, false>("lt", type, [](T a, T b) { return a < b; });
    comparison<T, false>("le", type, [](T a, T b) { return a <= b; });
    comparison<T, false>("gt", type, [](T a, T b) { return a > b; });
    comparison<T, false>("ge", type, [](T a, T b) { return a >= b; });
    if constexpr (std::is_unsigned_v<T>) {
        for (const auto& [name, same] : {std::pair{"lo", "lt"}, {"ls", "le"}, {"hi", "gt"}, {"hs", "ge"}})
            for (const char* with : {".", ".and.", ".or.", ".xor."})
                handlers()[string("setp.") + name + with + type] = handlers()[string("setp.") + same + with + type];
    }
}

template <class T, bool Z>
void float_comparisons(const string& type) {
    comparison<T, Z>("eq", type, [](T a, T b) { return a == b; });
    comparison<T, Z>("ne", type, [](T a, T b) { return a < b || a > b; });
    comparison<T, Z>("lt", type, [](T a, T b) { return a < b; });
    comparison<T, Z>("le", type, [](T a, T b) { return a <= b; });
    comparison<T, Z>("gt", type, [](T a, T b) { return a > b; });
    comparison<T, Z>("ge", type, [](T a, T b) { return a >= b; });
    comparison<T, Z>("equ", type, [](T a, T b) { return !(a < b || a > b); });
    comparison<T, Z>("neu", type, [](T a, T b) { return !(a == b); });
    comparison<T, Z>("ltu", type, [](T a, T b) { return !(a >= b); });
    comparison<T, Z>("leu", type, [](T a, T b) { return !(a > b); });
    comparison<T, Z>("gtu", type, [](T a, T b) { return !(a <= b); });
    comparison<T, Z>("geu", type, [](T a, T b) { return !(a < b); });
    comparison<T, Z>("num", type, [](T a, T b) { return !std::isnan(a) && !std::isnan(b); });
    comparison<T, Z>("nan", type, [](T a, T b) { return std::isnan(a) || std::isnan(b); });
}

template <class T>
void moves(const string& type) {
    define<T, T>("mov." + type, [](T a) { return a; });
    if (type != "pred") define<T, T, T, bool>("selp." + type, [](T a, T b, bool p) { return p ? a : b; });
}

}  // namespace

void register_arithmetic() {
    integers<i16>("s16"), integers<u16>("u16");
    integers<i32>("s32"), integers<u32>("u32");
    integers<i64>("s64"), integers<u64>("u64");
    logic<bool>("pred"), logic<u16>("b16"), logic<u32>("b32"), logic<u64>("b64");
    bits();
    carries();
    floating_point();
    integer_comparisons<i16>("s16"), integer_comparisons<u16>("u16"), integer_comparisons<u16>("b16");
    integer_comparisons<i32>("s32"), integer_comparisons<u32>("u32"), integer_comparisons<u32>("b32");
    integer_comparisons<i64>("s64"), integer_comparisons<u64>("u64"), integer_comparisons<u64>("b64");
    float_comparisons<float, false>("f32"), float_comparisons<float, true>("f32");
    float_comparisons<double, false>("f64");
    moves<bool>("pred");
    for (const char* type : {"b16", "u16", "s16", "f16", "bf16"}) moves<u16>(type);
    for (const char* type : {"b32", "u32", "s32", "f32", "f16x2", "bf16x2"}) moves<u32>(type);
    for (const char* type : {"b64", "u64", "s64", "f64"}) moves<u64>(type);
}

}  // namespace ptxsim
