"""Frames as bytes on a wire: JPEG, multipart JPEG, fragmented mp4; and pictures from a visitor, read with care."""

import io
from fractions import Fraction
from threading import Lock
from urllib.parse import quote

import av
import numpy as np
from av.video.stream import VideoStream

from ..encoders import BT709
from ..frame import Frame
from ..picture import enlarge, fitted
from .refusal import Refusal

QUALITY = 2
"""FFmpeg's scale of JPEG, 2 is its best. Chroma keeps its full resolution: small frames have edges everywhere."""

BOUNDARY = "cfrt-frame"

PICTURES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "mjpeg", b"RIFF": "webp"}
"""First bytes of what a stream may start from, and FFmpeg's decoder for it. A decoder is asked for by name and gets the
bytes: FFmpeg's guessing of formats knows playlists, which would make the server read other files and addresses."""


def jpeg(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a JPEG file."""
    codec = av.CodecContext.create("mjpeg", "w")
    assert isinstance(codec, av.VideoCodecContext)
    codec.height, codec.width, codec.pix_fmt = pixels.shape[0], pixels.shape[1], "yuvj444p"
    codec.time_base, codec.qmin, codec.qmax = Fraction(1), QUALITY, QUALITY
    codec.thread_count = 1  # as many as there are cores would be started and ended for every frame
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    frame = frame.reformat(format="yuvj444p", threads=1)
    return b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])


def read_jpeg(data: bytes) -> np.ndarray:
    """The pixels of `jpeg`."""
    codec = av.CodecContext.create("mjpeg", "r")
    assert isinstance(codec, av.VideoCodecContext)
    frames = [*codec.decode(av.Packet(data)), *codec.decode(None)]
    return frames[0].to_ndarray(format="rgb24")


def part(data: bytes, frame: Frame) -> bytes:
    """One JPEG of a multipart stream, with what is known about the frame."""
    head = {
        "Content-Type": "image/jpeg",
        "Content-Length": len(data),
        "X-Index": frame.index,
        "X-Unit": frame.unit,
        "X-Latency": f"{frame.latency:.6f}",
        "X-Prompt": quote(frame.prompt),
    }
    lines = (f"--{BOUNDARY}", *(f"{name}: {value}" for name, value in head.items()), "", "")
    return "\r\n".join(lines).encode() + data + b"\r\n"


class Fragments:
    """A film that is never finished: every frame becomes a piece of fragmented mp4 that can be sent at once.

    A viewer may leave while a thread works on his next frame: `finish` waits for it, and `add` gives nothing after."""

    def __init__(self, fps: float, scale: int) -> None:
        self._file = _Pipe()
        self._fps, self._scale = Fraction(fps).limit_denominator(1001), scale
        options = {"movflags": "+frag_every_frame+empty_moov+default_base_moof"}
        self._container = av.open(self._file, "w", format="mp4", options=options)
        self._stream: VideoStream | None = None
        self._lock = Lock()
        self._finished = False

    def add(self, pixels: np.ndarray, tick: int) -> bytes:
        """What there is to send after the frame of that tick; ticks may skip but never go back."""
        with self._lock:
            return b"" if self._finished else self._add(pixels, tick)

    def finish(self) -> bytes:
        """The rest."""
        with self._lock:
            self._finished = True
            if self._stream is not None:
                self._container.mux(self._stream.encode(None))
            self._container.close()
            return self._file.take()

    def _add(self, pixels: np.ndarray, tick: int) -> bytes:
        if self._stream is None:
            self._stream = self._start(*pixels.shape[:2])
        frame = av.VideoFrame.from_ndarray(enlarge(pixels, self._scale), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=BT709, threads=1)
        frame.pts, frame.time_base = tick, 1 / self._fps
        self._container.mux(self._stream.encode(frame))
        return self._file.take()

    def _start(self, height: int, width: int) -> VideoStream:
        options = {"preset": "veryfast", "tune": "zerolatency", "crf": "18"}
        stream = self._container.add_stream("libx264", rate=self._fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width * self._scale, height * self._scale, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = max(1, round(2 * self._fps))
        stream.codec_context.color_primaries = stream.codec_context.color_trc = stream.codec_context.colorspace = BT709
        return stream


class _Pipe(io.RawIOBase):
    """A file that forgets what has been taken from it."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        self._pieces.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


def picture(data: bytes, size: tuple[int, int], most_pixels: int) -> np.ndarray:
    """A visitor's PNG, JPEG or WebP, cut and resized to (height, width): (H, W, 3) uint8. Refusal for all else."""
    name = next((name for magic, name in PICTURES.items() if data.startswith(magic)), None)
    do = "send the bytes of one picture, at most 16 megapixels"
    if name is None:
        raise Refusal(415, expected="a PNG, JPEG or WebP picture", got=data[:12] or "an empty body", do=do)
    codec = av.CodecContext.create(name, "r")
    assert isinstance(codec, av.VideoCodecContext)
    codec.options = {"max_pixels": str(most_pixels)}
    try:
        frames = [*codec.decode(av.Packet(data)), *codec.decode(None)]
        pixels = frames[0].to_ndarray(format="rgb24")
    except (av.FFmpegError, IndexError, ValueError) as error:
        why = getattr(error, "strerror", None) or "nothing in it"
        raise Refusal(422, expected=f"a readable {name} picture", got=why, do=do) from error
    return fitted(pixels, size)
