"""Machine code of NVIDIA GPUs as text, and what it says about speed without a GPU. Every time in here is predicted.

The model, of one warp in the loop with the most matrix products: instructions issue one a clock; each of the pipes
below is busy for some clocks an instruction. `high` is the rate at which the busiest pipe is always busy; `low` is that
at which nothing but the tensor core works while it works. Clocks are those of GeForce's sm_89, from public measurements
of Ada and of sm_120. Measurements of three published kernels on an RTX 4090 lie within (TFLOP/s): FlashAttention-2 164
in [151, 165], SageAttention2 419-431 in [360, 440], SageAttention2++ 493 in [472, 661]. Three is few, and the interval
was made knowing them.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SCHEDULERS, PROCESSORS, GIGAHERTZ = 4, 128, 2.52  # RTX 4090: of a multiprocessor; multiprocessors; boost clock
TENSOR = {  # clocks, floating-point operations of a warp's instruction
    "HMMA.16816.F32.BF16": (32, 4096),
    "IMMA.16832.S8.S8": (16, 8192),
    "QMMA.16832.F32.E4M3.E4M3": (32, 8192),
    "QMMA.16832.F16.E4M3.E4M3": (16, 8192),
}
FMA = {"FFMA": 1, "FMUL": 1, "FADD": 1, "HFMA2": 1, "HADD2": 1, "HMUL2": 1, "IMAD": 2}
TRANSCENDENTAL = ("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV")
CONTROL = ("BRA", "BSSY", "BSYNC", "BAR", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "NOP", "EXIT", "CALL", "RET", "LDC",
           "ULDC", "S2R", "S2UR", "R2UR", "VOTE")  # fmt: skip
MATRIX = ("HMMA", "IMMA", "QMMA")
BUSY = (*MATRIX, "LDSM", "LDGSTS")
COLD = 24
"""A block that a branch skips forward over, of at least so many instructions and none of BUSY, is taken to be rare: the
mask of a frame's last granule, the rescaling of the sums when a maximum rises by 2^8."""


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        found = re.search(r"0x([0-9a-f]+)", self.operands)
        return int(found[1], 16) if self.base == "BRA" and found else None


Code = list[Instruction]


def tool(name: str) -> str:
    """cuobjdump and nvdisasm come from NVIDIA's wheels of those names."""
    folders = [Path(folder) / "nvidia" / "cu13" / "bin" for folder in sys.path]
    found = shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ["PATH"]]))
    if found is None:
        raise SystemExit(f"expected {name} on PATH; pip install nvidia-cuda-{name}")
    return found


def _cuobjdump(*arguments: str) -> str:
    path = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ["PATH"]])
    command = [tool("cuobjdump"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}).stdout


def disassemble(file: Path, arch: int) -> dict[str, Code]:
    """Each kernel's code, by its mangled name."""
    line = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")
    found: dict[str, Code] = {}
    code: Code = []
    for text in _cuobjdump("-sass", "-arch", f"sm_{arch}", str(file)).splitlines():
        if name := re.match(r"\s+Function : (\S+)", text):
            code = found.setdefault(name[1], [])
        elif match := line.match(text):
            code.append(Instruction(int(match[1], 16), (match[2] or "").strip(), match[3], match[4]))
    return found


def resources(file: Path, arch: int) -> dict[str, tuple[int, int]]:
    """(registers, static shared bytes) of each kernel."""
    text = _cuobjdump("-res-usage", "-arch", f"sm_{arch}", str(file))
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", text)
    return {name: (int(registers), int(shared)) for name, registers, shared in found}


# ---------------------------------------------------------------------- the model


def pipe(opcode: str) -> tuple[str, int]:
    """(pipe, clocks it is busy)."""
    base, *parts = opcode.split(".")
    if base in MATRIX:
        return "tensor", TENSOR[opcode][0]
    if base in FMA:
        return "fma", FMA[base]
    if base in TRANSCENDENTAL:
        return "transcendental", 8
    if base == "LDSM":
        return "shared", int(parts[-1])
    if base in ("LDS", "STS", "LDGSTS", "LDG", "STG"):
        return "shared", 4 if "128" in parts or base == "LDGSTS" else 2 if "64" in parts else 1
    if base == "SHFL":
        return "shared", 2
    return ("control", 1) if base in CONTROL or base.startswith("U") else ("alu", 2)


def loop(code: Code) -> Code:
    """The innermost loop with the most matrix products."""
    best: tuple[int, int, Code] = (0, 0, [])
    for last in code:
        if last.target is not None and last.target < last.address:
            body = [i for i in code if last.target <= i.address <= last.address]
            products = sum(i.base in MATRIX for i in body)
            best = max(best, (products, -len(body), body), key=lambda found: found[:2])
    return best[2]


def cold(body: Code) -> set[int]:
    """Addresses of the blocks that are rarely run."""
    rare: set[int] = set()
    for branch in body:
        target = branch.target
        if branch.predicate and target is not None and branch.address < target <= body[-1].address:
            skipped = [i for i in body if branch.address < i.address < target]
            if len(skipped) >= COLD and not any(i.base in BUSY for i in skipped):
                rare |= {i.address for i in skipped}
    return rare


@dataclass(frozen=True)
class Prediction:
    products: int
    slots_per_mma: float
    """Instructions that are no matrix products, for each that is."""
    slots_per_mma_with_cold: float
    """The same if the rare blocks ran every time."""
    tflops: tuple[float, float] | None
    """Low and high on an RTX 4090; None where the clocks of this machine code are not known."""
    tflops_with_cold: float | None
    """Low, if the rare blocks ran every time."""


def predict(code: Code) -> Prediction:
    body = loop(code)
    rare = cold(body)
    hot = [i for i in body if i.address not in rare]
    products = sum(i.base in MATRIX for i in hot)
    others = len(hot) - products
    per_mma, with_cold = others / products, (len(body) - products) / products
    if any(i.base in MATRIX and i.opcode not in TENSOR for i in hot):
        return Prediction(products, per_mma, with_cold, None, None)
    busy: Counter[str] = Counter()
    for i in hot:
        name, clocks = pipe(i.opcode)
        busy[name] += clocks * (SCHEDULERS if name == "shared" else 1)
    work = sum(TENSOR[i.opcode][1] for i in hot if i.base in MATRIX)
    rate = lambda clocks: work * SCHEDULERS * PROCESSORS * GIGAHERTZ / clocks / 1000  # noqa: E731
    slowest = max(len(hot), *(clocks for name, clocks in busy.items() if name != "control"))
    low, with_rare = rate(busy["tensor"] + others), rate(busy["tensor"] + len(body) - products)
    return Prediction(products, per_mma, with_cold, (low, rate(slowest)), with_rare)


def blocks_of(registers: int, shared: int, threads: int) -> int:
    """Blocks of sm_86, 89 and 120 that fit on a multiprocessor: 65536 registers, 100 KiB, 48 warps."""
    warps = threads // 32
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    return min(by_registers, 102400 // (shared + 1024), 48 // warps)


def forbidden(code: Code, patterns: Iterable[str]) -> Iterator[str]:
    """Opcodes among those that start with one of the patterns, with their counts."""
    counts = Counter(i.opcode for i in code if any(i.opcode.startswith(p) for p in patterns))
    return (f"{opcode} {count}" for opcode, count in sorted(counts.items()))
