"""One PTX instruction in a kernel of its own, run by ptxsim on edge values and random ones, beside a reference."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ptxsim import Memory, Module, Options
from ptxsim.types import width

LANES = 128
Reference = Callable[..., object]


@dataclass(frozen=True)
class Case:
    """d = opcode(sources...), types as PTX names them; an int among the sources is an immediate."""

    opcode: str
    result: str
    sources: tuple[str | int, ...]
    reference: Reference
    close: float = 0.0  # relative, for approximate functions


# ----------------------------------------------------------------------------------------------------- values and types


def bits_of(kind: str) -> int:
    return {"pred": 32, "f16x2": 32, "bf16x2": 32, "f16": 16, "bf16": 16, "e4m3x2": 16, "e5m2x2": 16}.get(
        kind, 8 * width(kind) if re.fullmatch(r"[busf]\d+", kind) else 0
    )


def unsigned(bits: int) -> np.dtype:
    return np.dtype(f"u{bits // 8}")


def values(kind: str, seed: int) -> np.ndarray:
    """LANES values of a type, as bits."""
    rng = np.random.default_rng(seed)
    bits = bits_of(kind)
    if kind == "pred":
        return rng.integers(0, 2, LANES).astype(np.uint32)
    if kind in ("f32", "f64"):
        dtype = np.dtype(np.float32 if kind == "f32" else np.float64)
        info = np.finfo(dtype)
        edges = [0.0, -0.0, 1, -1, 0.5, 1.5, 2.5, -2.5, 127.5, 448, 1e5, 3e9, -3e9, 2e19, -1e19, math.pi, np.nan,
                 np.inf,
                 -np.inf, info.max, info.tiny, info.smallest_subnormal, -info.smallest_subnormal * 5]  # fmt: skip
        scale = 2.0 ** rng.integers(-20, 20, LANES)
        drawn = (rng.standard_normal(LANES) * scale).astype(dtype)
        drawn[:64] = rng.permutation(np.resize(np.array(edges, dtype), 64))
        return drawn.view(unsigned(bits))
    drawn = np.frombuffer(rng.bytes(LANES * bits // 8), unsigned(bits))
    edges = [0, 1, 2, 31, 32, 33, 255, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1, 2**bits - 2]
    result = drawn.copy()
    result[:66] = rng.permutation(np.resize(np.array(edges, dtype=np.uint64), 66)).astype(unsigned(bits))
    return result


def decode(bits: np.ndarray, kind: str) -> list:
    """Bits as what a reference works on: int, bool, numpy float; halves and smaller stay bits."""
    if kind == "pred":
        return [bool(b) for b in bits]
    if kind == "f32":
        return list(bits.view(np.float32))
    if kind == "f64":
        return list(bits.view(np.float64))
    if kind[0] == "s":
        return [int(b) for b in bits.view(bits.dtype.str.replace("u", "i"))]
    return [int(b) for b in bits]


def encode(results: list, kind: str) -> np.ndarray:
    if kind in ("f32", "f64"):
        return np.array(results, np.float32 if kind == "f32" else np.float64).view(unsigned(bits_of(kind)))
    mask = (1 << bits_of(kind)) - 1
    return np.array([int(r) & mask for r in results], unsigned(bits_of(kind)))


# ------------------------------------------------------------------------------------------------------ the test kernel


def register(kind: str) -> str:
    bits = max(16, bits_of(kind))
    return {"f32": "f32", "f64": "f64"}.get(kind, f"b{bits}")


def kernel(case: Case) -> str:
    """A module with one entry, in which each thread loads its sources, executes the opcode and stores the result."""
    body, names = [], []
    params = [f".param .u64 p{i}" for i in range(len(case.sources) + 1)]
    for i, kind in enumerate(case.sources):
        if isinstance(kind, int):
            names.append(str(kind))
            continue
        size = bits_of(kind) // 8
        body += [f".reg .{register(kind)} s{i};", f"ld.param.u64 a, [p{i}];", f"mad.wide.u32 a, t, {size}, a;"]
        body += [f"ld.global.b{8 * size} s{i}, [a];"]
        if kind == "pred":
            body += [f".reg .pred q{i};", f"setp.ne.u32 q{i}, s{i}, 0;"]
        names.append(f"q{i}" if kind == "pred" else f"s{i}")
    size = bits_of(case.result) // 8
    out = "d"
    if case.result == "pred":
        body += [".reg .pred d;", ".reg .b32 d32;"]
    else:
        body += [f".reg .{register(case.result)} d;"]
    body += [f"{case.opcode} d, {', '.join(names)};"]
    if case.result == "pred":
        body += ["selp.u32 d32, 1, 0, d;"]
        out = "d32"
    last = len(case.sources)
    body += [
        f"ld.param.u64 a, [p{last}];",
        f"mad.wide.u32 a, t, {size}, a;",
        f"st.global.b{8 * size} [a], {out};",
        "ret;",
    ]
    head = f".version 9.0\n.target sm_89\n.address_size 64\n.visible .entry k({', '.join(params)})\n"
    return head + "{\n.reg .u64 a;\n.reg .u32 t;\nmov.u32 t, %tid.x;\n" + "\n".join(body) + "\n}\n"


def run(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """(what the executor gives, what the reference gives), as bits."""
    memory = Memory()
    sources = [values(k, seed) if isinstance(k, str) else None for seed, k in enumerate(case.sources)]
    buffers = [memory.put(s if s is not None else np.zeros(1, np.uint8)) for s in sources]
    out = memory.empty(LANES, unsigned(bits_of(case.result)))
    report = Module(kernel(case)).launch("k", (1,), (LANES,), [*buffers, out], memory, options=Options(races=False))
    assert report.clean, report
    columns = [decode(s, k) if s is not None else [k] * LANES for s, k in zip(sources, case.sources, strict=True)]
    with np.errstate(all="ignore"):
        expected = encode([case.reference(*row) for row in zip(*columns, strict=True)], case.result)
    return out.array, expected


def differing(case: Case) -> list[str]:
    """Where the two differ; NaNs of floats are alike."""
    got, expected = run(case)
    wrong = got != expected
    if case.result in ("f32", "f64"):
        dtype = np.float32 if case.result == "f32" else np.float64
        a, b = got.view(dtype), expected.view(dtype)
        with np.errstate(all="ignore"):
            alike = np.abs(a - b) <= case.close * np.abs(b) if case.close else False
        wrong &= ~((np.isnan(a) & np.isnan(b)) | alike)
    sources = [values(k, seed) if isinstance(k, str) else np.full(LANES, k) for seed, k in enumerate(case.sources)]
    return [
        f"{case.opcode}({', '.join(hex(int(s[i])) for s in sources)}): "
        f"expected {int(expected[i]):#x}, got {int(got[i]):#x}"
        for i in np.flatnonzero(wrong)[:3]
    ]
