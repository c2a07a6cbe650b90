"""Work for several processes, its results in the order of the jobs.

Every process computes on one thread, so that results do not depend on how many there are. They end with the process
that started them, however it ends."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

import torch

from cfrt.errors import CfrtError

Job = TypeVar("Job")
Result = TypeVar("Result")

AHEAD = 4
"""Jobs that wait for each worker, and results that wait to be taken."""


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered(
    make: Callable[[], Callable[[Job], Result]], jobs: Iterable[Job], workers: int, restart: str = "run it again"
) -> Generator[Result, None, None]:
    """The function that `make` returns, of every job. `make` is called once in each process, or here where one worker
    is asked for, and is pickled on its way there; so are jobs and results.

    CfrtError, with the advice in `restart`, when a process dies."""
    if workers <= 1:
        yield from _here(make, jobs)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(make,))
    try:
        waiting: deque[Future[Result]] = deque()
        rest = iter(jobs)
        while True:
            waiting.extend(pool.submit(_do, job) for job in islice(rest, AHEAD * workers - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise CfrtError(f"a worker process died, perhaps for want of memory; {restart}, with fewer workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _here(make: Callable[[], Callable[[Job], Result]], jobs: Iterable[Job]) -> Iterator[Result]:
    function, threads = make(), torch.get_num_threads()
    for job in jobs:
        torch.set_num_threads(1)
        try:
            result = function(job)
        finally:
            torch.set_num_threads(threads)
        yield result


# ---------------------------------------------------------------------- in a worker

_function: Callable[[Any], Any]


def _start(make: Callable[[], Callable[[Any], Any]]) -> None:
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started us is told too, and stops us in order
    threading.Thread(target=_follow, daemon=True).start()
    torch.set_num_threads(1)
    _function = make()


def _follow() -> None:
    """A killed parent closes no queue that its workers wait at."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(job: Any) -> Any:
    return _function(job)
