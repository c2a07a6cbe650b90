"""Self-rollout: the model plays a clip unit by unit through the runtime's own ring cache and `step`.

The same loop serves the few-step student, the guided multi-step teacher and the rollout of DMD, which differ only in
how one unit is denoised. What training sees is therefore what streaming does, to the letter.

Shapes: B clips, n latent frames, F frames a unit; x [B, F, C, h, w]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cfrt import flow
from cfrt.config import ModelConfig
from cfrt.nn.ring import RingCache
from training.data import Prompts
from training.network import Network, by_age, noise_like

TextKV = list[tuple[Tensor, Tensor]]


class Player:
    """A batch of streams in progress: one ring, the captions, and the velocity of the unit at hand."""

    def __init__(self, network: Network, model: ModelConfig, prompts: Prompts, *, guidance: float = 1.0) -> None:
        """Guidance doubles the batch inside."""
        self.dit, self.model, self.guidance = network.dit, model, guidance
        self.clips = len(prompts)
        asked = prompts if guidance == 1 else prompts.and_null()
        self.caption, self.text = asked.caption, network.text_kv(asked.captions)
        k, _ = self.text[0]  # has the precision of the compute
        self.device = k.device
        self.ring = RingCache(model, batch=len(asked), dtype=k.dtype, device=k.device)

    def velocity(self, x: Tensor, s: float, unit: int) -> Tensor:
        """v [B, F, C, h, w] of the unit at noise level s, guided where the player is."""
        guided = self.guidance != 1
        both = torch.cat([x, x]) if guided else x
        t = torch.full((len(both),), flow.TIME_SCALE * s, device=x.device)
        v = self.dit.step(both, t, self._text_of(unit), self.ring, unit)
        if not guided:
            return v
        v_cond, v_null = v.chunk(2)
        return flow.guide(v_cond, v_null, self.guidance)

    @torch.no_grad()
    def commit(self, x0: Tensor, unit: int) -> None:
        """The clean pass that writes the unit's keys and values for its successors."""
        both = torch.cat([x0, x0]) if self.guidance != 1 else x0
        self.dit.commit(both, self._text_of(unit), self.ring, unit)

    def _text_of(self, unit: int) -> TextKV:
        """Keys and values of the caption that rules this unit in each clip, one caption a clip."""
        clips = torch.arange(len(self.caption), device=self.caption.device)
        ruling = self.caption[:, unit * self.model.unit]
        return [(k[clips, ruling][:, None], v[clips, ruling][:, None]) for k, v in self.text]


class Led:
    """Streams of a teacher as distillation follows it: guided by the caption in the first units after it began, and
    led away from a weaker teacher in the others. That is autoguidance (arXiv:2406.02507), v + (a - 1) (v - v_weak): it
    takes off errors that both make, one more than the other, and costs no variety, as guidance by a caption does.
    Where there is little noise, s <= `above`, the motion is settled and leading only roughens outlines (an interval,
    arXiv:2404.07724): there the teacher goes by itself.

    What each of the three networks has seen is a ring of its own."""

    def __init__(
        self,
        teacher: Network,
        weak: Network,
        model: ModelConfig,
        prompts: Prompts,
        *,
        guidance: float,
        later: float,
        autoguidance: float,
        above: float = 0.0,
    ) -> None:
        self.model, self.prompts, self.clips = model, prompts, len(prompts)
        self.asked = Player(teacher, model, prompts)
        self.device = self.asked.device
        self.others = (Player(teacher, model, prompts.to_null()), Player(weak, model, prompts))
        self.scales = by_age(prompts, guidance, later, model.unit), by_age(prompts, 1.0, autoguidance, model.unit)
        self.above = (0.0, above)

    def velocity(self, x: Tensor, s: float, unit: int) -> Tensor:
        """v [B, F, C, h, w] of the unit at noise level s."""
        own = slice(unit * self.model.unit, (unit + 1) * self.model.unit)
        v = said = self.asked.velocity(x, s, unit)
        for other, scales, above in zip(self.others, self.scales, self.above, strict=True):
            scale = scales[:, own]
            if s > above and (scale != 1).any():
                v = v + (scale - 1) * (said - other.velocity(x, s, unit))
        return v

    def commit(self, x0: Tensor, unit: int) -> None:
        for player in (self.asked, *self.others):
            player.commit(x0, unit)


class Streams(Protocol):
    """A batch of streams in progress."""

    model: ModelConfig
    clips: int
    device: torch.device

    def velocity(self, x: Tensor, s: float, unit: int) -> Tensor: ...

    def commit(self, x0: Tensor, unit: int) -> None: ...


Denoiser = Callable[[Streams, Tensor, int], Tensor]  # (streams, noise, unit) -> x0


def play(
    player: Streams, units: int, denoise: Denoiser, generator: torch.Generator, prefix: Tensor | None = None
) -> Tensor:
    """Latents [B, n, C, h, w] of `units` units; the first ones are `prefix` [B, p, C, h, w] where given."""
    frames, model = player.model.unit, player.model
    shape = (player.clips, frames, model.latent_channels, *model.latent_grid)
    given = 0 if prefix is None else prefix.shape[1] // frames
    clip: list[Tensor] = []
    for unit in range(units):
        if prefix is not None and unit < given:
            x0 = prefix[:, unit * frames : (unit + 1) * frames]
        else:
            x0 = denoise(player, torch.randn(shape, generator=generator).to(player.device), unit)
        clip.append(x0)
        if unit + 1 < units:
            player.commit(x0, unit)
    return torch.cat(clip, 1)


def levels(model: ModelConfig, unit: int) -> tuple[float, ...]:
    """The student's noise levels sigma for a unit: its own list for the first one where the model has it."""
    return flow.sigmas(model.unit_steps(unit), model.shift)


class LastPass(NamedTuple):
    """What a unit's last denoising pass was given: x [B, F, C, h, w] at noise level s."""

    x: Tensor
    s: float


def few_step(
    model: ModelConfig,
    generator: torch.Generator,
    exits: Sequence[int] | None = None,
    passes: list[LastPass] | None = None,
) -> Denoiser:
    """The student's sampler, by the model's solver: jump to x0, put new noise on it, go on (consistency sampling), or
    go from level to level (phased consistency).

    `exits` = (step at which the first unit stops, step at which every other one does) makes it DMD's random-exit
    rollout: only the last pass of a unit carries a gradient (Self Forcing, arXiv:2506.08009, section 3.3). `passes` is
    filled with what each unit's last pass was given. A student that goes from level to level has no estimate of x0
    before its last pass: it takes no exits, and all of its passes carry the gradient."""
    renoises = model.solver == "renoise"

    def denoise(player: Streams, x: Tensor, unit: int) -> Tensor:
        ladder = levels(model, unit)
        last = len(ladder) - 1 if exits is None else exits[0 if unit == 0 else 1]
        differentiable = torch.is_grad_enabled()
        for index in range(last + 1):
            with torch.set_grad_enabled(differentiable and (index == last or not renoises)):
                x0 = flow.x0_from_v(x, player.velocity(x, ladder[index], unit), ladder[index])
            if index < last:
                noise = partial(noise_like, x0, generator)
                x = flow.onward(model.solver, x, x0, ladder[index], ladder[index + 1], noise)
        if passes is not None:
            passes.append(LastPass(x, ladder[last]))
        return x0

    return denoise


def euler(model: ModelConfig, steps: int) -> Denoiser:
    """The teacher's sampler: the probability-flow ODE by Euler steps, guided by the player."""
    grid = flow.euler_grid(steps, model.shift)

    def denoise(player: Streams, x: Tensor, unit: int) -> Tensor:
        for s, s_next in pairwise(grid):
            x = flow.euler(x, player.velocity(x, s, unit), s, s_next)
        return x

    return denoise
