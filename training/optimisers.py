"""Which optimiser moves which weight.

Teachers, and students by phases: Muon on the matrices of the blocks (it holds 2e-3 untuned), AdamW on everything else.
Other distillation, and whatever starts from published weights: AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from training import parallel


def muon_and_adam(
    network: nn.Module, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.01
) -> dict[str, torch.optim.Optimizer]:
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        (matrices if ".blocks." in f".{name}" and parameter.dim() == 2 else rest).append(parameter)
    stacked = bool(matrices) and (matrices[0].is_cuda or not parallel.bf16_is_fast(matrices[0].device))
    muon = StackedMuon if stacked else torch.optim.Muon
    return {
        "muon": muon(matrices, lr=lr, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        "adam": torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay),
    }


def adam(
    network: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float = 0.01
) -> dict[str, torch.optim.Optimizer]:
    return {"adam": torch.optim.AdamW(network.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)}


MAKERS = {"muon": muon_and_adam, "adam": adam}


class StackedMuon(torch.optim.Muon):
    """torch's Muon, the matrices of one shape orthogonalised together: 30 launches a shape instead of a matrix; and in
    fp32 where bf16 is slow."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                alike.setdefault(parameter.shape, []).append(parameter)
            for parameters in alike.values():
                self._descend(parameters, group)

    def _descend(self, matrices: list[nn.Parameter], group: dict[str, Any]) -> None:
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        momenta = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))  # Nesterov's
        steps = orthogonal(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"]).to(ahead.dtype)
        size = 0.2 * max(ahead.shape[1:]) ** 0.5  # the root mean square of AdamW's steps
        weights = list[Tensor](matrices)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(steps.unbind()), alpha=-size * group["lr"])


def orthogonal(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices [n, a, b] with their singular values pulled towards one: Newton-Schulz (Jordan, 2024)."""
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x.bfloat16() if parallel.bf16_is_fast(x.device) else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
