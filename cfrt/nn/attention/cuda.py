"""Our CUDA attention (csrc/cuda/attention_bf16.cuh), for inference in bf16 on NVIDIA GPUs: the op
`cfrt::attention_cuda`."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...blocks import Span
from ...errors import EngineError


def cuda_refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why "cuda" cannot run there, in one sentence, or None."""
    if device.type != "cuda":
        return f"the CUDA attention runs on an NVIDIA GPU, not on {device}"
    if dtype != torch.bfloat16:
        return f"the CUDA attention takes bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in (64, 128):
        return f"the CUDA attention takes heads of 64 or 128 numbers, not {head_dim}"
    return _kernels_refusal(torch.cuda.current_device() if device.index is None else device.index)


@torch.compiler.assume_constant_result  # no compiler looks into the extension, and a device stays what it is
def _kernels_refusal(index: int) -> str | None:
    return _asked_once(index)


@cache
def _asked_once(index: int) -> str | None:
    from _cfrt import cuda

    return cuda.refusal(index)


def cuda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ranges: Sequence[Span] | None,
    q_sink: Tensor | None,
    sink_tokens: int,
) -> Tensor:
    """Reads keys and values where they lie: nothing is copied or laid out first."""
    tensors = [q, k, v] if q_sink is None else [q, k, v, q_sink]
    refused = next(filter(None, (cuda_refusal(x.device, x.dtype, x.shape[-1]) for x in tensors)), None)
    if mask is not None:
        refused = "the CUDA attention reads ranges and takes no mask; use backend 'sdpa'"
    elif torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        refused = "the CUDA attention has no gradient; use backend 'sdpa', or torch.no_grad()"
    if refused is not None:
        raise EngineError(refused)
    spans = [(0, k.shape[1])] if ranges is None else ranges
    return _cuda_op(q, k, v, [bound for span in spans for bound in span], q_sink, sink_tokens)


@torch.library.custom_op("cfrt::attention_cuda", mutates_args=(), device_types="cuda")
def _cuda_op(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], q_sink: Tensor | None, sink_tokens: int) -> Tensor:
    """On the current stream, without waiting: fit for a CUDA graph, which then reads the same ranges for ever."""
    from _cfrt import cuda

    device = q.device.index
    with torch.cuda.device(q.device):
        return _call(
            q, k, v, bounds, q_sink, sink_tokens, cuda.processors(device), torch.cuda.current_stream().cuda_stream
        )


@_cuda_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bounds: Any, q_sink: Any, sink_tokens: int) -> Tensor:
    return q.new_empty(q.shape)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Sequence[int],
    q_sink: Tensor | None,
    sink_tokens: int,
    processors: int,
    stream: int,
) -> Tensor:
    """One launch for each of the batch."""
    from _cfrt import cuda

    _check_rows(q=q, k=k, v=v, q_sink=q if q_sink is None else q_sink)
    if k.stride() != v.stride() or (q_sink is not None and q_sink.stride() != q.stride()):
        raise EngineError("the CUDA attention wants k laid out like v, and q_sink like q; make them contiguous")
    (batch, queries, heads, dim), out = q.shape, torch.empty_like(q, memory_format=torch.contiguous_format)
    pieces, sink_pieces = _pieces(list(zip(bounds[::2], bounds[1::2], strict=True)), sink_tokens)
    splits, size = cuda.plan(queries=queries, heads=heads, dim=dim, pieces=pieces, processors=processors)
    scratch = q.new_empty(size, dtype=torch.float32)
    for i in range(batch):
        cuda.attention(
            q=q[i].data_ptr(),
            q_sink=0 if q_sink is None else q_sink[i].data_ptr(),
            k=k[i].data_ptr(),
            v=v[i].data_ptr(),
            out=out[i].data_ptr(),
            scratch=scratch.data_ptr(),
            q_stride=q.stride(1),
            out_stride=out.stride(1),
            row_stride=k.stride(1),
            queries=queries,
            heads=heads,
            dim=dim,
            splits=splits,
            pieces=pieces,
            sink_pieces=sink_pieces,
            scale=dim**-0.5,
            stream=stream,
        )
    return out


def _check_rows(**tensors: Tensor) -> None:
    """A row's heads lie side by side, and rows start on 16 bytes."""
    for name, x in tensors.items():
        side_by_side = x.stride(3) == 1 and x.stride(2) == x.shape[3]
        if not side_by_side or any(x[i].data_ptr() % 16 for i in range(len(x))) or x.stride(1) * x.element_size() % 16:
            raise EngineError(
                f"the CUDA attention wants {name} [B, N, H, D] with the heads of a row side by side and rows that "
                f"start on 16 bytes; got strides {x.stride()} from address {x.data_ptr():#x}: make it contiguous"
            )


def _pieces(spans: Sequence[Span], sink_tokens: int) -> tuple[list[Span], int]:
    """((first row, rows), ...), and how many of them are sinks': a span that is both is cut in two."""
    pieces: list[Span] = []
    sink_pieces, left = 0, sink_tokens
    for start, stop in spans:
        cut = min(stop, start + left)
        pieces += [(first, last - first) for first, last in ((start, cut), (cut, stop)) if first < last]
        sink_pieces += start < cut
        left -= cut - start
    return pieces, sink_pieces
