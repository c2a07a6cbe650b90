"""A prompt becomes a live stream of frames.

    stream = Stream("a large red circle moving left", seed=7)
    for frame in stream.frames(seconds=4):
        ...

What a stream is made of: an engine (`cfrt.engines`), the texts of its units (`cfrt.timeline`) and a thread that makes
units (`cfrt.worker`). This file is the part that people hold in their hands.
"""

import math
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Literal, Self

import numpy as np

from . import students
from .config import ModelConfig
from .engines import Spec, choose
from .errors import CfrtError, EngineError, VideoError
from .frame import Frame
from .stats import Stats
from .text import Encoded, Text, UMT5Text, encoder
from .timeline import Timeline
from .weights import load_model
from .worker import State, Worker


@dataclass(frozen=True)
class Change:
    """When a change of prompt takes effect."""

    unit: int
    """The first unit made from the new prompt."""
    recache_ms: float | None = None
    """What committing the window again has cost; None when that was not asked for."""


@dataclass(frozen=True, repr=False)
class Snapshot:
    """The exact state of a stream, for a stream of the same model, engine, precision and seed."""

    made_by: tuple[object, ...]
    state: State

    def __repr__(self) -> str:
        model, engine, *_ = self.made_by
        return f"Snapshot(model={model!r}, engine={engine!r}, unit={self.state.playhead})"


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
    engine, device, precision, threads: see `cfrt.engines`.

    Errors come at construction: WeightsError, ConfigError, PromptError, EngineError. What goes wrong later is raised by
    `frames`. Close a stream, use it in a `with` block or just drop it: its thread ends. Any thread may call any method.
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
        device: str = "cpu",
        precision: str = "auto",
        threads: int | None = None,
    ) -> None:
        born = perf_counter()
        folder = students.find(model)
        self.config, weights = load_model(folder)
        if guidance is not None:
            self.config = replace(self.config, guidance=guidance)
        if schedule is not None:
            self.config = replace(self.config, schedule=schedule)
        if reference_compat:
            self.config = self.config.as_reference()
        self._text = encoder(self.config, weights, folder) if text is None else self._reader(text)
        encoded = self._encode(prompt)
        beat = self._beat(fps, keep)
        prefix = continuation(self.config, image, prefix)
        spec = Spec(
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
        chosen, self.refusals = choose(engine, spec)
        made = chosen()
        made.prepare(spec)
        self.engine, self.precision, self.seed = chosen.name, made.precision, seed
        self._identity = (self.config.name, self.engine, device, self.precision, seed, self.config.schedule)
        self._prompt = prompt
        timeline = Timeline(prompt, encoded.rows)
        self._worker = Worker(made, self.config, timeline, fps=beat, live=keep == "latest", prefix=prefix, born=born)
        self._stop = weakref.finalize(self, self._worker.close)

    def frames(self, n: int | None = None, seconds: float | None = None) -> Iterator[Frame]:
        """The next n frames, or `seconds` of video (exactly round(seconds * the model's fps) frames), or all there will
        ever be. A second call goes on where the first one stopped."""
        count = self._count(n, seconds)
        if not self._stop.alive:
            raise CfrtError("this stream is closed; make a new one")
        return self._iterate(count)

    def __iter__(self) -> Iterator[Frame]:
        return self.frames()

    def prompt(self, text: str, *, blend_units: int = 0, recache: bool = False, flush: bool = True) -> Change:
        """Makes the stream follow `text`; of several changes before the same unit the latest wins.

        blend_units: cross-fade the rows of text over that many units before the new text stands alone.
        recache: also commit the window again under the new text, so that the past does not hold on to the old one;
            waits for the unit in work and for the recache. Sinks keep the text that they were made from.
        flush: take effect at the first unit of which no frame has been handed out, even if that one is made already and
            must be made again (four times at most). Without it: at the first unit that is not started.

        PromptError leaves the stream as it is."""
        if blend_units < 0:
            raise ValueError(f"expected blend_units >= 0, got {blend_units}")
        rows = self._encode(text).rows
        unit, cost = self._worker.change(text, rows, blend_units=blend_units, recache=recache, flush=flush)
        self._prompt = text
        return Change(unit, None if cost is None else 1000 * cost)

    def snapshot(self) -> Snapshot:
        """The exact state after the last frame handed out; commits first what is still to be committed."""
        return Snapshot(self._identity, self._worker.save())

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on exactly as the snapshot's stream did. EngineError where this stream is of another kind."""
        if snapshot.made_by != self._identity:
            raise EngineError(
                f"expected a snapshot of (model, engine, device, precision, seed, schedule) = {self._identity}, "
                f"got one of {snapshot.made_by}"
            )
        self._worker.load(snapshot.state)

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

    # ------------------------------------------------------------------ reading arguments

    def _iterate(self, count: int | None) -> Iterator[Frame]:
        handed = 0
        while handed != count and (frame := self._worker.take()) is not None:
            yield frame
            handed += 1

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


def continuation(config: ModelConfig, image: np.ndarray | None, prefix: np.ndarray | None) -> np.ndarray | None:
    """The pictures that a stream goes on from, (T, H, W, 3) uint8, checked against the model; None for none."""
    height, width = config.frame_size
    if image is not None and prefix is not None:
        raise ValueError("expected image or prefix, got both")
    if image is not None:
        if config.unit != 1:
            raise EngineError(
                f"only a frame-wise model can start from a picture; {config.name!r} makes units of {config.unit} "
                f"latent frames"
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
