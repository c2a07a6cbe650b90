"""When each frame of a stream is due. Pure arithmetic on times that its caller reads; no thread, no sleep."""

import math

JITTER = 0.5
"""Periods that a frame may be late and still leave the beat where it is. More is a stall: the beat moves, so that two
frames are never closer than half a period and nothing is ever fast-forwarded."""


class Clock:
    """The beat of a stream: frame i is due at origin + i / fps. Without fps every frame is due at once.

    `live` is the beat of a consumer that may be slow: being late moves the beat only when the *newest* frame is late,
    that is, when the frames come too slowly and not when they are fetched too slowly.
    """

    def __init__(self, fps: float | None, *, live: bool = False) -> None:
        self._period = 1 / fps if fps else 0.0
        self._patience = self._period * (1.0 if live else JITTER)
        self._origin: float | None = None
        self._last = -math.inf  # when the last frame was handed out
        self.stalls = 0
        """Frames that were late enough to move the beat."""
        self.moved = 0.0
        """Seconds by which they have moved it in all."""

    @property
    def running(self) -> bool:
        """Has a frame been handed out since the clock was made or reset?"""
        return self._origin is not None

    def delay(self, index: int, now: float) -> float:
        """Seconds until frame `index` is due. Where the beat has not started that is one period after the last frame
        that was handed out, so that no sequence of pauses and jumps is faster than the beat."""
        due = self._last + self._period if self._origin is None else self._origin + index * self._period
        return max(0.0, due - now)

    def newest(self, now: float) -> int:
        """Index of the newest frame that is due; -1 before the beat has started. For a clock with fps."""
        return -1 if self._origin is None else math.floor((now - self._origin) / self._period)

    def tick(self, index: int, now: float) -> None:
        """Frame `index` is handed out: the first one starts the beat, one that is late moves it."""
        late = 0.0 if self._origin is None else now - (self._origin + index * self._period)
        if self._period and late > self._patience:
            self.stalls, self.moved = self.stalls + 1, self.moved + late
        if self._origin is None or late > self._patience:
            self._origin = now - index * self._period
        self._last = now

    def reset(self) -> None:
        """The next frame, whichever it is, starts the beat anew."""
        self._origin = None
