"""Attention over keys that may lie in a ring, behind one name and several backends.

"reference" is the definition: eager, fp32 accumulation, registered as the op `cfrt::attention` so that torch.compile
and torch.export see one node. "sdpa" is PyTorch's fused attention: what training and the torch engine run. "native" is
the kernel of the native CPU engine (csrc/cpu/kernels/attention.cpp), for inference in fp32 and bf16. "cuda" is our CUDA
kernel (csrc/cuda/attention_bf16.cuh), for inference in bf16 on NVIDIA GPUs, the op `cfrt::attention_cuda`;
`cuda_refusal` says whether it can run.

Shapes: B batch, N queries, M keys, H heads, D numbers a head.
"""

import math
import threading
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import MaskMod, Span
from ..errors import EngineError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


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

    Raises EngineError for a backend that does not exist, and for what "native" and "cuda" cannot do.
    """
    if backend not in BACKENDS:
        raise EngineError(f"expected an attention backend out of {', '.join(BACKENDS)}; got {backend!r}")
    return BACKENDS[backend](q, k, v, mask, ranges, q_sink, sink_tokens)


class Part(NamedTuple):
    """Queries that see the same keys, and which: a row of a block mask as ranges."""

    queries: Span
    keys: tuple[Span, ...]
    """In the order in which they are read, sinks first."""
    sink_tokens: int = 0
    """How many of the keys read are looked at from the second position."""


def attention_by_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Sequence[Part],
    *,
    q_sink: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """`attention` under a block mask without the mask: one call for each part, over the keys that it sees. The parts
    cover the queries in order. What a mask would hide is not computed; the keys of a part are copied together.

    Everything is split once and put together again: the gradient of a slice is as long as what it was cut from."""
    cuts = sorted({0, k.shape[1], *(bound for part in parts for span in part.keys for bound in span)})
    piece = {bound: index for index, bound in enumerate(cuts)}
    pieces = [x.split([stop - start for start, stop in pairwise(cuts)], dim=1) for x in (k, v)]
    lengths = [stop - start for (start, stop), *_ in parts]
    near = q.split(lengths, dim=1)
    far = [None] * len(parts) if q_sink is None else q_sink.split(lengths, dim=1)
    answers = []
    for own, own_far, (_, spans, sinks) in zip(near, far, parts, strict=True):
        seen = [index for start, stop in spans for index in range(piece[start], piece[stop])]
        keys, values = (torch.cat([x[index] for index in seen], dim=1) for x in pieces)
        own_far = own_far if sinks else None
        answers.append(attention(own, keys, values, q_sink=own_far, sink_tokens=sinks, backend=backend))
    return torch.cat(answers, dim=1)


def attention_by_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: "BlockMask") -> Tensor:
    """`attention` under a mask that FlexAttention skips by blocks: q [B, N, H, D], k and v [B, M, H, D].

    Compiled, with a backward, on a GPU; on a CPU the plain forward, which computes what it hides: for tests."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = _flex(q.is_cuda)(q, k, v, block_mask=blocks)
    return out.transpose(1, 2)


@cache
def _flex(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    flex: Any = flex_attention
    return torch.compile(flex, dynamic=False) if compiled else flex


def block_mask(
    mask: np.ndarray, frame_tokens: int, mask_mod: MaskMod, device: torch.device, size: int = 128
) -> "BlockMask":
    """FlexAttention's form of a mask over frames, bool [T, S], which `mask_mod` says over tokens. Made from the frames:
    a mask over 65,520 tokens, which torch's own function looks at, has 4.3e9 entries."""
    from torch.nn.attention.flex_attention import BlockMask

    rows, columns = (count * frame_tokens for count in mask.shape)
    seen = np.pad(mask.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    (first, last, whole_q), (left, right, whole_k) = (_blocks(n, frame_tokens, size) for n in (rows, columns))
    pairs = seen[last][:, right] - seen[first][:, right] - seen[last][:, left] + seen[first][:, left]
    most = (last - first)[:, None] * (right - left)[None]
    full = (pairs == most) & whole_q[:, None] & whole_k[None]
    partial = (pairs > 0) & ~full
    lists = [_listed(torch.from_numpy(x).to(device)) for x in (partial, full)]
    (number, index), (full_number, full_index) = lists
    return BlockMask.from_kv_blocks(number, index, full_number, full_index, size, mask_mod, (rows, columns))


def _blocks(tokens: int, frame_tokens: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each block of tokens: its first frame, the frame after its last, and whether the block is whole."""
    start = np.arange(0, tokens, size)
    stop = np.minimum(start + size, tokens)
    return start // frame_tokens, (stop - 1) // frame_tokens + 1, stop - start == size


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """A bool [Q, K] of blocks as FlexAttention wants it: how many each row has, and which come first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return blocks.sum(-1, dtype=torch.int32)[None, None], order[None, None].contiguous()


def _read(x: Tensor, ranges: Sequence[Span] | None) -> Tensor:
    """The keys (or values) of the given spans, [B, keys read, H, D]; a view where there is only one."""
    if ranges is None:
        return x
    parts = [x[:, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


# ---------------------------------------------------------------------- reference


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
        scores = scores.masked_fill(~_per_head(mask), float("-inf"))
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(dim=-1), v.to(dtype)).to(q.dtype)


def _per_head(mask: Tensor) -> Tensor:
    return mask if mask.dim() == 2 else mask.unsqueeze(1)


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
    return _plain(q, _read(k, spans), _read(v, spans), mask, q_sink, sink_tokens).contiguous()


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
        out = _plain(q, _read(k, spans), _read(v, spans), mask, q_sink, ctx.sink_tokens)
    wanted = [q, k, v] if q_sink is None else [q, k, v, q_sink]
    grads = torch.autograd.grad(out, wanted, grad, allow_unused=True)
    return grads[0], grads[1], grads[2], None, None, None if q_sink is None else grads[3], None


_reference_op.register_autograd(_backward, setup_context=_save)


def _reference(
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


# ---------------------------------------------------------------------- sdpa


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ranges: Sequence[Span] | None,
    q_sink: Tensor | None,
    sink_tokens: int,
) -> Tensor:
    k, v = _read(k, ranges), _read(v, ranges)
    scale = q.shape[-1] ** -0.5
    if q_sink is not None:
        q, k = _two_positions(q, k, q_sink, sink_tokens)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask is None else _per_head(mask),
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


# ---------------------------------------------------------------------- native

_OWN = threading.local()
"""A pool of threads has one caller at a time: each Python thread keeps its own."""


def _native(
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


# ---------------------------------------------------------------------- cuda


@cache
def cuda_refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why "cuda" cannot run there, in one sentence, or None."""
    if device.type != "cuda":
        return f"the CUDA attention runs on an NVIDIA GPU, not on {device}"
    if dtype != torch.bfloat16:
        return f"the CUDA attention takes bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in (64, 128):
        return f"the CUDA attention takes heads of 64 or 128 numbers, not {head_dim}"
    from _cfrt import cuda

    return cuda.refusal(torch.cuda.current_device() if device.index is None else device.index)


def _cuda(
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
        return _cuda_call(
            q, k, v, bounds, q_sink, sink_tokens, cuda.processors(device), torch.cuda.current_stream().cuda_stream
        )


@_cuda_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bounds: Any, q_sink: Any, sink_tokens: int) -> Tensor:
    return q.new_empty(q.shape)


def _cuda_call(
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
    pieces, sink_pieces = _cuda_pieces(list(zip(bounds[::2], bounds[1::2], strict=True)), sink_tokens)
    splits, size = cuda.plan(queries=queries, heads=heads, dim=dim, pieces=pieces, processors=processors)
    scratch = q.new_empty(size, dtype=torch.float32)
    for i in range(batch):
        cuda.attention_bf16(
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


def _cuda_pieces(spans: Sequence[Span], sink_tokens: int) -> tuple[list[Span], int]:
    """((first row, rows), ...), and how many of them are sinks': a span that is both is cut in two."""
    pieces: list[Span] = []
    sink_pieces, left = 0, sink_tokens
    for start, stop in spans:
        cut = min(stop, start + left)
        pieces += [(first, last - first) for first, last in ((start, cut), (cut, stop)) if first < last]
        sink_pieces += start < cut
        left -= cut - start
    return pieces, sink_pieces


Backend = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Sequence[Span] | None, Tensor | None, int],
    Tensor,
]

BACKENDS: dict[str, Backend] = {"reference": _reference, "sdpa": _sdpa, "native": _native, "cuda": _cuda}
