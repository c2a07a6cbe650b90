"""The gate on the machine code of the CUDA kernels: what would make them slow is a failure, without a GPU.

    python -m benchmarks.sass_gate [--json FILE] [--update] [--figures cfrt/sass.json]

Reads the installed `_cfrt` (any architectures that it was built for): registers, spills, shared memory, blocks a
multiprocessor, opcodes that must and must not be there, and the predicted rates of benchmarks/sass.py. Where nvcc is,
the executor counts bank conflicts and sectors too (benchmarks/traffic.py). Compared with sass_budgets.json, which
--update writes, and with what the same model says of the best published kernels. TFLOP/s are
predicted for an RTX 4090 at 2.52 GHz, for a grid in balance; `balance` is the share of time in which a shape's grid
keeps all multiprocessors at work.

slots_per_mma and tflops_low leave two blocks out that a loop skips nearly always: the mask of a frame's last granule
(one granule in 25 at 1,560 tokens and 64 keys a granule) and, in bf16, the rescaling of the sums (once per query, in
the executor's counts). The names that end in _with_cold count them as if they ran every time.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import _cfrt

from . import sass

BUDGETS = Path(__file__).with_name("sass_budgets.json")
HEADS, FRAME_TOKENS = 12, 1560
SHAPES = {f"Q {q} KV {kv}": (q, kv) for q in (FRAME_TOKENS, 3 * FRAME_TOKENS) for kv in (14040, 32760)}
SLACK = 1.03
LOCAL, DOUBLE, BYTES = ("LDL", "STL"), ("DADD", "DMUL", "DFMA", "DSETP"), ("LDG.E.U8", "STG.E.U8", "LDG.E.S8")


@dataclass(frozen=True)
class Kernel:
    """One instantiation, out of its mangled name."""

    name: str
    head_dim: int | None = None
    accumulate: str | None = None
    dynamic_shared: int = 0
    threads: int = 128


def kernel_of(mangled: str) -> Kernel:
    name = next(n for n in _NAMES if n in mangled)
    found = re.search(r"ILi(\d+)E(?:Lb([01])E)?", mangled)
    if name in ("quantise_rows", "value_scales", "combine_kernel"):
        return Kernel(name, threads=256)
    if not found or name in ("pixels_kernel", "renoise_kernel"):
        element, whole = re.search(r"kernelI(f|6__half|13__nv_bfloat16)(?:Lb([01]))?", mangled).groups()  # type: ignore[union-attr]
        element = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}[element]
        return Kernel(f"{name}_{element}" + ("_misaligned" if whole == "0" else ""))
    dim, flag = int(found[1]), found[2] == "1"
    if name == "attention_bf16":
        return Kernel("attention_bf16_rows" if flag else "ring_attention_bf16", dim, "fp32", (128 + 2 * 32) * 2 * dim)
    if name == "attention_int8_fp8":
        return Kernel("ring_attention_int8_fp8", dim, "fp16" if flag else "fp32", 2 * 128 * dim)
    if name == "append_rows":
        return Kernel("append_int8" if flag else "append_bf16", dim)
    return Kernel(name, dim)


_NAMES = ("attention_bf16", "attention_int8_fp8", "attention_merge", "append_rows", "quantise_granule", "quantise_rows",
          "value_scales", "combine_kernel", "pixels_kernel", "renoise_kernel")  # fmt: skip

# (kernel, accumulate) -> most slots per product and least TFLOP/s (low) for heads of 128 on an RTX 4090, with whose the
# same model finds them: FlashAttention-2, SageAttention2, SageAttention2++.
GOALS = {
    ("ring_attention_bf16", "fp32"): (3.1, 151),
    ("ring_attention_int8_fp8", "fp32"): (5.3, 360),
    ("ring_attention_int8_fp8", "fp16"): (6.4, 472),
}
NEEDED = {
    "ring_attention_bf16": ("HMMA", "LDSM", "LDGSTS"),
    "ring_attention_int8_fp8": ("IMMA", "QMMA", "LDSM", "LDGSTS"),
}


MOST = {"bank_ratio": 1, "sector_ratio": 1.1}
"""Misaligned arrays, which are written element by element, apart."""

Moved = Mapping[Kernel, dict[str, float]]


def balance(queries: int, keys: int) -> float:
    frames = keys // FRAME_TOKENS
    pieces = [(0, FRAME_TOKENS)] * frames
    splits, _ = _cfrt.cuda.plan(queries=queries, heads=HEADS, dim=128, pieces=pieces, processors=sass.PROCESSORS)
    granules, blocks = -(-FRAME_TOKENS // 32) * frames, -(-queries // 128) * HEADS
    turns = -(-blocks * splits // sass.PROCESSORS)
    return queries / 128 * HEADS * granules / sass.PROCESSORS / (turns * -(-granules // splits))


def traffic() -> Moved:
    """Bank and sector ratios of each kernel; nothing where there is no nvcc."""
    if shutil.which("nvcc") is None:
        return {}
    from .traffic import measure  # which brings the tests

    return {kernel_of(name): vars(found) for name, found in measure().items()}


def examine(file: Path, arch: int, moved: Moved = MappingProxyType({})) -> list[dict[str, Any]]:
    """One row for each kernel, and for attention for each shape. moved: what `traffic` gives."""
    rows, used = [], sass.resources(file, arch)
    for mangled, code in sass.disassemble(file, arch).items():
        kernel = kernel_of(mangled)
        if arch < 89 and kernel.name in ("ring_attention_int8_fp8", "quantise_granule"):
            continue  # refused by the launcher: no product of e4m3
        registers, static = used[mangled]
        shared = static + kernel.dynamic_shared
        row = {"kernel": kernel.name, "arch": arch, "head_dim": kernel.head_dim, "accumulate": kernel.accumulate,
               "shape": None, "registers": registers, "spills": sum(i.base in LOCAL for i in code), "shared": shared,
               "blocks": sass.blocks_of(registers, shared, kernel.threads) if arch in (86, 89, 120) else None,
               "slots_per_mma": None, "slots_per_mma_with_cold": None, "tflops_low": None,
               "tflops_low_with_cold": None, "tflops_high": None, "balance": None,
               "bank_ratio": None, "sector_ratio": None, **moved.get(kernel, {}),
               "opcodes": opcodes(kernel, arch, code)}  # fmt: skip
        rows += [row] if kernel.accumulate is None else attention_rows(row, sass.predict(code))
    return rows


def opcodes(kernel: Kernel, arch: int, code: sass.Code) -> list[str]:
    """What must not be there, or is missing. Re-noise computes in fp64, as the host does; its sine has a slow path."""
    needed = NEEDED.get(kernel.name, ())
    patterns = BYTES if kernel.name.startswith("renoise") else () if "pixels" in kernel.name else (*DOUBLE, *BYTES)
    if arch in (90, 100):  # e4m3 products of a warp become fp16 ones there; wgmma and tcgen05 alone have their own
        needed = tuple(op for op in needed if op != "QMMA")
    bases = {i.base for i in code}
    return [*sass.forbidden(code, patterns), *(f"no {op}" for op in needed if op not in bases)]


def attention_rows(row: dict[str, Any], prediction: sass.Prediction) -> list[dict[str, Any]]:
    rates = prediction.tflops if row["arch"] == 89 else None
    found = {"slots_per_mma": round(prediction.slots_per_mma, 2),
             "slots_per_mma_with_cold": round(prediction.slots_per_mma_with_cold, 2)}  # fmt: skip
    if rates is None:
        return [row | found]
    found |= {"tflops_low": round(rates[0], 1), "tflops_high": round(rates[1], 1),
              "tflops_low_with_cold": round(prediction.tflops_with_cold or 0, 1)}  # fmt: skip
    return [row | found | {"shape": name, "balance": round(balance(*shape), 3)} for name, shape in SHAPES.items()]


# ---------------------------------------------------------------------- verdicts


def key(row: dict[str, Any]) -> str:
    return " ".join(str(row[name]) for name in ("kernel", "arch", "head_dim", "accumulate") if row[name] is not None)


def complaints(row: dict[str, Any], budgets: dict[str, dict[str, Any]]) -> list[str]:
    said = [f"opcode {opcode}" for opcode in row["opcodes"]]
    if row["spills"] and not row["kernel"].startswith("renoise"):
        said.append(f"{row['spills']} accesses to spilled registers")
    for name, most in MOST.items():
        if row[name] is not None and row[name] > most and not row["kernel"].endswith("misaligned"):
            said.append(f"{name} {row[name]}, more than {most}")
    budget = budgets.get(key(row))
    if budget is None:
        return [*said, "it has no budget; --update writes one"]
    for name, slack in (("registers", 1), ("shared", 1), ("slots_per_mma", SLACK)):
        if row[name] is not None and row[name] > budget[name] * slack:
            said.append(f"{name} {row[name]} over the budget of {budget[name]}")
    goal = GOALS.get((row["kernel"], row["accumulate"]))
    if goal and row["head_dim"] == 128 and row["arch"] == 89:
        if row["slots_per_mma"] > goal[0]:
            said.append(f"{row['slots_per_mma']} slots a product, more than {goal[0]}")
        if row["tflops_low"] < goal[1]:
            said.append(f"predicted {row['tflops_low']} TFLOP/s at least, less than {goal[1]}")
        if row["blocks"] < 2:
            said.append("only one block a multiprocessor")
        if row["balance"] < 0.9 and row["shape"].startswith(f"Q {FRAME_TOKENS} "):
            said.append(f"balance {row['balance']}, less than 0.9")
    return said


def verdict(rows: list[dict[str, Any]], budgets: dict[str, dict[str, Any]]) -> list[str]:
    return [f"{key(row)} {row['shape'] or ''}: {said}" for row in rows for said in complaints(row, budgets)]


FIGURES = ("kernel", "head_dim", "accumulate", "slots_per_mma", "slots_per_mma_with_cold", "tflops_low",
           "tflops_low_with_cold", "tflops_high")  # fmt: skip


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What cfrt/predict.py needs to know of attention on an RTX 4090, once for each kernel."""
    found = {key(row): {name: row[name] for name in FIGURES} for row in rows if row["tflops_low"] is not None}
    made = {"made_by": "python -m benchmarks.sass_gate --figures", "label": "predicted", "arch": 89}
    return made | {"gigahertz": sass.GIGAHERTZ, "processors": sass.PROCESSORS, "rows": list(found.values())}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--update", action="store_true", help="write what is found as the budgets")
    parser.add_argument("--figures", type=Path, help="where to write the rates that cfrt bench --predict ships with")
    options = parser.parse_args(arguments)
    cuda = _cfrt.build_info()["cuda"]
    if cuda is None:
        raise SystemExit("this _cfrt was built without CUDA; reinstall cfrt with CFRT_CUDA=ON in the environment")
    moved = traffic()
    if not moved:
        print("no nvcc on PATH: bank conflicts and sectors are not counted")
    rows = [row for arch in cuda["archs"] for row in examine(Path(_cfrt.__file__), arch, moved)]
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    if options.update:
        names = ("registers", "shared", "slots_per_mma")
        budgets |= {key(row): {name: row[name] for name in names if row[name] is not None} for row in rows}
        BUDGETS.write_text(json.dumps(dict(sorted(budgets.items())), indent=1) + "\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.figures:
        options.figures.write_text(json.dumps(figures(rows), indent=1) + "\n")
    failures = verdict(rows, budgets)
    for row in rows:
        rate = "" if row["tflops_low"] is None else f"{row['tflops_low']}-{row['tflops_high']} TFLOP/s (predicted)"
        slots = "" if row["slots_per_mma"] is None else f"{row['slots_per_mma']} slots a product"
        print(f"{key(row):42} {row['shape'] or '':16} {row['registers']:4} registers {slots:23} {rate}")
    print("\n".join(failures) or f"{len(rows)} rows, all within their budgets")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
