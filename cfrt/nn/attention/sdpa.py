"""PyTorch's fused attention."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...blocks import Span
from .keys import per_head, read


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ranges: Sequence[Span] | None,
    q_sink: Tensor | None,
    sink_tokens: int,
) -> Tensor:
    k, v = read(k, ranges), read(v, ranges)
    scale = q.shape[-1] ** -0.5
    if q_sink is not None:
        q, k = _two_positions(q, k, q_sink, sink_tokens)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask is None else per_head(mask),
        scale=scale,
    )
    return out.transpose(1, 2)


def _two_positions(q: Tensor, k: Tensor, q_sink: Tensor, sink_tokens: int) -> tuple[Tensor, Tensor]:
    """One dot product that picks its query by key: [q, q_sink] . [k, 0] for the window, . [0, k] for the sinks.

    Exact, differentiable, and good with any mask, at twice the width of q and k; there is no public fused attention
    that returns its softmax sum, with which two calls could be merged instead.
    """
    far, near = k.split([sink_tokens, k.shape[1] - sink_tokens], dim=1)
    widened = torch.cat([F.pad(far, (k.shape[-1], 0)), F.pad(near, (0, k.shape[-1]))], dim=1)
    return torch.cat([q, q_sink], dim=-1), widened
