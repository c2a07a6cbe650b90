"""RMS normalisation over the full width, as Wan2.1 puts it on q and k before they are split into heads."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """y = w x / sqrt(mean(x^2) + eps) over the last dimension; statistics in at least fp32, result in x's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            normed: Tensor = _RMS.apply(x, self.weight.to(x.dtype), self.eps)
            return normed
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class _RMS(torch.autograd.Function):
    """The same with its gradient written out: 2 to 4 times faster than autograd through F.rms_norm on a CPU, where that
    is six element-wise passes each way (0.5-0.8 ms against 1.6-1.7 ms for [16, 80, 192], one thread)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = (norm.square_() / x.shape[-1]).add_(eps).rsqrt_()
        unit = wide * scale
        ctx.save_for_backward(unit, weight, scale)
        return unit.to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """With u = x scale: dx = scale (g w - u mean(g w u)), dw = sum g u."""
        unit, weight, scale = ctx.saved_tensors
        grad_weight = (grad * unit).sum(dim=tuple(range(grad.dim() - 1)))
        grad_unit = (grad * weight).to(unit.dtype)
        along = (grad_unit * unit).mean(dim=-1, keepdim=True)
        grad_x = torch.addcmul(grad_unit, unit, along, value=-1).mul_(scale)
        return grad_x.to(grad.dtype), grad_weight.to(weight.dtype), None
