"""How frames become each kind of file: films through FFmpeg, raw y4m, contact sheets.

An encoder takes pictures one by one, in memory that does not grow with their number, and leaves a complete file when it
finishes. Where the file lies, and that nobody sees it before, is `cfrt.video`'s business.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, Protocol

import av
import numpy as np
from av.filter import Graph
from av.video.format import VideoFormat
from av.video.stream import VideoStream

from .errors import VideoError
from .frame import Frame
from .picture import enlarge, png
from .sheet import Sheet

Picture = Frame | np.ndarray
"""A frame of a stream, or bare pixels (H, W, 3) uint8."""

COMFORTABLE_SIDE = 256
"""Pixels that the shorter side of a film has at least, unless told otherwise: small frames are enlarged by a whole
factor, each pixel to a square, because players blur what they enlarge themselves."""

BT709 = 1
"""The colour matrix, primaries and transfer by their number in ITU-T H.273; written into the file, or players guess."""


class Encoder(Protocol):
    """Takes pictures one by one and leaves a complete file."""

    def add(self, picture: Picture) -> None:
        """The next picture; all have the size of the first."""
        ...

    def finish(self) -> None:
        """Writes what is still on its way; the file is complete."""
        ...

    def abandon(self) -> None:
        """Lets go of the file, which will be deleted."""
        ...


def encoder(suffix: str, path: Path | None, fps: Fraction, scale: int | None) -> Encoder:
    """The encoder of a suffix in `SUFFIXES`, into a file or, without one, standard output (y4m only)."""
    if path is None:
        return Y4M(sys.stdout.buffer, fps, scale)
    if suffix == ".y4m":
        return Y4M(path.open("wb"), fps, scale)
    if suffix == ".png":
        return SheetFile(path, fps, scale)
    return Film(path, FORMATS[suffix], fps, scale)


# ---------------------------------------------------------------------- films


@dataclass(frozen=True, kw_only=True)
class Format:
    """How FFmpeg makes one kind of film."""

    container: str
    codec: str
    pixels: str
    options: dict[str, str] = field(default_factory=dict)
    muxer: dict[str, str] = field(default_factory=dict)
    palette: bool = False
    """Colours from a palette per frame: almost lossless for small frames, and no frame waits for another."""


FORMATS = {
    ".mp4": Format(
        container="mp4", codec="libx264", pixels="yuv420p", options={"crf": "18"}, muxer={"movflags": "+faststart"}
    ),
    ".gif": Format(container="gif", codec="gif", pixels="pal8", muxer={"loop": "0"}, palette=True),
    ".webp": Format(
        container="webp", codec="libwebp_anim", pixels="bgra", options={"quality": "90"}, muxer={"loop": "0"}
    ),
}

SUFFIXES = (*FORMATS, ".y4m", ".png")


class Film:
    """mp4, gif, webp."""

    def __init__(self, path: Path, form: Format, fps: Fraction, scale: int | None) -> None:
        self._form, self._fps, self._scale = form, fps, scale
        self._container = av.open(os.fspath(path), "w", format=form.container, options=form.muxer)
        self._stream: VideoStream | None = None
        self._graph: Graph | None = None
        self._count = 0

    def add(self, picture: Picture) -> None:
        pixels = np.asarray(picture)
        if self._stream is None:
            self._stream = self._start(*pixels.shape[:2])
        assert self._scale is not None
        frame = av.VideoFrame.from_ndarray(enlarge(pixels, self._scale), format="rgb24")
        if self._form.pixels == "yuv420p":
            frame = frame.reformat(format="yuv420p", dst_colorspace=BT709)
        frame.pts, frame.time_base = self._count, 1 / self._fps
        self._count += 1
        for ready in self._filtered(frame):
            self._container.mux(self._stream.encode(ready))

    def finish(self) -> None:
        assert self._stream is not None
        for ready in self._filtered(None):
            self._container.mux(self._stream.encode(ready))
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def abandon(self) -> None:
        self._container.close()

    def _start(self, height: int, width: int) -> VideoStream:
        form = self._form
        if self._scale is None:
            self._scale = max(1, -(-COMFORTABLE_SIDE // min(height, width)))
        height, width = height * self._scale, width * self._scale
        if form.pixels == "yuv420p" and (height % 2 or width % 2):
            raise VideoError(f"expected even sides for an mp4, got {width} x {height} pixels; enlarge by scale 2")
        lossless = {"lossless": "1"} if form.codec == "libwebp_anim" and self._scale > 1 else {}
        stream = self._container.add_stream(form.codec, rate=self._fps, options=form.options | lossless)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width, stream.pix_fmt = height, width, form.pixels
        if form.pixels == "yuv420p":
            codec = stream.codec_context
            codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        if form.palette:
            self._graph = _palette_graph(height, width, 1 / self._fps)
        return stream

    def _filtered(self, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
        """What the filter graph has ready after one more frame (None: after the last one)."""
        if self._graph is None:
            if frame is not None:
                yield frame
            return
        self._graph.push(frame)
        while True:
            try:
                ready = self._graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            assert isinstance(ready, av.VideoFrame)
            yield ready


def _palette_graph(height: int, width: int, time_base: Fraction) -> Graph:
    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format=VideoFormat("rgb24"), time_base=time_base)
    both = graph.add("split")
    palette = graph.add("palettegen", "stats_mode=single")
    paint = graph.add("paletteuse", "new=1:dither=none")
    source.link_to(both)
    both.link_to(paint, 0, 0)
    both.link_to(palette, 1, 0)
    palette.link_to(paint, 0, 1)
    paint.link_to(graph.add("buffersink"))
    graph.configure()
    return graph


# ---------------------------------------------------------------------- raw y4m

_STUDIO = (
    np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]) / 255
)  # ITU-R BT.601, full-range RGB to studio-range YCbCr: what a reader of y4m assumes
_OFFSET = np.array([16.0, 128.0, 128.0])[:, None]


class Y4M:
    """YUV4MPEG2 with full colour resolution: a text header, then every frame raw."""

    def __init__(self, file: BinaryIO, fps: Fraction, scale: int | None) -> None:
        self._file, self._fps, self._scale = file, fps, scale or 1
        self._started = False

    def add(self, picture: Picture) -> None:
        pixels = enlarge(np.asarray(picture), self._scale)
        height, width, _ = pixels.shape
        if not self._started:
            rate = f"{self._fps.numerator}:{self._fps.denominator}"
            self._file.write(f"YUV4MPEG2 W{width} H{height} F{rate} Ip A1:1 C444\n".encode())
            self._started = True
        planes = _STUDIO @ pixels.reshape(-1, 3).T + _OFFSET
        self._file.write(b"FRAME\n" + np.rint(planes).astype(np.uint8).tobytes())
        self._file.flush()

    def finish(self) -> None:
        self._file.flush()
        self.abandon()

    def abandon(self) -> None:
        if self._file is not sys.stdout.buffer:
            self._file.close()


# ---------------------------------------------------------------------- contact sheets


class SheetFile:
    """png: the whole film on one page."""

    def __init__(self, path: Path, fps: Fraction, scale: int | None) -> None:
        self._path, self._fps = path, fps
        self._sheet = Sheet(scale)
        self._count = 0

    def add(self, picture: Picture) -> None:
        if isinstance(picture, Frame):
            self._sheet.add(picture.pixels, picture.time, picture.prompt)
        else:
            self._sheet.add(picture, float(self._count / self._fps))
        self._count += 1

    def finish(self) -> None:
        self._path.write_bytes(png(self._sheet.draw()))

    def abandon(self) -> None:
        pass
