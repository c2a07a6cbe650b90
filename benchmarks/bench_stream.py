"""How fast the embedded student streams, decoding included; what the first frame costs in time and memory; and whether
the ten-thousandth unit costs what the first one did.

The floor: at least the model's own 16 fps on two cores, the 95th percentile of the unit time below the unit's own
duration, the first frame half a second after the process starts. `pytest benchmarks/bench_stream.py -s` prints the
sheet; `--benchmark-json` keeps it.
"""

import os
import platform
import subprocess
import sys
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import cfrt
from benchmarks.machine import resident
from cfrt.stats import Timing

MODEL = os.environ.get("CFRT_BENCH_MODEL", "tiny")
PROMPT = "a large red circle moving left"
UNITS = 200
WARM_UNITS = 20
START = 0.5
"""Seconds from the start of a process to its first frame, at most."""

LONG, BLOCK = 10_000, 100
"""Units of the long run, and of its pieces whose medians are compared."""

DRIFT = 0.05
"""Share of the unit time by which it may drift over the long run, beyond what noise explains."""

KINDS = (("native", "auto", 1), ("native", "auto", 2), ("native", "fp32", 1), ("torch", "fp32", 1))
"""Engine, precision, threads."""

FIRST_FRAME = f"""
import cfrt, resource
stream = cfrt.Stream({PROMPT!r}, model={MODEL!r}, engine="ENGINE", threads=1)
next(stream.frames())
print(stream.stats.time_to_first_frame, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_first_frame_from_process_start(engine: str, benchmark: BenchmarkFixture) -> None:
    """A new interpreter, `import cfrt`, the engine, weights, the first unit's passes, decoding. The fastest round
    counts: what else the machine does can only add."""
    inside: list[tuple[float, float]] = []

    def start() -> None:
        code = [sys.executable, "-c", FIRST_FRAME.replace("ENGINE", engine)]
        done = subprocess.run(code, capture_output=True, text=True, check=True)
        seconds, megabytes = done.stdout.split()
        inside.append((float(seconds), float(megabytes)))

    benchmark.pedantic(start, rounds=7, warmup_rounds=1)
    seconds, megabytes = (median(values) for values in zip(*inside, strict=True))
    facts = {"construction to frame (s)": seconds, "peak memory (MB)": megabytes}
    sheet(benchmark, f"first frame from process start, {engine}", facts)
    assert benchmark.stats is not None
    assert engine != "native" or benchmark.stats.stats.min < START


def test_first_frame_from_construction(benchmark: BenchmarkFixture) -> None:
    """In a process that has streamed before: weights, the first unit's passes, decoding."""

    def start() -> None:
        with cfrt.Stream(PROMPT, model=MODEL, threads=1) as stream:
            next(stream.frames())

    benchmark.pedantic(start, rounds=10, warmup_rounds=2)
    sheet(benchmark, "first frame from construction", {})


@pytest.mark.parametrize(("engine", "precision", "threads"), KINDS)
@pytest.mark.parametrize("fps", ["max", 16.0])
def test_stream(fps: Any, engine: str, precision: str, threads: int, benchmark: BenchmarkFixture) -> None:
    """One round is one unit handed out. At "max" the commit is part of the next unit's first pass, else it is apart."""
    kind: Any = {"engine": engine, "precision": precision, "threads": threads}
    with cfrt.Stream(PROMPT, model=MODEL, fps=fps, **kind) as stream:
        units = UNITS if fps == "max" else UNITS // 5
        frames = stream.frames()
        every = stream.config.unit_frames(1)
        for _ in range(stream.config.first_frame(WARM_UNITS if fps == "max" else 2)):
            next(frames)
        begin = perf_counter()
        benchmark.pedantic(lambda: [next(frames) for _ in range(every)], rounds=units)
        reached = units * every / (perf_counter() - begin)
        stats = stream.stats
        sheet(
            benchmark,
            f"{stream.config.name}, {stream.engine}, {stream.precision}, {threads} threads, fps={fps}, decode included",
            {"fps": reached, **timings(stats), "unit duration (ms)": 1000 * stats.unit_duration},
        )
        assert stats.real_time
        assert reached >= (stream.config.fps if fps == "max" else 0.97 * stream.config.fps)


def test_change_to_pixel(benchmark: BenchmarkFixture) -> None:
    """From `prompt` to the first frame that follows it, handed out as soon as it is made."""
    with cfrt.Stream(PROMPT, model=MODEL, threads=1, fps="max") as stream:
        prompts = ["a small blue square moving up", PROMPT]
        frames = stream.frames()
        for _ in range(stream.config.first_frame(WARM_UNITS)):
            next(frames)

        def change() -> None:
            unit = stream.prompt(prompts[0]).unit
            prompts.reverse()
            while next(frames).unit < unit:
                pass

        benchmark.pedantic(change, rounds=50)
        sheet(benchmark, "change of prompt to pixel", timings(stream.stats))


def test_unit_time_is_flat(benchmark: BenchmarkFixture) -> None:
    """10,000 units in one stream: a line through the medians of blocks of 100, and how far it goes from first to last.
    Memory as well, from the thousandth unit on."""
    times: list[float] = []
    memory: list[float] = []
    with cfrt.Stream(PROMPT, model=MODEL, threads=1, fps="max", journal_bytes=2**20) as stream:
        frames, every = stream.frames(), stream.config.unit_frames(1)
        for _ in range(stream.config.first_frame(2)):
            next(frames)

        def unit() -> None:
            begin = perf_counter()
            for _ in range(every):
                next(frames)
            times.append(perf_counter() - begin)
            if len(times) in (LONG // 10, LONG):
                memory.append(resident())

        benchmark.pedantic(unit, rounds=LONG)
        title = f"{LONG} units, {stream.engine}, {stream.precision}"
    blocks = np.array([median(times[i : i + BLOCK]) for i in range(0, LONG, BLOCK)])
    drift, noise = slope(blocks)
    facts = {"drift (%)": 100 * drift, "of which noise may be (%)": 100 * noise, "growth (MB)": memory[1] - memory[0]}
    sheet(benchmark, title, {**facts, "first block (ms)": 1000 * blocks[0], "last block (ms)": 1000 * blocks[-1]})
    assert drift - noise < DRIFT
    assert memory[1] - memory[0] < 8


def slope(values: np.ndarray) -> tuple[float, float]:
    """Rise of the least-squares line from first to last, and two standard errors of it, as shares of the median."""
    x = np.linspace(-0.5, 0.5, len(values))
    rise = float(x @ values / (x @ x))
    left = values - values.mean() - rise * x
    deviation = float(np.sqrt(left @ left / (len(values) - 2) / (x @ x)))
    return rise / float(np.median(values)), 2 * deviation / float(np.median(values))


def timings(stats: cfrt.Stats) -> dict[str, float]:
    found = {}
    for name in ("latency", "unit", "decode", "commit", "change_to_pixel"):
        timing: Timing = getattr(stats, name)
        if timing.count:
            found |= {f"{name} p50 (ms)": 1000 * timing.p50, f"{name} p95 (ms)": 1000 * timing.p95}
    return found


def sheet(benchmark: BenchmarkFixture, title: str, values: dict[str, float]) -> None:
    benchmark.extra_info |= {"what": title, "cpu": platform.processor() or platform.machine(), **values}
    print(f"\n{title}: " + ", ".join(f"{name} {value:.3g}" for name, value in values.items()))
