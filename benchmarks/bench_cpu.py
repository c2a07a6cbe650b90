"""The native engine beside the runtimes that a user could pick instead, on the same weights and inputs.

    python -m benchmarks.bench_cpu --json F [--sizes S/64 L student] [--threads 1 2] [--engines native torch]
    pytest benchmarks/bench_cpu.py [-k "student and native"]

A row is {size, tokens, threads, engine, precision, ms, gops, error}: the median of calls taken in turns with the
others' (`rounds.py`); billions of operations a second, 2 a multiply-add, useful work only; relative L2 against an fp64
forward in PyTorch. A row whose output is wrong for its precision is no number: it says `failed`, and so does the run.

What is timed (`workload.py`): one denoising pass of one latent frame against a window of 12, at sizes S, M and L with
64 and 256 tokens a frame, 16 text tokens; the embedded student's whole unit (its passes, decoding, commit); and one
layer's attention alone, a frame against 12. `native` and `torch` read their ring in place; ONNX Runtime and OpenVINO
have no state, so keys and values are inputs and outputs (`contenders.py`): that difference is part of what is compared.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from cfrt.config import PRESETS

from . import attention, machine
from .contenders import COMPILED, CONTENDERS, build, prepare
from .rounds import CLOCKS, medians, side_by_side
from .workload import GRIDS, SIZES, STUDENT, Workload, error, workload

Row = dict[str, Any]
Case = tuple[str, int]
"""Size, tokens a frame."""

CASES: tuple[Case, ...] = ((STUDENT, 4), *((size, tokens) for size in SIZES for tokens in GRIDS))
KEY = ("size", "tokens", "threads", "engine", "precision")
WRONG = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.2}
"""Relative errors from which on an output is no answer at all. What the precisions cost is in the rows."""

CAP = 2.5
"""Seconds that a row may take, beyond the three calls that it must."""


def measure(
    work: Workload, threads: int, contenders: Sequence[tuple[str, str]], cap: float = CAP, clock: str = "wall"
) -> list[Row]:
    """The rows of one case."""
    errors: dict[tuple[str, str], float] = {}
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    rows: list[Row] = []
    for engine, precision in contenders:
        call = build(engine, precision, work, threads)
        errors[engine, precision] = error(work, call())
        if errors[engine, precision] < WRONG[precision]:
            calls[engine, precision] = call
    torch.set_num_threads(threads)
    taken = medians(side_by_side(calls, cap, clock=clock))
    for engine, precision in contenders:
        seconds, wrong = taken.get((engine, precision)), errors[engine, precision]
        row: Row = {"size": work.size, "tokens": work.tokens, "threads": threads}
        row |= {"engine": engine, "precision": precision, "ms": None, "gops": None, "error": wrong}
        if seconds is None:
            row["failed"] = f"expected an error below {WRONG[precision]} against fp64, got {wrong:.3g}"
        else:
            row |= {"ms": 1000 * seconds, "gops": work.truth.gop / seconds}
        rows.append(row)
    return rows


def ceiling() -> dict[str, float]:
    """GOP/s of one core in multiply-adds that never leave the registers, at the level that the engine would pick. The
    fastest of twenty short runs: what else the machine does can only add."""
    from _cfrt import kernels

    best: dict[str, float] = {}
    for precision in WRONG:
        for _ in range(20):
            begin = perf_counter()
            rate = kernels.ceiling(precision, 50_000) / (perf_counter() - begin) / 1e9
            best[precision] = max(rate, best.get(precision, 0.0))
    return best


# ------------------------------------------------------------------------------------------------------------- pytest


@lru_cache(1)
def _workload(size: str, tokens: int, folder: Path) -> Workload:
    return workload(size, tokens, folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workloads")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("engine", "precision"), CONTENDERS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("size", "tokens"), CASES)
def test_pass(
    size: str, tokens: int, threads: int, engine: str, precision: str, benchmark: BenchmarkFixture, folder: Path
) -> None:
    """One contender at a time; `python -m benchmarks.bench_cpu` lets them take turns, which compares better."""
    if engine in ("onnxruntime", "openvino"):
        pytest.importorskip(engine)
    work = _workload(size, tokens, folder)
    call = build(engine, precision, work, threads)
    wrong = error(work, call())
    benchmark.extra_info |= dict(zip(KEY, (size, tokens, threads, engine, precision), strict=True))
    benchmark.extra_info |= {"gop": work.truth.gop, "error": wrong}
    assert wrong < WRONG[precision]
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


# ------------------------------------------------------------------------------------------------------------ command


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    cases = [case for case in CASES if {case[0], f"{case[0]}/{case[1]}"} & set(options.sizes)]
    contenders = [each for each in CONTENDERS if each[0] in options.engines]
    contenders += COMPILED if options.compile else ()
    kept = _kept(options.json, options.clock)
    if not options.prepare and "native" in options.engines:
        kept["ceiling"] = ceiling()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for size, tokens in cases:
            work = workload(size, tokens, folder)
            if options.prepare:
                prepare(work, options.engines)
                continue
            for threads in options.threads:
                _keep(kept, measure(work, threads, contenders, options.cap, options.clock), options.json)
    if "attention" in options.sizes and not options.prepare:
        for threads in options.threads:
            _keep(kept, attention.measure(threads, options.cap, clock=options.clock), options.json)
    return 1 if any("failed" in row for row in kept["rows"]) else 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    names = {engine for engine, _ in CONTENDERS}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = [*SIZES, STUDENT, "attention"]
    parser.add_argument("--json", type=Path, metavar="F", help="keep the rows there; rows of a run before stay")
    parser.add_argument("--sizes", nargs="+", default=sizes, metavar="SIZE", help=f"of {', '.join(sizes)}, S/64 ...")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], metavar="N")
    parser.add_argument("--engines", nargs="+", default=sorted(names), choices=sorted(names), metavar="ENGINE")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well: minutes")
    parser.add_argument("--cap", type=float, default=CAP, metavar="SECONDS", help=f"for each row (default {CAP:g})")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep graphs and fp64 results there for the next run"
    )
    clocks = "processor: what one thread would take alone, for a machine that others use as well"
    parser.add_argument("--clock", choices=[*CLOCKS], default="wall", help=clocks)
    parser.add_argument("--prepare", action="store_true", help="only make what --keep keeps")
    options = parser.parse_args(argv)
    known = {*sizes, *(f"{size}/{tokens}" for size, tokens in CASES)}
    if unknown := sorted(set(options.sizes) - known):
        parser.error(f"expected --sizes out of {', '.join(sorted(known))}, got {', '.join(unknown)}")
    if options.clock == "processor" and options.threads != [1]:
        parser.error("the processor's clock adds threads up: --clock processor needs --threads 1")
    if missing := sorted(e for e in options.engines if e in ("onnxruntime", "openvino") and find_spec(e) is None):
        parser.error(f"{', '.join(missing)} not installed: pip install 'cfrt[bench]', or choose others with --engines")
    return options


def _kept(path: Path | None, clock: str = "wall") -> dict[str, Any]:
    """This machine's header and the student's steps, with the rows of the file where they are of the same day, machine
    and versions. Beside them goes the ceiling."""
    head = machine.header() | {"clock": clock, "steps": len(PRESETS["tiny"].unit_steps(1))}
    if path is None or not path.exists():
        return head | {"rows": []}
    old = json.loads(path.read_text(encoding="utf-8"))
    same = {name: old.get(name) for name in head} == head
    return head | {"rows": old["rows"] if same else []}


def _keep(kept: dict[str, Any], rows: Sequence[Row], path: Path | None) -> None:
    """Rows replace those of the same key, are printed, and written at once: a run may be cut short."""
    fresh = {tuple(row[name] for name in KEY): row for row in rows}
    old = {tuple(row[name] for name in KEY): row for row in kept["rows"]}
    kept["rows"] = list((old | fresh).values())
    for row in rows:
        print(as_text(row), flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n  ".join(json.dumps(row) for row in kept["rows"])
        head = json.dumps({name: value for name, value in kept.items() if name != "rows"}, indent=1)
        path.write_text(f'{head[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8")


def as_text(row: Row) -> str:
    name = f"{row['size']}/{row['tokens']}, {row['threads']} threads, {row['engine']} {row['precision']}"
    if "failed" in row:
        return f"{name}: FAILED, {row['failed']}"
    return f"{name}: {row['ms']:.3g} ms, {row['gops']:.0f} GOP/s, error {row['error']:.2g}"


if __name__ == "__main__":
    sys.exit(main())
