"""The gate on machine code: what is installed passes it, and what is worse does not."""

import json
from pathlib import Path
from typing import Any

import pytest

import _cfrt
from benchmarks import sass, sass_gate

pytestmark = pytest.mark.cpu


def code(*lines: str) -> sass.Code:
    """Instructions 16 bytes apart, as cuobjdump writes them without their addresses."""
    found = []
    for i, line in enumerate(lines):
        predicate = line.split()[0] if line.startswith("@") else ""
        opcode, _, operands = line.removeprefix(predicate).strip().partition(" ")
        found.append(sass.Instruction(16 * i, predicate, opcode, operands))
    return found


PRODUCT, SKIPPED = "HMMA.16816.F32.BF16 R0, R4, R8, R0", ["FMUL R1, R1, R2"] * sass.COLD


def test_a_loop_is_counted_without_what_it_rarely_runs() -> None:
    """Two products, six further instructions, and a block that a branch skips."""
    lines = ["MOV R1, R2", "LDSM.16.M88.4 R4, [R1]", "FADD R3, R3, R4", "MUFU.EX2 R3, R3", PRODUCT, PRODUCT]
    after = 16 * (len(lines) + 1 + len(SKIPPED))
    body = code(*lines, f"@P0 BRA 0x{after:x}", *SKIPPED, "BRA 0x10", "EXIT")
    found = sass.predict(body)
    assert (found.products, found.slots_per_mma) == (2, 5 / 2)
    assert found.slots_per_mma_with_cold == (5 + sass.COLD) / 2
    assert found.tflops is not None
    low, high = found.tflops
    at = lambda clocks: 2 * 4096 * 4 * 128 * 2.52 / clocks / 1000  # noqa: E731
    assert (low, high) == (pytest.approx(at(64 + 5)), pytest.approx(at(64)))


def test_blocks_of_a_multiprocessor() -> None:
    assert sass.blocks_of(255, 49152, 128) == 2
    assert sass.blocks_of(128, 60000, 128) == 1
    assert sass.blocks_of(32, 0, 1024) == 1


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    cuda = _cfrt.build_info()["cuda"]
    return [] if cuda is None else [r for arch in cuda["archs"] for r in sass_gate.examine(Path(_cfrt.__file__), arch)]


def budgets(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {sass_gate.key(r): {name: r[name] for name in ("registers", "shared", "slots_per_mma")} for r in rows}


def test_what_is_installed_passes(rows: list[dict[str, Any]]) -> None:
    """A module without CUDA has no rows, and the gate says that it cannot run."""
    if not rows:
        with pytest.raises(SystemExit, match="built without CUDA"):
            sass_gate.main([])
        return
    assert sass_gate.verdict(rows, json.loads(sass_gate.BUDGETS.read_text())) == []
    assert {row["kernel"] for row in rows} >= {"ring_attention_bf16", "append_bf16", "pixels_kernel_fp32"}


@pytest.mark.usefixtures("nvcc")
def test_the_traffic_of_every_kernel_is_counted_and_passes(rows: list[dict[str, Any]]) -> None:
    moved = sass_gate.traffic()
    assert {sass_gate.kernel_of(name) for arch in {r["arch"] for r in rows} for name in names_of(arch)} <= set(moved)
    for kernel, ratios in moved.items():
        assert ratios["bank_ratio"] == 1, kernel
        assert ratios["sector_ratio"] <= sass_gate.MOST["sector_ratio"] or kernel.name.endswith("misaligned"), kernel


def names_of(arch: int) -> list[str]:
    return list(sass.resources(Path(_cfrt.__file__), arch))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"registers": 256}, "registers 256 over the budget"),
        ({"spills": 3}, "3 accesses to spilled registers"),
        ({"slots_per_mma": 3.2}, "slots a product, more than 3.1"),
        ({"tflops_low": 150}, "predicted 150 TFLOP/s at least, less than 151"),
        ({"blocks": 1}, "only one block"),
        ({"balance": 0.6}, "balance 0.6, less than 0.9"),
        ({"bank_ratio": 1.01}, "bank_ratio 1.01, more than 1"),
        ({"sector_ratio": 1.11}, "sector_ratio 1.11, more than 1.1"),
        ({"opcodes": ["LDG.E.U8 48"]}, "opcode LDG.E.U8 48"),
    ],
    ids=str,
)
def test_what_is_worse_fails(change: dict[str, Any], complaint: str) -> None:
    row = {"kernel": "ring_attention_bf16", "arch": 89, "head_dim": 128, "accumulate": "fp32", "spills": 0, "blocks": 2,
           "shape": "Q 1560 KV 14040", "registers": 220, "shared": 49152, "slots_per_mma": 2.5, "tflops_low": 154,
           "balance": 0.91, "bank_ratio": 1, "sector_ratio": 1.02, "opcodes": []}  # fmt: skip
    assert sass_gate.complaints(row, budgets([row])) == []
    assert any(complaint in said for said in sass_gate.complaints(row | change, budgets([row])))
    assert sass_gate.complaints(row, {}) == ["it has no budget; --update writes one"]
