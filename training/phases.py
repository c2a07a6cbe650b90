"""Stage 2 for a student that follows the flow: regression of each of its own steps on trajectories of the AR teacher.

    min E |v_theta(x_s^i, x^{<i}, s) - (x_e^i - x_s^i) / (e - s)|^2,    s -> e a step of the student's list

One jump from noise to the end is a hard function of the noise, and what a small network makes of it is too smooth:
objects slow down. In a few phases (phased consistency, arXiv:2405.18407) each is nearly straight. The pairs are those
of causal ODE distillation (arXiv:2602.02214, section 3.3), a function of what the student sees; the teacher is
followed as `rollout.Led` leads it, on a past that it played itself.

Shapes: B clips, S stored states, n latent frames, F frames a unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from cfrt import flow
from cfrt.config import ModelConfig
from cfrt.nn.constants import kept
from training import ideal, ode, rollout
from training.data import Batch, Prompts
from training.loop import SCHEDULES, Micro, Optimisers, Report, Schedule, Update
from training.network import Network, Velocity, broadcast, unit_weights
from training.optimisers import MAKERS


@dataclass(frozen=True, kw_only=True)
class Config:
    pairs: int = 20_480
    """Clips that the teacher plays. Seen a dozen times each they are learnt by heart."""
    openings: int = 32_768
    """First units that it plays beside them, a twentieth of a clip's work each."""
    euler_steps: int = 16
    guidance: float = 2.0
    """By the caption, in the first units after it began."""
    guidance_later: float = 1.0
    autoguidance: float = 2.1
    """Away from the weaker teacher, in the others, ..."""
    autoguidance_above: float = 0.5
    """... at noise levels s above this one."""
    piece: int = 64
    steps: int = 16_000
    batch: int = 16
    lr: float = 8e-4
    optimiser: Literal["muon", "adam"] = "muon"
    betas: tuple[float, float] = (0.9, 0.99)
    """Of AdamW, on what Muon leaves it or on everything."""
    schedule: Schedule = "cosine"
    ema: float = 0.998
    first_weight: float = 4.0
    early_weight: float = 2.0
    last_weight: float = 2.0
    """Loss weight of steps that end without noise: the longest one of most lists, and nothing comes after it that could
    take an error off again."""
    starts: int = 48
    """Further first units in every batch, which cost a twentieth of a clip each: their list is the longest, and each
    step of it would come up seldom."""

    def trajectories(self, model: ModelConfig) -> ode.Config:
        """How clips are stored: the states at which any unit's step begins."""
        levels = sorted({*model.unit_steps(0), *model.unit_steps(1)}, reverse=True)
        return ode.Config(
            pairs=self.pairs, euler_steps=self.euler_steps, levels=tuple(levels), piece=self.piece, half=True
        )

    def first_trajectories(self, model: ModelConfig) -> ode.Config:
        """How openings are stored."""
        return replace(self.trajectories(model), pairs=self.openings, piece=8 * self.piece)

    def led(self, teacher: Network, weak: Network, model: ModelConfig, prompts: Prompts) -> rollout.Led:
        """The teacher under these prompts."""
        return rollout.Led(
            teacher,
            weak,
            model,
            prompts.to(teacher.device),
            guidance=self.guidance,
            later=self.guidance_later,
            autoguidance=self.autoguidance,
            above=self.autoguidance_above,
        )

    def pairs_of(
        self, teacher: Network, weak: Network, model: ModelConfig, batch: Batch, generator: torch.Generator
    ) -> ode.Pairs:
        """The teacher's clips under the batch's prompts."""
        return ode.led_pairs(self.led(teacher, weak, model, batch), self.trajectories(model), generator)

    def openings_of(
        self, teacher: Network, weak: Network, model: ModelConfig, batch: Batch, generator: torch.Generator
    ) -> ode.Pairs:
        """The first units of such clips."""
        first = Prompts(captions=batch.captions[:, :1], caption=batch.caption[:, : model.unit], null=batch.null)
        return ode.led_pairs(self.led(teacher, weak, model, first), self.first_trajectories(model), generator)


Maker = Callable[[Network, Network, ModelConfig, Batch, torch.Generator], ode.Pairs]
"""Of pairs: (teacher, weak, model, batch, generator)."""


class Stage:
    name = "phases"

    def __init__(
        self,
        config: Config,
        model: ModelConfig,
        pairs: ode.Trajectories,
        openings: ode.Trajectories | ideal.Answers,
        start: Network,
    ) -> None:
        """`openings` may also be states that the ideal denoiser has answered: then the first units of clips count only
        where a caption leaves something of the look open, on which it has no word."""
        self.config, self.model, self.pairs, self.openings, self.steps = config, model, pairs, openings, config.steps
        self.student, self.batch = start, config.batch
        self.networks, self.frozen = {"student": self.student}, dict[str, nn.Module]()
        self.levels = config.trajectories(model).levels

    @property
    def capturable(self) -> bool:
        """Whether nothing has to be fetched for a step."""
        played = (self.pairs, self.openings)
        return all(isinstance(found, ode.Kept) and found.captions.is_cuda for found in played)

    def optimisers(self) -> dict[str, Optimisers]:
        return {"student": MAKERS[self.config.optimiser](self.student, self.config.lr, self.config.betas)}

    def step(self, index: int) -> Iterator[Update]:
        yield Update("student", self.config.lr * SCHEDULES[self.config.schedule](index, self.steps), self.loss)

    def loss(self, micro: Micro) -> tuple[Tensor, Report]:
        config, unit, generator = self.config, self.model.unit, micro.generator
        pairs = self._drawn(self.pairs, config.batch, generator)
        steps = self._steps(pairs.end.shape[1], config.batch, generator)
        errors = self._error(self.student.teacher_forced, pairs, *steps)  # [B, n]
        error, first = errors.mean(0), self._first(errors[:, :unit].mean(1), pairs, generator)
        weights = unit_weights(len(error), unit, config.first_weight, config.early_weight, error.device)
        loss = ((error * weights)[unit:].sum() + first * weights[:unit].sum()) / len(error)
        return loss, {"loss": error.mean(), "first": first}

    def _first(self, error: Tensor, pairs: ode.Pairs, generator: torch.Generator) -> Tensor:
        """Mean error of first units: those of the clips, [B], and further ones."""
        if not self.config.starts:
            return error.mean()
        if isinstance(self.openings, ideal.Answers):
            further, counts = self._answered(self.openings, generator), ~ideal.named(pairs.captions[:, 0])
        else:
            further, counts = self._starts(self.openings, generator), torch.ones_like(error)
        return torch.cat([further, error * counts]).sum() / (len(further) + counts.sum())

    def _drawn(self, pairs: ode.Trajectories, clips: int, generator: torch.Generator) -> ode.Pairs:
        return pairs[_integers(len(pairs), clips, generator)].to(self.student.device)

    def _starts(self, openings: ode.Trajectories, generator: torch.Generator) -> Tensor:
        """Errors on further first units, [B]. One sees only itself: the bidirectional forward is the teacher-forced
        one."""
        pairs = self._drawn(openings, self.config.starts, generator)
        steps = self._steps(self.model.unit, self.config.starts, generator)
        return self._error(self.student.bidirectional, pairs, *steps).mean(1)

    def _answered(self, openings: ideal.Answers, generator: torch.Generator) -> Tensor:
        """The same against the ideal denoiser, each weighted by its noise level: without that, the errors of the last
        levels, divided by s, would be all that counts."""
        clip, level = openings.draw(self.config.starts, generator)
        drawn, level = openings[clip].to(self.student.device), level.to(self.student.device)
        row = torch.arange(len(level), device=level.device)
        x, answer = drawn.states[row, level], drawn.answers[row, level]
        s = _sigmas(self.model.unit_steps(0), self.model.shift, x.device)[level, None].expand(x.shape[:2])
        said = self.student.bidirectional(x, s, Batch.of(x, drawn))
        return ((said - flow.v_from_x0(x, answer, broadcast(s))).square() * broadcast(s)).mean((1, 2, 3, 4))

    def _error(self, velocity: Velocity, pairs: ode.Pairs, start: Tensor, end: Tensor) -> Tensor:
        """Squared error of what is said of a step to what it has to be, [B, n], weighted by where it ends."""
        track = torch.cat([pairs.states, pairs.end[:, None]], 1)  # [B, S + 1, n, C, h, w]
        clip, frame = (torch.arange(count, device=track.device) for count in start.shape)
        x, goal = (track[clip[:, None], places, frame] for places in (start, end))
        sigmas = _sigmas(self.levels, self.model.shift, track.device)
        s, e = sigmas[start], sigmas[end]
        said = velocity(x, s, Batch.of(pairs.clean, pairs))
        error = (said - (goal - x) / broadcast(e - s)).square().mean((2, 3, 4))
        return torch.where(e == 0, self.config.last_weight * error, error)

    def _steps(self, frames: int, clips: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A step of its list for each unit of each clip: places of the levels from and to which it leads, [B, n]."""
        columns = []
        for unit in range(frames // self.model.unit):
            ladder = _ladder(self.levels, self.model.unit_steps(unit), generator.device)
            rung = _integers(len(ladder) - 1, clips, generator)
            columns.append(torch.stack([ladder[rung], ladder[rung + 1]]))
        start, end = torch.stack(columns, -1).repeat_interleave(self.model.unit, -1)
        return start, end


@kept(16)
def _sigmas(levels: tuple[float, ...], shift: float, device: torch.device) -> Tensor:
    """Noise levels s of stored states, and of the end of a trajectory after them."""
    return torch.tensor([*flow.sigmas(levels, shift), 0.0], device=device)


@kept(16)
def _ladder(levels: tuple[float, ...], steps: tuple[float, ...], device: torch.device) -> Tensor:
    """Places among them of a list's steps, the end last."""
    return torch.tensor([*map(levels.index, steps), len(levels)], device=device)


def _integers(below: int, count: int, generator: torch.Generator) -> Tensor:
    """[count], each in [0, below), where the generator lives."""
    return torch.randint(below, (count,), generator=generator, device=generator.device)
