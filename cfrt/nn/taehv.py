"""TAEHV's decoder, the tiny one for Wan2.1's latents: 25 times less work than Wan's own and a softer picture.

Two-dimensional convolutions; what a layer knows of the past is the frame before, at nine places, which is the whole
streaming state (the TAEHV project of O. Boer Bohan; its weights for Wan2.1 are taew2_1.pth, whose `decoder.*` names
these are). It reads normalised latents as they are. Every latent frame gives four pixel frames, but of the first one
only the last counts (Wan's time law). Pictures are encoded by Wan's own encoder.

Legend: B clips, n latent frames, f pixel frames, C latent channels, h x w the latent grid, T frames at some level."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from ..config import AutoencoderConfig
from ..errors import ConfigError
from .causal import Memory, State

WIDTHS = (64, 64, 128, 256)
"""Channels of each level, from pixels to latents, of the released weights."""
BLOCKS = 3
"""Blocks of a level."""
REACH = 3.0
"""Latents are bent into (-3, 3)."""


class Bend(nn.Module):
    """Identity for small numbers, never beyond REACH."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / REACH) * REACH


class Block(nn.Module):
    """relu(x + three convolutions of x and of the frame before it)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor, memory: Memory, batch: int) -> Tensor:
        """[B T, C, H, W] of x [B T, C, H, W], frames of `batch` clips."""
        before = memory.extend(x.unflatten(0, (batch, -1)), 1)[:, :-1].flatten(0, 1)
        return torch.relu(self.conv(torch.cat([x, before], dim=1)) + x)


class Grow(nn.Module):
    """`times` frames for every one."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.times = times
        self.conv = nn.Conv2d(width, times * width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[times T, C, H, W] of x [T, C, H, W]."""
        return self.conv(x).unflatten(1, (self.times, -1)).flatten(0, 1)


class TAEHV(nn.Module):
    """`config.widths` = channels of each level, from pixels to latents; empty = WIDTHS."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths or WIDTHS
        if config.kind != "taehv" or config.temporal != 4 or config.spatial != 8 or len(widths) != 4:
            raise ConfigError(
                f"TAEHV's decoder is of kind 'taehv' with spatial 8, temporal 4 and four widths or none, got {config}"
            )
        falling, self.temporal = widths[::-1], config.temporal
        layers: list[nn.Module] = [Bend(), nn.Conv2d(config.latent_channels, falling[0], 3, padding=1), nn.ReLU()]
        for times, (width, narrower) in zip((1, 2, 2), pairwise(falling), strict=True):
            layers += [Block(width) for _ in range(BLOCKS)]
            layers += [nn.Upsample(scale_factor=2), Grow(width, times)]
            layers += [nn.Conv2d(width, narrower, 3, padding=1, bias=False)]
        layers += [nn.ReLU(), nn.Conv2d(falling[-1], 3, 3, padding=1)]
        self.decoder = nn.ModuleList(layers)

    def forward(self, latents: Tensor, past: State | None) -> tuple[Tensor, State]:
        """All 4 n frames [B, 4 n, 3, H, W] of normalised latents [B, n, C, h, w], and the next state."""
        memory, batch = Memory(past, time=1), len(latents)
        x = latents.flatten(0, 1)
        for layer in self.decoder:
            x = layer(x, memory, batch) if isinstance(layer, Block) else layer(x)
        return x.unflatten(0, (batch, -1)), tuple(memory.left)

    def decode(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Pixels [B, f, 3, H, W] of normalised latents [B, n, C, h, w], n >= 1, and the next state.

        `state` is what the latents before these have left, None where the clip starts: then the first latent frame
        gives one frame. Memory grows with n. Values are not clamped to [0, 1]."""
        video, left = self(latents, state)
        return (video if state is not None else video[:, self.temporal - 1 :]), left
