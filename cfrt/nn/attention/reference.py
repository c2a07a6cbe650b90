"""The definition of attention: eager, fp32 accumulation, the op `cfrt::attention`, with its derivative."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...blocks import Span
from .keys import per_head, read


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_sink: Tensor | None, sink_tokens: int) -> Tensor:
    """The formula, in at least fp32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    far, near = k[:, :sink_tokens].to(dtype), k[:, sink_tokens:].to(dtype)
    q_far = q if q_sink is None else q_sink
    scores = torch.cat(
        [
            torch.einsum("bnhd,bmhd->bhnm", q_far.to(dtype), far),
            torch.einsum("bnhd,bmhd->bhnm", q.to(dtype), near),
        ],
        dim=-1,
    ) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~per_head(mask), float("-inf"))
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(dim=-1), v.to(dtype)).to(q.dtype)


@torch.library.custom_op("cfrt::attention", mutates_args=())
def _reference_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bounds: Sequence[int],
    q_sink: Tensor | None,
    sink_tokens: int,
) -> Tensor:
    """`bounds` are the ranges, flattened: an operator's schema has no pairs."""
    spans = list(zip(bounds[::2], bounds[1::2], strict=True))
    return _plain(q, read(k, spans), read(v, spans), mask, q_sink, sink_tokens).contiguous()


@_reference_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Any, bounds: Any, q_sink: Any, sink_tokens: int) -> Tensor:
    return q.new_empty(q.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, mask, ctx.bounds, q_sink, ctx.sink_tokens = inputs
    ctx.save_for_backward(q, k, v, mask, q_sink)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Recomputes and lets autograd differentiate the formula: the reference is for being right, not fast."""
    q, k, v, mask, q_sink = ctx.saved_tensors
    spans = list(zip(ctx.bounds[::2], ctx.bounds[1::2], strict=True))
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        q_sink = None if q_sink is None else q_sink.detach().requires_grad_()
        out = _plain(q, read(k, spans), read(v, spans), mask, q_sink, ctx.sink_tokens)
    wanted = [q, k, v] if q_sink is None else [q, k, v, q_sink]
    grads = torch.autograd.grad(out, wanted, grad, allow_unused=True)
    return grads[0], grads[1], grads[2], None, None, None if q_sink is None else grads[3], None


_reference_op.register_autograd(_backward, setup_context=_save)


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ranges: Sequence[Span] | None,
    q_sink: Tensor | None,
    sink_tokens: int,
) -> Tensor:
    spans = [(0, k.shape[1])] if ranges is None else ranges
    return _reference_op(q, k, v, mask, [bound for span in spans for bound in span], q_sink, sink_tokens)
