"""Wan2.1's video autoencoder (arXiv:2503.20314, section 4.1): 8x in space, 4x in time, causal, for any picture size.

The first latent frame is one pixel frame, each further one four. Every layer that looks back keeps the frames it needs
in a state that goes in and comes out, so a clip may be cut anywhere between latent frames: streaming equals offline.
Where a clip starts, the layers that change the frame rate are left out for its first frame.

Parameters carry the names of Wan2.1_VAE.pth. Pixels are in [0, 1] at the border and in [-1, 1] inside, latents are
normalised at the border by the config's mean and deviation.

Legend: B clips, n latent frames, f pixel frames, C latent channels, h x w the latent grid, T frames at some level."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import AutoencoderConfig
from ..errors import ConfigError
from .causal import CausalConv3d, Memory, State

TEMPORAL_LEVELS = 2
"""Levels that halve the frame rate, the ones next to the latents: 4x in time."""
DOWN_BLOCKS, UP_BLOCKS = 2, 3
"""Residual blocks of a level, encoding and decoding."""


class RMSNorm(nn.Module):
    """Channels scaled to a root mean square of one, in at least fp32; `axes` dimensions follow the channels."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1).to(x.dtype)
        return unit * len(self.gamma) ** 0.5 * self.gamma


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1 x 1 convolution beside it where the width changes."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.residual = nn.ModuleList(
            [
                RMSNorm(channels, 3), nn.SiLU(), CausalConv3d(channels, out),
                RMSNorm(out, 3), nn.SiLU(), nn.Identity(), CausalConv3d(out, out),
            ]
        )  # fmt: skip
        self.shortcut = nn.Conv3d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[B, out, T, H, W] of x [B, channels, T, H, W]."""
        return _through(self.residual, x, memory) + self.shortcut(x)


class Attention(nn.Module):
    """One head, every position of a frame with every other; frames do not see each other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[B, C, T, H, W] of the same; nothing is remembered."""
        frames = _frames(x)  # [B T, C, H, W]
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)  # [B T, H W, 3 C]
        q, k, v = (part.unsqueeze(1) for part in qkv.chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(frames.shape)
        return x + _clips(self.proj(y), len(x))


class Down(nn.Module):
    """Half the picture's side and, if `temporal`, half the frame rate; the first frame of a clip keeps its place."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        if temporal:
            self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))
        self.temporal = temporal

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[B, C, T', H/2, W/2] of x [B, C, T, H, W]; T' is T/2, or T where the frame rate stays."""
        x = _clips(self.resample(_frames(x)), len(x))
        if not self.temporal:
            return x
        if memory.starts:
            memory.keep(x)
            return x
        return self.time_conv(memory.extend(x, 1))


class Up(nn.Module):
    """Twice the picture's side, half the channels and, if `temporal`, twice the frame rate; the first frame of a clip
    stays one frame, and the frames after it do not look back at it here."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels // 2, 3, padding=1))
        if temporal:
            self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1))
        self.temporal = temporal

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[B, C/2, T', 2 H, 2 W] of x [B, C, T, H, W]; T' is 2 T, or T where the frame rate stays."""
        if self.temporal and memory.starts:
            memory.start_later(x, self.time_conv.back)
        elif self.temporal:
            twice = self.time_conv(x, memory).unflatten(1, (2, -1))  # [B, 2, C, T, H, W]
            x = twice.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return _clips(self.resample(_frames(x)), len(x))


class Encoder(nn.Module):
    """Pixels [B, 3, f, H, W] -> mean and log variance [B, 2 C, n, h, w]. A call at the start of a clip takes its first
    frame alone; a later call takes four frames for every latent frame."""

    def __init__(self, widths: tuple[int, ...], out: int) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv1 = CausalConv3d(3, widths[0])
        self.downsamples = nn.ModuleList()
        for level, (channels, width) in enumerate(pairwise((widths[0], *widths))):
            self.downsamples.extend(_blocks(channels, width, DOWN_BLOCKS))
            if level < last:
                self.downsamples.append(Down(width, temporal=level >= last - TEMPORAL_LEVELS))
        self.middle = _middle(widths[-1])
        self.head = _head(widths[-1], out)

    def forward(self, x: Tensor, past: State | None) -> tuple[Tensor, State]:
        """And the state for the next call; `past` is that of the call before, None where the clip starts."""
        memory = Memory(past)
        x = self.conv1(x, memory)
        for part in (self.downsamples, self.middle, self.head):
            x = _through(part, x, memory)
        return x, tuple(memory.left)


class Decoder(nn.Module):
    """Latents [B, C, n, h, w] -> pixels [B, 3, f, H, W]. A call at the start of a clip takes its first latent frame
    alone and gives one frame; a later call gives four frames for every latent frame."""

    def __init__(self, widths: tuple[int, ...], channels: int) -> None:
        super().__init__()
        rising, last = widths[::-1], len(widths) - 1
        self.conv1 = CausalConv3d(channels, rising[0])
        self.middle = _middle(rising[0])
        self.upsamples = nn.ModuleList()
        for level, width in enumerate(rising):
            before = rising[0] if level == 0 else rising[level - 1] // 2
            self.upsamples.extend(_blocks(before, width, UP_BLOCKS))
            if level < last:
                self.upsamples.append(Up(width, temporal=level < TEMPORAL_LEVELS))
        self.head = _head(widths[0], 3)

    def forward(self, z: Tensor, past: State | None) -> tuple[Tensor, State]:
        """And the state for the next call; `past` is that of the call before, None where the clip starts."""
        memory = Memory(past)
        x = self.conv1(z, memory)
        for part in (self.middle, self.upsamples, self.head):
            x = _through(part, x, memory)
        return x, tuple(memory.left)


class WanVAE(nn.Module):
    """`config.widths` = channels of each level, from pixels to latents; Wan2.1's are 96, 192, 384, 384."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        levels = len(config.widths)
        if config.kind != "wan" or config.temporal != 4 or levels < 3 or config.spatial != 2 ** (levels - 1):
            raise ConfigError(
                "Wan's autoencoder is of kind 'wan' with temporal 4, at least three widths and spatial 2^(widths - 1), "
                f"got {config}; use a preset from cfrt.config.PRESETS as a pattern"
            )
        self.temporal = config.temporal
        self.encoder = Encoder(config.widths, 2 * config.latent_channels)
        self.conv1 = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.conv2 = nn.Conv3d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config.widths, config.latent_channels)
        self.normalisation = config.normalisation

    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents [B, n, C, h, w] of a clip [B, 1 + 4 (n - 1), 3, H, W] in [0, 1] that starts at its first
        frame: the mean of the posterior, as every sampler of these models takes it. A latent frame at a time."""
        parts, state = [], None
        for piece in _pieces(video, self.temporal):
            latents, state = self.encode_on(piece, state)
            parts.append(latents)
        return torch.cat(parts, dim=1)

    def encode_on(self, video: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The same for a piece of a clip, and the next state: 1 + 4 k frames at its start (`state` None), 4 k later."""
        frames, first = video.shape[1], 1 if state is None else 0
        if frames < first or (frames - first) % self.temporal:
            raise ConfigError(
                f"a clip has 1 + {self.temporal} k frames (Wan's time law) and goes on by {self.temporal} k, got "
                f"{frames}; cut or pad it"
            )
        x = 2 * video.transpose(1, 2) - 1
        parts = []
        for piece in (x[:, :, :first], x[:, :, first:]):
            if piece.shape[2]:
                encoded, state = self.encoder(piece, state)
                parts.append(encoded)
        assert state is not None
        latents, _ = self.conv1(torch.cat(parts, dim=2)).chunk(2, dim=1)
        mean, std = self._normalisation(latents)
        return ((latents - mean) / std).transpose(1, 2), state

    def decode(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Pixels [B, f, 3, H, W] of normalised latents [B, n, C, h, w], n >= 1, and the next state.

        `state` is what the latents before these have left, None where the clip starts: then the first latent frame
        gives one frame. All later frames are made at once, so memory grows with n. Values are not clamped to [0, 1]."""
        mean, std = self._normalisation(latents)
        z = self.conv2(latents.transpose(1, 2) * std + mean)
        first = 1 if state is None else 0
        parts = []
        for piece in (z[:, :, :first], z[:, :, first:]):
            if piece.shape[2]:
                decoded, state = self.decoder(piece, state)
                parts.append(decoded)
        assert state is not None
        return (torch.cat(parts, dim=2).transpose(1, 2) + 1) / 2, state

    def _normalisation(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation [C, 1, 1, 1], rounded once, to the dtype of `like`."""
        mean, std = (like.new_tensor(values).view(-1, 1, 1, 1) for values in self.normalisation)
        return mean, std


# ---------------------------------------------------------------------- parts


def _blocks(channels: int, width: int, count: int) -> list[nn.Module]:
    return [Residual(channels if i == 0 else width, width) for i in range(count)]


def _middle(width: int) -> nn.ModuleList:
    return nn.ModuleList([Residual(width, width), Attention(width), Residual(width, width)])


def _head(width: int, out: int) -> nn.ModuleList:
    return nn.ModuleList([RMSNorm(width, 3), nn.SiLU(), CausalConv3d(width, out)])


LOOKING_BACK = (CausalConv3d, Residual, Attention, Down, Up)


def _through(layers: nn.ModuleList, x: Tensor, memory: Memory) -> Tensor:
    for layer in layers:
        x = layer(x, memory) if isinstance(layer, LOOKING_BACK) else layer(x)
    return x


def _pieces(video: Tensor, temporal: int) -> tuple[Tensor, ...]:
    """The first frame, then `temporal` at a time: [B, f, 3, H, W] each."""
    return (video[:, :1], *(video[:, 1:].split(temporal, dim=1) if video.shape[1] > 1 else ()))


def _frames(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B T, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def _clips(x: Tensor, batch: int) -> Tensor:
    """[B T, C, H, W] -> [B, C, T, H, W]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)
