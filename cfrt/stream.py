"""A prompt becomes a live stream of frames.

    stream = Stream("a large red circle moving left", seed=7)
    for frame in stream.frames(seconds=4):
        ...

What a stream is made of: an engine (`cfrt.engines`), what is made by it (`cfrt.maker`), the texts of its units
(`cfrt.timeline`) and a thread with a queue (`cfrt.worker`). This file is the part that people hold in their hands;
docs/control.md says exactly what each call does.
"""

import asyncio
import json
import math
import os
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Literal, Self

import numpy as np

from . import students
from .config import ModelConfig
from .engines import Engine, Spec, choose
from .errors import CfrtError, EngineError, SnapshotError, VideoError
from .frame import Frame
from .journal import Journal
from .maker import Maker
from .snapshot import Origin, Snapshot, portable
from .stats import Meters, Stats
from .text import Encoded, Text, UMT5Text, encoder
from .timeline import BLENDS, Blend, Timeline
from .trace import Hook, both, off
from .weights import fingerprint, load_model
from .worker import State, Worker

__all__ = ["Change", "Snapshot", "Stream", "continuation"]

JOURNAL_BYTES = 64 * 2**20
"""What a stream keeps for going back: eleven minutes of the embedded student at 16 frames a second."""

MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class Change:
    """When a change of prompt takes effect."""

    unit: int
    """The first unit made from the new prompt."""
    recache_ms: float | None = None
    """What committing the window again has cost; None when that was not asked for, or a rewind came first."""


class Stream:
    """Frames of a prompt, without end, made in the background at most one unit ahead.

    model: name of an embedded student, or the folder of a model.
    seed: same seed, engine, precision and number of threads: same bytes.
    fps: the beat at which frames are handed out; None is the model's own, "max" hands them out as they are made.
    keep: "all" hands out every frame, however slow the consumer; "latest" goes on in its own time and skips what a slow
        consumer has missed.
    image: (H, W, 3) uint8 of the model's frame size; the stream starts from it (frame 0 is its reconstruction).
    prefix: (T, H, W, 3) uint8, a film to go on from, in place of `image`: as many frames as whole units have, of which
        the stream hands out the reconstruction first.
    text: what reads prompts (`cfrt.text.Text`), or the folder of umT5's files; None finds what belongs to the model.
    guidance, negative: weight of classifier-free guidance and the prompt that it leads away from; None are the model's
        own (teachers have both, students need neither). More than 1 doubles the work and the ring.
    decoder: "taehv" for the small decoder of Wan's latents, where the model's folder has it; None the model's own.
    tile: latent cells along the side of the tiles that are decoded at once, for less memory and blended seams.
    schedule: "sequential" or "rolling" (`ModelConfig.schedule`); None the model's own.
    reference_compat: as the released inference code does it (`ModelConfig.reference_compat`).
    journal_bytes: host memory for `rewind`, as far as it is needed; 0 for none.
    trace: called around every stage of the work (`cfrt.trace`).
    engine, device, precision, threads: see `cfrt.engines`.

    Errors come at construction: WeightsError, ConfigError, PromptError, EngineError. What goes wrong later is raised by
    `frames`. Close a stream, use it in a `with` block or just drop it: its thread ends. Any thread may call any method;
    calls take effect one after the other.
    """

    def __init__(
        self,
        prompt: str,
        *,
        model: str | os.PathLike[str] = "tiny",
        engine: str = "auto",
        seed: int = 0,
        fps: float | Literal["max"] | None = None,
        keep: Literal["all", "latest"] = "all",
        image: np.ndarray | None = None,
        prefix: np.ndarray | None = None,
        text: Text | str | os.PathLike[str] | None = None,
        guidance: float | None = None,
        negative: str | None = None,
        decoder: str | None = None,
        tile: int | None = None,
        schedule: Literal["sequential", "rolling"] | None = None,
        reference_compat: bool = False,
        journal_bytes: int = JOURNAL_BYTES,
        trace: Hook | None = None,
        device: str = "cpu",
        precision: str = "auto",
        threads: int | None = None,
    ) -> None:
        born = perf_counter()
        if journal_bytes < 0:
            raise ValueError(f"expected journal_bytes >= 0, got {journal_bytes}")
        folder = students.find(model)
        config, weights = load_model(folder)
        self.config = changed(config, guidance, schedule, reference_compat)
        self._text = encoder(self.config, weights, folder) if text is None else self._reader(text)
        self._prompt, rows = prompt, self._encode(prompt).rows
        self._fps, self._live, self._trace = self._beat(fps, keep), keep == "latest", trace
        prefix = continuation(self.config, image, prefix)
        self._spec = Spec(
            config=self.config,
            weights=weights,
            device=device,
            precision=precision,
            seed=seed,
            threads=threads,
            null=self._null(negative),
            prefix=0 if prefix is None else len(prefix),
            decoder=decoder,
            tile=tile,
        )
        chosen, self.refusals = choose(engine, self._spec)
        made = chosen()
        made.prepare(self._spec)
        self.engine, self.precision, self.seed = chosen.name, made.precision, seed
        self._start(made, Timeline(prompt, rows, seed), Journal(journal_bytes), prefix, born)

    def _start(
        self, engine: Engine, timeline: Timeline, journal: Journal, prefix: np.ndarray | None, born: float
    ) -> None:
        """The thread, and what ends it."""
        hooks = [hook for hook in (self._trace, getattr(engine, "annotate", None)) if hook is not None]
        span = both(*hooks) if len(hooks) == 2 else hooks[0] if hooks else off
        meters = Meters()
        maker = Maker(
            engine,
            self.config,
            fuse=self._fps is None and engine.fuses,  # by configuration, never by timing: the same bytes every time
            prefix=prefix,
            seed=self._spec.seed,
            journal=journal,
            meters=meters,
            span=span,
        )
        self._worker = Worker(
            maker, self.config, timeline, fps=self._fps, live=self._live, born=born, meters=meters, span=span
        )
        self._stop = weakref.finalize(self, self._worker.close)

    # ------------------------------------------------------------------ frames

    def frames(self, n: int | None = None, seconds: float | None = None) -> Iterator[Frame]:
        """The next n frames, or `seconds` of video (exactly round(seconds * the model's fps) frames), or all there will
        ever be. A second call goes on where the first one stopped."""
        count = self._count(n, seconds)
        if not self._stop.alive:
            raise CfrtError("this stream is closed; make a new one")
        return self._iterate(count)

    def __iter__(self) -> Iterator[Frame]:
        return self.frames()

    def aframes(self, n: int | None = None, seconds: float | None = None) -> AsyncIterator[Frame]:
        """`frames` for asyncio. Nothing blocks the loop, and a task that is cancelled while it waits loses no frame."""
        count = self._count(n, seconds)
        if not self._stop.alive:
            raise CfrtError("this stream is closed; make a new one")
        return self._aiterate(count)

    def __aiter__(self) -> AsyncIterator[Frame]:
        return self.aframes()

    # ------------------------------------------------------------------ control

    def prompt(
        self, text: str, *, blend_units: int = 0, blend: Blend = "lerp", recache: bool = False, flush: bool = True
    ) -> Change:
        """Makes the stream follow `text`; of several changes before the same unit the latest wins.

        blend_units: cross-fade the rows of text over that many units before the new text stands alone.
        blend: "lerp", along a line, or "slerp", along the arc between the directions of two rows.
        recache: also commit the window again under the new text, so that the past does not hold on to the old one;
            waits for the unit in work and for the recache. Sinks keep the text that they were made from. Flushes.
        flush: take effect at the first unit of which no frame has been handed out, even if that one is made already and
            must be made again (four times at most). Without it: at the first unit that is not started.

        PromptError leaves the stream as it is."""
        if blend_units < 0:
            raise ValueError(f"expected blend_units >= 0, got {blend_units}")
        if blend not in BLENDS:
            raise ValueError(f"expected blend {' or '.join(map(repr, BLENDS))}, got {blend!r}")
        rows = self._encode(text).rows
        unit, cost = self._worker.change(text, rows, blend_units=blend_units, blend=blend, recache=recache, flush=flush)
        self._prompt = text
        return Change(unit, None if cost is None else 1000 * cost)

    def reseed(self, seed: int) -> Change:
        """Other noise from the first unit on of which no frame has been handed out."""
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"expected a seed from 0 to 2**64 - 1, got {seed}")
        self._refuse_compat("reseed")
        unit = self._worker.reseed(seed)
        self.seed = seed
        return Change(unit)

    def pause(self) -> None:
        """Hands out no more frames, from this moment on: who asks for one waits. The work for the unit under way is
        finished, no other is begun."""
        self._worker.pause()

    def resume(self) -> None:
        """Hands out frames again, on a beat that starts anew; nothing is made up for."""
        self._worker.resume()

    def step(self, units: int = 1) -> int:
        """While paused: lets frames through to the end of the next `units` units and gives the last one's number. The
        rest of a unit that is half shown counts as the first. Steps add up. CfrtError when the stream is not paused."""
        if units < 1:
            raise ValueError(f"expected units >= 1, got {units}")
        last = self._worker.step(units)
        if last is None:
            raise CfrtError("a stream steps only while it is paused; call pause() first")
        return last

    def rewind(self, units: int) -> int:
        """Goes back over the unit on show and `units` - 1 before it, and gives the unit that comes next. It and those
        after it are made again as they were made the first time, from the same texts, seeds and recaches, until a new
        change takes their place. CfrtError past `reach`, which leaves the stream where it is."""
        if units < 1:
            raise ValueError(f"expected units >= 1, got {units}")
        self._refuse_compat("rewind")
        unit, reach = self._worker.rewind(units)
        if unit is None:
            raise CfrtError(f"cannot go back {units} units: {self._limits(reach)}")
        return unit

    def snapshot(self, *, portable: bool = False) -> Snapshot:
        """The state after the last frame handed out; commits first what is still to be committed.

        Exact, for a stream of the same model, engine and precision, which then goes on bit for bit; or `portable`: keys
        and values as fp32 by frame, for any engine and for a file (`Snapshot.save`). A portable one is as exact where
        the engine keeps no more than fp32."""
        if portable and self.config.schedule == "rolling":
            raise SnapshotError(
                "a rolling schedule has units half made, which only an exact snapshot holds: snapshot()"
            )
        return self._snapshot(portable)

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on as the snapshot's stream did, with its prompt and seed, at this stream's pace, paused if it is. What
        came before cannot be gone back to. SnapshotError where this stream is of another kind."""
        snapshot.check(self._origin)
        self._worker.load(snapshot.state)
        self._follow(snapshot.state)

    def branch(self) -> "Stream":
        """A second stream that has the same past, up to the last frame handed out, and a future of its own. It has
        its own thread and pace, shares the weights as far as its engine can, can go back as far as this one, and runs
        even where this one is paused."""
        self._refuse_compat("branch")
        born = perf_counter()
        engine, state = self._worker.branch()
        twin = copy(self)
        twin._start(engine, state.timeline, Journal(0), None, born)
        twin._worker.load(state)
        twin._follow(state)
        return twin

    # ------------------------------------------------------------------ state

    @property
    def paused(self) -> bool:
        return self._worker.paused

    @property
    def unit(self) -> int:
        """The playhead: the unit of the last frame handed out; -1 before the first. With keep="latest" the unit that
        is on show by the clock."""
        return self._worker.unit

    @property
    def reach(self) -> int:
        """Units that `rewind` can go back now."""
        return self._worker.reach

    @property
    def changes(self) -> list[tuple[int, str]]:
        """Unit and text of the changes of prompt, the first text included, as far back as `rewind` goes."""
        return self._worker.changes()

    @property
    def stats(self) -> Stats:
        """What the stream has measured of itself so far."""
        return self._worker.stats()

    def close(self) -> None:
        """Ends the stream and its thread, after the pass that is running."""
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "" if self._stop.alive else ", closed"
        return f"Stream({self._prompt!r}, model={self.config.name!r}, engine={self.engine!r}, seed={self.seed}{state})"

    # ------------------------------------------------------------------ parts

    def _iterate(self, count: int | None) -> Iterator[Frame]:
        handed = 0
        while handed != count and (frame := self._worker.take()) is not None:
            yield frame
            handed += 1

    async def _aiterate(self, count: int | None) -> AsyncIterator[Frame]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop has ended before this generator was closed
                loop.call_soon_threadsafe(changed.set)

        handed = 0
        with self._worker.listening(wake):
            while handed != count:
                changed.clear()
                due = self._worker.poll()
                if due.closed:
                    return
                if due.frame is not None:
                    yield due.frame
                    handed += 1
                    continue
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), due.wait)

    def _snapshot(self, on_host: bool) -> Snapshot:
        state = self._worker.save(portable=on_host)
        return Snapshot(self._origin, portable(state) if on_host else state)

    @cached_property
    def _origin(self) -> Origin:
        return Origin(
            model=self.config.name,
            config=json.dumps(self.config.to_dict(), sort_keys=True),
            weights=fingerprint(self._spec.weights),
            decoder=self._spec.decoder,
            tile=self._spec.tile,
            engine=self.engine,
            device=self._spec.device,
            precision=self.precision,
        )

    def _follow(self, state: State) -> None:
        """Text and seed of what has been restored."""
        self._prompt, self.seed = state.timeline.at(state.next).text, state.timeline.seed(state.next)

    def _limits(self, reach: int) -> str:
        """How far back one can go, and why no further."""
        cap, entry = self._worker.journal_sizes()
        if entry > cap:
            return f"the journal has {cap} bytes and one unit needs {entry}; make the stream with more journal_bytes"
        if reach > self.unit:
            return f"the stream is {reach} units long"
        return (
            f"the journal reaches {reach} back; make the stream with more journal_bytes (now {cap}), or take snapshots"
        )

    def _refuse_compat(self, what: str) -> None:
        if self.config.reference_compat:
            raise EngineError(f"reference_compat draws its noise once and in order, so it cannot {what}; leave it out")

    def _encode(self, prompt: str) -> Encoded:
        encoded = self._text.encode(prompt)
        encoded.warn(stacklevel=3)
        return encoded

    def _count(self, n: int | None, seconds: float | None) -> int | None:
        if n is not None and seconds is not None:
            raise ValueError("expected n or seconds, got both")
        if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"expected seconds >= 0, got {seconds}")
        if n is not None and n < 0:
            raise ValueError(f"expected n >= 0 frames, got {n}")
        return n if seconds is None else round(seconds * self.config.fps)

    def _beat(self, fps: float | str | None, keep: str) -> float | None:
        """Frames a second, None for as fast as they are made."""
        if keep not in ("all", "latest"):
            raise ValueError(f'expected keep="all" or "latest", got {keep!r}')
        if fps == "max":
            if keep == "latest":
                raise ValueError('keep="latest" needs a beat: give fps a number, or None for the model\'s own')
            return None
        beat = self.config.fps if fps is None else fps
        if isinstance(beat, str) or not (math.isfinite(beat) and beat > 0):
            raise ValueError(f'expected fps > 0, "max" or None, got {fps!r}')
        return float(beat)

    def _reader(self, text: Text | str | os.PathLike[str]) -> Text:
        if not isinstance(text, str | os.PathLike):
            return text
        if self.config.text.kind != "umt5":
            raise EngineError(f"{self.config.name!r} reads through its own table; there is no text encoder to give it")
        return UMT5Text(self.config.text, [Path(text).expanduser()])

    def _null(self, negative: str | None) -> np.ndarray | None:
        """Text rows to lead away from, where the model is guided."""
        if not self.config.guided:
            if negative is not None:
                raise EngineError(f"{self.config.name!r} is not guided (guidance 1), so it reads no negative prompt")
            return None
        text = self.config.text
        words = text.negative if negative is None else negative
        if text.kind == "table" and not words.strip():
            return np.zeros((text.length, text.width), dtype=np.float32)
        return self._encode(words).rows


def changed(config: ModelConfig, guidance: float | None, schedule: str | None, reference_compat: bool) -> ModelConfig:
    """The config with what a stream may choose."""
    if guidance is not None:
        config = replace(config, guidance=guidance)
    if schedule is not None:
        config = replace(config, schedule=schedule)
    return config.as_reference() if reference_compat else config


def continuation(config: ModelConfig, image: np.ndarray | None, prefix: np.ndarray | None) -> np.ndarray | None:
    """The pictures that a stream goes on from, (T, H, W, 3) uint8, checked against the model; None for none."""
    height, width = config.frame_size
    if image is not None and prefix is not None:
        raise ValueError("expected image or prefix, got both")
    if image is not None:
        if config.unit != 1:
            raise EngineError(
                f"only a frame-wise model can start from a picture; {config.name!r} makes units of {config.unit} "
                f"latent frames, so give it a film of {config.first_frame(1)} pictures or more as prefix"
            )
        if not isinstance(image, np.ndarray) or image.shape != (height, width, 3) or image.dtype != np.uint8:
            got = f"{image.shape} {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
            raise VideoError(
                f"expected a picture ({height}, {width}, 3) uint8, got {got}; "
                f"cfrt.video.read_picture(path, ({height}, {width})) makes one"
            )
        return image[None]
    if prefix is None:
        return None
    if not isinstance(prefix, np.ndarray) or prefix.shape[1:] != (height, width, 3) or prefix.dtype != np.uint8:
        got = f"{prefix.shape} {prefix.dtype}" if isinstance(prefix, np.ndarray) else type(prefix).__name__
        raise VideoError(f"expected pictures (T, {height}, {width}, 3) uint8, got {got}")
    units = config.unit_at(len(prefix) - 1) + 1
    if len(prefix) == 0 or config.first_frame(units) != len(prefix):
        fitting = ", ".join(str(config.first_frame(n)) for n in (1, 2, 3, max(4, units)))
        raise VideoError(f"expected as many pictures as whole units have ({fitting}, ...), got {len(prefix)}; cut some")
    return prefix
