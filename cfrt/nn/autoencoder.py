"""The embedded student's video autoencoder: 16x in space, 4x in time, causal, with Wan's time law.

The first latent frame is one pixel frame, each further one four (Wan2.1, arXiv:2503.20314, section 4.1), so a picture
is a clip of one frame and image-to-video needs no second code path. The decoder looks at the latent frame and the one
before it; that one latent is its whole streaming state, and streaming equals offline by construction.

Legend: B clips, n latent frames, f pixel frames, C latent channels, h x w the latent grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfrt.config import AutoencoderConfig
from cfrt.errors import ConfigError

GRAY = 0.3  # pixels are shifted and scaled to roughly zero mean and unit deviation
CONTRAST = 2.0
FOLD = 4  # pixels folded into channels before the first convolution


class Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))), the second convolution zero at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Autoencoder(nn.Module):
    """`config.widths` = encoder widths at 1/4, 1/8, 1/16 and decoder widths at 1/16, 1/8, 1/4 of the picture."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        if config.kind != "tiny" or config.spatial != 16 or config.temporal != 4 or len(config.widths) != 6:
            raise ConfigError(
                "the small autoencoder is kind 'tiny' with spatial 16, temporal 4 and six widths, "
                f"got {config}; use a preset from cfrt.config.PRESETS as a pattern"
            )
        e4, e8, e16, d16, d8, d4 = config.widths
        pixels = 3 * config.temporal * FOLD**2
        self.channels = config.latent_channels
        self.temporal = config.temporal
        self.encoder = nn.Sequential(
            nn.Conv2d(pixels, e4, 3, padding=1), Residual(e4),
            nn.PixelUnshuffle(2), nn.Conv2d(4 * e4, e8, 1), Residual(e8),
            nn.PixelUnshuffle(2), nn.Conv2d(4 * e8, e16, 1), Residual(e16),
            nn.SiLU(), nn.Conv2d(e16, self.channels, 3, padding=1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(2 * self.channels, d16, 3, padding=1), Residual(d16),
            nn.Conv2d(d16, 4 * d8, 1), nn.PixelShuffle(2), Residual(d8), Residual(d8),
            nn.Conv2d(d8, 4 * d4, 1), nn.PixelShuffle(2), Residual(d4), Residual(d4),
            nn.SiLU(), nn.Conv2d(d4, pixels, 3, padding=1),
        )  # fmt: skip
        self.register_buffer("latent_mean", torch.zeros(self.channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(self.channels, 1, 1))
        self.latent_mean: Tensor
        self.latent_std: Tensor

    def encode_raw(self, video: Tensor) -> Tensor:
        """Latents before normalisation: video [B, 1 + 4(n-1), 3, H, W] in [0, 1] -> [B, n, C, h, w]."""
        batch, frames = video.shape[:2]
        if (frames - 1) % self.temporal:
            raise ConfigError(f"a clip has 1 + {self.temporal} k frames (Wan's time law), got {frames}; cut or pad it")
        still = video[:, :1].expand(-1, self.temporal, -1, -1, -1)
        units = torch.cat([still, video[:, 1:]], dim=1).unflatten(1, (-1, self.temporal))  # [B, n, 4, 3, H, W]
        x = (units.flatten(0, 1).flatten(1, 2) - GRAY) * CONTRAST
        return self.encoder(F.pixel_unshuffle(x, FOLD)).unflatten(0, (batch, -1))

    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents [B, n, C, h, w] of a clip [B, 1 + 4(n-1), 3, H, W] in [0, 1] that starts at its first
        frame."""
        return (self.encode_raw(video) - self.latent_mean) / self.latent_std

    def decode(self, latents: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pixels [B, f, 3, H, W] and the next state.

        latents [B, n, C, h, w] normalised; `state` is the last latent frame decoded before these [B, C, h, w], or None
        where the clip starts: then the first latent gives one frame. Values are not clamped to [0, 1]."""
        batch = len(latents)
        before = torch.zeros_like(latents[:, 0]) if state is None else state
        previous = torch.cat([before[:, None], latents[:, :-1]], dim=1)
        pairs = torch.cat([previous, latents], dim=2).flatten(0, 1)
        y = F.pixel_shuffle(self.decoder(pairs), FOLD)
        # in bf16 GRAY would be a fifth of a level off
        y = y.to(torch.promote_types(y.dtype, torch.float32)) / CONTRAST + GRAY
        video = y.unflatten(1, (self.temporal, 3)).unflatten(0, (batch, -1)).flatten(1, 2)
        return (video if state is not None else video[:, self.temporal - 1 :]), latents[:, -1]
