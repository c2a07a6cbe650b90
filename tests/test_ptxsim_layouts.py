"""mma.sync and ldmatrix of ptxsim against CuTe's traits: which lane holds which element, as NVIDIA wrote it down."""

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from ptxsim import Memory, Module, compiler

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("nvcc")]

SOURCE = Path(__file__).with_name("ptxsim_layouts.cpp")
HEAD = ".version 9.0\n.target sm_89\n.address_size 64\n"
SMALL = {"f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
MULTIPLICATIONS = (
    "m16n8k16.row.col.f32.bf16.bf16.f32",
    "m16n8k16.row.col.f32.f16.f16.f32",
    "m16n8k16.row.col.f16.f16.f16.f16",
    "m16n8k32.row.col.s32.s8.s8.s32",
    "m16n8k32.row.col.f32.e4m3.e4m3.f32",
    "m16n8k32.row.col.f32.e5m2.e5m2.f32",
    "m16n8k32.row.col.f16.e4m3.e4m3.f16",
)


@cache
def layouts() -> dict[tuple[str, str], np.ndarray]:
    """{(atom, part): element of each [lane, value]}."""
    found = importlib.util.find_spec("cutlass_library")
    if found is None:
        pytest.skip("needs CuTe's headers: pip install nvidia-cutlass")
    include = Path(found.submodule_search_locations[0]) / "source" / "include"

    def make(folder: Path) -> None:
        compiler.run(compiler.nvcc(), "-std=c++17", "-x", "c++", "-I", include, SOURCE, "-o", folder / "layouts")

    program = compiler.cached([compiler.nvcc(), str(include), SOURCE.read_bytes()], make) / "layouts"
    lines = [line.split() for line in compiler.run(program).splitlines()]
    return {(atom, part): np.array(numbers, int).reshape(32, -1) for atom, part, *numbers in lines}


def to_bits(x: np.ndarray, kind: str) -> np.ndarray:
    """Numbers of a PTX type as unsigned integers of its width."""
    if kind in SMALL:
        small = torch.from_numpy(x.astype(np.float64)).to(SMALL[kind])
        return (
            small.view(torch.uint8 if kind[0] == "e" else torch.int16)
            .numpy()
            .view(np.uint8 if kind[0] == "e" else np.uint16)
        )
    return x.astype({"f32": np.float32, "s32": np.int32, "s8": np.int8}[kind]).view(
        {"s8": np.uint8}.get(kind, np.uint32)
    )


def from_bits(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    return bits.view({"f32": np.float32, "s32": np.int32}[kind]).astype(np.float64)


def registers(matrix: np.ndarray, layout: np.ndarray, kind: str) -> np.ndarray:
    """[32, registers]: a matrix, its elements counted down the columns, spread over lanes by CuTe's layout."""
    return np.ascontiguousarray(to_bits(matrix.T.reshape(-1)[layout], kind)).view(np.uint32)


def multiplication(opcode: str, counts: tuple[int, int, int]) -> str:
    """A kernel that loads fragments of A, B and C, multiplies and stores D."""
    names = [[f"%{part}{i}" for i in range(n)] for part, n in zip("abcd", (*counts, counts[2]), strict=True)]
    lines = [f".reg .b32 {', '.join(n for part in names for n in part)};", ".reg .b64 at;", ".reg .b32 lane;"]
    lines += ["mov.u32 lane, %tid.x;"]
    for p, part in enumerate(names):
        lines += [f"ld.param.u64 at, [p{p}];", f"mad.wide.u32 at, lane, {4 * len(part)}, at;"]
        if p == 3:
            a, b, c, d = ("{" + ", ".join(n) + "}" for n in names)
            lines += [f"mma.sync.aligned.{opcode} {d}, {a}, {b}, {c};"]
        lines += [f"{'ld.global.b32 ' + n + ',' if p < 3 else 'st.global.b32'} [at+{4 * i}]{'' if p < 3 else ', ' + n};"
                  for i, n in enumerate(part)]  # fmt: skip
    parameters = ", ".join(f".param .u64 p{p}" for p in range(4))
    return f"{HEAD}.visible .entry k({parameters})\n{{\n" + "\n".join(lines) + "\nret;\n}\n"


@pytest.mark.parametrize("name", MULTIPLICATIONS)
def test_a_product_has_cutes_fragments(name: str) -> None:
    """Small integers, so that every type holds them and every sum is exact."""
    layout = layouts()
    shape, _, _, d, a, _, _ = name.split(".")
    k = int(shape.split("k")[1])
    rng = np.random.default_rng(k)
    A, B, C = (rng.integers(-4, 5, s) for s in ((16, k), (k, 8), (16, 8)))
    # CuTe counts B as n x k.
    parts = [
        registers(A, layout[name, "A"], a),
        registers(B.T, layout[name, "B"], a),
        registers(C, layout[name, "C"], d),
    ]
    memory = Memory()
    buffers = [memory.put(p) for p in parts]
    out = memory.empty(parts[2].shape, np.uint32)
    counts = tuple(p.shape[1] for p in parts)
    report = Module(multiplication(name, counts)).launch("k", (1,), (32,), [*buffers, out], memory)
    assert report.clean, report
    D = np.empty(128)
    D[layout[name, "C"]] = from_bits(out.array, d)
    np.testing.assert_array_equal(D.reshape(8, 16).T, A @ B + C)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_load_gives_cutes_fragments(count: int, transposed: bool) -> None:
    """Lane l names the 16 bytes at 16 (l mod 8 count): CuTe's source. What arrives where is CuTe's destination."""
    layout = layouts()
    name = f"x{count}" + (".trans" if transposed else "")
    d = [f"%d{i}" for i in range(count)]
    body = [
        ".shared .align 16 .b8 tile[512];", f".reg .b32 {', '.join(d)}, lane, at, x;", ".reg .b64 g;",
        "mov.u32 lane, %tid.x;", "ld.param.u64 g, [p0];", "mad.wide.u32 g, lane, 16, g;", "shl.b32 at, lane, 4;",
        "mov.u32 x, tile;", "add.u32 at, at, x;",
        *(line for i in range(4) for line in (f"ld.global.b32 x, [g+{4 * i}];", f"st.shared.b32 [at+{4 * i}], x;")),
        "bar.sync 0;", f"and.b32 lane, lane, {8 * count - 1};", "shl.b32 at, lane, 4;", "mov.u32 x, tile;",
        "add.u32 at, at, x;",
        f"ldmatrix.sync.aligned.m8n8.{name}.shared.b16 {{{', '.join(d)}}}, [at];",
        "mov.u32 lane, %tid.x;", "ld.param.u64 g, [p1];", f"mad.wide.u32 g, lane, {4 * count}, g;",
        *(f"st.global.b32 [g+{4 * i}], {r};" for i, r in enumerate(d)), "ret;",
    ]  # fmt: skip
    memory = Memory()
    tile = memory.put(np.arange(256, dtype=np.uint16))
    out = memory.empty((32, count), np.uint32)
    text = f"{HEAD}.visible .entry k(.param .u64 p0, .param .u64 p1)\n{{\n" + "\n".join(body) + "\n}\n"
    report = Module(text).launch("k", (1,), (32,), [tile, out], memory)
    assert report.clean, report
    # Bits of 16-bit elements, 16 apart; in CuTe the lanes beyond 8 count name what lane l mod 8 count names.
    source, target = layout[name, "from"][:, ::16], layout[name, "to"][:, ::16]
    place = {}
    for lane, bits in enumerate(source[: 8 * count]):
        place |= {bit: 8 * lane + i for i, bit in enumerate(bits)}
    expected = np.array([[place[bit] for bit in bits] for bits in target], np.uint16)
    np.testing.assert_array_equal(out.array.view(np.uint16), expected)
