"""Last stage: the decoder again, on latents as the student makes them. The encoder stays, and so does what a latent
means: nothing that was trained on latents notices.

The autoencoder's decoder has seen latents of real clips with a little noise on them. A student's are wrong in their own
way, and the pixels show it as blurred outlines and as motion that shrinks within a latent frame. So most clips here are
the student's guess of a real clip from a noisy copy of it (`network.resampled`), and the decoder answers with the real
pixels. Levels stay low: a guess from more noise may show something else than its clip, and the decoder an average."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cfrt.config import ModelConfig
from cfrt.nn.autoencoder import Autoencoder
from training import autoencoder, data, parallel, worlds
from training.data import Batch
from training.loop import Micro, Optimisers, Report, Update, cosine
from training.network import Network, frozen, resampled
from training.optimisers import adam


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 2000
    batch: int = 6
    units: int = 8
    """Latent frames of a clip."""
    lr: float = 1e-3
    ema: float = 0.995
    guessed: float = 0.75
    """Share of clips that are the student's guess; the others are the encoder's own."""
    top: float = 0.5
    """Noisiest copy that is guessed from; the student's last step starts there."""
    latent_noise: float = 0.05
    object_weight: float = 5.0
    motion_weight: float = 2.0


class Stage:
    """One step renders, encodes, guesses and decodes a batch of clips."""

    name = "decoder"

    def __init__(
        self, config: Config, model: ModelConfig, clips: data.Config, start: Autoencoder, guesser: Network
    ) -> None:
        self.config, self.model, self.clips = config, model, clips
        self.steps, self.batch = config.steps, config.batch
        self.student = autoencoder.channels_last(start.train().requires_grad_(False))
        self.student.decoder.requires_grad_(True)
        self.guesser = frozen(guesser)
        self.networks, self.frozen = {"student": self.student}, {"guesser": self.guesser}

    def optimisers(self) -> dict[str, Optimisers]:
        return {"student": adam(self.student.decoder, self.config.lr, (0.9, 0.95), weight_decay=1e-3)}

    def step(self, index: int) -> Iterator[Update]:
        yield Update("student", self.config.lr * cosine(index, self.steps), self.loss)

    def loss(self, micro: Micro) -> tuple[Tensor, Report]:
        config, generator = self.config, micro.generator
        device = self.student.latent_mean.device
        plan = data.script(config.batch, self.clips, generator)
        scene = data.play(plan, config.units, generator)
        video = worlds.render(scene).to(device)
        with torch.no_grad(), parallel.half(device):
            clean = self.student.encode(video).float()
        batch = Batch(latents=clean, captions=plan.captions, caption=plan.caption(config.units)).to(device)
        latents = resampled(self.guesser, batch, config.guessed, config.top, self.model.shift, generator).latents
        latents = latents + config.latent_noise * torch.randn(latents.shape, generator=generator).to(device)
        with parallel.half(device):
            decoded, _ = self.student.decode(latents)
        weight = 1 + (config.object_weight - 1) * autoencoder.around(scene).to(device)
        loss, error = autoencoder.pixel_loss(decoded.float(), video, weight, config.motion_weight)
        return loss, {"loss": loss, "psnr": -10 * error.square().mean().log10()}
