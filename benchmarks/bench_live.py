"""What steering costs: a change of prompt until it is seen, in units and in milliseconds, paced and not; going back;
branching; snapshots, their size and their time; the hook for traces, on and off.

The embedded student, one thread, decoding included. `pytest benchmarks/bench_live.py -s` prints the sheets, and
`--benchmark-json` keeps them.
"""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from time import perf_counter, process_time
from typing import Literal

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import cfrt
from benchmarks.bench_stream import MODEL, PROMPT, sheet
from cfrt.trace import off

OTHER = "a small blue square moving up"
PAST = 120
"""Units before anything is measured: half a minute of video."""

ROUNDS = 10


@pytest.fixture
def stream() -> Iterator[cfrt.Stream]:
    with cfrt.Stream(PROMPT, model=MODEL, threads=1, fps="max") as made:
        advance(made, PAST)
        yield made


def advance(stream: cfrt.Stream, units: int) -> None:
    """Watches so many units."""
    for _ in stream.frames(
        stream.config.first_frame(stream.unit + 1 + units) - stream.config.first_frame(stream.unit + 1)
    ):
        pass


@pytest.mark.parametrize("fps", [None, "max"], ids=["paced", "max"])
@pytest.mark.parametrize("recache", [False, True], ids=["", "recache"])
def test_change_to_pixel(benchmark: BenchmarkFixture, fps: Literal["max"] | None, recache: bool) -> None:
    """From the call to the first frame that follows it. Paced, most of it is the rest of the unit on show, which is
    never cut: on average half a unit, one at the most."""
    with cfrt.Stream(PROMPT, model=MODEL, threads=1, fps=fps) as stream:
        frames, texts, units, wait = stream.frames(), cycle((OTHER, PROMPT)), [], np.random.default_rng(0)
        index = [next(frames).index for _ in range(9)][-1]

        def change() -> None:
            nonlocal index
            unit = stream.prompt(next(texts), recache=recache).unit
            called = index
            while index < stream.config.first_frame(unit):
                index = next(frames).index
            units.append((index - called) / stream.config.unit_frames(1))

        def anywhere() -> None:
            nonlocal index
            for _ in range(wait.integers(1, 9)):
                index = next(frames).index

        rounds = 40 if fps is None else 200
        benchmark.pedantic(change, setup=anywhere, rounds=rounds)
        ms = 1000 * np.array(benchmark.stats.stats.data)
        values = {
            **{f"p{q} (ms)": float(np.percentile(ms, q)) for q in (50, 95)},
            **{f"p{q} (units)": float(np.percentile(units, q)) for q in (50, 95)},
            "unit p50 (ms)": 1000 * stream.stats.unit.p50,
        }
        pace = f"{stream.config.fps:.0f} fps" if fps is None else "as fast as it goes"
        sheet(benchmark, f"change to pixel, {pace}{', recache' if recache else ''}", values)
        assert max(units) <= 1 + 1 / stream.config.unit_frames(1)


@pytest.mark.parametrize("units", [1, 16, 100])
def test_rewind(benchmark: BenchmarkFixture, stream: cfrt.Stream, units: int) -> None:
    """The call alone; the frames behind it cost what frames cost."""
    benchmark.pedantic(lambda: stream.rewind(units), setup=lambda: advance(stream, units), rounds=20)
    per_unit = stream.stats.journal_bytes / (stream.unit + 1)
    sheet(benchmark, f"rewind by {units} unit{'s' if units > 1 else ''}", {"journal (bytes a unit)": per_unit})


def test_branch(benchmark: BenchmarkFixture, stream: cfrt.Stream) -> None:
    """Until the second stream's first frame."""
    branches: list[cfrt.Stream] = []

    def branch() -> None:
        branches.append(stream.branch())
        next(branches[-1].frames())

    benchmark.pedantic(branch, teardown=lambda: branches.pop().close(), rounds=20)
    sheet(benchmark, "branch and its first frame", {})


@pytest.mark.parametrize("portable", [False, True], ids=["exact", "portable"])
def test_snapshot(benchmark: BenchmarkFixture, stream: cfrt.Stream, portable: bool, tmp_path: Path) -> None:
    """Taking one and going on from it; a portable one also through a file."""
    begin = perf_counter()
    snapshot = stream.snapshot(portable=portable)
    taken = perf_counter()
    values: dict[str, float] = {}
    if portable:
        snapshot.save(tmp_path / "snapshot")
        saved = perf_counter()
        cfrt.Snapshot.load(tmp_path / "snapshot")
        values = {
            "file (kB)": (tmp_path / "snapshot").stat().st_size / 1000,
            "save (ms)": 1000 * (saved - taken),
            "load (ms)": 1000 * (perf_counter() - saved),
        }
    benchmark.pedantic(lambda: stream.restore(stream.snapshot(portable=portable)), rounds=20, warmup_rounds=1)
    sheet(
        benchmark,
        f"{'portable' if portable else 'exact'} snapshot, taken and restored",
        {"first one (ms)": 1000 * (taken - begin), **values},
    )


def test_the_hook_for_traces(benchmark: BenchmarkFixture) -> None:
    """A stage under the hook that does nothing, and a unit with a trace beside one without."""
    units: dict[str, list[float]] = {"without": [], "with": []}
    with (
        cfrt.Stream(PROMPT, model=MODEL, threads=1, fps="max") as plain,
        cfrt.Stream(PROMPT, model=MODEL, threads=1, fps="max", trace=cfrt.Trace()) as traced,
    ):
        for _ in range(ROUNDS):
            for name, one in (("without", plain), ("with", traced)):
                begin = process_time()
                advance(one, PAST)
                units[name].append((process_time() - begin) / PAST)

    def stage() -> None:
        with off("noise"):
            pass

    benchmark(stage)
    title = "one stage under the hook that does nothing; a unit with a trace and without"
    sheet(benchmark, title, {f"{name} (ms a unit)": 1000 * float(np.median(times)) for name, times in units.items()})
