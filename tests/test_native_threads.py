"""The thread pool: it takes nothing from others while it has nothing to do, and more threads than cores come through.

What it computes is in the tests of the kernels, its races in tests/test_sanitizers.py, its cost in
benchmarks/bench_kernels.py.
"""

import time

import pytest

import _cfrt

pytestmark = pytest.mark.cpu

Threads = _cfrt.kernels.Threads


def test_an_idle_pool_costs_nothing() -> None:
    """Watching for the next call ends after some tens of microseconds: beside another pool, such as torch's, the cores
    are that one's. Counted in processor time of all threads of this process, whatever else the machine does."""
    pools = [Threads(count) for count in (2, 3, 4)]
    for pool in pools:
        pool.fork_join(10)
    time.sleep(0.05)
    begin = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - begin < 0.05


def test_calls_far_apart() -> None:
    """Each finds the workers asleep."""
    pool = Threads(3)
    for _ in range(5):
        time.sleep(0.01)
        pool.fork_join(1)


@pytest.mark.parametrize("count", [1, 2, 5, 32])
def test_more_threads_than_cores(count: int) -> None:
    pool = Threads(count)
    assert pool.count == count
    pool.fork_join(100)
