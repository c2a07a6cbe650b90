"""Stage 1b: the autoregressive teacher by teacher forcing, from the bidirectional weights.

Each unit is denoised at its own noise level while it sees the *clean* past of the data, so the frame-level ODE of
this teacher is injective given what a causal student sees (arXiv:2602.02214, definition 3.1): the pairs that stage 2
distils from are a function of the student's input."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cfrt import flow
from cfrt.config import ModelConfig
from training.data import Clips, drop_captions
from training.loop import Stats, cosine
from training.network import Network, broadcast
from training.optimisers import descend, muon_and_adam


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 3000
    batch: int = 16
    lr: float = 2e-3
    ema: float = 0.996
    caption_dropout: float = 0.1
    first_weight: float = 2.0
    """Loss weight of unit 0 against the others: it carries the whole unconditional scene, and its errors stay for
    ever."""


def unit_levels(clips: int, units: int, frames: int, generator: torch.Generator) -> torch.Tensor:
    """[B, T] uniform u, one for each unit of `frames` latent frames (reference schedule: independent per unit)."""
    return torch.rand(clips, units, generator=generator).repeat_interleave(frames, 1)


def unit_weights(frames: int, first_weight: float) -> torch.Tensor:
    """[T] loss weights of mean 1 in which the first frame counts `first_weight` times."""
    weights = torch.ones(frames)
    weights[0] = first_weight
    return weights / weights.mean()


class Stage:
    """Teacher-forced flow matching: E |v(x_s^i, x0^{<i}, s_i) - (e - x0^i)|^2 (arXiv:2602.02214, section 3.2)."""

    name = "teacher"

    def __init__(self, config: Config, model: ModelConfig, clips: Clips, start: Network) -> None:
        self.config, self.model, self.clips, self.steps = config, model, clips, config.steps
        self.student = start
        self.networks = {"student": self.student}
        self.optimisers = muon_and_adam(self.student, config.lr)

    def step(self, index: int, generator: torch.Generator) -> Stats:
        config, unit = self.config, self.model.unit
        batch = drop_captions(self.clips.batch(index, config.batch), config.caption_dropout, generator)
        x0 = batch.latents
        frames = x0.shape[1]
        s = flow.warp(unit_levels(len(x0), frames // unit, unit, generator), self.model.shift)
        eps = torch.randn(x0.shape, generator=generator)
        v = self.student.teacher_forced(flow.add_noise(x0, eps, broadcast(s)), s, batch)
        error = (v - flow.velocity(x0, eps)).square().mean((0, 2, 3, 4))  # [T]
        loss = (error * unit_weights(frames, config.first_weight)).mean()
        norm = descend(loss, self.student, self.optimisers, config.lr * cosine(index, self.steps))
        return {"loss": error.mean().item(), "first": error[0].item(), "norm": norm}
