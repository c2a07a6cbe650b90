"""Beyond the papers: causal consistency distillation in continuous time, without a grid and without a target network.

The discrete loss of `training.cd` compares two jumps a step apart. In the limit of no distance it asks that the jump
does not change along the teacher's ODE (sCM, arXiv:2410.11081; MeanFlow, arXiv:2505.13447, with its second time at 0):

    0 = d/ds G(x_s, s) = v_T - v - s (dv/dx . v_T + dv/ds),    G(x, s) = x - s v

The bracket is the derivative of v along (dx/ds, ds) = (v_T, 1): one forward-mode pass (JVP) through the teacher-forced
mask. v is pulled by g, the right-hand side at fixed weights, with the two devices of sCM that keep it stable: the
bracket is faded in over the first steps, and g is normalised (here per unit). A third is needed where time is embedded
as Wan does it, turning by a radian in 0.001 of s: dv/ds feeds on itself there until nothing is left of the student, and
a difference over a distance that is long beside that (`Config.apart`) does not. rCM (arXiv:2510.08431, semi-continuous
time) takes one over 1e-4."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cfrt import flow
from cfrt.config import ModelConfig
from training.data import Batch, DataSet
from training.loop import Micro, Optimisers, Report, Update, cosine
from training.network import Network, broadcast, clone, frozen, guided, unit_weights
from training.optimisers import adam

SOFT = 0.1  # g is divided by |g| + SOFT: small ones stay small (sCM's constant)


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 3000
    batch: int = 16
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.99)
    guidance: float = 4.0
    fade_in: float = 0.3
    """Share of the steps over which the derivative of v comes in."""
    apart: float | None = None
    """dv/ds is a difference of levels so far apart; None = exact."""
    ema: float = 0.98
    first_weight: float = 3.0
    early_weight: float = 2.0


class Stage:
    name = "ccm"

    def __init__(self, config: Config, model: ModelConfig, clips: DataSet, teacher: Network) -> None:
        self.config, self.model, self.clips, self.steps = config, model, clips, config.steps
        self.batch = config.batch
        self.teacher = frozen(teacher)
        self.student = clone(teacher, model)
        self.networks, self.frozen = {"student": self.student}, {"teacher": self.teacher}
        self.fade = 0.0

    def optimisers(self) -> dict[str, Optimisers]:
        return {"student": adam(self.student, self.config.lr, self.config.betas)}

    def step(self, index: int) -> Iterator[Update]:
        config = self.config
        self.fade = min(1.0, (index + 1) / max(1.0, config.fade_in * self.steps))
        yield Update("student", config.lr * cosine(index, self.steps), self.loss)

    def loss(self, micro: Micro) -> tuple[Tensor, Report]:
        config, unit, generator = self.config, self.model.unit, micro.generator
        batch = self.clips.batch(micro.index, config.batch)
        x0 = batch.latents
        frames = x0.shape[1]
        u = torch.rand(len(x0), frames // unit, generator=generator).repeat_interleave(unit, 1)
        s = flow.warp(u, self.model.shift)
        x = flow.add_noise(x0, torch.randn(x0.shape, generator=generator), broadcast(s))
        v_teacher = guided(self.teacher.teacher_forced, x, s, batch, config.guidance)
        v, slope = along(self.student, x, s, batch, v_teacher, config.apart)
        g = v_teacher - v - self.fade * broadcast(s) * slope
        size = _size(g, unit)
        goal = v + g / broadcast(size + SOFT)
        error = (self.student.teacher_forced(x, s, batch) - goal).square().mean((0, 2, 3, 4))
        weights = unit_weights(frames, unit, config.first_weight, config.early_weight, error.device)
        return (error * weights).mean(), {"loss": size.mean(), "slope": slope.abs().mean()}


def _size(x: Tensor, unit: int) -> Tensor:
    """[B, n] root mean square of the unit that a frame belongs to."""
    return x.unflatten(1, (-1, unit)).square().mean((2, 3, 4, 5)).sqrt().repeat_interleave(unit, 1)


@torch.no_grad()
def along(
    student: Network, x: Tensor, s: Tensor, batch: Batch, direction: Tensor, apart: float | None = None
) -> tuple[Tensor, Tensor]:
    """(v, its derivative along dx/ds = direction) of the student on the clean past of the batch; in s alone it is a
    difference over `apart`, where that is given, or down to s = 0.

    Forward mode needs attention written out in its parts; the fused CPU kernels have no derivative of this kind."""
    with sdpa_kernel(SDPBackend.MATH):
        tangents = (direction, torch.ones_like(s) if apart is None else torch.zeros_like(s))
        v, slope = torch.func.jvp(lambda x, s: student.teacher_forced(x, s, batch), (x, s), tangents)[:2]
    if apart is not None:
        lower = (s - apart).clamp(min=0)
        slope = slope + (v - student.teacher_forced(x, lower, batch)) / broadcast((s - lower).clamp(min=1e-6))
    return v, slope
