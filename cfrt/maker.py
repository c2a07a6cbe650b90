"""Units, from noise to pixels, and what the stream remembers of them. All of it runs in the worker's thread.

    unit u:  [recache] -> noise -> denoising passes -> decode -> (frames leave) -> commit, or fused into unit u + 1

The engine knows one stream position; this file keeps it. `started` is the unit after the last one begun: a unit that is
asked for again is taken back first, one unit for free (the ring's spare slots), more through the journal.
"""

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from .config import ModelConfig
from .engines import Engine, Latents, Memory
from .journal import Entry, Journal
from .schedule import Calls, schedule
from .stats import Meters
from .timeline import Timeline
from .trace import Hook


class Made(NamedTuple):
    """A unit that is ready to be shown."""

    pixels: np.ndarray
    latency: float
    """Seconds from the start of its first pass."""
    latents: Latents


class Past(NamedTuple):
    """What a stream carries beside its engine from one unit to the next."""

    latents: tuple[tuple[int, Latents], ...]
    """The units of the window, for a recache."""
    given: tuple[Latents, ...]
    """The units that the stream went on from."""
    recached: int | None
    """The unit before which the window was last committed again, if that is the next one."""
    begun: Any = None
    """What the schedule has begun."""


class Maker:
    """Makes the units of one stream, in order, each from what the timeline says of it."""

    def __init__(
        self,
        engine: Engine,
        config: ModelConfig,
        *,
        fuse: bool,
        prefix: np.ndarray | None,
        seed: int,
        journal: Journal,
        meters: Meters,
        span: Hook,
    ) -> None:
        self.engine, self.journal = engine, journal
        self.started = 0
        self._schedule = schedule(engine, config)
        self._begun: Any = None  # what it had begun before the last unit
        self._config, self._meters, self._span = config, meters, span
        self._fuse = fuse and self._schedule.fuses
        self._prefix = prefix  # pictures to go on from
        self._given: tuple[Latents, ...] = ()  # the units that they make, once encoded
        self._seed = seed
        self._reading: np.ndarray | None = None
        self._owed: tuple[int, Latents] | None = None  # a unit whose commit goes into the next unit's first pass
        self._past: deque[tuple[int, Latents]] = deque(maxlen=config.window // config.unit + 1)
        self._recached: int | None = None

    # ------------------------------------------------------------------ making

    def make(self, unit: int, timeline: Timeline, stale: Callable[[], bool]) -> Made | None:
        """One unit as `timeline` has it; None once `stale` says that nobody wants it any more."""
        with self._span("unit"):
            self._begin(unit)
            rows = timeline.recache(unit)
            if rows is not None and self._recached != unit:
                self._recommit(unit, rows)
            self._read(timeline.at(unit).rows)
            latents, start = self._denoise(unit, timeline, stale)
            if latents is None:
                return None
            denoised = perf_counter()
            with self._span("decode"):
                pixels = self.engine.decode(latents)
            decoded = perf_counter()
            self._meters.decode.add(decoded - denoised)
            return Made(pixels, decoded - start, latents)

    def remember(self, unit: int, latents: Latents) -> None:
        """A unit has been shown: its keys and values go into the ring, now or with the next unit's first pass."""
        self._past.append((unit, latents))
        self._owed = (unit, latents)
        if not self._fuse:
            self._settle()

    def recache(self, unit: int, rows: np.ndarray) -> float:
        """KV-recache before `unit` (as in LongLive, arXiv:2509.22622): every unit of the window is committed again,
        oldest first, under `rows`. Gives the seconds that it took."""
        begin = perf_counter()
        self._begin(unit)
        self._recommit(unit, rows)
        return perf_counter() - begin

    def _recommit(self, unit: int, rows: np.ndarray) -> None:
        with self._span("recache"):
            self._read(rows)
            self._settle()
            size = self._config.unit
            window = [(u, x) for u, x in self._past if self._config.geometry.visible(unit, (u + 1) * size - 1)]
            if not self.journal.off:
                frames = (frame for u, _ in window for frame in range(u * size, (u + 1) * size))
                self.journal.overwrites(unit, self.engine.memory(frames).keys)
            for u, latents in window:
                self.engine.commit(latents, u)
            self._recached = unit

    def _begin(self, unit: int) -> None:
        """Makes `unit` the next one, and writes down what it is about to overwrite."""
        if unit < self.started:
            self._take_back(unit)
        if not self.journal.off and not self.journal.holds(unit):
            evicted = self._config.geometry.evicted_by(unit)
            self.journal.add(Entry(self.engine.memory(range(*evicted)), tuple(self._past), self._schedule.state()))
        self._begun = self._schedule.state()
        self.started = unit + 1

    def _denoise(self, unit: int, timeline: Timeline, stale: Callable[[], bool]) -> tuple[Latents | None, float]:
        """Clean latents of a unit, and when its first pass began. The pictures that a stream goes on from are its first
        units, and the one after them has the step list of a first unit (as in image-to-video of arXiv:2602.02214's
        code)."""
        given = self.given()
        if unit < len(given):
            self._settle()  # no pass of this unit will take the commit along
            return None if stale() else given[unit], perf_counter()
        calls = Calls(stale, timeline, partial(self._noise, timeline), self._take_owed, self._span)
        return self._schedule.make(unit, unit - len(given), calls), self._schedule.began

    def _noise(self, timeline: Timeline, unit: int, step: int) -> Latents:
        with self._span("noise"):
            self._reseed(timeline.seed(unit))
            return self.engine.noise(unit, step)

    def _take_owed(self) -> Latents | None:
        """The clean latents of the unit before, if the next pass is to commit them; then they are no longer owed."""
        owed, self._owed = self._owed, None
        return None if owed is None else owed[1]

    def given(self) -> tuple[Latents, ...]:
        """The units that the stream goes on from."""
        if self._prefix is not None:
            frames, self._prefix = self._prefix, None
            one = len(frames) == 1
            self._given = (self.engine.encode(frames[0]),) if one else tuple(self.engine.encode_film(frames))
        return self._given

    def _settle(self) -> None:
        """Commits what is owed in a pass of its own."""
        if self._owed is None:
            return
        (unit, latents), self._owed = self._owed, None
        begin = perf_counter()
        with self._span("commit"):
            self.engine.commit(latents, unit)
        self._meters.commit.add(perf_counter() - begin)

    def _read(self, rows: np.ndarray) -> None:
        """Makes the engine read `rows`, after a commit that is still to be made under the old ones."""
        if rows is not self._reading:
            self._settle()
            self.engine.set_text(rows)
            self._reading = rows

    def _reseed(self, seed: int) -> None:
        if seed != self._seed:
            self.engine.reseed(seed)
            self._seed = seed

    # ------------------------------------------------------------------ going back

    def _take_back(self, unit: int) -> None:
        """Forgets the last unit begun, made or half made."""
        self._forget(unit)
        self._schedule.load(self._begun)
        self.engine.rewind(unit)

    def go_back(self, unit: int) -> None:
        """Makes any unit the next one that the journal holds."""
        entry = self.journal.back_to(unit, unit * self._config.unit)
        self._forget(unit)
        self._past.clear()
        self._past.extend(entry.past)
        self._recached = None
        self._schedule.load(entry.begun)
        self.engine.recall(entry.memory)

    def _forget(self, unit: int) -> None:
        if self._owed is not None and self._owed[0] >= unit:
            self._owed = None
        while self._past and self._past[-1][0] >= unit:
            self._past.pop()
        self.journal.drop_after(unit)
        self.started = unit

    # ------------------------------------------------------------------ snapshots

    def save(self, unit: int, *, portable: bool) -> tuple[Any, Past]:
        """The engine's state with `unit` as the next one, raw or on the host, and what goes with it."""
        if unit < self.started:
            self._take_back(unit)
        self._settle()
        recached = self._recached if self._recached == unit else None
        past = Past(tuple(self._past), self.given(), recached, self._schedule.state())
        if not portable:
            return self.engine.snapshot(), past
        host = self.engine.host
        latents = tuple((u, host(x)) for u, x in past.latents)
        return self.engine.memory(self._live_frames(unit)), Past(latents, tuple(map(host, past.given)), recached)

    def load(self, unit: int, state: Any, past: Past, journal: Journal | None = None) -> None:
        """Goes on from what `save` gave, raw or portable."""
        if isinstance(state, Memory):
            self.engine.recall(state)
            place = self.engine.place
            latents = tuple((u, place(x)) for u, x in past.latents)
            past = Past(latents, tuple(map(place, past.given)), past.recached)
        else:
            self.engine.restore(state)
        self._schedule.load(past.begun)
        self._owed, self._reading, self._prefix = None, None, None
        self._given, self._recached, self.started = past.given, past.recached, unit
        self._past.clear()
        self._past.extend(past.latents)
        if journal is None:
            self.journal.clear()
        else:
            self.journal = journal

    def _live_frames(self, unit: int) -> Iterable[int]:
        """Frames that `unit`, a later one or a recache may look at."""
        end, geometry = unit * self._config.unit, self._config.geometry
        yield from range(min(geometry.sinks, end))
        yield from range(max(geometry.sinks, end - geometry.window), end)
