"""The thread that makes a stream's units, and the bounded queue between it and the consumer.

    unit u:  noise -> denoising passes -> decode -> frames into the queue -> commit (or fused into unit u + 1)

The worker starts unit u + 1 when the first frame of unit u has left the queue, so it is at most one unit ahead and the
queue holds at most two. A change of prompt may take that one unit back (`Engine.rewind`), which costs no memory.

Everything that touches the engine runs in this thread; what others want of it is posted as a task, done between units.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from .clock import Clock
from .config import ModelConfig
from .engines import Engine, Latents
from .errors import CfrtError
from .frame import Frame
from .schedule import schedule
from .stats import Meters, Stats
from .timeline import Context, Timeline

T = TypeVar("T")

CALLED_OFF = 4
"""Times that one unit may be made again, so that prompts in quick succession cannot hold up the frames for ever."""


@dataclass(frozen=True)
class State:
    """A stream between two units: what the engine holds, what is made but not handed out, what comes next."""

    engine: Any
    next: int
    playhead: int
    queue: tuple[Frame, ...]
    timeline: Timeline
    past: tuple[tuple[int, Latents], ...]
    given: tuple[Latents, ...]
    begun: Any
    """What the schedule has begun."""


class Worker:
    """Makes units in a thread of its own. The methods of the consumer's side may be called from any thread."""

    def __init__(
        self,
        engine: Engine,
        config: ModelConfig,
        timeline: Timeline,
        *,
        fps: float | None,
        live: bool,
        prefix: np.ndarray | None,
        born: float,
    ) -> None:
        self.meters = Meters()
        self._engine, self._config, self._timeline = engine, config, timeline
        self._prefix = prefix  # pictures to go on from
        self._given: tuple[Latents, ...] = ()  # the units that they make, once encoded
        self._clock, self._live, self._born = Clock(fps, live=live), live, born
        self._schedule = schedule(engine, config)
        self._fuse = (
            fps is None and engine.fuses and self._schedule.fuses
        )  # by configuration, never by timing: the same bytes every time
        self._reading: np.ndarray | None = None
        self._owed: tuple[int, Latents] | None = None  # a unit whose commit goes into the next unit's first pass
        self._past: deque[tuple[int, Latents]] = deque(maxlen=config.window // config.unit + 1)  # for `recache`
        # Below: shared between threads, read and written under the lock.
        self._lock = threading.Condition()
        self._queue: deque[Frame] = deque()
        self._tasks: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._next = 0  # the first unit that is not started
        self._playhead = -1  # the unit of the last frame handed out
        self._called_off = 0  # times that the unit after the playhead was taken back
        self._awaited: tuple[int, float] | None = None  # unit of the last change of prompt, when it was asked for
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="cfrt-stream", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ the consumer's side

    def take(self) -> Frame | None:
        """The next frame when it is due; None when the stream is closed. Raises what stopped the worker, if anything
        did, once the frames made before that are gone."""
        with self._lock:
            while not self._closed:
                wait = None
                if self._queue:
                    self._drop_late()
                    wait = self._clock.delay(self._queue[0].index, perf_counter())
                    if wait == 0:
                        return self._hand_out(self._queue.popleft())
                elif self._error is not None:
                    raise self._error
                self._lock.wait(wait)
        return None

    def change(
        self, text: str, rows: np.ndarray, *, blend_units: int, recache: bool, flush: bool
    ) -> tuple[int, float | None]:
        """The unit from which `text` holds, and the seconds that the recache took, if one was asked for.

        With `flush` that is the first unit of which no frame has left, made again if need be; else the first that is
        not started."""
        asked = perf_counter()
        with self._lock:
            self._check_running()
            flush = flush and self._called_off < CALLED_OFF
            unit = min(self._playing() + 1, self._next) if flush else self._next
            self._timeline.change(unit, text, rows, blend_units)
            self._awaited = (unit, asked)
            if unit < self._next:
                self._next = unit
                self._called_off += 1
                self._queue = deque(frame for frame in self._queue if frame.unit < unit)
                self._post(partial(self._rewind, unit))
            done = self._post(self._recache) if recache else None
        return unit, None if done is None else done.result()

    def save(self) -> State:
        """The exact state after the last frame that was handed out."""
        return self._call(self._save)

    def load(self, state: State) -> None:
        """Goes on from `state`."""
        self._call(partial(self._load, state))

    def stats(self) -> Stats:
        """What has been measured so far."""
        geometry = self._config.geometry
        held = sum(stop - start for start, stop in geometry.visible_frames(self._next)) - geometry.unit
        duration = self._config.unit_frames(1) / self._config.fps
        return self.meters.read(ring=(held, geometry.capacity - 2 * geometry.unit), unit_duration=duration)

    def close(self) -> None:
        """Stops after the pass that is running, and waits for that. Closing twice is fine."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        if self._thread is not threading.current_thread():  # a stream may be collected in its own worker
            self._thread.join()

    def _hand_out(self, frame: Frame) -> Frame:
        now = perf_counter()
        self._clock.tick(frame.index, now)
        if frame.unit != self._playhead:
            self._playhead, self._called_off = frame.unit, 0
        self.meters.frames += 1
        if self._awaited is not None and frame.unit >= self._awaited[0]:
            self.meters.change_to_pixel.add(now - self._awaited[1])
            self._awaited = None
        self._lock.notify_all()
        return frame

    def _drop_late(self) -> None:
        """A live consumer gets the newest frame that is due; what it missed is counted and gone."""
        newest = self._clock.newest(perf_counter()) if self._live else -1
        while len(self._queue) > 1 and self._queue[1].index <= newest:
            self._queue.popleft()
            self.meters.dropped += 1

    def _playing(self) -> int:
        """The unit on show: by the frames handed out or, for a live stream, by the clock."""
        if not self._live:
            return self._playhead
        return max(self._playhead, self._config.unit_at(self._clock.newest(perf_counter())))

    def _check_running(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise CfrtError("this stream is closed; make a new one")

    def _call(self, task: Callable[[], T]) -> T:
        """What `task` gives when the worker runs it between two units."""
        with self._lock:
            self._check_running()
            done = self._post(task)
        return done.result()

    def _post(self, task: Callable[[], T]) -> "Future[T]":
        done: Future[T] = Future()
        self._tasks.append((task, done))
        self._lock.notify_all()
        return done

    # ------------------------------------------------------------------ the thread's side

    def _run(self) -> None:
        error: BaseException = CfrtError("this stream is closed; make a new one")
        try:
            while (job := self._job()) is not None:
                job()
        except BaseException as caught:  # whatever it is, it belongs to whoever waits for frames
            error = self._error = caught
        finally:
            with self._lock:
                for _, done in self._tasks:
                    done.set_exception(error)
                self._tasks.clear()
                self._lock.notify_all()
            self._engine.close()

    def _job(self) -> Callable[[], None] | None:
        """What to do next, waiting until there is something; None when the stream is closed."""
        with self._lock:
            while not self._closed:
                if self._tasks:
                    return partial(self._do, *self._tasks.popleft())
                if self._next <= self._playing() + 1:
                    self._next += 1
                    return partial(self._make, self._next - 1, self._timeline.at(self._next - 1))
                self._lock.wait(self._until_next_unit())
        return None

    def _until_next_unit(self) -> float | None:
        """Seconds until the clock of a live stream starts the unit before the next one; None where only frames do."""
        if not self._live or not self._clock.running:
            return None
        return self._clock.delay(self._config.first_frame(self._next - 1), perf_counter())

    def _do(self, task: Callable[[], Any], done: "Future[Any]") -> None:
        try:
            done.set_result(task())
        except BaseException as error:
            done.set_exception(error)
            raise

    def _make(self, unit: int, context: Context) -> None:
        """One unit, from noise to frames in the queue and keys in the ring."""
        begin = perf_counter()
        self._read(context.rows)
        made = self._denoise(unit)
        if made is None:
            return
        latents, start = made
        denoised = perf_counter()
        pixels = self._engine.decode(latents)
        latency = perf_counter() - start
        if not self._deliver(unit, pixels, context.text, latency):
            return
        self.meters.decode.add(start + latency - denoised)
        self._remember(unit, latents)
        self.meters.unit.add(perf_counter() - begin)

    def _denoise(self, unit: int) -> tuple[Latents, float] | None:
        """Clean latents of a unit, and when their first pass began; None when they are no longer wanted. The pictures
        that a stream goes on from are its first units, and the one after them has the step list of a first unit (as in
        image-to-video of arXiv:2602.02214's code)."""
        given = self._continued()
        if unit < len(given):
            self._settle()  # no pass of this unit will take the commit along
            return given[unit], perf_counter()
        latents = self._schedule.make(unit, unit - len(given), self)
        return None if latents is None else (latents, self._schedule.began)

    def wanted(self, unit: int) -> bool:
        """Is a unit in work still to be made? False once it was called off."""
        return not self._stale(unit)

    def rows(self, unit: int) -> np.ndarray:
        """What a unit reads, as far as is known now."""
        with self._lock:
            return self._timeline.at(unit).rows

    def take_owed(self) -> Latents | None:
        """The unit whose commit goes into the next pass, if there is one."""
        owed, self._owed = self._owed, None
        return None if owed is None else owed[1]

    def _continued(self) -> tuple[Latents, ...]:
        """The units that the stream goes on from."""
        if self._prefix is not None:
            frames, self._prefix = self._prefix, None
            one = len(frames) == 1
            self._given = (self._engine.encode(frames[0]),) if one else tuple(self._engine.encode_film(frames))
        return self._given

    def _stale(self, unit: int) -> bool:
        """Was this unit called off while it was being made?"""
        return self._closed or unit >= self._next

    def _deliver(self, unit: int, pixels: np.ndarray, text: str, latency: float) -> bool:
        """Puts a unit's frames into the queue, unless it was called off meanwhile."""
        first = self._config.first_frame(unit)
        frames = [
            Frame(picture, index, index / self._config.fps, unit, latency, text)
            for index, picture in enumerate(pixels, start=first)
        ]
        with self._lock:
            if self._stale(unit):
                return False
            if self.meters.time_to_first_frame is None:
                self.meters.time_to_first_frame = perf_counter() - self._born
            self.meters.units += 1
            self.meters.latency.add(latency)
            self._queue.extend(frames)
            self._drop_late()
            self._lock.notify_all()
        return True

    # ------------------------------------------------------------------ what the ring remembers

    def _remember(self, unit: int, latents: Latents) -> None:
        self._past.append((unit, latents))
        self._owed = (unit, latents)
        if not self._fuse:
            self._settle()

    def _settle(self) -> None:
        """Commits what is owed in a pass of its own."""
        if self._owed is None:
            return
        (unit, latents), self._owed = self._owed, None
        begin = perf_counter()
        self._engine.commit(latents, unit)
        self.meters.commit.add(perf_counter() - begin)

    def _read(self, rows: np.ndarray) -> None:
        """Makes the engine read `rows`, after a commit that is still to be made under the old ones."""
        if rows is not self._reading:
            self._settle()
            self._engine.set_text(rows)
            self._reading = rows

    def _rewind(self, unit: int) -> None:
        """Forgets `unit`, made or half made."""
        if self._owed is not None and self._owed[0] >= unit:
            self._owed = None
        while self._past and self._past[-1][0] >= unit:
            self._past.pop()
        self._schedule.rewind()
        self._engine.rewind(unit)

    def _recache(self) -> float:
        """KV-recache (as in LongLive, arXiv:2509.22622): every unit of the window is committed again, oldest first."""
        begin = perf_counter()
        with self._lock:
            unit, context = self._next, self._timeline.at(self._next)
        self._read(context.rows)
        self._settle()
        for past, latents in self._past:
            if self._config.geometry.visible(unit, (past + 1) * self._config.unit - 1):
                self._engine.commit(latents, past)
        return perf_counter() - begin

    def _save(self) -> State:
        self._settle()
        engine, given, past = self._engine.snapshot(), self._continued(), tuple(self._past)
        begun = self._schedule.state()
        with self._lock:
            queue, timeline = tuple(self._queue), self._timeline.copy()
            return State(engine, self._next, self._playhead, queue, timeline, past, given, begun)

    def _load(self, state: State) -> None:
        self._engine.restore(state.engine)
        self._owed, self._reading, self._prefix, self._given = None, None, None, state.given
        self._past.clear()
        self._past.extend(state.past)
        self._schedule.load(state.begun)
        with self._lock:
            self._next, self._playhead = state.next, state.playhead
            self._queue = deque(state.queue)
            self._timeline = state.timeline.copy()
            self._clock.reset()
