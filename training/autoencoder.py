"""Stage 0: the video autoencoder of the embedded student, trained on the world itself (no data set needed).

The latent is standardised by running statistics instead of a KL term, and noise is added to it in training so that the
decoder forgives what a generator gets slightly wrong. The loss looks harder at the object than at the stage, and at
the change from frame to frame, because motion is what the later stages must be able to see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cfrt.config import AutoencoderConfig
from cfrt.nn.autoencoder import Autoencoder
from training import parallel, worlds
from training.loop import Micro, Optimisers, Report, Update, cosine
from training.optimisers import adam

UNITS = 3  # a start and two further units: every case the decoder meets
STATISTICS = 0.02  # update rate of the running mean and deviation


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 3200
    batch: int = 16  # clips of UNITS latent frames
    lr: float = 2e-3
    ema: float = 0.995
    latent_noise: float = 0.1
    object_weight: float = 5.0
    motion_weight: float = 1.0


def channels_last(network: Autoencoder) -> Autoencoder:
    """The layout in which a CPU convolves fastest."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Stage:
    """One step renders a batch of short clips and reconstructs it."""

    name = "autoencoder"

    def __init__(self, config: Config, autoencoder: AutoencoderConfig) -> None:
        self.config, self.steps, self.batch = config, config.steps, config.batch
        self.student = channels_last(Autoencoder(autoencoder))
        self.networks, self.frozen = {"student": self.student}, dict[str, nn.Module]()

    def optimisers(self) -> dict[str, Optimisers]:
        return {"student": adam(self.student, self.config.lr, (0.9, 0.95), weight_decay=1e-3)}

    def step(self, index: int) -> Iterator[Update]:
        yield Update("student", self.config.lr * cosine(index, self.steps), self.loss)

    def loss(self, micro: Micro) -> tuple[Tensor, Report]:
        config, generator = self.config, micro.generator
        device = self.student.latent_mean.device
        video, weight = (x.to(device) for x in batch(config.batch, generator))
        with parallel.half(device):  # convolutions run 1.5x faster on a CPU with AVX-512-BF16
            latents = self._standardise(self.student.encode_raw(video).float())
            latents = latents + config.latent_noise * torch.randn(latents.shape, generator=generator).to(device)
            decoded, _ = self.student.decode(latents)
        weight = 1 + (config.object_weight - 1) * weight
        loss, error = pixel_loss(decoded.float(), video, weight, config.motion_weight)
        return loss, {"loss": loss, "psnr": -10 * error.square().mean().log10()}

    def _standardise(self, raw: Tensor) -> Tensor:
        """Latents with the batch's own mean and deviation; the running ones are what `encode` will use."""
        mean, std = raw.mean((0, 1, 3, 4)).view(-1, 1, 1), raw.std((0, 1, 3, 4)).view(-1, 1, 1)
        with torch.no_grad():
            self.student.latent_mean.lerp_(mean, STATISTICS)
            self.student.latent_std.lerp_(std, STATISTICS)
        return (raw - mean) / (std + 1e-5)


def batch(clips: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips [B, 9, 3, H, W] with turns at any time, a third of them in the middle of a switch, and where the object
    is [B, 9, 1, H, W]."""
    frames = 1 + worlds.UNIT_FRAMES * (UNITS - 1)
    before, after = worlds.sample_factors(clips, generator), worlds.sample_factors(clips, generator)
    switch = torch.randint(-worlds.FADE, frames, (clips,), generator=generator)
    switch = torch.where(torch.rand(clips, generator=generator) < 1 / 3, switch, frames)
    scene = worlds.simulate(before, generator, frames, after=after, switch=switch, calm=1)
    return worlds.render(scene), around(scene)


def around(scene: worlds.Scene) -> Tensor:
    """Where the object is, with some room: [B, T, 1, H, W]."""
    clips, frames = scene.position.shape[:2]
    count = clips * frames
    disc = worlds.coverage(
        scene.position.flatten(0, 1), torch.full((count,), 14.0), torch.zeros(count, dtype=torch.long)
    )
    return disc.view(clips, frames, 1, worlds.SIDE, worlds.SIDE)


def pixel_loss(decoded: Tensor, video: Tensor, weight: Tensor, motion_weight: float) -> tuple[Tensor, Tensor]:
    """The weighted loss of frames and of the change between them; and the error, all [B, T, 3, H, W] but the loss."""
    error = decoded - video
    motion = error[:, 1:] - error[:, :-1]
    loss = (weight * (0.3 * error.abs() + 3 * error.square())).mean()
    return loss + motion_weight * (weight[:, 1:] * (0.1 * motion.abs() + motion.square())).mean(), error
