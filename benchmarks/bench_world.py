"""How fast the world is drawn and read back, on one thread: the floor is 2,000 drawn frames a second.

`pytest benchmarks/bench_world.py --benchmark-json FILE` keeps the numbers (`extra_info`)."""

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from training import worlds
from training.reader import read

CLIPS, FRAMES = 32, 37
DRAWN_A_SECOND = 2000  # at least
READ_MS = 15  # at most, for a clip of 37 frames


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def scene() -> worlds.Scene:
    generator = torch.Generator().manual_seed(0)
    return worlds.simulate(worlds.sample_factors(CLIPS, generator), generator, FRAMES)


def fastest(benchmark: BenchmarkFixture) -> float:
    """Seconds of the fastest round: what else the machine does can only add."""
    assert benchmark.stats is not None
    return float(benchmark.stats.stats.min)


@pytest.mark.cpu
def test_draw(benchmark: BenchmarkFixture) -> None:
    """Motion and pixels."""
    benchmark.pedantic(lambda: worlds.render(scene()), rounds=5, warmup_rounds=1)
    rate = CLIPS * FRAMES / fastest(benchmark)
    benchmark.extra_info["frames_a_second"] = rate
    assert rate >= DRAWN_A_SECOND


@pytest.mark.cpu
def test_read(benchmark: BenchmarkFixture) -> None:
    video = worlds.render(scene())
    benchmark.pedantic(lambda: read(video), rounds=5, warmup_rounds=1)
    milliseconds = 1000 * fastest(benchmark) / CLIPS
    benchmark.extra_info["ms_a_clip"] = milliseconds
    assert milliseconds <= READ_MS
