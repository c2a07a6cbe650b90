"""flash-attn (the package, extra `flash`), for inference and training on NVIDIA GPUs where it is installed."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ...blocks import Span
from ...errors import EngineError
from .keys import read


@cache
def flash_refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why "flash" cannot run there, in one sentence, or None."""
    if device.type != "cuda":
        return f"flash-attn runs on an NVIDIA GPU, not on {device}"
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed: pip install 'cfrt[flash]'"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn takes bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim > 256 or head_dim % 8:
        return f"flash-attn takes heads of multiples of 8 up to 256 numbers, not {head_dim}"
    return None


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ranges: Sequence[Span] | None,
    q_sink: Tensor | None,
    sink_tokens: int,
) -> Tensor:
    """Keys of several ranges are copied together first; sinks seen from their own position are a call of their own."""
    refused = flash_refusal(q.device, q.dtype, q.shape[-1])
    if mask is not None:
        refused = "flash-attn reads ranges and takes no mask; use backend 'sdpa'"
    if refused is not None:
        raise EngineError(refused)
    from flash_attn import flash_attn_func

    k, v = read(k, ranges), read(v, ranges)
    if q_sink is None or sink_tokens == 0:
        return flash_attn_func(q, k, v)
    if sink_tokens == k.shape[1]:
        return flash_attn_func(q_sink, k, v)
    sizes = [sink_tokens, k.shape[1] - sink_tokens]
    parts = zip((q_sink, q), k.split(sizes, dim=1), v.split(sizes, dim=1), strict=True)
    (far, far_log, _), (near, near_log, _) = (flash_attn_func(*part, return_attn_probs=True) for part in parts)
    return _merged(far, near, far_log, near_log)


def _merged(a: Tensor, b: Tensor, a_log: Tensor, b_log: Tensor) -> Tensor:
    """Answers [B, N, H, D] over two sets of keys, by the logarithms [B, H, N] of their sums of weights."""
    share = torch.sigmoid(a_log.float() - b_log.float()).transpose(1, 2).unsqueeze(-1)
    return (share * a.float() + (1 - share) * b.float()).to(a.dtype)
