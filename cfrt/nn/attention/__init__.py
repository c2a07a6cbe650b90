"""Attention over keys that may lie in a ring, behind one name and several backends, a file each.

"reference" is the definition: eager, fp32 accumulation, registered as the op `cfrt::attention` so that torch.compile
and torch.export see one node. "sdpa" is PyTorch's fused attention: what training and the torch engine run. "native" is
the kernel of the native CPU engine (csrc/cpu/kernels/attention.cpp), for inference in fp32 and bf16. "cuda" is our CUDA
kernel (csrc/cuda/attention_bf16.cuh), for inference in bf16 on NVIDIA GPUs, the op `cfrt::attention_cuda`. "flash" is
the package flash-attn. `cuda_refusal` and `flash_refusal` say whether they can run, `fastest` which to ask for.

Shapes: B batch, N queries, M keys, H heads, D numbers a head.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...blocks import Span
from ...errors import EngineError
from .blocks import attention_by_blocks, block_mask
from .cuda import cuda_attention, cuda_refusal
from .flash import flash_attention, flash_refusal
from .native import native_attention
from .reference import reference_attention
from .sdpa import sdpa_attention

__all__ = [
    "BACKENDS",
    "attention",
    "attention_by_blocks",
    "block_mask",
    "cuda_refusal",
    "fastest",
    "flash_refusal",
]

Backend = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Sequence[Span] | None, Tensor | None, int],
    Tensor,
]

BACKENDS: dict[str, Backend] = {
    "reference": reference_attention,
    "sdpa": sdpa_attention,
    "native": native_attention,
    "cuda": cuda_attention,
    "flash": flash_attention,
}


def fastest(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The backend for inference there: "cuda", "flash" or, where neither can run, "sdpa"."""
    for name, refusal in (("cuda", cuda_refusal), ("flash", flash_refusal)):
        if refusal(device, dtype, head_dim) is None:
            return name
    return "sdpa"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    ranges: Sequence[Span] | None = None,
    q_sink: Tensor | None = None,
    sink_tokens: int = 0,
    backend: str = "reference",
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: q [B, N, H, D], k and v [B, M, H, D] -> [B, N, H, D].

    ranges: half-open spans of key tokens to read, one after another (None = all of them). Order among keys does not
        matter to attention, so a ring is read as it lies.
    mask: bool [N, keys read] or [B, N, keys read], True = may look; every query must see something.
    q_sink: the queries at a second position, [B, N, H, D], used for the first `sink_tokens` of the keys read.

    Raises EngineError for a backend that does not exist, and for what "native", "cuda" and "flash" cannot do.
    """
    if backend not in BACKENDS:
        raise EngineError(f"expected an attention backend out of {', '.join(BACKENDS)}; got {backend!r}")
    return BACKENDS[backend](q, k, v, mask, ranges, q_sink, sink_tokens)
