"""The thread that makes a stream's units, the bounded queue between it and the consumer, and who may take what when.

The worker starts unit u + 1 when the first frame of unit u has left the queue, so it is at most one unit ahead and the
queue holds at most two. A change of prompt may take that one unit back, which costs no memory.

Everything that touches the engine (`cfrt.maker`) runs in this thread; what others want of it is posted as a task, done
between units. What is shared is read and written under one lock, which nobody holds while a unit is made.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from .config import ModelConfig
from .engines import Engine
from .errors import CfrtError
from .frame import Frame
from .maker import Maker
from .playback import Due, Playback
from .state import State
from .stats import Meters, Stats
from .timeline import Blend, Timeline
from .trace import Hook

T = TypeVar("T")

CALLED_OFF = 4
"""Times that one unit may be made again, so that prompts in quick succession cannot hold up the frames for ever."""


def closed() -> CfrtError:
    """What is raised when more is asked of a stream that has ended."""
    return CfrtError("expected a stream that runs, got a closed one; make a new one")


class Worker:
    """Makes units in a thread of its own. The methods of the consumer's side may be called from any thread."""

    def __init__(
        self,
        maker: Maker,
        config: ModelConfig,
        timeline: Timeline,
        *,
        fps: float | None,
        live: bool,
        born: float,
        meters: Meters,
        span: Hook,
        state: State | None = None,
    ) -> None:
        self._maker, self._config, self._meters, self._span = maker, config, meters, span
        self._born = born
        # Below: shared between threads, read and written under the lock.
        self._lock = threading.Condition()
        self._timeline = timeline
        self._playback = Playback(config, fps, live=live)
        self._tasks: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._listeners: list[Callable[[], None]] = []
        self._next = 0  # the first unit that is not started
        self._called_off = 0  # times that the unit after the one on show was taken back
        self._awaited: tuple[int, float] | None = None  # unit of the last change of prompt, when it was asked for
        self._closed = False
        self._error: BaseException | None = None
        with self._lock:
            loaded = None if state is None else self._post(partial(self._load, state))
        self._thread = threading.Thread(target=self._run, name="cfrt-stream", daemon=True)
        self._thread.start()
        if loaded is not None:
            loaded.result()  # before anybody asks where the stream is

    # ------------------------------------------------------------------ the consumer's side: frames

    def take(self) -> Frame | None:
        """The next frame when it is due; None when the stream is closed. Raises what stopped the worker, if anything
        did, once the frames made before that are gone."""
        with self._lock:
            due = self._due()
            if due.frame is None and not due.closed:
                with self._span("wait"):
                    while due.frame is None and not due.closed:
                        self._lock.wait(due.wait)
                        due = self._due()
            return due.frame

    def poll(self) -> Due:
        """`take` for those who must not wait."""
        with self._lock:
            return self._due()

    @contextmanager
    def listening(self, wake: Callable[[], None]) -> Iterator[None]:
        """Calls `wake`, which must not block, from whatever thread changes what `poll` gives."""
        with self._lock:
            self._listeners.append(wake)
        try:
            yield
        finally:
            with self._lock:
                self._listeners.remove(wake)

    def last_frame(self) -> Frame | None:
        """The frame handed out last."""
        return self._playback.last

    # ------------------------------------------------------------------ the consumer's side: control

    @property
    def paused(self) -> bool:
        return self._playback.paused

    @property
    def unit(self) -> int:
        """The unit on show; -1 before the first frame."""
        with self._lock:
            return self._playing()

    @property
    def reach(self) -> int:
        """Units that `rewind` can go back."""
        with self._lock:
            return self._reach()

    def changes(self) -> list[tuple[int, str]]:
        """Unit and text of the changes of prompt that are remembered."""
        with self._lock:
            return self._timeline.changes()

    def change(
        self, text: str, rows: np.ndarray, *, blend_units: int, blend: Blend, recache: bool, flush: bool
    ) -> tuple[int, float | None]:
        """The unit from which `text` holds, and the seconds that the recache took, if one was asked for and no other
        call has undone it meanwhile."""
        asked = perf_counter()
        with self._lock:
            unit = self._turn(flush or recache)
            self._timeline.change(unit, text, rows, blend_units, blend=blend, recache=recache)
            self._awaited = None if self.paused else (unit, asked)
            done = self._post(self._recache) if recache else None
        return unit, None if done is None else done.result()

    def reseed(self, seed: int) -> int:
        """The unit from which noise is that of `seed`: the first of which no frame has left."""
        with self._lock:
            unit = self._turn(flush=True)
            self._timeline.reseed(unit, seed)
        return unit

    def pause(self) -> None:
        """Hands out no further frame until `resume` or `step`; cancels what is left of a step."""
        with self._lock:
            self._check_running()
            self._playback.pause(perf_counter())
            self._awaited = None

    def resume(self) -> None:
        """Goes on after a pause, in time with a new beat."""
        with self._lock:
            self._check_running()
            self._playback.resume()
            self._notify()

    def step(self, units: int) -> int | None:
        """While paused: lets the frames of so many units through (`Playback.step`)."""
        with self._lock:
            self._check_running()
            last = self._playback.step(units)
            self._notify()
            return last

    def rewind(self, units: int) -> tuple[int | None, int]:
        """Goes back so that the unit on show and the `units - 1` before it come again: the unit that comes next. None
        where that is too far. The second number is how far it could have gone."""
        return self._call(partial(self._rewind, units))

    def save(self, *, portable: bool = False) -> State:
        """The state after the last frame that was handed out; raw, or on the host for any engine."""
        return self._call(partial(self._save, portable))

    def load(self, state: State) -> None:
        """Goes on from `state`, paused if this stream is paused."""
        self._call(partial(self._load, state))

    def branch(self) -> tuple[Engine, State]:
        """What a second stream with the same past needs."""
        engine, state = self._call(self._branch)
        if isinstance(engine, Exception):
            raise engine
        return engine, state

    def stats(self) -> Stats:
        """What has been measured so far."""
        geometry = self._config.geometry
        held = sum(stop - start for start, stop in geometry.visible_frames(self._next)) - geometry.unit
        duration = self._config.unit_frames(1) / self._config.fps
        return self._meters.read(
            ring=(held, geometry.capacity - 2 * geometry.unit),
            unit_duration=duration,
            dropped=self._playback.dropped,
            stalls=self._playback.clock.stalls,
            stalled=self._playback.clock.moved,
            journal_bytes=self._maker.journal.nbytes,
        )

    def journal_sizes(self) -> tuple[int, int]:
        """Bytes that the journal may have, and those of its largest entry so far."""
        return self._maker.journal.cap, self._maker.journal.largest

    def close(self) -> None:
        """Stops after the pass that is running, and waits for that. Closing twice is fine."""
        with self._lock:
            self._closed = True
            self._notify()
        if self._thread is not threading.current_thread():  # a stream may be collected in its own worker
            self._thread.join()

    # ------------------------------------------------------------------ under the lock

    def _due(self) -> Due:
        if self._closed:
            return Due(closed=True)
        if self._error is not None and not self._playback.queue:
            raise self._error
        before, due = self._playback.position, self._playback.due(perf_counter())
        if due.frame is not None:
            self._handed_out(due.frame, before)
        return due

    def _handed_out(self, frame: Frame, before: int) -> None:
        if frame.unit != self._config.unit_at(before):
            self._called_off = 0
        self._meters.frames += 1
        if self._awaited is not None and frame.unit >= self._awaited[0]:
            self._meters.change_to_pixel.add(perf_counter() - self._awaited[1])
            self._awaited = None
        self._notify()

    def _playing(self) -> int:
        """The unit on show."""
        return self._playback.unit(perf_counter())

    def _reach(self) -> int:
        oldest = self._maker.journal.oldest
        return 0 if oldest is None else max(0, self._playing() + 1 - oldest)

    def _turn(self, flush: bool) -> int:
        """The unit from which a change holds: with `flush` the first of which no frame has left, made again if need be;
        else the first that is not started."""
        self._check_running()
        unit = self._next
        if flush and self._called_off < CALLED_OFF:
            unit = min(self._playing() + 1, self._next)
        if unit < self._next:
            self._called_off += 1
            self._forget_from(unit)
        oldest = self._maker.journal.oldest
        earliest = self._playing() + 1 if oldest is None else min(oldest, self._playing() + 1)
        self._timeline.forget(max(0, earliest - 1))  # a change of that unit may be blended with the one before it
        self._notify()
        return unit

    def _forget_from(self, unit: int) -> None:
        """Nothing of `unit` and later ones is made; whoever makes it next takes it back first."""
        self._next = unit
        self._playback.forget_from(unit)

    def _jump(self, shown: int, queue: Iterable[Frame] = ()) -> None:
        self._playback.jump(shown, queue)
        self._called_off, self._awaited = 0, None
        self._notify()

    def _check_running(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise closed()

    def _call(self, task: Callable[[], T]) -> T:
        """What `task` gives when the worker runs it between two units."""
        with self._lock:
            self._check_running()
            done = self._post(task)
        return done.result()

    def _post(self, task: Callable[[], T]) -> "Future[T]":
        done: Future[T] = Future()
        self._tasks.append((task, done))
        self._notify()
        return done

    def _notify(self) -> None:
        self._lock.notify_all()
        for wake in self._listeners:
            wake()

    # ------------------------------------------------------------------ the thread's side

    def _run(self) -> None:
        error: BaseException = closed()
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
                self._notify()
            self._maker.engine.close()

    def _job(self) -> Callable[[], None] | None:
        """What to do next, waiting until there is something; None when the stream is closed."""
        with self._lock:
            while not self._closed:
                if self._tasks:
                    return partial(self._do, *self._tasks.popleft())
                if self._next <= self._playing() + 1:
                    self._next += 1
                    return partial(self._make, self._next - 1, self._timeline.copy())
                with self._span("wait"):
                    self._lock.wait(self._playback.begins(self._next - 1, perf_counter()))
        return None

    def _do(self, task: Callable[[], Any], done: "Future[Any]") -> None:
        try:
            done.set_result(task())
        except BaseException as error:
            done.set_exception(error)
            raise

    def _make(self, unit: int, timeline: Timeline) -> None:
        """One unit, from noise to frames in the queue and keys in the ring."""
        begin = perf_counter()
        made = self._maker.make(unit, timeline, partial(self._stale, unit))
        if made is None or not self._deliver(unit, made.pixels, timeline.at(unit).text, made.latency):
            return
        self._maker.remember(unit, made.latents)
        self._meters.unit.add(perf_counter() - begin)

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
            if self._meters.time_to_first_frame is None:
                self._meters.time_to_first_frame = perf_counter() - self._born
            self._meters.units += 1
            self._meters.latency.add(latency)
            self._playback.put(frames, perf_counter())
            self._notify()
        return True

    # ------------------------------------------------------------------ tasks

    def _recache(self) -> float | None:
        with self._lock:
            unit, rows = self._next, self._timeline.recache(self._next)
        return None if rows is None else self._maker.recache(unit, rows)

    def _rewind(self, units: int) -> tuple[int | None, int]:
        with self._lock:
            reach, unit = self._reach(), self._playing() + 1 - units
            if units > reach:
                return None, reach
            self._forget_from(unit)
            self._jump(self._config.first_frame(unit) - 1)
        self._maker.go_back(unit)
        return unit, reach

    def _save(self, portable: bool) -> State:
        """A unit that was made ahead is taken back, so that whoever goes on from here may still change it."""
        with self._lock:
            shown, timeline = self._playback.shown(perf_counter()), self._timeline.copy()
            unit = self._config.unit_at(shown) + 1
            self._forget_from(unit)
            queue = tuple(frame for frame in self._playback.queue if frame.index > shown)
        engine, past = self._maker.save(unit, portable=portable)
        return State(engine=engine, past=past, next=unit, shown=shown, queue=queue, timeline=timeline)

    def _branch(self) -> tuple[Engine | Exception, State]:
        """Where there is no room for a second engine, the first one goes on."""
        state = replace(self._save(portable=False), journal=self._maker.journal.copy())
        try:
            return self._maker.engine.twin(), state
        except Exception as error:
            return error, state

    def _load(self, state: State) -> None:
        journal = None if state.journal is None else state.journal.copy()
        self._maker.load(state.next, state.engine, state.past, journal)
        with self._lock:
            self._next, self._timeline = state.next, state.timeline.copy()
            self._jump(state.shown, state.queue)
