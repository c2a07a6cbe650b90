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
import os
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Literal, Self

import numpy as np

from . import students
from .arguments import beat, changed, continuation, count, reader
from .bundle import Bundle, is_bundle
from .clip import Clip, panel
from .engines import Engine, Spec, choose
from .errors import CfrtError, EngineError, SnapshotError
from .frame import Frame
from .journal import Journal, evicted_bytes
from .maker import Maker
from .noise import is_seed
from .snapshot import BUNDLE, Origin, Snapshot, in_fp32
from .state import State
from .stats import Meters, Stats
from .text import Encoded, Text, encoder
from .timeline import BLENDS, Blend, Timeline
from .trace import Hook, both, off
from .weights import fingerprint, load_model
from .worker import Worker, closed

__all__ = ["Change", "Snapshot", "Stream"]

JOURNAL_BYTES = 64 * 2**20
"""What a stream keeps for going back: eleven minutes of the embedded student at 16 frames a second."""


@dataclass(frozen=True)
class Change:
    """When a change of prompt takes effect."""

    unit: int
    """The first unit made from the new prompt."""
    recache_ms: float | None = None
    """What committing the window again has cost; None when that was not asked for, or a rewind came first."""


class Stream:
    """Frames of a prompt, without end, made in the background at most one unit ahead.

    model: name of an embedded student, or the folder of a model or of an exported bundle.
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
        device: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
    ) -> None:
        born = perf_counter()
        if journal_bytes < 0:
            raise ValueError(f"expected journal_bytes >= 0, got {journal_bytes}")
        folder = students.find(model)
        config, weights = load_model(folder)
        self.config = changed(config, guidance, schedule, reference_compat)
        self._text = encoder(self.config, weights, folder) if text is None else reader(self.config, text)
        self._prompt, rows = prompt, self._encode(prompt).rows
        self._fps, self._live, self._trace = beat(self.config, fps, keep), keep == "latest", trace
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
            bundle=Bundle.open(folder) if is_bundle(folder) else None,
        )
        chosen, self.refusals = choose(engine, self._spec)
        made = chosen()
        made.prepare(self._spec)
        journal = Journal(journal_bytes, least=evicted_bytes(self.config))
        self.engine, self.precision, self.seed = chosen.name, made.precision, seed
        self._start(made, Timeline(prompt, rows, seed), journal, prefix, born)

    def _start(
        self,
        engine: Engine,
        timeline: Timeline,
        journal: Journal,
        prefix: np.ndarray | None,
        born: float,
        state: State | None = None,
    ) -> None:
        """The thread, and what ends it. With `state` it goes on from there."""
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
            maker,
            self.config,
            timeline,
            fps=self._fps,
            live=self._live,
            born=born,
            meters=meters,
            span=span,
            state=state,
        )
        self._stop = weakref.finalize(self, self._worker.close)

    # ------------------------------------------------------------------ frames

    def frames(self, n: int | None = None, seconds: float | None = None) -> Iterator[Frame]:
        """The next n frames, or `seconds` of video (exactly round(seconds * the model's fps) frames), or all there will
        ever be. A second call goes on where the first one stopped."""
        wanted = count(self.config, n, seconds)
        if not self._stop.alive:
            raise closed()
        return self._iterate(wanted)

    def clip(self, n: int | None = None, seconds: float | None = None) -> Clip:
        """The next frames together, which a notebook plays. ValueError where there would be no end."""
        if n is None and seconds is None:
            raise ValueError("expected n frames or so many seconds, got neither")
        return Clip(self.frames(n, seconds), self.config.fps)

    def __iter__(self) -> Iterator[Frame]:
        return self.frames()

    def aframes(self, n: int | None = None, seconds: float | None = None) -> AsyncIterator[Frame]:
        """`frames` for asyncio. Nothing blocks the loop, and a task that is cancelled while it waits loses no frame."""
        wanted = count(self.config, n, seconds)
        if not self._stop.alive:
            raise closed()
        return self._aiterate(wanted)

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

    def read(self, text: str) -> Encoded:
        """How the model reads a prompt: the words that it understood and, in `notes`, those that it did not."""
        return self._text.encode(text)

    def reseed(self, seed: int) -> Change:
        """Other noise from the first unit on of which no frame has been handed out."""
        if not is_seed(seed):
            raise ValueError(f"expected a whole-number seed from 0 to 2**64 - 1, got {seed!r}")
        self._refuse_compat("reseed")
        unit = self._worker.reseed(seed)
        self.seed = seed
        return Change(unit)

    def pause(self) -> None:
        """Hands out no more frames, from this moment on: who asks for one waits. The unit ahead is still made, and no
        other."""
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
            raise CfrtError("expected a stream that is paused, got one that plays; call pause() first")
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
            raise CfrtError(f"expected at most {counted(reach)} to go back, got {units}: {self._limits(reach)}")
        return unit

    def snapshot(self, *, portable: bool = False) -> Snapshot:
        """The state after the last frame handed out; commits first what is still to be committed.

        Exact, for a stream of the same model, engine and precision, which then goes on bit for bit; or `portable`: keys
        and values as fp32 by frame, for any engine and for a file (`Snapshot.save`). A portable one is as exact where
        the engine keeps no more than fp32."""
        self._refuse_compat("take snapshots")
        if portable and self.config.schedule == "rolling":
            raise SnapshotError(
                "a rolling schedule has units half made, which only an exact snapshot holds: snapshot()"
            )
        state = self._worker.save(portable=portable)
        return Snapshot(self._origin, in_fp32(state) if portable else state)

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on as the snapshot's stream did, with its prompt and seed, at this stream's pace, paused if it is. What
        came before cannot be gone back to. SnapshotError where this stream is of another kind."""
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"expected a Snapshot, as snapshot() and Snapshot.load give, got {type(snapshot).__name__}")
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
        twin._start(engine, state.timeline, Journal(0), None, born, state)
        twin._follow(state)
        return twin

    # ------------------------------------------------------------------ state

    @property
    def paused(self) -> bool:
        """Whether frames are held back: after `pause`, until `resume`, also while steps are on their way out."""
        return self._worker.paused

    @property
    def device(self) -> str:
        """Where it runs: what was asked for; of "auto", a GPU for the engine that needs one, else the CPU."""
        if self._spec.device != "auto":
            return self._spec.device
        return "cuda" if self.engine == "trt" else "cpu"

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

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def __repr__(self) -> str:
        state = "" if self._stop.alive else ", closed"
        return f"Stream({self._prompt!r}, model={self.config.name!r}, engine={self.engine!r}, seed={self.seed}{state})"

    def _repr_html_(self) -> str:
        """Where the stream is, and the last frame handed out; looking at it takes no frame away."""
        state = "closed" if not self._stop.alive else "paused" if self.paused else "playing"
        facts = {
            "prompt": self._prompt,
            "model": f"{self.config.name} ({self.engine}, {self.precision}, seed {self.seed})",
            "state": f"{state}, unit {self.unit}, can go back {self.reach}",
        }
        return panel(facts, self._worker.last_frame())

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

    @cached_property
    def _origin(self) -> Origin:
        return Origin(
            model=self.config.name,
            config=json.dumps(self.config.to_dict(), sort_keys=True),
            weights=(BUNDLE if self._spec.bundle is not None else "") + fingerprint(self._spec.weights),
            decoder=self._spec.decoder,
            tile=self._spec.tile,
            engine=self.engine,
            device=self.device,
            precision=self.precision,
        )

    def _follow(self, state: State) -> None:
        """Text and seed of what has been restored."""
        self._prompt, self.seed = state.timeline.at(state.next).text, state.timeline.seed(state.next)

    def _limits(self, reach: int) -> str:
        """How far back one can go, and why no further."""
        cap, entry = self._worker.journal_sizes()
        if cap == 0:
            return "it has no journal; make the stream with journal_bytes above 0"
        if entry > cap:
            return f"the journal has {cap} bytes and one unit needs {entry}; make the stream with more journal_bytes"
        if reach > self.unit:
            return f"the stream is {counted(reach)} long; go back less far"
        return f"the journal reaches no further; make the stream with more journal_bytes (now {cap}), or take snapshots"

    def _refuse_compat(self, what: str) -> None:
        if self.config.reference_compat:
            raise EngineError(f"reference_compat draws its noise once and in order, so it cannot {what}; leave it out")

    def _encode(self, prompt: str) -> Encoded:
        encoded = self._text.encode(prompt)
        encoded.warn(stacklevel=3)
        return encoded

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


def counted(units: int) -> str:
    """1 unit, 2 units."""
    return f"{units} unit{'' if units == 1 else 's'}"
