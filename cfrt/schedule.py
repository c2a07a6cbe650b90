"""In which order the denoising passes of a stream's units run.

    sequential   unit u: one pass after another over u alone, given its clean past
    rolling      a pass over units u .. u + S - 1, each at its own of the S noise levels, takes all of them a level down
                 and finishes u (Rolling Forcing, arXiv:2509.25161)

A schedule holds what is between noise and clean; it asks the engine for passes and its host, the worker, for the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from . import flow
from .config import ModelConfig
from .engines import Engine, Latents


class Host(Protocol):
    """The worker, as a schedule sees it."""

    def wanted(self, unit: int) -> bool:
        """False once the unit has been called off."""
        ...

    def rows(self, unit: int) -> np.ndarray:
        """What the unit reads, as far as is known now."""
        ...

    def take_owed(self) -> Latents | None:
        """The clean latents of the unit before, if the next pass is to commit them; they are then no longer owed."""
        ...


class Schedule(Protocol):
    """Turns noise into units, asked for in order."""

    fuses: bool
    """Do its passes take commits along?"""
    began: float
    """When the first pass of the last unit made began, by `perf_counter`."""

    def make(self, unit: int, number: int, host: Host) -> Latents | None:
        """Clean latents of a unit, the `number`-th that is not given; None when it is no longer wanted."""
        ...

    def rewind(self) -> None:
        """Forgets what it has begun: the next unit starts from noise, whichever that is."""
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

    def make(self, unit: int, number: int, host: Host) -> Latents | None:
        engine, config = self._engine, self._config
        self.began = perf_counter()
        levels = flow.sigmas(config.unit_steps(number), config.shift)
        x = engine.noise(unit, 0)
        for step, (s, s_next) in enumerate(pairwise((*levels, 0.0))):
            if not host.wanted(unit):
                return None
            if step > 0 and config.solver == "renoise":
                x = flow.renoise(x, engine.noise(unit, step), s)
            x0 = engine.denoise(x, flow.TIME_SCALE * s, unit, commit=host.take_owed())
            x = x0 if config.solver == "renoise" else flow.euler(x, flow.v_from_x0(x, x0, s), s, s_next)
        return x

    def rewind(self) -> None:
        pass

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
    began: float


class Rolling:
    """S consecutive units on their way, each a level ahead of the next: a pass costs S times as much, and there is one
    for each unit, so the work is that of `Sequential`. The first unit after a start takes S passes, over one unit, then
    two, up to S of them.

    A change of text starts the units that it concerns again from noise, so that none is made from two texts; what the
    units before them had seen of them stays.

    A clip of known length (reference_compat) ends as it began, with passes over S - 1 units, down to one."""

    fuses = False

    def __init__(self, engine: Engine, config: ModelConfig) -> None:
        self._engine = engine
        self._levels = flow.sigmas(config.steps, config.shift)
        self._end = config.trained_frames // config.unit if config.reference_compat else None
        self._first = 0
        self._begun: tuple[_Begun, ...] = ()  # units from `_first` on
        self.began = 0.0

    def make(self, unit: int, number: int, host: Host) -> Latents | None:
        kept = self._begun if unit == self._first else ()
        self._first, self._begun = unit, self._of_these_texts(kept, host)
        while host.wanted(unit):
            self._admit(host)
            oldest, clean = self._begun[0], self._pass()
            if oldest.step + 1 == len(self._levels):
                self._first, self.began = unit + 1, oldest.began
                return clean
        return None

    def rewind(self) -> None:
        self._begun = ()

    def state(self) -> tuple[int, tuple[_Begun, ...]]:
        return self._first, self._begun

    def load(self, state: tuple[int, tuple[_Begun, ...]]) -> None:
        self._first, self._begun = state

    def _of_these_texts(self, begun: Sequence[_Begun], host: Host) -> tuple[_Begun, ...]:
        """The units, up to the first whose text has changed since it began."""
        kept: list[_Begun] = []
        for unit, one in enumerate(begun, self._first):
            if not np.array_equal(one.rows, host.rows(unit)):
                break
            kept.append(one)
        return tuple(kept)

    def _admit(self, host: Host) -> None:
        """One more unit, from noise, unless the clip ends before it."""
        unit = self._first + len(self._begun)
        if unit != self._end or not self._begun:
            new = _Begun(self._engine.noise(unit, 0), 0, host.rows(unit), perf_counter())
            self._begun = (*self._begun, new)

    def _pass(self) -> Latents:
        """Takes every unit a level down; gives the estimate of x0 of the oldest, which leaves after the last level."""
        begun, times = self._begun, [flow.TIME_SCALE * self._levels[one.step] for one in self._begun]
        x, rows = [one.x for one in begun], [one.rows for one in begun]
        estimates = self._engine.denoise_jointly(x, times, self._first, rows)
        lowered = []
        for unit, (one, x0) in enumerate(zip(begun, estimates, strict=True), self._first):
            if (step := one.step + 1) < len(self._levels):
                noisy = flow.renoise(x0, self._engine.noise(unit, step), self._levels[step])
                lowered.append(_Begun(noisy, step, one.rows, one.began))
        self._begun = tuple(lowered)
        return estimates[0]
