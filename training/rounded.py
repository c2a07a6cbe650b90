"""Stage 2b: weights that 8 bits hold, for a student that is exported to them.

    min E |v_R(theta)(x_s^i, x^{<i}, s) - (x_e^i - x_s^i) / (e - s)|^2

The loss of `training.phases`, of a network whose products have weights rounded to what E4M3 and int8 both hold, each
with a power of two for a scale: four significant bits, and no more steps than 127 for an output. The gradient passes
the rounding straight through (arXiv:1308.3432). Rounding after training moves an output the same way in every frame of
a stream, which adds it up; a network that was trained rounded has settled around it. R(theta) ships, so that an export
to either changes no weight (`export/quantize.py`).

Where the clips are the world's, first units are answered by the ideal denoiser from here on (`training.ideal`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfrt.config import ModelConfig
from training import ideal, ode, phases
from training.network import Network

LAYERS = (
    "self_attn.q",
    "self_attn.k",
    "self_attn.v",
    "self_attn.o",
    "cross_attn.q",
    "cross_attn.o",
    "ffn.0",
    "ffn.2",
)
"""Of every block: the products that an export makes of 8 bits."""
DROPPED = 20
"""Of the 23 bits behind the leading one that fp32 writes down: three are kept."""


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 6000
    lr: float = 6e-4
    ema: float = 0.995
    answers: int = 98_304
    """First units that the ideal denoiser answers, where the clips are the world's (`training.ideal`), ..."""
    piece: int = 1024
    """... so many of one look at a time, ..."""
    starts: int = 320
    """... and states of them in every batch."""

    def answered(self, of: phases.Config, model: ModelConfig) -> ode.Config:
        """How they are stored."""
        return replace(of.first_trajectories(model), pairs=self.answers, piece=self.piece)


class Stage(phases.Stage):
    """Everything else is as in the phases `of` before it."""

    name = "rounded"

    def __init__(
        self,
        config: Config,
        of: phases.Config,
        model: ModelConfig,
        pairs: ode.Trajectories,
        openings: ode.Trajectories | ideal.Answers,
        start: Network,
    ) -> None:
        again = replace(of, steps=config.steps, lr=config.lr, ema=config.ema, starts=config.starts)
        super().__init__(again, model, pairs, openings, start)
        for name, layer in start.named_modules():
            if isinstance(layer, nn.Linear) and name.endswith(LAYERS):
                layer.forward = partial(_product, layer)  # type: ignore[method-assign]


def _product(layer: nn.Linear, x: Tensor) -> Tensor:
    weight = layer.weight
    return F.linear(x, weight + (narrowed(weight) - weight).detach(), layer.bias)


@torch.no_grad()
def narrowed(weight: Tensor) -> Tensor:
    """The nearest of [out, in] that both formats hold: for each output four significant bits, and below an eighth or
    less of the largest whole steps, of which that is 64 to 120."""
    near = four_bits(weight)
    _, exponent = torch.frexp(near.abs().amax(1, keepdim=True))
    step = torch.ldexp(torch.ones_like(weight[:, :1]), exponent - 7)
    return torch.where(weight.abs() < 8 * step, (weight / step).round() * step, near)


@torch.no_grad()
def four_bits(x: Tensor) -> Tensor:
    """The nearest fp32 numbers of four significant bits, ties to even: E4M3 scaled by any power of two, away from the
    ends of its range."""
    bits = x.float().contiguous().view(torch.int32)
    even = (bits >> DROPPED) & 1
    return ((bits + (1 << DROPPED - 1) - 1 + even) >> DROPPED << DROPPED).view(torch.float32)


def shipped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """R(theta) of averaged weights: what the network is from here on."""
    ends = tuple(f"{layer}.weight" for layer in LAYERS)
    return {name: narrowed(value.float()) if name.endswith(ends) else value for name, value in weights.items()}
