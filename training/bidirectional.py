"""Stage 1a: the bidirectional teacher, a flow-matching model of whole clips.

It starts the AR teacher (four times cheaper than training that one from scratch) and is the real score of asymmetric
DMD (arXiv:2602.02214, section 3.1: the clip-level score may be bidirectional, since DMD matches a distribution and no
trajectory)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from cfrt import flow
from cfrt.config import ModelConfig
from training.data import Batch, DataSet, Prompts
from training.loop import Micro, Optimisers, Report, Update, cosine
from training.network import Network, broadcast, guided, noise_like, unit_weights
from training.optimisers import muon_and_adam


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 6000
    batch: int = 32
    lr: float = 2e-3
    ema: float = 0.998
    caption_dropout: float = 0.1
    shift: float | None = None
    """Of the noise levels; None = the model's. A whole clip is settled at higher noise than a unit of it."""
    first_weight: float = 1.0
    early_weight: float = 1.0


class Stage:
    """Flow matching with one noise level a clip: E |v(x_s, s) - (e - x0)|^2."""

    name = "bidirectional"
    capturable = True

    def __init__(self, config: Config, model: ModelConfig, clips: DataSet, start: Network) -> None:
        self.config, self.model, self.clips, self.steps = config, model, clips, config.steps
        self.student, self.batch = start, config.batch
        self.networks, self.frozen = {"student": self.student}, dict[str, nn.Module]()

    def optimisers(self) -> dict[str, Optimisers]:
        return {"student": muon_and_adam(self.student, self.config.lr)}

    def step(self, index: int) -> Iterator[Update]:
        yield Update("student", self.config.lr * cosine(index, self.steps), self.loss)

    def loss(self, micro: Micro) -> tuple[Tensor, Report]:
        config, generator = self.config, micro.generator
        batch = self.clips.batch(micro.index, config.batch).drop(config.caption_dropout, generator)
        batch = batch.to(self.student.device)
        x0 = batch.latents
        u = torch.rand(len(x0), 1, generator=generator, device=generator.device)
        s = flow.warp(u, config.shift or self.model.shift)
        s = s.to(x0.device).expand(x0.shape[:2])
        eps = noise_like(x0, generator)
        v = self.student.bidirectional(flow.add_noise(x0, eps, broadcast(s)), s, batch)
        error = (v - flow.velocity(x0, eps)).square().mean((0, 2, 3, 4))
        weights = unit_weights(x0.shape[1], self.model.unit, config.first_weight, config.early_weight, error.device)
        return (error * weights).mean(), {"loss": error.mean()}


@torch.no_grad()
def sample(
    network: Network,
    model: ModelConfig,
    prompts: Prompts,
    generator: torch.Generator,
    *,
    steps: int,
    guidance: float,
) -> Tensor:
    """Whole clips [B, n, C, h, w] by guided Euler steps."""
    shape = (*prompts.caption.shape, model.latent_channels, *model.latent_grid)
    x = torch.randn(shape, generator=generator).to(network.device)
    batch = Batch.of(x, prompts.to(x.device))
    grid = flow.euler_grid(steps, model.shift)
    for s, s_next in pairwise(grid):
        v = guided(network.bidirectional, x, torch.full(shape[:2], s, device=x.device), batch, guidance)
        x = flow.euler(x, v, s, s_next)
    return x
