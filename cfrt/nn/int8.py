"""Weights in int8, for networks that are read from more than they compute: half of bf16's memory, no gradient.

Every output of a linear map, and every row of a table, has a scale of its own: w = q s, q in -127 ... 127. Products are
made in the dtype of the input, a block of outputs at a time, so that no more than a block is ever there in that dtype.
What it costs is that conversion. Activations stay as they are: T5's have outliers, which 8 bits a row would round away.

Legend: n tokens, k inputs, o outputs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 1024
"""Outputs at a time."""


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """q int8 [o, k] and s fp32 [o] of w [o, k]; rows of zeros have s = 1."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    largest = wide.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return (wide / scale[:, None]).round_().to(torch.int8), scale.float()


class _Quantised(nn.Module):
    """The two tensors; no parameters, since nothing is trained. A change of dtype would round the scales: do not."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        q, scale = quantised(weight)
        self.register_buffer("weight", q)
        self.register_buffer("scale", scale)


class Int8Linear(_Quantised):
    """A linear map without bias, of weights [o, k]."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., o] of x [..., k], in x's dtype."""
        parts = zip(self.weight.split(BLOCK), self.scale.split(BLOCK), strict=True)
        return torch.cat([F.linear(x, q.to(x.dtype)) * scale.to(x.dtype) for q, scale in parts], dim=-1)


class Int8Embedding(_Quantised):
    """A table [rows, k]."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__(weight)
        self.dtype = dtype

    def forward(self, index: Tensor) -> Tensor:
        """[..., k] of indices [...], in `dtype`."""
        return (self.weight[index] * self.scale[index][..., None]).to(self.dtype)
