"""Stage 2b: weights that floats of 8 bits hold, for a student that is exported to them.

    min E |v_R(theta)(x_s^i, x^{<i}, s) - (x_e^i - x_s^i) / (e - s)|^2

The loss of `training.phases`, of a network whose products have weights rounded to the four significant bits of E4M3;
the gradient passes the rounding straight through (arXiv:1308.3432). Rounding after training moves an output the same
way in every frame of a stream, which adds it up; a network that was trained rounded has settled around it. R(theta)
ships, so that an export to fp8 changes no weight (its scales are powers of two, `export/quantize.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfrt.config import ModelConfig
from training import ode, phases
from training.network import Network

LAYERS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0")
"""Of every block: the products that an export makes of fp8."""
DROPPED = 20
"""Of the 23 bits behind the leading one that fp32 writes down."""


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 1500
    lr: float = 3e-4
    ema: float = 0.995


class Stage(phases.Stage):
    """Everything else is as in the phases `of` before it."""

    name = "rounded"

    def __init__(
        self,
        config: Config,
        of: phases.Config,
        model: ModelConfig,
        pairs: ode.Trajectories,
        openings: ode.Trajectories,
        start: Network,
    ) -> None:
        again = replace(of, steps=config.steps, lr=config.lr, ema=config.ema)
        super().__init__(again, model, pairs, openings, start)
        for name, layer in start.named_modules():
            if isinstance(layer, nn.Linear) and name.endswith(LAYERS):
                layer.forward = partial(_product, layer)  # type: ignore[method-assign]


def _product(layer: nn.Linear, x: Tensor) -> Tensor:
    weight = layer.weight
    return F.linear(x, weight + (four_bits(weight) - weight).detach(), layer.bias)


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
    return {name: four_bits(value) if name.endswith(ends) else value for name, value in weights.items()}
