"""Videos whose frames say which they are, with captions beside them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from cfrt.video import write

RED, BLUE = "A red circle,\n moving left.", "blue square moving right"


def numbered(count: int, height: int = 32, width: int = 32) -> Iterator[np.ndarray]:
    """Frame k says k: its left half is the high digit in base 16, its right half the low one."""
    for k in range(count):
        frame = np.empty((height, width, 3), np.uint8)
        frame[:, : width // 2], frame[:, width // 2 :] = 15 * (k // 16), 15 * (k % 16)
        yield frame


def numbers(pixels: np.ndarray) -> list[int]:
    """Which frames those of a clip [T, H, W, 3] are."""
    width = pixels.shape[2]
    digits = [pixels[:, :, part].mean((1, 2, 3)) / 15 for part in (slice(2, width // 2 - 2), slice(width // 2 + 2, -2))]
    return [int(16 * round(high) + round(low)) for high, low in zip(*digits, strict=True)]


def film(path: Path, count: int = 60, fps: float = 16.0, size: tuple[int, int] = (32, 32), caption: str = RED) -> Path:
    """A video of numbered frames, with its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        write(numbered(count, *size), path, fps=fps, scale=1)
    else:
        encoded(path, numbered(count, *size), fps)
    path.with_suffix(".txt").write_text(caption)
    return path


def encoded(
    path: Path, pictures: Iterable[np.ndarray], fps: float = 16.0, *, matrix: int | None = None, **tags: Any
) -> Path:
    """H.264 on one thread, in colours of `matrix`; `tags` are what the file says about its pixels."""
    pictures, rate = list(pictures), Fraction(fps).limit_denominator(1001)
    head = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", format="h264" if path.suffix == ".ts" else None, options=head) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "8", "preset": "veryfast"})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        for name, value in {"thread_count": 1, **tags}.items():
            setattr(stream.codec_context, name, value)
        for number, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=matrix, threads=1)
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def table(path: Path) -> dict[str, str]:
    """Which files were rejected, and why."""
    with path.open(newline="") as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}
