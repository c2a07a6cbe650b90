"""Who sees whom, and where a key lives: the integer arithmetic of block-causal attention.

A *unit* is F latent frames that are denoised together. Unit u sees frame f when f < (u+1)F and
(f < K or f >= (u+1)F - W): the K *sinks* at the start of the stream, and a *window* of W frames that includes the unit
itself. With W covering the clip and K = 0 this is the mask of Causal Forcing (arXiv:2602.02214); K and W bound the
memory of a stream without end. Dense masks, flex masks and the ring plan below all derive from `Geometry.sees`.

Integers only: no tensors of any framework but numpy, no I/O, no state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import ConfigError

Span = tuple[int, int]
"""Half-open range (start, stop)."""

Index = Any
"""int, numpy integer array or torch integer tensor: the arithmetic below is the same for all three."""

MaskMod = Callable[[Index, Index, Index, Index], Index]
"""(batch, head, query token, key token) -> may look; the form that `torch.nn.attention.flex_attention` takes."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Unit F, window W and sinks K, all in latent frames; the ring that holds what they let a unit see."""

    unit: int
    window: int
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.unit < 1 or self.sinks < 0:
            raise ConfigError(
                f"expected unit >= 1 and sinks >= 0 latent frames, got unit={self.unit}, sinks={self.sinks}"
            )
        if self.window < self.unit:
            raise ConfigError(
                f"expected window >= unit, since the window includes the current unit; got window={self.window}, "
                f"unit={self.unit}"
            )

    @property
    def capacity(self) -> int:
        """Frames that the ring has room for: K + W and one more unit, so that a fused pass can hold two units."""
        return self.sinks + self.window + self.unit

    # ------------------------------------------------------------------ who sees whom

    def sees(self, unit: Index, frame: Index) -> Index:
        """May `unit` attend to `frame`? Elementwise over ints, numpy arrays or torch tensors. The one definition."""
        end = (unit + 1) * self.unit
        return (frame < end) & ((frame < self.sinks) | (frame >= end - self.window))

    def visible(self, unit: int, frame: int) -> bool:
        """May `unit` attend to `frame`? Both counted from the start of the stream."""
        return frame >= 0 and bool(self.sees(unit, frame))

    def visible_frames(self, unit: int) -> list[Span]:
        """The frames that `unit` sees, in order: the sinks (when there are any), then the rest of the window."""
        end = (unit + 1) * self.unit
        sinks = (0, min(self.sinks, end))
        window = (max(self.sinks, end - self.window), end)
        return [span for span in (sinks, window) if span[0] < span[1]]

    # ------------------------------------------------------------------ where a key lives

    def slot(self, frame: int) -> int:
        """The ring slot of a frame: sinks keep their own for ever, the others go round the remaining W + F."""
        if frame < self.sinks:
            return frame
        return self.sinks + (frame - self.sinks) % (self.window + self.unit)

    def slots(self, unit: int) -> list[Span]:
        """The slots of `visible_frames(unit)`, in frame order: at most three spans, sinks and the window cut in two."""
        return [span for frames in self.visible_frames(unit) for span in self.slot_spans(frames)]

    def slot_spans(self, frames: Span) -> list[Span]:
        """The slots of consecutive frames, all sinks or none: one span, or two where the ring wraps."""
        start, stop = frames
        first, count = self.slot(start), stop - start
        head = min(count, self.capacity - first)
        wrapped = [(self.sinks, self.sinks + count - head)] if count > head else []
        return [(first, first + head), *wrapped]

    def evicted_by(self, unit: int) -> Span:
        """The frames whose slots `unit` takes: what it makes forgotten. Sinks take nobody's and lose theirs never."""
        turn = self.window + self.unit
        start, stop = unit * self.unit - turn, (unit + 1) * self.unit - turn
        return max(self.sinks, start), max(self.sinks, stop)

    # ------------------------------------------------------------------ masks (True = may look)

    def causal_mask(self, frames: int) -> np.ndarray:
        """Bool [T, T]: row = the frame that looks, column = the frame that is looked at."""
        f = np.arange(frames)
        mask: np.ndarray = self.sees(f[:, None] // self.unit, f[None, :])
        return mask

    def teacher_forcing_mask(self, frames: int) -> np.ndarray:
        """Bool [2T, 2T] over [clean | noisy]: one forward that equals the cached one unit by unit.

        A clean frame sees the clean frames that its unit sees. A noisy frame sees the clean frames of *earlier* units
        and the noisy frames of its own: never the clean version of itself (arXiv:2602.02214, section 3; the mask of the
        published code, cut by window and sinks).
        """
        token = np.arange(2 * frames)
        mask_mod = teacher_forcing_mod(self, frames, frame_tokens=1)
        mask: np.ndarray = mask_mod(0, 0, token[:, None], token[None, :])
        return mask


def to_tokens(mask: np.ndarray, frame_tokens: int) -> np.ndarray:
    """A mask over frames, bool [T, S], as a mask over tokens, bool [T N, S N]: frames see each other whole."""
    return mask.repeat(frame_tokens, axis=0).repeat(frame_tokens, axis=1)


def causal_mod(geometry: Geometry, frame_tokens: int) -> MaskMod:
    """`causal_mask` as a function of token indices, for flex attention."""

    def mask_mod(batch: Index, head: Index, query: Index, key: Index) -> Index:
        return geometry.sees(query // (frame_tokens * geometry.unit), key // frame_tokens)

    return mask_mod


def teacher_forcing_mod(geometry: Geometry, frames: int, frame_tokens: int) -> MaskMod:
    """`teacher_forcing_mask` as a function of token indices over [clean | noisy], for flex attention."""
    half = frames * frame_tokens

    def mask_mod(batch: Index, head: Index, query: Index, key: Index) -> Index:
        frame = key % half // frame_tokens
        unit_q, unit_k = query % half // (frame_tokens * geometry.unit), frame // geometry.unit
        past = (key < half) & geometry.sees(unit_q, frame) & ((query < half) | (unit_k < unit_q))
        return past | ((query >= half) & (key >= half) & (unit_q == unit_k))

    return mask_mod
