"""A stream's frames as VP8, encoded once for all who watch by WebRTC: an encoder for each viewer would do the same
work again for each, and one more of it whenever a browser thinks the network faster or slower.

A frame that is no key frame needs the one before it. So frames are numbered, and a viewer who has missed one, or has
just come, waits for the next key frame and asks for it.
"""

from dataclasses import dataclass
from fractions import Fraction
from threading import Lock

import av
import numpy as np

from ..picture import enlarge

SMALLEST = 128
"""Pixels of the shorter side, by a whole factor: with half the chroma a small frame would lose its colours' edges."""

CELL, BITS = 8, 16
"""Of the strip that says which frame it is: pixels along a cell, cells. page/video.js reads it."""

QUALITY = 8
"""libvpx's constrained quality, 4 is its best; up to a rate of 500 kbit/s and a seventh of a bit for each pixel."""

APART = 4
"""Frames between key frames that are asked for, at least: nobody who asks all the time makes them worse for others."""

OPTIONS = {"deadline": "realtime", "cpu-used": "-6", "lag-in-frames": "0", "crf": str(QUALITY), "auto-alt-ref": "0"}


@dataclass(frozen=True)
class Coded:
    """One frame: VP8, its number in the film, and whether it needs no other."""

    data: bytes
    number: int
    key: bool

    def follows(self, last: int | None) -> bool:
        """Can it be shown by a viewer whose last frame had that number?"""
        return self.key or self.number - 1 == last


class Film:
    """The frames of one stream. Any thread may call; one at a time is encoded."""

    def __init__(self, fps: float, *, stamped: bool) -> None:
        self._fps, self._stamped = fps, stamped
        self._codec: av.VideoCodecContext | None = None
        self._lock = Lock()
        self._number = 0
        self._asked, self._since = True, APART

    def add(self, pixels: np.ndarray, tick: int) -> Coded:
        """The stream's next frame, (H, W, 3) uint8."""
        with self._lock:
            key = self._asked and self._since >= APART
            return self._encode(pixels, tick, key=key)

    def still(self, pixels: np.ndarray, tick: int) -> Coded:
        """A frame that was shown before, for somebody who comes late. The next one is a key frame: to those who have
        not seen this one it makes no difference."""
        with self._lock:
            coded = self._encode(pixels, tick, key=True)
            self._asked, self._since = True, APART
            return coded

    def ask(self) -> None:
        """Somebody needs a key frame."""
        self._asked = True

    def _encode(self, pixels: np.ndarray, tick: int, *, key: bool) -> Coded:
        pixels = enlarge(pixels, -(-SMALLEST // min(pixels.shape[:2])))
        picture = av.VideoFrame.from_ndarray(stamped(pixels, tick) if self._stamped else pixels, format="rgb24")
        if self._codec is None:
            self._codec = self._open(picture.height, picture.width)
        frame = picture.reformat(format="yuv420p", threads=1)
        frame.pts, frame.pict_type = self._number, av.video.frame.PictureType.I if key else frame.pict_type
        if key:
            self._asked, self._since = False, 0
        self._since += 1
        self._number += 1
        packets = self._codec.encode(frame)
        return Coded(b"".join(map(bytes, packets)), self._number, any(packet.is_keyframe for packet in packets))

    def _open(self, height: int, width: int) -> av.VideoCodecContext:
        codec = av.CodecContext.create("libvpx", "w")
        assert isinstance(codec, av.VideoCodecContext)
        codec.height, codec.width, codec.pix_fmt = height, width, "yuv420p"
        codec.time_base = 1 / Fraction(self._fps).limit_denominator(1001)
        codec.bit_rate = 500_000 + round(height * width * self._fps / 7)
        codec.gop_size = round(60 * self._fps)  # key frames come when somebody needs one
        codec.thread_count = 1
        codec.options = OPTIONS
        return codec


def stamped(pixels: np.ndarray, tick: int) -> np.ndarray:
    """A strip below the picture: the tick's low bits as white and black cells, least first. A browser does not say
    which frame of a track it shows; this does, through any codec, and so the time from a change to its pixels can be
    measured where they are seen."""
    bits = (tick >> np.arange(BITS)) & 1
    strip = np.zeros((CELL, pixels.shape[1], 3), dtype=np.uint8)
    strip[:, : BITS * CELL] = 255 * bits.repeat(CELL)[None, :, None]
    return np.concatenate([pixels, strip])
