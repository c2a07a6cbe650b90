"""One picture of a stream, and what is known about it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

DISPLAY_SIDE = 256
"""Pixels that the shorter side has at least when a notebook shows a frame; small frames are enlarged, never blurred."""


@dataclass(frozen=True, eq=False)
class Frame:
    """A frame: pixels and their place in the stream. `numpy.asarray(frame)` gives the pixels."""

    pixels: np.ndarray
    """(H, W, 3) uint8, sRGB."""
    index: int
    """Counted from the start of the stream."""
    time: float
    """Seconds from the start of the video, at the model's own frame rate."""
    unit: int
    """The autoregressive unit that it belongs to."""
    latency: float
    """Seconds from the start of the unit's first pass to its first pixels on the host, decoding included."""
    prompt: str
    """The text that the unit was made from."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.pixels, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        height, width, _ = self.pixels.shape
        return (
            f"Frame(pixels=({height}, {width}, 3) {self.pixels.dtype}, index={self.index}, time={self.time:.4f}, "
            f"unit={self.unit}, latency={self.latency:.4f}, prompt={self.prompt!r})"
        )

    def image(self) -> "Image":
        """A Pillow image; needs Pillow (`pip install pillow`)."""
        from PIL import Image

        return Image.fromarray(self.pixels)

    def _repr_png_(self) -> bytes:
        from .picture import enlarge, png

        return png(enlarge(self.pixels, -(-DISPLAY_SIDE // min(self.pixels.shape[:2]))))
