"""Which frame is handed out when: the queue, the clock, the position on show, and the gate that a pause closes.

No thread and no lock: `cfrt.worker` calls it under its own, with times that it reads.
"""

import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from .clock import Clock
from .config import ModelConfig
from .frame import Frame


class Due(NamedTuple):
    """What a consumer gets now: a frame; or none, and the seconds until one may be due, None = until something happens
    or, with `closed`, never."""

    frame: Frame | None = None
    wait: float | None = None
    closed: bool = False


class Playback:
    """`live` shows the newest frame that is due and drops the ones before it; else every frame is handed out."""

    def __init__(self, config: ModelConfig, fps: float | None, *, live: bool) -> None:
        self.live = live
        self.queue: deque[Frame] = deque()
        self.last: Frame | None = None
        """The frame handed out last, for display."""
        self.dropped = 0
        self._config = config
        self.clock = Clock(fps, live=live)
        self.position = -1
        """Index of the last frame handed out, or jumped to."""
        self._gate = math.inf  # the first frame that a pause holds back

    # ------------------------------------------------------------------ position

    @property
    def paused(self) -> bool:
        return self._gate != math.inf

    def shown(self, now: float) -> int:
        """Index of the frame on show: the last one handed out or, for a live stream, the newest by the clock; -1 before
        the first."""
        if not self.live:
            return self.position
        made = self.queue[-1].index if self.queue else self.position
        return max(self.position, int(min(self.clock.newest(now), made, self._gate - 1)))

    def unit(self, now: float) -> int:
        """The unit of the frame on show."""
        return self._config.unit_at(self.shown(now))

    def begins(self, unit: int, now: float) -> float | None:
        """Seconds until the clock of a live stream shows `unit`; None where only the consumer, or nobody, moves on."""
        first = self._config.first_frame(unit)
        if not self.live or not self.clock.running or first >= self._gate:
            return None
        return self.clock.delay(first, now)

    # ------------------------------------------------------------------ frames

    def put(self, frames: Iterable[Frame], now: float) -> None:
        """The frames of the next unit."""
        self.queue.extend(frames)
        self._drop_late(now)

    def due(self, now: float) -> Due:
        """The next frame, if its time has come and no pause holds it back: it is handed out."""
        if not self.queue:
            return Due()
        self._drop_late(now)
        index = self.queue[0].index
        if index >= self._gate:
            self.clock.reset()
            return Due()
        wait = self.clock.delay(index, now)
        if wait > 0:
            return Due(wait=wait)
        frame = self.queue.popleft()
        self.clock.tick(index, now)
        self.position, self.last = index, frame
        return Due(frame)

    def forget_from(self, unit: int) -> None:
        """Takes the frames of `unit` and later ones out of the queue."""
        self.queue = deque(frame for frame in self.queue if frame.unit < unit)

    def _drop_late(self, now: float) -> None:
        """A live consumer gets the newest frame that is due; what it missed is counted and gone."""
        newest = self.shown(now)
        while self.live and len(self.queue) > 1 and self.queue[1].index <= newest:
            self.queue.popleft()
            self.dropped += 1

    # ------------------------------------------------------------------ control

    def pause(self, now: float) -> None:
        """Closes the gate after the frame on show."""
        self._drop_late(now)
        self.position = self.shown(now)
        self._gate = self.position + 1
        self.clock.reset()

    def resume(self) -> None:
        """Opens the gate; the beat starts anew."""
        if self.paused:
            self._gate = math.inf
            self.clock.reset()

    def step(self, units: int) -> int | None:
        """Moves the gate to the end of the next `units` units, the rest of one that is half shown counting as the
        first: the last of them. None when there is no pause."""
        if not self.paused:
            return None
        last = self._config.unit_at(int(self._gate)) + units - 1
        self._gate = self._config.first_frame(last + 1)
        return last

    def jump(self, shown: int, queue: Iterable[Frame] = ()) -> None:
        """Frame `shown` is now the last one handed out, and `queue` comes next; a gate that is closed moves along."""
        self.position, self.queue = shown, deque(queue)
        self.clock.reset()
        if self.paused:
            self._gate = shown + 1
