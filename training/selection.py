"""Which clips are made of what footage: every file looked at, refused with a reason or cut into clips, and each clip
given its place. Nothing is decoded beyond a first frame, and nothing encoded.

The same files and settings give the same selection."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

from tqdm.auto import tqdm

from cfrt.config import ModelConfig
from cfrt.errors import ConfigError, PromptError, VideoError
from training import footage
from training.footage import Cut, Film, Rejected, Video
from training.wording import Rows, vocabulary

SLOWEST = 0.9
"""Footage may have this share of the model's frame rate; in what is slower too many frames would stand still."""
ROUNDING = 1.01
"""Enlargement up to which footage counts as large enough."""
READERS = 8
"""Files looked at side by side: that is waiting for a disk, mostly."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How footage is cut; None: the model's, or what follows from it."""

    frames: int | None = None
    stride: float | None = None
    clips_per_video: int | None = None
    min_fps: float | None = None
    enlarge: bool = False
    vocabulary: str = "model"

    def __post_init__(self) -> None:
        for name in ("frames", "stride", "clips_per_video", "min_fps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"expected {name} above 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A video that clips are made of."""

    video: Video
    film: Film
    starts: tuple[float, ...]
    """Seconds at which its clips begin."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    model: ModelConfig
    """Its text is the one that the captions are written in."""
    frames: int
    """n: latent frames of a clip."""
    settings: Settings
    sources: tuple[Source, ...]
    rejected: tuple[Rejected, ...] = ()
    unread: dict[str, int] = field(default_factory=dict)
    """Words that the model does not read, with the number of videos whose caption has them."""

    @property
    def cut(self) -> Cut:
        return _cut(self.model, self.frames)

    @property
    def clips(self) -> int:
        return sum(len(source.starts) for source in self.sources)

    def jobs(self) -> Iterator[Job]:
        """Every clip with its number, from 0."""
        every = ((source, start) for source in self.sources for start in source.starts)
        return (Job(number=number, source=source, start=start) for number, (source, start) in enumerate(every))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the footage: the names, sizes and captions of its files."""
        videos = [(s.video, s.film) for s in self.sources]
        content = [[v.name, v.path.stat().st_size, film.seconds, v.caption, v.start, v.end] for v, film in videos]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One clip to make."""

    number: int
    source: Source
    start: float


def select(videos: Sequence[Video], rejected: Iterable[Rejected], model: ModelConfig, settings: Settings) -> Selection:
    """Look at every video. `rejected` are those that fell out before. ConfigError when the settings do not go with the
    model."""
    frames = settings.frames or model.trained_frames
    if frames % model.unit:
        raise ConfigError(f"expected frames to be a multiple of the unit of {model.name!r}, {model.unit}; got {frames}")
    refused = list(rejected)
    sources = list(_usable(videos, _cut(model, frames), settings, refused))
    if settings.vocabulary == "captions":
        if model.text.kind != "table":
            raise ConfigError(f"{model.name!r} reads any words, through {model.text.kind}: leave its vocabulary alone")
        model = replace(model, text=vocabulary([source.video.caption for source in sources], model.text))
    unread: Counter[str] = Counter()
    if model.text.kind == "table":
        sources = list(_readable(sources, Rows(model.text), refused, unread))
    return Selection(
        model=model,
        frames=frames,
        settings=settings,
        sources=tuple(sources),
        rejected=tuple(sorted(refused, key=lambda r: (r.file, r.reason))),
        unread=dict(sorted(unread.items(), key=lambda item: (-item[1], item[0]))),
    )


def _cut(model: ModelConfig, frames: int) -> Cut:
    """Wan's time law: the first latent frame is one picture, each further one as many as the autoencoder folds."""
    return Cut(frames=1 + model.autoencoder.temporal * (frames - 1), fps=model.fps, size=model.frame_size)


def _usable(videos: Sequence[Video], cut: Cut, settings: Settings, refused: list[Rejected]) -> Iterator[Source]:
    """Videos that clips can be cut out of, in order; the others go to `refused`."""
    look = partial(_look, cut=cut, settings=settings)
    with ThreadPoolExecutor(READERS) as readers:
        seen = readers.map(look, videos)
        for found in tqdm(seen, total=len(videos), desc="looking", unit="file", disable=not sys.stderr.isatty()):
            if isinstance(found, Rejected):
                refused.append(found)
            else:
                yield found


def _look(video: Video, cut: Cut, settings: Settings) -> Source | Rejected:
    try:
        film = footage.probe(video.path)
        _check(film, cut, settings)
        starts = footage.starts(video, film, cut, stride=settings.stride, most=settings.clips_per_video)
    except VideoError as error:
        return Rejected(file=video.name, reason=str(error))
    return Source(video=video, film=film, starts=tuple(starts))


def _check(film: Film, cut: Cut, settings: Settings) -> None:
    slowest = cut.fps * SLOWEST if settings.min_fps is None else settings.min_fps
    if film.fps is not None and film.fps < slowest:
        raise VideoError(
            f"too slow: {film.fps:g} frames a second for a model of {cut.fps:g}, some would stand still; "
            f"--min-fps {film.fps:g} takes it"
        )
    scale = footage.enlargement(film, cut)
    if scale > ROUNDING and not settings.enlarge:
        (height, width), (rows, columns) = film.size, cut.size
        raise VideoError(
            f"too small: {width} x {height} pixels, {columns} x {rows} would be {scale:.1f} times larger; "
            "--enlarge takes it"
        )


def _readable(sources: Iterable[Source], rows: Rows, refused: list[Rejected], unread: Counter[str]) -> Iterator[Source]:
    """Those in whose caption the table knows a word; `unread` counts the words that it does not know."""
    for source in sources:
        try:
            unread.update(rows.unread(source.video.caption))
        except PromptError as error:
            refused.append(Rejected(file=source.video.name, reason=str(error)))
        else:
            yield source
