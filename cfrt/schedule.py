"""In which order the denoising passes of a stream's units run.

    sequential   unit u: one pass after another over u alone, given its clean past
    rolling      a pass over units u .. u + S - 1, each at its own of the S noise levels, takes all of them a level down
                 and finishes u (Rolling Forcing, arXiv:2509.25161)

A schedule holds what is between noise and clean; it asks the engine for passes, and its stream for the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from . import flow
from .config import ModelConfig
from .engines import Engine, Latents
from .timeline import Timeline
from .trace import Hook


@dataclass(frozen=True)
class Calls:
    """What a schedule asks of its stream while it makes one unit."""

    stale: Callable[[], bool]
    """Has the unit been called off?"""
    timeline: Timeline
    """What units read, and the seeds of their noise, as far as is known now."""
    noise: Callable[[int, int], Latents]
    """Standard normals of a unit and step."""
    owed: Callable[[], Latents | None]
    """The clean latents of the unit before, where the next pass is to commit them; they are then no longer owed."""
    span: Hook
    """Entered around every pass, by its name."""


class Schedule(Protocol):
    """Turns noise into units, asked for in order."""

    fuses: bool
    """Do its passes take commits along?"""
    began: float
    """When the first pass of the last unit made began, by `perf_counter`."""

    def make(self, unit: int, number: int, calls: Calls) -> Latents | None:
        """Clean latents of a unit, the `number`-th that is not given; None when it is no longer wanted."""
        ...

    def state(self) -> Any:
        """What it has begun, independent of what it does later."""
        ...

    def load(self, state: Any) -> None:
        """Goes on from the state of a schedule of the same kind."""
        ...


def schedule(engine: Engine, config: ModelConfig) -> Schedule:
    """The one that the config names."""
    return Rolling(engine, config) if config.schedule == "rolling" else Sequential(engine, config)


class Sequential:
    """Each unit from noise to clean before the next one begins. Nothing is left over between two units."""

    fuses = True

    def __init__(self, engine: Engine, config: ModelConfig) -> None:
        self._engine, self._config = engine, config
        self.began = 0.0

    def make(self, unit: int, number: int, calls: Calls) -> Latents | None:
        """S passes over one unit; the first may take a commit along."""
        engine, config = self._engine, self._config
        self.began = perf_counter()
        x = calls.noise(unit, 0)
        for step, (s, s_next) in enumerate(flow.descent(config.unit_steps(number), config.shift)):
            if calls.stale():
                return None
            with calls.span(f"denoise {step}"):
                x0 = engine.denoise(x, flow.TIME_SCALE * s, unit, commit=calls.owed())
            x = flow.onward(config.solver, x, x0, s, s_next, partial(calls.noise, unit, step + 1))
        return x

    def state(self) -> None:
        return None

    def load(self, state: None) -> None:
        pass


@dataclass(frozen=True)
class _Begun:
    """A unit on its way."""

    x: Latents
    step: int
    """Index of the level at which x is."""
    rows: np.ndarray
    seed: int
    began: float

    def holds(self, unit: int, timeline: Timeline) -> bool:
        """Is it made of what the timeline says of that unit?"""
        rows = timeline.at(unit).rows
        return timeline.seed(unit) == self.seed and (rows is self.rows or np.array_equal(rows, self.rows))


class Rolling:
    """S consecutive units on their way, each a level ahead of the next: a pass costs S times as much, and there is one
    for each unit, so the work is that of `Sequential`. The first unit after a start takes S passes, over one unit, then
    two, up to S of them.

    A change of text or seed starts the units that it concerns again from noise, so that none is made from two; what
    the units before them had seen of them stays.

    A clip of known length (reference_compat) ends as it began, with passes over S - 1 units, down to one."""

    fuses = False

    def __init__(self, engine: Engine, config: ModelConfig) -> None:
        self._engine = engine
        self._levels = flow.sigmas(config.steps, config.shift)
        self._end = config.trained_frames // config.unit if config.reference_compat else None
        self._first = 0
        self._begun: tuple[_Begun, ...] = ()  # units from `_first` on
        self.began = 0.0

    def make(self, unit: int, number: int, calls: Calls) -> Latents | None:
        """Passes over the window until its oldest unit, this one, is clean."""
        begun = enumerate(self._begun if unit == self._first else (), unit)
        kept = takewhile(lambda entry: entry[1].holds(entry[0], calls.timeline), begun)
        self._first, self._begun = unit, tuple(one for _, one in kept)
        while not calls.stale():
            self._admit(calls)
            oldest, clean = self._begun[0], self._pass(calls)
            if oldest.step + 1 == len(self._levels):
                self._first, self.began = unit + 1, oldest.began
                return clean
        return None

    def state(self) -> tuple[int, tuple[_Begun, ...]]:
        return self._first, self._begun

    def load(self, state: tuple[int, tuple[_Begun, ...]]) -> None:
        self._first, self._begun = state

    def _admit(self, calls: Calls) -> None:
        """One more unit, from noise, unless the clip ends before it."""
        unit = self._first + len(self._begun)
        if unit != self._end or not self._begun:
            rows, seed = calls.timeline.at(unit).rows, calls.timeline.seed(unit)
            self._begun = (*self._begun, _Begun(calls.noise(unit, 0), 0, rows, seed, perf_counter()))

    def _pass(self, calls: Calls) -> Latents:
        """Takes every unit a level down; gives the estimate of x0 of the oldest, which leaves after the last level."""
        begun, times = self._begun, [flow.TIME_SCALE * self._levels[one.step] for one in self._begun]
        x, rows = [one.x for one in begun], [one.rows for one in begun]
        with calls.span(f"denoise {len(begun)} units"):
            estimates = self._engine.denoise_jointly(x, times, self._first, rows)
        lowered = []
        for unit, (one, x0) in enumerate(zip(begun, estimates, strict=True), self._first):
            if (step := one.step + 1) < len(self._levels):
                noisy = flow.renoise(x0, calls.noise(unit, step), self._levels[step])
                lowered.append(replace(one, x=noisy, step=step))
        self._begun = tuple(lowered)
        return estimates[0]
