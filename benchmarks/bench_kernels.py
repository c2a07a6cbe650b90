"""The native products against what one core can do at all, and what a second thread and a call of the pool bring.

The ceiling of a level and precision is measured in the same run, by multiply-adds that never leave the registers; a
product of 64 rows or more is held to 80 % of it. Shapes: one layer of S, M and L (width 256, 384, 768, feed-forward
four times as wide) and of the embedded student (192 and 576). `pytest benchmarks/bench_kernels.py -s` prints the sheet;
`CFRT_BENCH_ISA=all` takes every level of the CPU. Times are the fastest round's: what else the machine does can only
add.
"""

import os
import platform
from collections.abc import Callable
from functools import cache
from time import perf_counter

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import _cfrt

pytestmark = pytest.mark.cpu

kernels = _cfrt.kernels
PRECISIONS = ("fp32", "bf16", "int8")
ISAS = kernels.isas() if os.environ.get("CFRT_BENCH_ISA") == "all" else [kernels.isa()]
SHARE = 0.8  # of the ceiling, at least, for a product of 64 rows or more at the best level
SPEEDUP = 1.85  # of a second thread, at least, on the products of L with 256 rows

# (rows, outputs, inputs)
LARGE = [
    (m, n, k) for width in (256, 384, 768) for m in (64, 128, 256) for n, k in [(4 * width, width), (width, 4 * width)]
]
SMALL = [(m, n, k) for m in (1, 2, 4, 8, 16) for n, k in [(576, 192), (192, 576)]]

every_isa = pytest.mark.parametrize("isa", ISAS)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)


@cache
def ceiling(precision: str, isa: str) -> float:
    """Operations a second of one core."""
    rate = 0.0
    for _ in range(20):
        begin = perf_counter()
        operations = kernels.ceiling(precision, 50_000, isa=isa)
        rate = max(rate, operations / (perf_counter() - begin))
    return rate


def product(
    m: int, n: int, k: int, precision: str, isa: str, threads: int, epilogue: str = "none"
) -> Callable[[], None]:
    """A product ready to run; its operands were written once and lie where the last round left them."""
    random = np.random.default_rng(0)
    pool = kernels.Threads(threads)
    rows = kernels.Rows(random.normal(size=(m, k)).astype(np.float32), precision, isa=isa)
    weights = kernels.Weights(random.normal(size=(n, k)).astype(np.float32), precision, isa=isa)
    bias, out = np.zeros(n, np.float32), np.zeros((m, n), np.float32)
    return lambda: kernels.gemm(rows, weights, out, bias=bias, epilogue=epilogue, threads=pool)


def fastest(benchmark: BenchmarkFixture, work: Callable[[], None]) -> float:
    """Seconds of the fastest round of some 20 ms in all."""
    begin = perf_counter()
    work()
    once = perf_counter() - begin
    benchmark.pedantic(work, rounds=max(5, min(1000, int(0.02 / once))), warmup_rounds=1)
    assert benchmark.stats is not None
    return float(benchmark.stats.stats.min)


def sheet(benchmark: BenchmarkFixture, title: str, values: dict[str, float]) -> None:
    benchmark.extra_info |= {"what": title, "cpu": platform.processor() or platform.machine(), **values}
    print(f"\n{title}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))


def shape_id(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))


@every_isa
@every_precision
@pytest.mark.parametrize("shape", LARGE + SMALL, ids=shape_id)
def test_product(shape: tuple[int, int, int], precision: str, isa: str, benchmark: BenchmarkFixture) -> None:
    m, n, k = shape
    top = ceiling(precision, isa)
    seconds = fastest(benchmark, product(m, n, k, precision, isa, threads=1))
    rate = 2 * m * n * k / seconds
    title = f"[{m}, {k}] x [{k}, {n}], {precision}, {isa}, one thread"
    sheet(benchmark, title, {"us": 1e6 * seconds, "GOP/s": rate / 1e9, "ceiling": top / 1e9, "share": rate / top})
    assert m < 64 or isa != kernels.isas()[-1] or rate >= SHARE * top


@every_precision
@pytest.mark.parametrize("epilogue", ["gelu", "silu", "add"])
def test_epilogue(epilogue: str, precision: str, benchmark: BenchmarkFixture) -> None:
    """On the first feed-forward product of L."""
    m, n, k, isa = 64, 3072, 768, ISAS[-1]
    plain = min(timed(product(m, n, k, precision, isa, 1)) for _ in range(5))
    seconds = fastest(benchmark, product(m, n, k, precision, isa, 1, epilogue))
    sheet(benchmark, f"{epilogue}, {precision}, {isa}, one thread", {"us": 1e6 * seconds, "of none": seconds / plain})


def timed(work: Callable[[], None]) -> float:
    begin = perf_counter()
    work()
    return perf_counter() - begin


@every_precision
@pytest.mark.parametrize("shape", [(256, 3072, 768), (256, 768, 3072), (64, 1024, 256), (8, 576, 192)], ids=shape_id)
def test_a_second_thread(shape: tuple[int, int, int], precision: str, benchmark: BenchmarkFixture) -> None:
    isa = ISAS[-1]
    one, two = (product(*shape, precision, isa, threads) for threads in (1, 2))
    alone = min(timed(one) for _ in range(20))
    seconds = fastest(benchmark, two)
    title = f"[{shape[0]}, {shape[2]}] x [{shape[2]}, {shape[1]}], {precision}, {isa}, two threads"
    sheet(benchmark, title, {"us": 1e6 * seconds, "speedup": alone / seconds})
    assert shape[0] < 256 or alone / seconds >= SPEEDUP


@pytest.mark.parametrize("pause", [0.0, 0.001], ids=["watching", "asleep"])
def test_fork_join(pause: float, benchmark: BenchmarkFixture) -> None:
    """An empty call on two threads: while the worker watches for it, and when it has gone to sleep."""
    pool, rounds = kernels.Threads(2), 1000 if pause == 0 else 1
    benchmark.pedantic(pool.fork_join, (rounds,), setup=lambda: sleep(pause), rounds=50, warmup_rounds=2)
    assert benchmark.stats is not None
    spent = benchmark.stats.stats.median / rounds
    sheet(benchmark, f"fork and join, {'asleep' if pause else 'watching'}, two threads", {"ns": 1e9 * spent})


def sleep(seconds: float) -> None:
    end = perf_counter() + seconds
    while perf_counter() < end:
        pass
