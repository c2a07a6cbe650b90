"""The attention of the native CPU engine, for inference in fp32 and bf16."""

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...blocks import Span
from ...errors import EngineError

_OWN = threading.local()
"""A pool of threads has one caller at a time: each Python thread keeps its own."""


def native_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ranges: Sequence[Span] | None,
    q_sink: Tensor | None,
    sink_tokens: int,
) -> Tensor:
    """Lays out the keys and values first, which the native engine does once, when it writes them into its ring."""
    _check_native(q, k, v, mask, q_sink)
    from _cfrt import kernels

    if getattr(_OWN, "threads", None) is None or _OWN.threads.count != torch.get_num_threads():
        _OWN.threads = kernels.Threads(torch.get_num_threads())
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    spans = [(0, k.shape[1])] if ranges is None else [span for span in ranges if span[0] < span[1]]
    for i in range(len(q)):
        kernels.attention(
            _wide(q[i]),
            kernels.KeyValues(_wide(k[i]), _wide(v[i]), "fp32" if q.dtype == torch.float32 else "bf16"),
            _bits(out[i]),
            ranges=spans,
            q_sink=None if q_sink is None else _wide(q_sink[i]),
            sink_rows=0 if q_sink is None else sink_tokens,
            threads=_OWN.threads,
        )
    return out


def _check_native(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_sink: Tensor | None) -> None:
    tensors = [q, k, v] if q_sink is None else [q, k, v, q_sink]
    if mask is not None:
        raise EngineError("the native attention reads ranges and takes no mask; use backend 'sdpa'")
    if any(x.dtype != q.dtype or x.device.type != "cpu" for x in tensors) or q.dtype not in _NATIVE:
        got = ", ".join(sorted({f"{x.dtype} on {x.device}" for x in tensors}))
        raise EngineError(f"the native attention takes float32 or bfloat16 on the CPU, all alike; got {got}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise EngineError("the native attention has no gradient; use backend 'sdpa', or torch.no_grad()")


_NATIVE = (torch.float32, torch.bfloat16)


def _wide(x: Tensor) -> np.ndarray:
    array: np.ndarray = x.detach().to(torch.float32).contiguous().numpy()
    return array


def _bits(x: Tensor) -> np.ndarray:
    """float32, or bf16 as uint16, sharing memory."""
    array: np.ndarray = x.numpy() if x.dtype == torch.float32 else x.view(torch.int16).numpy().view(np.uint16)
    return array
