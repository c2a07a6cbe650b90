"""Which optimiser moves which weight.

From scratch: Muon on the matrices of the blocks (it holds 2e-3 untuned), AdamW on everything else. Distillation, and
whatever starts from published weights: AdamW."""

from __future__ import annotations

import torch
from torch import nn


def muon_and_adam(
    network: nn.Module, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.01
) -> dict[str, torch.optim.Optimizer]:
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        (matrices if ".blocks." in f".{name}" and parameter.dim() == 2 else rest).append(parameter)
    return {
        "muon": torch.optim.Muon(
            matrices, lr=lr, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        "adam": torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay),
    }


def adam(
    network: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float = 0.01
) -> dict[str, torch.optim.Optimizer]:
    return {"adam": torch.optim.AdamW(network.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)}
