"""Timing side by side: contenders take turns, in another order every round, and the median counts.

What else the machine does comes and goes; in turns it meets everybody. A turn is a burst of calls, the first of which
does not count: it brings the caches and the contender's threads back.
"""

import time
from collections.abc import Callable, Hashable, Mapping
from statistics import median
from typing import TypeVar

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""By name. The processor's is what one thread would take alone, on a machine that others use as well."""

Name = TypeVar("Name", bound=Hashable)

PAUSE = 0.01
"""Seconds between turns, in which the last contender's threads stop spinning."""

BURST = 0.15
"""Seconds of calls in a turn, at least one."""

LEAST = 3
"""Calls that count, whatever the cap."""


def side_by_side(
    contenders: Mapping[Name, Callable[[], object]], seconds: float, *, burst: float = BURST, clock: str = "wall"
) -> dict[Name, list[float]]:
    """Seconds of every call that counts. Each contender gets about `seconds` in all, warm-up included."""
    names = list(contenders)
    spent = dict.fromkeys(names, 0.0)
    taken: dict[Name, list[float]] = {name: [] for name in names}
    turn = 0
    while waiting := [name for name in names if spent[name] < seconds or len(taken[name]) < LEAST]:
        for name in waiting[turn % len(waiting) :] + waiting[: turn % len(waiting)]:
            time.sleep(PAUSE)
            warm, *counted = _burst(contenders[name], burst, CLOCKS[clock])
            spent[name] += warm + sum(counted)
            taken[name] += counted
        turn += 1
    return taken


def medians(taken: Mapping[Name, list[float]]) -> dict[Name, float]:
    return {name: median(values) for name, values in taken.items()}


def _burst(call: Callable[[], object], seconds: float, now: Callable[[], float]) -> list[float]:
    values: list[float] = []
    left = seconds
    while len(values) < 2 or left > 0:
        begin = now()
        call()
        values.append(now() - begin)
        left -= values[-1] if len(values) > 1 else 0
    return values
