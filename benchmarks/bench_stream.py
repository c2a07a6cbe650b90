"""How fast the embedded student streams, decoding included, and what the first frame costs.

The floor: at least the model's own 16 fps on two cores, and the 95th percentile of the unit time below the unit's own
duration. `pytest benchmarks/bench_stream.py -s` prints the sheet; `--benchmark-json` keeps it.
"""

import os
import platform
import subprocess
import sys
from statistics import median
from time import perf_counter
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import cfrt
from cfrt.stats import Timing

MODEL = os.environ.get("CFRT_BENCH_MODEL", "tiny")
PROMPT = "a large red circle moving left"
UNITS = 200
WARM_UNITS = 20
THREADS = (1, 2)

FIRST_FRAME = f"""
import cfrt
stream = cfrt.Stream({PROMPT!r}, model={MODEL!r}, threads=1)
next(stream.frames())
print(stream.stats.time_to_first_frame)
"""


def test_first_frame_from_process_start(benchmark: BenchmarkFixture) -> None:
    """A new interpreter, `import cfrt`, torch, weights, four denoising passes, decoding."""
    inside: list[float] = []

    def start() -> None:
        done = subprocess.run([sys.executable, "-c", FIRST_FRAME], capture_output=True, text=True, check=True)
        inside.append(float(done.stdout))

    benchmark.pedantic(start, rounds=5, warmup_rounds=1)
    sheet(benchmark, "first frame from process start", {"construction to frame (s)": median(inside)})


def test_first_frame_from_construction(benchmark: BenchmarkFixture) -> None:
    """With torch imported: weights, four denoising passes, decoding."""

    def start() -> None:
        with cfrt.Stream(PROMPT, model=MODEL, threads=1) as stream:
            next(stream.frames())

    benchmark.pedantic(start, rounds=10, warmup_rounds=2)
    sheet(benchmark, "first frame from construction", {})


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("fps", ["max", 16.0])
def test_stream(fps: Any, threads: int, benchmark: BenchmarkFixture) -> None:
    """One round is one unit handed out. At "max" the commit is part of the next unit's first pass, else it is apart."""
    with cfrt.Stream(PROMPT, model=MODEL, threads=threads, fps=fps) as stream:
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
            f"{stream.config.name}, {stream.engine}, fp32, {threads} threads, fps={fps}, decode included",
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
