"""What a stream measures of itself, in memory that does not grow: percentiles are those of the last `WINDOW` values."""

import math
from collections import deque
from dataclasses import dataclass, field

WINDOW = 1024


@dataclass(frozen=True)
class Timing:
    """Percentiles in seconds of the last values (at most `WINDOW` of them); `count` is of all that ever were."""

    p50: float
    p95: float
    p99: float
    count: int

    def __repr__(self) -> str:
        if not self.count:
            return "Timing(none yet)"
        p50, p95, p99 = (f"{1000 * value:.1f}" for value in (self.p50, self.p95, self.p99))
        return f"Timing(p50={p50} ms, p95={p95} ms, p99={p99} ms, count={self.count})"


class Recent:
    """The last `WINDOW` values of one quantity. One thread adds, any thread reads."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=WINDOW)
        self._count = 0

    def add(self, value: float) -> None:
        self._values.append(value)
        self._count += 1

    def timing(self) -> Timing:
        values = sorted(self._values.copy())
        if not values:
            return Timing(float("nan"), float("nan"), float("nan"), 0)
        p50, p95, p99 = (values[_rank(q, len(values))] for q in (0.50, 0.95, 0.99))
        return Timing(p50, p95, p99, self._count)


def _rank(q: float, count: int) -> int:
    """Index of the q-quantile by the nearest-rank rule: the smallest value that at least q of all do not exceed."""
    return max(0, math.ceil(q * count) - 1)


@dataclass(frozen=True, kw_only=True)
class Stats:
    """A stream's own account of itself. Times in seconds."""

    time_to_first_frame: float | None
    """From the construction of the stream, loading included, to its first pixels; None before them."""
    latency: Timing
    """Per unit: the start of its first pass to its first pixels on the host, decoding included."""
    unit: Timing
    """Per unit: all the work it costs, commit included, waiting left out. Real time means less than `unit_duration`."""
    unit_duration: float
    """Seconds of video in one unit."""
    decode: Timing
    commit: Timing
    """Separate commits only: at full speed a commit is part of the next unit's first pass."""
    change_to_pixel: Timing
    """From a call of `prompt` to the first frame handed out that follows it."""
    units: int
    """Units made, those included that a change of prompt made again."""
    frames: int
    """Frames handed out."""
    dropped: int
    """Frames that a slow consumer missed; only a stream with keep="latest" drops any."""
    stalls: int
    """Frames that came more than half a period late (a whole one with keep="latest"), each of which moved the beat."""
    stalled: float
    """Seconds by which those have moved it in all."""
    ring: tuple[int, int]
    """Latent frames that the next unit can look back at, and the most it ever will."""
    journal_bytes: int
    """What is kept for `Stream.rewind`."""

    @property
    def real_time(self) -> bool:
        """Is the 95th percentile of the unit time below the unit's own duration?"""
        return self.unit.p95 < self.unit_duration


@dataclass
class Meters:
    """The gauges behind `Stats`, filled by the worker and its consumer."""

    time_to_first_frame: float | None = None
    latency: Recent = field(default_factory=Recent)
    unit: Recent = field(default_factory=Recent)
    decode: Recent = field(default_factory=Recent)
    commit: Recent = field(default_factory=Recent)
    change_to_pixel: Recent = field(default_factory=Recent)
    units: int = 0
    frames: int = 0

    def read(
        self,
        *,
        ring: tuple[int, int],
        unit_duration: float,
        dropped: int,
        stalls: int,
        stalled: float,
        journal_bytes: int,
    ) -> Stats:
        return Stats(
            time_to_first_frame=self.time_to_first_frame,
            latency=self.latency.timing(),
            unit=self.unit.timing(),
            unit_duration=unit_duration,
            decode=self.decode.timing(),
            commit=self.commit.timing(),
            change_to_pixel=self.change_to_pixel.timing(),
            units=self.units,
            frames=self.frames,
            dropped=dropped,
            stalls=stalls,
            stalled=stalled,
            ring=ring,
            journal_bytes=journal_bytes,
        )
