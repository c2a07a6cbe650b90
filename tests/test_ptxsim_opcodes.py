"""Every opcode that ptxsim knows against arithmetic not its own: Python's integers, numpy, torch's small floats."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from opcode_fixture import Case, Reference, bits_of, differing
from ptxsim.opcodes import bind
from ptxsim.types import Label

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("cxx")]


# ------------------------------------------------------------------------------------------------------------- integers


def integers() -> Iterator[Case]:
    for bits in (16, 32, 64):
        for sign in "su":
            t = f"{sign}{bits}"
            for name, f in {
                "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b,
                "mul.hi": lambda a, b, n=bits: a * b >> n, "min": min, "max": max,
            }.items():  # fmt: skip
                yield Case(f"{name}.{t}", t, (t, t), f)
            yield Case(f"mad.lo.{t}", t, (t, t, t), lambda a, b, c: a * b + c)
            yield Case(f"mad.hi.{t}", t, (t, t, t), lambda a, b, c, n=bits: (a * b >> n) + c)
            yield Case(f"div.{t}", t, (t, t), lambda a, b: -1 if b == 0 else truncated(a, b))
            yield Case(f"rem.{t}", t, (t, t), lambda a, b: a if b == 0 else a - b * truncated(a, b))
            yield Case(f"shr.{t}", t, (t, "u32"), lambda a, n: a >> n if n < 64 else -int(a < 0))
            if sign == "s":
                yield Case(f"neg.{t}", t, (t,), lambda a: -a)
                yield Case(f"abs.{t}", t, (t,), abs)
            if bits < 64:
                wide = f"{sign}{2 * bits}"
                yield Case(f"mul.wide.{t}", wide, (t, t), lambda a, b: a * b)
                yield Case(f"mad.wide.{t}", wide, (t, t, wide), lambda a, b, c: a * b + c)
            if bits > 16:
                yield Case(
                    f"bfe.{t}", t, (t, "u32", "u32"), lambda a, p, n, w=bits, s=sign: field(a, p, n, w, s == "s")
                )
        b = f"b{bits}"
        for name, f in {"and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y}.items():
            yield Case(f"{name}.{b}", b, (b, b), f)
        yield Case(f"not.{b}", b, (b,), lambda x: ~x)
        yield Case(f"shl.{b}", b, (b, "u32"), lambda x, n: x << n if n < 64 else 0)
        yield Case(f"shr.{b}", b, (b, "u32"), lambda x, n: x >> n if n < 64 else 0)
        if bits > 16:
            yield Case(f"popc.{b}", "u32", (b,), lambda x: x.bit_count())
            yield Case(f"clz.{b}", "u32", (b,), lambda x, n=bits: n - x.bit_length())
            yield Case(f"brev.{b}", b, (b,), lambda x, n=bits: int(f"{x:0{n}b}"[::-1], 2))
            yield Case(f"bfi.{b}", b, (b, b, "u32", "u32"), insert)


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field(a: int, p: int, n: int, bits: int, signed: bool) -> int:
    """bfe by the PTX ISA's own loop."""
    p, n = p & 255, n & 255
    last = min(p + n - 1, bits - 1)
    sign = a >> last & 1 if signed and n else 0
    return sum((a >> (p + i) & 1 if i < n and p + i < bits else sign) << i for i in range(bits))


def insert(a: int, b: int, p: int, n: int) -> int:
    p, n = p & 255, n & 255
    for i in range(min(n, 64)):
        if p + i < 64:
            b = b & ~(1 << (p + i)) | (a >> i & 1) << (p + i)
    return b


def bit_tricks() -> Iterator[Case]:
    for name, f in {"and": lambda x, y: x and y, "or": lambda x, y: x or y, "xor": lambda x, y: x != y}.items():
        yield Case(f"{name}.pred", "pred", ("pred", "pred"), f)
    yield Case("not.pred", "pred", ("pred",), lambda x: not x)
    yield Case("mov.pred", "pred", ("pred",), lambda x: x)
    for selector in (0x3210, 0x5410, 0x7632, 0x1A0F, 0x8888):
        yield Case("prmt.b32", "b32", ("b32", "b32", selector), permuted)
    for side, mode in (("l", "wrap"), ("r", "wrap"), ("l", "clamp"), ("r", "clamp")):
        yield Case(f"shf.{side}.{mode}.b32", "b32", ("b32", "b32", "u32"),
                   lambda a, b, n, s=side, m=mode: funnel(a, b, n & 31 if m == "wrap" else min(n, 32), s))  # fmt: skip
    for table in (0x00, 0xC0, 0x96, 0xE8, 0x6A, 0x1D, 0xFF):
        yield Case("lop3.b32", "b32", ("b32", "b32", "b32", table), looked_up)
    byte = lambda x, k: (x >> 8 * k & 255 ^ 128) - 128  # noqa: E731
    yield Case("dp4a.s32.s32", "s32", ("b32", "b32", "s32"),
               lambda a, b, c: c + sum(byte(a, k) * byte(b, k) for k in range(4)))  # fmt: skip
    for t in (
        "b16",
        "u16",
        "s16",
        "f16",
        "bf16",
        "b32",
        "u32",
        "s32",
        "f32",
        "f16x2",
        "bf16x2",
        "b64",
        "u64",
        "s64",
        "f64",
    ):
        yield Case(f"mov.{t}", t, (t,), lambda x: x)
        yield Case(f"selp.{t}", t, (t, t, "pred"), lambda a, b, p: a if p else b)


def permuted(a: int, b: int, selector: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    chosen = [source[selector >> 4 * k & 7] for k in range(4)]
    signs = [255 * (c >> 7) if selector >> 4 * k & 8 else c for k, c in enumerate(chosen)]
    return int.from_bytes(signs, "little")


def funnel(a: int, b: int, n: int, side: str) -> int:
    both = b << 32 | a
    return both << n >> 32 if side == "l" else both >> n


def looked_up(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))


# --------------------------------------------------------------------------------------------------------------- floats


def flushed(x: np.floating) -> np.floating:
    return np.copysign(type(x)(0), x) if x != 0 and abs(x) < np.finfo(type(x)).tiny else x


def number_first(pick: Callable) -> Callable:
    """min and max: a number beats NaN, and -0 is below +0."""

    def f(a: np.floating, b: np.floating) -> np.floating:
        if np.isnan(a) or np.isnan(b):
            return b if np.isnan(a) else a
        return pick((a, b), key=lambda x: (x, 0 if np.signbit(x) else 1))

    return f


def fused(a: np.floating, b: np.floating, c: np.floating) -> np.floating:
    if not all(np.isfinite(x) for x in (a, b, c)):
        return a * b + c
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        return a * b + c
    return rounded(exact, type(a))


def rounded(exact: Fraction, kind: type) -> np.floating:
    """To nearest even, once."""
    mantissa = np.finfo(kind).nmant
    smallest = np.finfo(kind).minexp - mantissa
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length()  # or one too many
    exponent -= Fraction(2) ** exponent > abs(exact)
    unit = Fraction(2) ** max(exponent - mantissa, smallest)
    value = round(exact / unit) * unit
    if abs(value) > Fraction(float(np.finfo(kind).max)):
        return kind(-np.inf if exact < 0 else np.inf)
    return np.copysign(kind(float(value)), kind(-1 if exact < 0 else 1))


def floats() -> Iterator[Case]:
    for t, one in (("f32", np.float32(1)), ("f64", np.float64(1))):
        plain: dict[str, tuple[int, Callable]] = {
            "add.rn": (2, lambda a, b: a + b), "sub.rn": (2, lambda a, b: a - b), "mul.rn": (2, lambda a, b: a * b),
            "div.rn": (2, lambda a, b: a / b), "fma.rn": (3, fused), "rcp.rn": (1, lambda a, i=one: i / a),
            "sqrt.rn": (1, np.sqrt), "abs": (1, np.abs), "neg": (1, lambda a: -a),
            "min": (2, number_first(min)), "max": (2, number_first(max)),
        }  # fmt: skip
        for name, (count, f) in plain.items():
            yield Case(f"{name}.{t}", t, (t,) * count, f)
            if t == "f32":
                flush = lambda *x, f=f: flushed(f(*map(flushed, x)))  # noqa: E731
                yield Case(f"{name}.ftz.{t}", t, (t,) * count, flush)
        yield Case(f"copysign.{t}", t, (t, t), lambda a, b: np.copysign(b, a))
    nan = lambda f: lambda a, b: np.float32(np.nan) if np.isnan(a) or np.isnan(b) else f(a, b)  # noqa: E731
    yield Case("min.NaN.f32", "f32", ("f32", "f32"), nan(number_first(min)))
    yield Case("max.NaN.f32", "f32", ("f32", "f32"), nan(number_first(max)))
    yield Case("testp.infinite.f32", "pred", ("f32",), np.isinf)
    yield Case("testp.notanumber.f32", "pred", ("f32",), np.isnan)
    yield Case("testp.finite.f32", "pred", ("f32",), np.isfinite)


def approximate() -> Iterator[Case]:
    """To 2 units in the last place; the executor rounds correctly, numpy nearly."""
    unary = {
        "rcp.approx": lambda a: np.float32(1) / a, "sqrt.approx": np.sqrt, "ex2.approx": np.exp2,
        "rsqrt.approx": lambda a: np.float32(1 / np.sqrt(np.float64(a))), "lg2.approx": np.log2,
        "sin.approx": lambda a: np.float32(np.sin(np.float64(a))),
        "cos.approx": lambda a: np.float32(np.cos(np.float64(a))),
    }  # fmt: skip
    for z in ("", ".ftz"):
        g = (lambda f: lambda *x: flushed(f(*map(flushed, x)))) if z else (lambda f: f)
        for name, f in unary.items():
            yield Case(f"{name}{z}.f32", "f32", ("f32",), g(f), close=2.4e-7)
        for name in ("div.approx", "div.full"):
            yield Case(f"{name}{z}.f32", "f32", ("f32", "f32"), g(lambda a, b: a / b), close=2.4e-7)
    yield Case("tanh.approx.f32", "f32", ("f32",), np.tanh, close=2.4e-7)
    yield Case("rcp.approx.ftz.f64", "f64", ("f64",), lambda a: flushed(1 / flushed(a)), close=2.0**-19)
    yield Case("rsqrt.approx.ftz.f64", "f64", ("f64",), lambda a: flushed(1 / np.sqrt(flushed(a))), close=2.0**-19)


# --------------------------------------------------------------------------------------------------------- small floats

TORCH = {"f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
STORED = {"f16": torch.int16, "bf16": torch.int16, "e4m3": torch.uint8, "e5m2": torch.uint8}


def from_small(bits: int, kind: str) -> float:
    raw = torch.tensor([bits], dtype=torch.int32).to(STORED[kind])
    return raw.view(TORCH[kind]).double().item()


def to_small(x: float, kind: str) -> int:
    limit = {"e4m3": 448.0, "e5m2": 57344.0}.get(kind)
    if math.isnan(x):
        return {"f16": 0x7FFF, "bf16": 0x7FFF, "e4m3": 0x7F, "e5m2": 0x7F}[kind]
    clamped = min(max(x, -limit), limit) if limit else x
    small = torch.tensor([clamped], dtype=torch.float64).to(TORCH[kind])
    return int(small.view(STORED[kind]).item()) & (0xFFFF if kind in ("f16", "bf16") else 0xFF)


def halves() -> Iterator[Case]:
    """Operations on f16 and bf16, and on pairs; fp64 holds sums and products of two exactly enough."""
    for t in ("f16", "bf16"):
        for name, (count, f) in {
            "add": (2, lambda a, b: a + b), "sub": (2, lambda a, b: a - b), "mul": (2, lambda a, b: a * b),
            "fma.rn": (3, fused), "min": (2, number_first(min)), "max": (2, number_first(max)),
        }.items():  # fmt: skip

            def scalar(*x: int, f: Callable = f, t: str = t) -> int:
                return to_small(float(f(*(np.float64(from_small(b, t)) for b in x))), t)

            yield Case(f"{name}.{t}", t, (t,) * count, scalar)
            pair = lambda *x, g=scalar: g(*(b & 0xFFFF for b in x)) | g(*(b >> 16 for b in x)) << 16  # noqa: E731
            yield Case(f"{name}.{t}x2", f"{t}x2", (f"{t}x2",) * count, pair)
        yield Case(f"neg.{t}", t, (t,), lambda x: x ^ 0x8000)
        yield Case(f"abs.{t}", t, (t,), lambda x: x & 0x7FFF)
        yield Case(f"neg.{t}x2", f"{t}x2", (f"{t}x2",), lambda x: x ^ 0x80008000)
        yield Case(f"abs.{t}x2", f"{t}x2", (f"{t}x2",), lambda x: x & 0x7FFF7FFF)


def small_conversions() -> Iterator[Case]:
    for t in ("f16", "bf16"):
        yield Case(f"cvt.rn.{t}.f32", t, ("f32",), lambda x, t=t: to_small(float(x), t))
        yield Case(f"cvt.f32.{t}", "f32", (t,), lambda b, t=t: np.float32(from_small(b, t)))
        yield Case(f"cvt.rn.{t}x2.f32", f"{t}x2", ("f32", "f32"),
                   lambda a, b, t=t: to_small(float(a), t) << 16 | to_small(float(b), t))  # fmt: skip
    relu = lambda x: x if np.isnan(x) or x > 0 else 0.0  # noqa: E731
    yield Case("cvt.rn.relu.bf16x2.f32", "bf16x2", ("f32", "f32"),
               lambda a, b: to_small(float(relu(a)), "bf16") << 16 | to_small(float(relu(b)), "bf16"))  # fmt: skip
    yield Case("cvt.rn.f16.f64", "f16", ("f64",), lambda x: to_small(float(x), "f16"))
    for t in ("e4m3", "e5m2"):
        yield Case(f"cvt.rn.satfinite.{t}x2.f32", f"{t}x2", ("f32", "f32"),
                   lambda a, b, t=t: to_small(float(a), t) << 8 | to_small(float(b), t))  # fmt: skip
        wide = lambda bits, t=t: to_small(from_small(bits, t), "f16")  # noqa: E731
        yield Case(f"cvt.rn.f16x2.{t}x2", "f16x2", (f"{t}x2",), lambda x, f=wide: f(x >> 8) << 16 | f(x & 255))
    narrow = lambda bits: to_small(from_small(bits, "f16"), "e4m3")  # noqa: E731
    yield Case(
        "cvt.rn.satfinite.e4m3x2.f16x2", "e4m3x2", ("f16x2",), lambda x: narrow(x >> 16) << 8 | narrow(x & 0xFFFF)
    )


# ---------------------------------------------------------------------------------------------------------- conversions

INTEGERS = [f"{s}{b}" for s in "su" for b in (8, 16, 32, 64)]
TOWARDS = {"rn": round, "rz": math.trunc, "rm": math.floor, "rp": math.ceil}


def limits(kind: str) -> tuple[int, int]:
    bits = bits_of(kind)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind[0] == "s" else (0, 2**bits - 1)


def clamped(x: float, how: str, to: str, source: str) -> int:
    """A float to an integer: NaN is 0, or the smallest signed value if either side has 64 bits; the rest is clamped."""
    low, high = limits(to)
    if math.isnan(x):
        return 2 ** (bits_of(to) - 1) if 64 in (bits_of(to), bits_of(source)) else 0
    return min(max(TOWARDS[how](x) if math.isfinite(x) else (high if x > 0 else low), low), high)


def directed(x: int | Fraction, how: str, kind: type) -> np.floating:
    near = rounded(Fraction(x), kind) if x else kind(0)
    exactly = Fraction(float(near)) if np.isfinite(near) else Fraction(2) ** 1100 * (1 if near > 0 else -1)
    above, below = exactly > x, exactly < x
    down = how == "rm" or (how == "rz" and x > 0)
    up = how == "rp" or (how == "rz" and x < 0)
    if down and above:
        return np.nextafter(near, kind(-np.inf))
    return np.nextafter(near, kind(np.inf)) if up and below else near


def conversions() -> Iterator[Case]:
    for d in INTEGERS:
        for s in INTEGERS:
            yield Case(f"cvt.{d}.{s}", d, (s,), lambda x: x)
            yield Case(f"cvt.sat.{d}.{s}", d, (s,), lambda x, d=d: min(max(x, limits(d)[0]), limits(d)[1]))
        for how in TOWARDS:
            for s in ("f32", "f64"):
                f = lambda x, h=how, d=d, s=s: clamped(float(x), h, d, s)  # noqa: E731
                for sat in ("", "sat."):
                    yield Case(f"cvt.{how}i.{sat}{d}.{s}", d, (s,), f)
                    if s == "f32":
                        yield Case(f"cvt.{how}i.ftz.{sat}{d}.{s}", d, (s,), lambda x, f=f: f(flushed(x)))
            for s in ("f16", "bf16"):
                f = lambda x, h=how, d=d, s=s: clamped(from_small(x, s), h, d, s)  # noqa: E731
                for sat in ("", "sat."):
                    yield Case(f"cvt.{how}i.{sat}{d}.{s}", d, (s,), f)
            yield Case(f"cvt.{how}.f32.{d}", "f32", (d,), lambda x, h=how: directed(x, h, np.float32))
            yield Case(f"cvt.{how}.f64.{d}", "f64", (d,), lambda x, h=how: directed(x, h, np.float64))
        for t in ("f16", "bf16"):
            yield Case(f"cvt.rn.{t}.{d}", t, (d,), lambda x, t=t: to_small(float(x), t))


def float_conversions() -> Iterator[Case]:
    yield Case("cvt.f64.f32", "f64", ("f32",), np.float64)
    yield Case("cvt.ftz.f64.f32", "f64", ("f32",), lambda x: np.float64(flushed(x)))
    for how in TOWARDS:

        def narrow(x: np.float64, how: str = how) -> np.float32:
            return directed(Fraction(float(x)), how, np.float32) if np.isfinite(x) and x else np.float32(x)

        yield Case(f"cvt.{how}.f32.f64", "f32", ("f64",), narrow)
        yield Case(f"cvt.{how}.ftz.f32.f64", "f32", ("f64",), lambda x, f=narrow: flushed(f(x)))
        whole = {"rn": np.rint, "rz": np.trunc, "rm": np.floor, "rp": np.ceil}[how]
        yield Case(f"cvt.{how}i.f32.f32", "f32", ("f32",), whole)
        yield Case(f"cvt.{how}i.ftz.f32.f32", "f32", ("f32",), lambda x, f=whole: f(flushed(x)))
        yield Case(f"cvt.{how}i.f64.f64", "f64", ("f64",), whole)
    unit = lambda x: np.float32(0) if np.isnan(x) else min(max(x, np.float32(0)), np.float32(1))  # noqa: E731
    yield Case("cvt.sat.f32.f32", "f32", ("f32",), unit)
    yield Case("cvt.sat.ftz.f32.f32", "f32", ("f32",), lambda x: unit(flushed(x)))
    yield Case("cvt.ftz.f32.f32", "f32", ("f32",), flushed)


# ---------------------------------------------------------------------------------------------------------- comparisons

ORDERED = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def comparisons() -> Iterator[Case]:
    for bits in (16, 32, 64):
        for t in (f"s{bits}", f"u{bits}", f"b{bits}"):
            names = list(ORDERED)[: 2 if t[0] == "b" else 6]
            table = {n: ORDERED[n] for n in names} | (
                {n: ORDERED[o] for n, o in UNSIGNED.items()} if t[0] == "u" else {}
            )
            yield from combined(table, t, t)
    number = lambda a, b: not (np.isnan(a) or np.isnan(b))  # noqa: E731
    table = {n: lambda a, b, f=f: number(a, b) and f(a, b) for n, f in ORDERED.items()}
    table |= {f"{n}u": lambda a, b, f=f: not number(a, b) or f(a, b) for n, f in ORDERED.items()}
    table |= {"num": number, "nan": lambda a, b: not number(a, b)}
    yield from combined(table, "f32", "f32")
    yield from combined(table, "f64", "f64")
    yield from combined({n: lambda a, b, f=f: f(flushed(a), flushed(b)) for n, f in table.items()}, "ftz.f32", "f32")


def combined(table: dict[str, Reference], suffix: str, t: str) -> Iterator[Case]:
    for name, f in table.items():
        yield Case(f"setp.{name}.{suffix}", "pred", (t, t), f)
        for how, g in {"and": lambda x, p: x and p, "or": lambda x, p: x or p, "xor": lambda x, p: x != p}.items():
            yield Case(
                f"setp.{name}.{how}.{suffix}", "pred", (t, t, "pred"), lambda a, b, p, f=f, g=g: g(bool(f(a, b)), p)
            )


FAMILIES = {
    f.__name__: f
    for f in (
        integers,
        bit_tricks,
        floats,
        approximate,
        halves,
        small_conversions,
        conversions,
        float_conversions,
        comparisons,
    )
}


@pytest.mark.parametrize("family", FAMILIES)
def test_arithmetic(family: str) -> None:
    wrong = [line for case in FAMILIES[family]() for line in differing(case)]
    assert not wrong, "\n".join(wrong[:40])


def covered() -> set[str]:
    """Handlers that FAMILIES runs."""
    return {bind(c.opcode, (Label("_"),) * (1 + len(c.sources))).handler for f in FAMILIES.values() for c in f()}
