"""Videos and captions as people keep them, and clips cut out of them.

A folder holds videos with a caption each, NAME.mp4 and NAME.txt; or a CSV lists them. A clip is what a player would
show: at time t the last frame whose time has come, turned and stretched as its file says, in the colours it means. It
covers the asked size about its centre. Which models read the clips, and how, is not known here.

Times are seconds from a video's first frame; pixels are uint8 [T, H, W, 3]."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream

from cfrt.errors import CfrtError, VideoError

_NAMES = "3gp avi flv gif m2ts m4v mkv mov mp4 mpeg mpg mts ogv ts webm wmv y4m"
SUFFIXES = frozenset(f".{name}" for name in _NAMES.split())
COLUMNS, SEGMENT = ("path", "caption"), ("start", "end")
INSTANT = 1e-4
"""Seconds within which two times are the same: time stamps are rounded, to a millisecond at worst to half of one."""
LARGE = 720
"""Lines from which untagged video is taken to be in BT.709 colours, as players do; below it is BT.601."""
UNTAGGED = 2
"""AVCOL_SPC_UNSPECIFIED."""
DEFAULT_RATE = 25
"""Frames a second of a file that does not say, which is what FFmpeg takes such streams for."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """A video and what is said about it."""

    path: Path
    name: str
    """How reports call it: its path as its owner wrote it, or below the folder."""
    caption: str
    start: float = 0.0
    end: float | None = None
    """The segment that the caption is about; None is the end of the video."""


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A file that cannot be used, and why."""

    file: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What a clip is: `frames` pictures of `size` (height, width), `fps` a second."""

    frames: int
    fps: float
    size: tuple[int, int]

    @property
    def seconds(self) -> float:
        """From the first frame's time to the last one's."""
        return (self.frames - 1) / self.fps


@dataclass(frozen=True, kw_only=True)
class Film:
    """What a video file says about itself."""

    seconds: float
    fps: float | None
    size: tuple[int, int]
    """Height and width as shown, in square pixels."""


# ---------------------------------------------------------------------- lists


def listed(folder: Path) -> tuple[list[Video], list[Rejected]]:
    """The videos in `folder` and below it, by name, each with the caption in the .txt beside it; and what has none.
    Files that are neither video nor .txt are left alone, and so is what is hidden."""
    every = sorted(_files(folder))
    names = [name for name in every if _speakable(name)]
    videos = [name for name in names if Path(name).suffix.lower() in SUFFIXES]
    found: list[Video] = []
    rejected = [Rejected(file=ascii(name), reason="its name is not UTF-8") for name in every if not _speakable(name)]
    for name in videos:
        try:
            found.append(Video(path=folder / name, name=name, caption=_caption_beside(folder / name)))
        except VideoError as error:
            rejected.append(Rejected(file=name, reason=str(error)))
    stems = {os.path.splitext(name)[0] for name in videos}
    orphans = [name for name in names if name.endswith(".txt") and name.removesuffix(".txt") not in stems]
    return found, rejected + [Rejected(file=name, reason="a caption without a video beside it") for name in orphans]


def _files(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        raise VideoError(f"expected a folder of videos at {folder}, found {'a file' if folder.exists() else 'nothing'}")
    for place, below, names in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        yield from ((Path(place) / name).relative_to(folder).as_posix() for name in names if not name.startswith("."))


def _speakable(name: str) -> bool:
    """Names that are not UTF-8 come from the system with surrogates in them, which no file can be written of."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _caption_beside(path: Path) -> str:
    beside = path.with_suffix(".txt")
    try:
        return _caption(beside.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise VideoError(f"no caption: expected {beside.name} beside it") from None
    except UnicodeDecodeError:
        raise VideoError(f"its caption {beside.name} is not UTF-8") from None
    except OSError as error:
        raise VideoError(f"its caption {beside.name} cannot be read: {error.strerror}") from None


def _caption(text: str) -> str:
    words = text.split()
    if not words:
        raise VideoError("its caption is empty")
    return " ".join(words)


def tabled(table: Path, folder: Path) -> tuple[list[Video], list[Rejected]]:
    """The videos that a CSV lists: columns path (below `folder`, or absolute) and caption, and where a caption is about
    a part of its video only, start and end in seconds."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            found = list(reader.fieldnames or [])
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise VideoError(f"cannot read {table}: {getattr(error, 'strerror', None) or error}") from error
    if missing := [name for name in COLUMNS if name not in found]:
        raise VideoError(f"expected the columns {', '.join(COLUMNS)} in {table}, it lacks {missing} and has {found}")
    return _split(_row(row, number, folder) for number, row in enumerate(rows, 2))


def _split(rows: Iterable[Video | Rejected]) -> tuple[list[Video], list[Rejected]]:
    videos: list[Video] = []
    rejected: list[Rejected] = []
    seen: set[Video] = set()
    for row in rows:
        if isinstance(row, Rejected):
            rejected.append(row)
        elif row in seen:
            rejected.append(Rejected(file=row.name, reason="listed before, with the same caption"))
        else:
            seen.add(row)
            videos.append(row)
    return videos, rejected


def _row(row: dict[str, str | None], number: int, folder: Path) -> Video | Rejected:
    """One line of a CSV; `number` counts from its head, which is line 1."""
    name = (row["path"] or "").strip()
    try:
        if not name:
            raise VideoError(f"row {number} has no path")
        if not (folder / name).is_file():
            raise VideoError(f"there is no such file in {folder}")
        start, end = (_seconds(row.get(column), column) for column in SEGMENT)
        caption = _caption(row["caption"] or "")
        return Video(path=folder / name, name=name, caption=caption, start=start or 0.0, end=end)
    except VideoError as error:
        return Rejected(file=name or f"row {number}", reason=str(error))


def _seconds(text: str | None, column: str) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise VideoError(f"expected its {column} in seconds, got {text!r}")
    return seconds


# ---------------------------------------------------------------------- one video


def probe(path: Path) -> Film:
    """What is in a video file. VideoError, without the file's name, when no frame of it can be read."""
    with _opened(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise VideoError("unreadable: there is no frame in it")
        height, width = frame.height, frame.width * _stretch(stream)
        size = (height, round(width)) if frame.rotation % 180 == 0 else (round(width), height)
        seconds, rate = float((stream.duration or 0) * (stream.time_base or 0)), stream.average_rate
    return Film(seconds=seconds or _measured(path), fps=float(rate) if rate else None, size=size)


def _measured(path: Path) -> float:
    """Length of a video whose file does not say it: from the time stamps of its packets, which need no decoding, or
    their number."""
    with _opened(path) as (container, stream):
        base, rate = stream.time_base or 0, stream.average_rate or 0
        packets = [(p.pts, p.duration or 0) for p in container.demux(stream) if p.size]
    stamps = [(pts, pts + duration) for pts, duration in packets if pts is not None]
    if len(stamps) == len(packets) > 1:
        return float((max(end for _, end in stamps) - min(begin for begin, _ in stamps)) * base)
    return float(len(packets) / rate) if rate else 0.0


def starts(video: Video, film: Film, cut: Cut, *, stride: float | None, most: int | None) -> list[float]:
    """When the clips of a video begin: every `stride` seconds (None: end to end), and where that makes more than
    `most`, that many spread evenly. VideoError when not even one fits."""
    end = film.seconds if video.end is None else min(video.end, film.seconds)
    room = end - video.start - cut.seconds
    if room <= INSTANT:
        raise VideoError(
            f"too short: {max(0.0, end - video.start):.2f} s, and a clip of {cut.frames} frames at {cut.fps:g} fps "
            f"takes {cut.seconds:.2f} s"
        )
    stride = cut.frames / cut.fps if stride is None else stride
    count = 1 + int((room - INSTANT) / stride)
    picked = range(count) if most is None or count <= most else [int((k + 0.5) * count / most) for k in range(most)]
    return [round(video.start + k * stride, 6) for k in picked]


def enlargement(film: Film, cut: Cut) -> float:
    """How many times larger than the video its clips are."""
    return max(cut.size[0] / film.size[0], cut.size[1] / film.size[1])


def read(path: Path, start: float, cut: Cut) -> np.ndarray:
    """The clip that begins at `start`: uint8 [T, H, W, 3].

    VideoError, without the file's name, when the video is damaged there or ends before the clip does."""
    pixels = np.empty((cut.frames, *cut.size, 3), dtype=np.uint8)
    done, until = 0, 0.0
    for frame, stretch, until in _shown(path, start):
        due = min(cut.frames, math.ceil((until - start - INSTANT) * cut.fps))  # frames k with start + k / fps < until
        if due > done:
            pixels[done:due] = _fitted(frame, stretch, cut.size)
            done = due
        if done == cut.frames:
            return pixels
    raise VideoError(f"the video ends at {until:.2f} s; is the file cut off?")


def _shown(path: Path, start: float) -> Iterator[tuple[av.VideoFrame, Fraction, float]]:
    """From the frame that is on screen at `start`, or an earlier one, on: each with how wide its pixels are and the
    time at which it gives way to the next. A file that cannot be entered in the middle is read from its beginning."""
    for place in dict.fromkeys((start, 0.0)):
        with _opened(path) as (container, stream):
            stretch, period = _stretch(stream), float(1 / (stream.average_rate or DEFAULT_RATE))
            frames = _timed(container, stream, place, period)
            before = next(frames, None)
            if place > 0 and (before is None or before[1] > start + INSTANT):
                continue
            for frame, time in frames:
                if before is not None:
                    yield before[0], stretch, time
                before = frame, time
            if before is not None:
                yield before[0], stretch, before[1] + period
            return


def _timed(
    container: InputContainer, stream: VideoStream, place: float, period: float
) -> Iterator[tuple[av.VideoFrame, float]]:
    """Frames with their times, from the last key frame before `place` on; none where there is no going there."""
    base, zero = stream.time_base or Fraction(1), stream.start_time or 0
    if place > 0:
        try:
            container.seek(zero + int(place / base), stream=stream)
        except av.FFmpegError:
            return
    for number, frame in enumerate(container.decode(stream)):
        if frame.pts is None and place > 0:
            return
        yield frame, number * period if frame.pts is None else float((frame.pts - zero) * base)


def _stretch(stream: VideoStream) -> Fraction:
    """Width of a pixel against its height."""
    return Fraction(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)


def _fitted(frame: av.VideoFrame, stretch: Fraction, size: tuple[int, int]) -> np.ndarray:
    """A frame as shown: shrunk or enlarged to cover `size`, cut about its centre, upright; uint8 [H, W, 3]."""
    if frame.is_corrupt:
        raise VideoError(f"damaged at {frame.time or 0:.2f} s")
    quarters = round(frame.rotation / 90)
    height, width = size if quarters % 2 == 0 else size[::-1]
    shown = float(frame.width * stretch)
    scale = max(height / frame.height, width / shown)
    rows, columns = max(height, round(frame.height * scale)), max(width, round(shown * scale))
    colours = _colours(frame)
    small = frame.reformat(columns, rows, "rgb24", src_colorspace=colours, interpolation="AREA", threads=1).to_ndarray()
    top, left = (rows - height) // 2, (columns - width) // 2
    return np.rot90(small[top : top + height, left : left + width], quarters)


def _colours(frame: av.VideoFrame) -> Colorspace | None:
    """The colour matrix to assume; None is the one that the frame names."""
    if frame.colorspace != UNTAGGED or frame.format.is_rgb:
        return None
    return Colorspace.ITU709 if frame.height >= LARGE else Colorspace.ITU601


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The video stream of a file. Whatever FFmpeg has to say against it becomes a VideoError."""
    try:
        with av.open(os.fspath(path)) as container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise VideoError("no video stream in it")
            streams[0].thread_count = 1  # what runs side by side is clips
            yield container, streams[0]
    except CfrtError:
        raise
    except (OSError, av.FFmpegError, ValueError) as error:
        raise VideoError(f"unreadable: {getattr(error, 'strerror', None) or error}") from error
