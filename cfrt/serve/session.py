"""A stream that visitors share: the thread that plays it, its viewers, its recording, and what steers it.

The thread takes frames from `cfrt.Stream`, which paces them, and hands them to the event loop. It waits when nobody
watches, so a forgotten stream costs nothing. Control comes from any thread, one at a time.
"""

import asyncio
import logging
import threading
from itertools import count
from time import monotonic, perf_counter
from typing import Any, Protocol

import numpy as np

from ..errors import CfrtError
from ..stats import Recent, Stats, Timing
from ..stream import Change, Stream
from . import messages
from .broadcast import Broadcast, Codec, Shot, Viewer
from .film import Film
from .limits import Limits
from .recorder import Recorder
from .refusal import Refusal
from .shelf import Shelf

log = logging.getLogger(__name__)

TIMELINE = 64
"""Changes of prompt, the last ones, that a page hears of."""


class Make(Protocol):
    """How a server makes its streams."""

    def __call__(self, prompt: str, *, seed: int = 0, image: np.ndarray | None = None) -> Stream: ...


class Session:
    """One stream and everybody who watches it."""

    def __init__(
        self, name: str, make: Make, limits: Limits, stream: Stream, prompt: str, seed: int, notes: list[str]
    ) -> None:
        self.id, self.limits, self.seed = name, limits, seed
        self._asked, self._notes = prompt, notes
        self.broadcast, self.overhead = Broadcast(), Recent()
        self.recorder: Recorder | None = None
        self.error: str | None = None
        self._news = 0  # times that viewers were told of a change
        self._common: tuple[Any, dict[str, Any]] = (None, {})
        self._kept: tuple[Any, ...] = ()  # where it was when it was put on the shelf
        self.touched = monotonic()
        self._make, self._stream = make, stream
        self.films: dict[Codec, Film] = {
            "vp8": Film(self.fps, stamped=False),
            "vp8 stamped": Film(self.fps, stamped=True),
        }
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()  # one control at a time
        self._wake = threading.Condition()  # of the thread that plays: watched, replaced, closed
        self._ticks = count(1)
        self._closed = False
        self._play(stream)

    # ------------------------------------------------------------------ the event loop's side

    def enter(self, viewer: Viewer) -> None:
        """A viewer comes. Refusal when there are too many."""
        if len(self.broadcast.viewers) >= self.limits.viewers:
            most = self.limits.viewers
            raise Refusal(503, expected=f"at most {most} viewers of a stream", got=f"one more than {most}", do="wait")
        self.broadcast.add(viewer)
        self._nudge()

    def leave(self, viewer: Viewer) -> None:
        self.broadcast.remove(viewer)
        self.touched = monotonic()

    @property
    def timings(self) -> Stats:
        return self._stream.stats

    @property
    def prompt(self) -> str:
        """What the next unit is made from. A stream that was rewound meets its old changes of prompt again."""
        following = max(0, self._stream.unit + 1)
        return next((text for unit, text in reversed(self._stream.changes) if unit <= following), self._asked)

    @property
    def notes(self) -> list[str]:
        """What the model did not understand of the prompt."""
        return self._notes if self.prompt == self._asked else []

    @property
    def reach(self) -> int:
        """Units that one can rewind."""
        return self._stream.reach

    @property
    def fps(self) -> float:
        return self._stream.config.fps

    @property
    def idle(self) -> float:
        """Seconds since somebody watched or asked."""
        return 0.0 if self.broadcast.viewers else monotonic() - self.touched

    def record(self) -> Recorder:
        """Starts a recording, in place of a finished one."""
        if self.recorder is not None and self.recorder.running:
            raise Refusal(409, expected="no recording under way", got="one is", do="stop it: POST .../recording/stop")
        if self.recorder is not None:
            self.recorder.discard()
        self.recorder = Recorder(self.fps, self.limits.recording_seconds, self.leave)
        self.enter(self.recorder.viewer)
        self.recorder.start()
        self.tell()
        return self.recorder

    def recording(self) -> Recorder:
        """The present or last recording. Refusal when there has been none."""
        if self.recorder is None:
            raise Refusal(404, expected="a recording", got="none", do="start one: POST /streams/{id}/recording")
        return self.recorder

    def touch(self) -> None:
        """Somebody has asked about it."""
        self.touched = monotonic()

    def tell(self) -> None:
        """Viewers learn the present state."""
        self._news += 1
        self.broadcast.tell()

    async def close(self) -> None:
        self._closed = True
        self.broadcast.close()
        if self.recorder is not None:
            await self.recorder.stop()
            self.recorder.discard()
        self._nudge()
        await asyncio.to_thread(self._stream.close)

    def state(self) -> dict[str, Any]:
        """`messages.StreamState` as JSON."""
        stream = self._stream
        return {
            "id": self.id,
            "prompt": self.prompt,
            "seed": self.seed,
            "paused": stream.paused,
            "unit": stream.unit,
            "reach": stream.reach,
            "timeline": [{"unit": unit, "prompt": prompt} for unit, prompt in stream.changes[-TIMELINE:]],
            "viewers": len(self.broadcast.viewers),
            "recording": None if self.recorder is None else self.recorder.state(),
            "notes": self.notes,
            "error": self.error,
            "stats": self.stats(),
        }

    def common_state(self) -> dict[str, Any]:
        """`state`, worked out once for all viewers who ask at the same frame."""
        here = (self._news, self.broadcast.last, len(self.broadcast.viewers), self.error)
        if self._common[0] != here:
            self._common = (here, self.state())
        return self._common[1]

    def stats(self) -> dict[str, Any]:
        """`messages.StreamStats` as JSON, times in milliseconds."""
        stats = self._stream.stats
        first = stats.time_to_first_frame
        return {
            "time_to_first_frame": None if first is None else 1000 * first,
            "unit": _milliseconds(stats.unit),
            "latency": _milliseconds(stats.latency),
            "change_to_pixel": _milliseconds(stats.change_to_pixel),
            "overhead": _milliseconds(self.overhead.timing()),
            "unit_duration": 1000 * stats.unit_duration,
            "frames": stats.frames,
            "dropped": self.broadcast.dropped,
            "ring": stats.ring,
        }

    # ------------------------------------------------------------------ control, from any thread

    def control(self, wish: messages.Control) -> Change | None:
        """Does what is wished, from top to bottom; the change of prompt, if there was one."""
        with self._lock:
            self._check_alive()
            if wish.prompt is not None:
                self.limits.check_prompt(wish.prompt)
            change = None
            if wish.restart:
                self._restart(wish.prompt or self.prompt, self.seed if wish.seed is None else wish.seed)
            else:
                change = self._steer(wish)
            if wish.paused or wish.step is not None:
                self._stream.pause()
            elif wish.paused is False:
                self._stream.resume()
            if wish.step is not None:
                self._stream.step(wish.step)
        self._loop.call_soon_threadsafe(self.tell)
        return change

    def start_from(self, image: np.ndarray) -> None:
        """The stream anew, from a picture."""
        with self._lock:
            self._check_alive()
            self._restart(self.prompt, self.seed, image=image)
        self._loop.call_soon_threadsafe(self.tell)

    def branch(self) -> Stream:
        """A second future of what has been shown so far."""
        with self._lock:
            self._check_alive()
            return self._stream.branch()

    def keep(self, shelf: Shelf) -> None:
        """Puts the stream on the shelf as it is now, unless it is there so already."""
        with self._lock:
            here = (self._stream, self._stream.stats.frames, self._stream.paused, self._stream.changes, self.seed)
            if here == self._kept or self._closed or self.error is not None:
                return
            shelf.keep(self.id, self._stream.snapshot(portable=True), paused=self._stream.paused)
            self._kept = here

    def _steer(self, wish: messages.Control) -> Change | None:
        stream = self._stream
        if wish.rewind is not None:
            stream.rewind(wish.rewind)
            if stream.paused:
                stream.step()  # shows where it is now
        if wish.seed is not None:
            stream.reseed(wish.seed)
            self.seed = wish.seed
        if wish.prompt is None:
            return None
        change = stream.prompt(wish.prompt, blend_units=wish.blend_units, recache=wish.recache)
        self._reads(wish.prompt)
        return change

    def _restart(self, prompt: str, seed: int, image: np.ndarray | None = None) -> None:
        old, paused, self.overhead = self._stream, self._stream.paused, Recent()
        self._stream = self._make(prompt, seed=seed, image=image)
        self.seed = seed
        self._reads(prompt)
        if paused:
            self._stream.pause()
            self._stream.step()  # shows its first picture
        self._loop.call_soon_threadsafe(self.broadcast.forget)
        self._play(self._stream)
        self._nudge()
        old.close()

    def _reads(self, prompt: str) -> None:
        self._asked, self._notes = prompt, self._stream.read(prompt).notes

    def _check_alive(self) -> None:
        self.touched = monotonic()
        if self._closed or self.error is not None:
            raise Refusal(410, expected="a stream that runs", got=self.error or "a closed one", do="make a new one")

    # ------------------------------------------------------------------ the thread that plays

    def _play(self, stream: Stream) -> None:
        threading.Thread(target=self._run, args=(stream,), name="cfrt-serve", daemon=True).start()

    def _run(self, stream: Stream) -> None:
        try:
            for frame in stream.frames():
                begin = perf_counter()
                shot = Shot(frame, next(self._ticks))
                self._encode(shot)
                self._loop.call_soon_threadsafe(self._arrived, stream, shot, begin)
                self._wait_for_viewers(stream)
        except Exception as error:
            if not self._loop.is_closed():  # the server has not ended before the stream
                self._failed(stream, error)

    def _encode(self, shot: Shot) -> None:
        """As the viewers want it."""
        for codec in self.broadcast.wanted:
            if codec == "jpeg":
                _ = shot.jpeg
            elif codec is not None:
                shot.vp8[codec] = self.films[codec].add(shot.frame.pixels, shot.tick)

    def _wait_for_viewers(self, stream: Stream) -> None:
        with self._wake:
            self._wake.wait_for(lambda: self.broadcast.viewers or self._closed or stream is not self._stream)

    def _nudge(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _arrived(self, stream: Stream, shot: Shot, begin: float) -> None:
        if stream is self._stream and not self._closed:  # not the last frame of a stream that was replaced
            self.broadcast.push(shot)
            self.overhead.add(perf_counter() - begin)

    def _failed(self, stream: Stream, error: Exception) -> None:
        if stream is not self._stream or self._closed:
            return
        log.error("stream %s failed", self.id, exc_info=error)
        self.error = str(error) if isinstance(error, CfrtError) else "the stream has failed; the server's log says why"
        self._loop.call_soon_threadsafe(self.tell)


def _milliseconds(timing: Timing) -> dict[str, float | int | None]:
    values = {name: 1000 * getattr(timing, name) if timing.count else None for name in ("p50", "p95", "p99")}
    return {**values, "count": timing.count}
