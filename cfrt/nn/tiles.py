"""Decoding a picture in overlapping tiles, for less memory at once: each tile streams with a state of its own, and
neighbours are blended linearly where they overlap. Not exact: a decoder looks further than a tile, so this is an
option and never the default.

Legend: B clips, n latent frames, f pixel frames, h x w latent cells, H x W pixels."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..blocks import Span
from ..errors import ConfigError

Decode = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""(latents [B, n, C, h, w], state or None) -> (pixels [B, f, 3, H, W], next state)."""


@dataclass(frozen=True)
class Tiling:
    """Tiles of `side` x `side` latent cells that share `overlap` of them with each neighbour."""

    side: int = 32
    overlap: int = 8

    def __post_init__(self) -> None:
        if not 0 <= 2 * self.overlap <= self.side or self.side < 1:
            raise ConfigError(f"expected tiles at least twice as long as their overlap, got {self}")

    def spans(self, size: int) -> list[Span]:
        """The cells of each tile along an axis of `size` cells; the last one may be shorter."""
        starts = range(0, max(1, size - self.overlap), self.side - self.overlap)
        return [(start, min(start + self.side, size)) for start in starts]

    def count(self, height: int, width: int) -> int:
        """Tiles of a grid of latent cells."""
        return len(self.spans(height)) * len(self.spans(width))

    def decode(self, decode: Decode, latents: Tensor, states: Any = None) -> tuple[Tensor, Any]:
        """What `decode` gives, tile by tile; `states` is a tuple, one state for every tile, or None at the start."""
        rows, columns = self.spans(latents.shape[3]), self.spans(latents.shape[4])
        places = list(product(range(len(rows)), range(len(columns))))
        out, left = latents.new_zeros(0), []
        for place, (i, j) in enumerate(places):
            (top, bottom), (west, east) = rows[i], columns[j]
            piece, state = decode(latents[..., top:bottom, west:east], states and states[place])
            left.append(state)
            scale = piece.shape[-1] // (east - west)
            if not place:
                shape = (*piece.shape[:-2], latents.shape[3] * scale, latents.shape[4] * scale)
                out = piece.new_zeros(shape)
            weight = _weight(rows, i, scale, piece)[:, None] * _weight(columns, j, scale, piece)
            out[..., top * scale : bottom * scale, west * scale : east * scale] += piece * weight
        return out, tuple(left)


def _weight(spans: list[Span], place: int, scale: int, like: Tensor) -> Tensor:
    """How much each pixel of a tile counts along one axis: rising from 0 over the overlap with the tile before, falling
    over the one with the tile after, so that the weights of neighbours add up to 1."""
    start, stop = spans[place]
    weight = like.new_ones((stop - start) * scale)
    if place > 0 and (shared := (spans[place - 1][1] - start) * scale):
        weight[:shared] = torch.arange(shared) / shared
    if place + 1 < len(spans) and (shared := (stop - spans[place + 1][0]) * scale):
        weight[-shared:] = 1 - torch.arange(shared) / shared
    return weight
