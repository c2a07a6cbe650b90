"""Stage 1b: the autoregressive teacher by teacher forcing, from the bidirectional weights.

Each unit is denoised at its own noise level while it sees the *clean* past of the data, so the frame-level ODE of
this teacher is injective given what a causal student sees (arXiv:2602.02214, definition 3.1): the pairs that stage 2
distils from are a function of the student's input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from cfrt import flow
from cfrt.config import ModelConfig
from training.data import Batch, DataSet
from training.loop import SCHEDULES, Micro, Optimisers, Report, Schedule, Update
from training.network import Network, Velocity, broadcast, noise_like, resampled, unit_weights
from training.optimisers import MAKERS

ELSEWHERE = 2**20  # batches ahead: where the further first units come from


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 5400
    batch: int = 16
    lr: float = 2e-3
    schedule: Schedule = "cosine"
    optimiser: Literal["muon", "adam"] = "muon"
    betas: tuple[float, float] = (0.9, 0.99)
    """Of AdamW, on what Muon leaves it or on everything."""
    ema: float = 0.996
    weighting: Literal["uniform", "bell"] = "uniform"
    """Loss weight of a noise level: all alike, or `flow.loss_weight`, which hardly looks at either end."""
    caption_dropout: float = 0.1
    forcing: Literal["teacher", "diffusion"] = "teacher"
    """Which past a unit sees: the clean one, or (diffusion forcing, the ablation) one as noisy as its own levels."""
    first_weight: float = 4.0
    """Loss weight of unit 0 against the others: it makes the whole scene out of nothing, and its errors stay."""
    early_weight: float = 2.0
    """Loss weight of the three units after it, in which the caption alone decides where the object heads."""
    resampled: float = 0.0
    """Share of clips whose past is the network's own guess of it (`network.resampled`); none in the paper."""
    resampled_top: float = 0.75
    """Noisiest copy that it guesses from. Beyond, a guess may turn where the data does not."""
    resampled_jumps: int = 1
    """How often it guesses, each time from half the noise and on the past guessed before: nearer to a stream's past."""
    starts: int = 64
    """Further unit-0 examples in every batch. They have no past, so they cost a twentieth of a clip each."""


def unit_levels(clips: int, units: int, frames: int, generator: torch.Generator) -> Tensor:
    """[B, T] uniform u, one for each unit of `frames` latent frames (reference schedule: independent per unit)."""
    return torch.rand(clips, units, generator=generator, device=generator.device).repeat_interleave(frames, 1)


class Stage:
    """Teacher-forced flow matching: E |v(x_s^i, x0^{<i}, s_i) - (e - x0^i)|^2 (arXiv:2602.02214, section 3.2)."""

    name = "teacher"
    capturable = True

    def __init__(self, config: Config, model: ModelConfig, clips: DataSet, start: Network) -> None:
        self.config, self.model, self.clips, self.steps = config, model, clips, config.steps
        self.student, self.batch = start, config.batch
        self.networks, self.frozen = {"student": self.student}, dict[str, nn.Module]()

    def optimisers(self) -> dict[str, Optimisers]:
        return {"student": MAKERS[self.config.optimiser](self.student, self.config.lr, self.config.betas)}

    def step(self, index: int) -> Iterator[Update]:
        yield Update("student", self.config.lr * SCHEDULES[self.config.schedule](index, self.steps), self.loss)

    def loss(self, micro: Micro) -> tuple[Tensor, Report]:
        config, unit, generator = self.config, self.model.unit, micro.generator
        batch = self.clips.batch(micro.index, config.batch).drop(config.caption_dropout, generator)
        x0 = batch.latents
        frames = x0.shape[1]
        s = flow.warp(unit_levels(len(x0), frames // unit, unit, generator), self.model.shift)
        velocity = {"teacher": self.student.teacher_forced, "diffusion": self.student.noisy_prefix}[config.forcing]
        batch = batch.to(self.student.device)
        context = resampled(
            self.student,
            batch,
            config.resampled,
            config.resampled_top,
            self.model.shift,
            generator,
            config.resampled_jumps,
        )
        error = self._error(velocity, batch, s, generator, context).mean(0)  # [T]
        first = error[:unit].mean()
        if config.starts:
            first = torch.lerp(self._starts(micro), first, len(x0) / (len(x0) + config.starts))
        weights = unit_weights(frames, unit, config.first_weight, config.early_weight, error.device)
        loss = (error * weights)[unit:].sum() / frames + first * weights[:unit].sum() / frames
        return loss, {"loss": error.mean(), "first": first}

    def _starts(self, micro: Micro) -> Tensor:
        """Mean error on further first units, of clips that this batch does not hold. A first unit sees only itself, so
        the bidirectional forward over it alone is the teacher-forced one."""
        config, unit, generator = self.config, self.model.unit, micro.generator
        clips = self.clips.batch(micro.index + ELSEWHERE, config.starts)
        cut = replace(
            clips, latents=clips.latents[:, :unit], captions=clips.captions[:, :1], caption=clips.caption[:, :unit] * 0
        )
        batch = cut.drop(config.caption_dropout, generator)
        s = flow.warp(unit_levels(config.starts, 1, unit, generator), self.model.shift)
        return self._error(self.student.bidirectional, batch, s, generator).mean()

    def _error(
        self, velocity: Velocity, batch: Batch, s: Tensor, generator: torch.Generator, context: Batch | None = None
    ) -> Tensor:
        """Squared error of v for each clip and frame, weighted, [B, T]; `context` is the past to go on from."""
        batch = batch.to(self.student.device)
        x0, s = batch.latents, s.to(self.student.device)
        eps = noise_like(x0, generator)
        v = velocity(flow.add_noise(x0, eps, broadcast(s)), s, batch if context is None else context)
        error = (v - flow.velocity(x0, eps)).square().mean((2, 3, 4))
        return error if self.config.weighting == "uniform" else error * flow.loss_weight(s, self.model.shift)
