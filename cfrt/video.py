"""Frames into files: mp4, gif and webp films, raw y4m, and png contact sheets, by suffix.

Frames are written as they come, in flat memory (a contact sheet keeps a bounded number of them). A file appears under
its name when it is complete: until then it is a hidden neighbour, which the next write to the same name clears away if
its writer has died.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Self

import av
import numpy as np

from .encoders import SUFFIXES, Picture, encoder
from .errors import VideoError
from .picture import read_film, read_picture

__all__ = ["STDOUT", "SUFFIXES", "Picture", "Writer", "check", "read_film", "read_picture", "write"]

STDOUT = "-"
"""As a path: raw y4m to standard output."""


class Writer:
    """A video file in the making. Use as a context manager: complete at the end of the block, gone if the block fails.

    VideoError when the suffix is unknown, the folder cannot be written, frames differ in size, or none ever came."""

    def __init__(self, path: str | os.PathLike[str], *, fps: float, scale: int | None = None) -> None:
        self.path = os.fspath(path)
        suffix = check(self.path, fps, scale)
        self._draft = None if self.path == STDOUT else _Draft(Path(self.path))
        self._shape: tuple[int, ...] | None = None
        draft = None if self._draft is None else self._draft.path
        try:
            with _naming(self.path):
                self._encoder = encoder(suffix, draft, Fraction(fps).limit_denominator(1001), scale)
        except BaseException:
            self._discard()
            raise

    def add(self, picture: Picture) -> None:
        """The next frame."""
        pixels = np.asarray(picture)
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise VideoError(f"expected frames (H, W, 3) uint8, got {pixels.shape} {pixels.dtype}")
        if self._shape not in (None, pixels.shape):
            raise VideoError(f"expected every frame to be {self._shape}, got {pixels.shape}")
        self._shape = pixels.shape
        with _naming(self.path):
            self._encoder.add(picture)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
            else:
                self._abandon()
        finally:
            self._discard()

    def _abandon(self) -> None:
        with suppress(OSError, av.FFmpegError):  # what made it fail may well fail again, and is already being said
            self._encoder.abandon()

    def _discard(self) -> None:
        if self._draft is not None:
            self._draft.remove()

    def _finish(self) -> None:
        if self._shape is None:
            self._abandon()
            raise VideoError(f"{self.path} was not written: there were no frames")
        with _naming(self.path):
            self._encoder.finish()
            if self._draft is not None:
                self._draft.publish()


def write(
    frames: Iterable[Picture], path: str | os.PathLike[str], *, fps: float = 16.0, scale: int | None = None
) -> None:
    """Writes frames to `path` as its suffix says. fps: of the film; scale: whole factor of enlargement, None chooses
    one so that the shorter side of an mp4, gif or webp has at least 256 pixels."""
    with Writer(path, fps=fps, scale=scale) as writer:
        for frame in frames:
            writer.add(frame)


def check(path: str, fps: float, scale: int | None) -> str:
    """The suffix by which `path` will be written. VideoError for what cannot work whatever the frames are."""
    suffix = ".y4m" if path == STDOUT else Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise VideoError(f"expected a file name ending in {', '.join(SUFFIXES)} (or - for raw y4m), got {path!r}")
    if not 0 < fps <= 1000:
        raise VideoError(f"expected 0 < fps <= 1000, got {fps}")
    if scale is not None and not 1 <= scale <= 64:
        raise VideoError(f"expected a scale from 1 to 64, got {scale}")
    return suffix


# ---------------------------------------------------------------------- files


class _Draft:
    """A hidden file beside its target, named after the process that writes it."""

    def __init__(self, target: Path) -> None:
        self._target = target.resolve()  # a link keeps pointing where it points, the file behind it is replaced
        folder, name = self._target.parent, self._target.name
        if self._target.is_dir():
            raise VideoError(f"cannot write {target}: it is a folder")
        if not folder.is_dir():
            raise VideoError(f"cannot write {target}: there is no folder {folder}; make it first")
        self.path = folder / f".{name}.{os.getpid()}.{token_hex(4)}.part"
        with _naming(target):
            self.path.touch(exist_ok=False)
            self._clear(folder, name)

    def publish(self) -> None:
        self.path.replace(self._target)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _clear(self, folder: Path, name: str) -> None:
        """Deletes what writers of the same target have left that were killed."""
        for leftover in folder.iterdir():
            if leftover.name.startswith(f".{name}.") and leftover.suffix == ".part":
                owner = leftover.name.removeprefix(f".{name}.").split(".")[0]
                if owner.isdigit() and not _alive(int(owner)):
                    leftover.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    """Is there a process of that number on this machine?"""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # there is one, another user's
        return True
    return True


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Turns an operating system's or FFmpeg's error into one that names the file."""
    try:
        yield
    except BrokenPipeError:  # whoever read our standard output has gone; that is for the caller to know
        raise
    except (OSError, av.FFmpegError) as error:
        raise VideoError(f"cannot write {path}: {error.strerror or error}") from error
