"""Stage 2: causal consistency distillation (Causal Forcing++, arXiv:2605.15141, section 3.2).

    theta* = argmin E |G_theta(x_t^i, x0^{<i}, t) - G_theta-(xhat_t'^i, x0^{<i}, t')|^2,    G(x, s) = x - s v

xhat_t' is one guided Euler step of the AR teacher on the real past, theta- the moving average; G keeps the boundary
G(x, 0) = x by itself. Against the published code: dt is exact in fp32, the level is drawn per unit, and the last
interval, down to s = 0, is trained.

A student that follows the flow (`solver="euler"`) is consistent within each step of its own list, down to whose end it
jumps instead of to 0 (phased consistency, arXiv:2405.18407)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cfrt import flow
from cfrt.config import ModelConfig
from cfrt.nn.constants import kept
from training import rollout
from training.data import Batch, DataSet
from training.loop import SCHEDULES, Average, Micro, Optimisers, Report, Schedule, Update
from training.network import (
    Network,
    broadcast,
    clone,
    frozen,
    guidance_of,
    guided,
    noise_like,
    resampled,
    unit_weights,
)
from training.optimisers import adam


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 3000
    batch: int = 16
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.99)
    schedule: Schedule = "cosine"
    levels: int = 24
    guidance: float = 4.0
    guidance_later: float | None = None
    """Of units more than three after their caption began; None = the same. A caption decides where the first ones go,
    and only lives on in the others, whose variety guidance lowers."""
    ema: float = 0.96
    first_weight: float = 3.0
    early_weight: float = 2.0
    resampled: float = 0.0
    """Share of clips whose past is the target network's own guess of it (`network.resampled`)."""
    resampled_top: float = 0.75
    resampled_jumps: int = 1
    own: float = 0.0
    """Share of clips that the target network plays itself, prompts alone given: consistency along the teacher's ODE
    needs no data, and these pasts are those of a stream."""


class Stage:
    """`average` is both the target network theta- and the result."""

    name = "cd"

    def __init__(
        self, config: Config, model: ModelConfig, clips: DataSet, teacher: Network, start: Network | None = None
    ) -> None:
        """`start`: where the student begins; None = at the teacher."""
        self.config, self.model, self.clips, self.steps = config, model, clips, config.steps
        self.batch = config.batch
        self.teacher = frozen(teacher)
        self.student = clone(start or teacher, model)
        self.target = frozen(clone(start or teacher, model))
        self.average = Average(self.student, config.ema, warm=False, into=self.target)
        self.networks = {"student": self.student}
        self.frozen = {"teacher": self.teacher, "target": self.target}

    @property
    def capturable(self) -> bool:
        """A rollout's kernels differ from unit to unit and are many."""
        return self.config.own == 0

    def optimisers(self) -> dict[str, Optimisers]:
        return {"student": adam(self.student, self.config.lr, self.config.betas)}

    def step(self, index: int) -> Iterator[Update]:
        yield Update("student", self.config.lr * SCHEDULES[self.config.schedule](index, self.steps), self.loss)

    def loss(self, micro: Micro) -> tuple[Tensor, Report]:
        config, unit, generator = self.config, self.model.unit, micro.generator
        batch = self._batch(micro)
        x0 = batch.latents
        frames = x0.shape[1]
        grid = _grid(config.levels, self.model.shift, x0.device)
        shape = (len(x0), frames // unit)
        level = torch.randint(config.levels, shape, generator=generator, device=generator.device).to(x0.device)
        level = level.repeat_interleave(unit, 1)
        later = (torch.arange(frames, device=x0.device) >= unit).long()
        end = _landings(self.model, config.levels, x0.device)[later, level]
        s, s_next = grid[level], grid[level + 1].maximum(end)
        x = flow.add_noise(x0, noise_like(x0, generator), broadcast(s))
        scale = guidance_of(batch, config.guidance, config.guidance_later, unit)
        past = resampled(
            self.target,
            batch,
            config.resampled,
            config.resampled_top,
            self.model.shift,
            generator,
            config.resampled_jumps,
        )
        with torch.no_grad():
            v = guided(self.teacher.teacher_forced, x, s, past, scale)
            x_next = flow.euler(x, v, broadcast(s), broadcast(s_next))
            v_next = self.target.teacher_forced(x_next, s_next, past)
            goal = flow.euler(x_next, v_next, broadcast(s_next), broadcast(end))
        jump = flow.euler(x, self.student.teacher_forced(x, s, past), broadcast(s), broadcast(end))
        error = (jump - goal).square().mean((0, 2, 3, 4))
        weights = unit_weights(frames, unit, config.first_weight, config.early_weight, error.device)
        return (error * weights).mean(), {"loss": error.mean(), "first": error[:unit].mean()}

    def _batch(self, micro: Micro) -> Batch:
        """Clips of the data, then those of the target network's own."""
        clips = self.clips.batch(micro.index, self.config.batch).to(self.student.device)
        own = round(self.config.own * len(clips))
        if own == 0:
            return clips
        asked = self.clips.prompts(own, micro.generator).to(self.student.device)
        player = rollout.Player(self.target, self.model, asked)
        units = clips.latents.shape[1] // self.model.unit
        played = rollout.play(player, units, rollout.few_step(self.model, micro.generator), micro.generator)
        data = clips.first(len(clips) - own)
        return replace(
            data,
            latents=torch.cat([data.latents, played]),
            captions=torch.cat([data.captions, asked.captions]),
            caption=torch.cat([data.caption, asked.caption]),
        )


@kept(4)
def _grid(levels: int, shift: float, device: torch.device) -> Tensor:
    return torch.tensor(flow.euler_grid(levels, shift), device=device)


@kept(4)
def _landings(model: ModelConfig, levels: int, device: torch.device) -> Tensor:
    """[2, levels]: where the student jumps to from each level of the grid, in the first unit and in every other one:
    to 0, or, where it goes from level to level, to the next one of its own."""
    rows = []
    for unit in (0, 1):
        ladder = (*flow.sigmas(model.unit_steps(unit), model.shift), 0.0) if model.solver == "euler" else (0.0,)
        rows.append([max(e for e in ladder if e < s - 1e-6) for s in flow.euler_grid(levels, model.shift)[:-1]])
    return torch.tensor(rows, device=device)
