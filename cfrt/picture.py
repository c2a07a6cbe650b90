"""Pictures: enlarging, PNG, reading one or a film of them. Pixels are (H, W, 3) uint8 throughout."""

import os
from collections import deque
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np

from .errors import VideoError


def enlarge(pixels: np.ndarray, scale: int) -> np.ndarray:
    """Every pixel to a square of scale x scale."""
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1) if scale > 1 else pixels


def png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a PNG file."""
    codec = av.CodecContext.create("png", "w")
    assert isinstance(codec, av.VideoCodecContext)
    codec.height, codec.width, codec.pix_fmt = pixels.shape[0], pixels.shape[1], "rgb24"
    codec.time_base = Fraction(1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    return b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])


def read_picture(path: str | os.PathLike[str], size: tuple[int, int]) -> np.ndarray:
    """The first frame of any picture or video file, cut to the shape of (height, width) about its centre and resized to
    it: (H, W, 3) uint8. VideoError when it cannot be read."""
    try:
        with av.open(os.fspath(path)) as container:
            picture = next(container.decode(video=0)).to_ndarray(format="rgb24")
    except (OSError, av.FFmpegError, IndexError, StopIteration) as error:
        reason = getattr(error, "strerror", None) or "there is none in it"
        raise VideoError(f"cannot read a picture from {os.fspath(path)}: {reason}") from error
    return fitted(picture, size)


def read_film(path: str | os.PathLike[str], size: tuple[int, int], fps: float, longest: int) -> np.ndarray:
    """The end of a video file, at most `longest` frames at `fps` a second, each as `read_picture` cuts it:
    (T, H, W, 3) uint8. VideoError when it cannot be read."""
    try:
        with av.open(os.fspath(path)) as container:
            kept = deque(_at_rate(container.decode(video=0), fps), maxlen=longest)
            film = [fitted(frame.to_ndarray(format="rgb24"), size) for frame in kept]
    except (OSError, av.FFmpegError, IndexError) as error:
        reason = getattr(error, "strerror", None) or "there is none in it"
        raise VideoError(f"cannot read a film from {os.fspath(path)}: {reason}") from error
    if not film:
        raise VideoError(f"cannot read a film from {os.fspath(path)}: there is no frame in it")
    return np.stack(film)


def _at_rate(frames: Iterator[av.VideoFrame], fps: float) -> Iterator[av.VideoFrame]:
    """At every time k / fps the last frame whose time has come; the last frame of all once."""
    count, start, shown = 0, None, None
    for frame in frames:
        time = frame.time or 0.0
        start = time if start is None else start
        while shown is not None and (time - start) * fps > count + 1e-3:
            yield shown
            count += 1
        shown = frame
    if shown is not None:
        yield shown


def fitted(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut to the shape of (height, width) about its centre and resized to it."""
    height, width = size
    rows, columns, _ = picture.shape
    shrink = min(rows / height, columns / width)
    h, w = round(height * shrink), round(width * shrink)
    top, left = (rows - h) // 2, (columns - w) // 2
    cut = np.ascontiguousarray(picture[top : top + h, left : left + w], dtype=np.uint8)
    return av.VideoFrame.from_ndarray(cut, format="rgb24").reformat(width, height, "rgb24").to_ndarray()
