"""One layer's attention alone: the queries of one frame over the keys of 12, batch 1, at the width of size L."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .rounds import medians, side_by_side

HEADS = {64: 12, 128: 6}  # numbers a head: heads
FRAMES = 12
TOKENS = (64, 256)
WRONG = {"fp32": 1e-5, "bf16": 0.02}
CONTENDERS = (("native", "fp32"), ("native", "bf16"), ("torch", "fp32"), ("torch", "bf16"))


def measure(
    threads: int, cap: float, dims: Sequence[int] = (64, 128), tokens: Sequence[int] = TOKENS, clock: str = "wall"
) -> list[Any]:
    """Rows as `bench_cpu` has them; size is "attention-64" for heads of 64 numbers."""
    return [row for dim in dims for n in tokens for row in _case(dim, n, threads, cap, clock)]


def _case(dim: int, tokens: int, threads: int, cap: float, clock: str) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    generator, heads = torch.Generator().manual_seed(0), HEADS[dim]
    q, k, v = (torch.randn(n, heads, dim, generator=generator) for n in (tokens, FRAMES * tokens, FRAMES * tokens))
    truth = _sdpa(q.double(), k.double(), v.double())
    makers = {"native": _native, "torch": _torch}
    calls = {(engine, precision): makers[engine](q, k, v, precision, threads) for engine, precision in CONTENDERS}
    wrong = {name: float(torch.linalg.norm(call() - truth) / torch.linalg.norm(truth)) for name, call in calls.items()}
    right = {name: call for name, call in calls.items() if wrong[name] < WRONG[name[1]]}
    taken = medians(side_by_side(right, cap / 4, clock=clock))
    gop = 4e-9 * tokens * FRAMES * tokens * heads * dim
    return [_row(name, dim, tokens, threads, wrong[name], taken.get(name), gop) for name in CONTENDERS]


def _row(
    name: tuple[str, str], dim: int, tokens: int, threads: int, wrong: float, seconds: float | None, gop: float
) -> dict[str, Any]:
    row: dict[str, Any] = {"size": f"attention-{dim}", "tokens": tokens, "threads": threads}
    row |= {"engine": name[0], "precision": name[1], "ms": None, "gops": None, "error": wrong}
    if seconds is None:
        return row | {"failed": f"expected an error below {WRONG[name[1]]} against fp64, got {wrong:.3g}"}
    return row | {"ms": 1000 * seconds, "gops": gop / seconds}


def _torch(q: Tensor, k: Tensor, v: Tensor, precision: str, threads: int) -> Callable[[], Tensor]:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return partial(_sdpa, q.to(dtype), k.to(dtype), v.to(dtype))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[N, H, D] of q [N, H, D], k and v [M, H, D]."""
    return F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)


def _native(q: Tensor, k: Tensor, v: Tensor, precision: str, threads: int) -> Callable[[], Tensor]:
    """Keys and values laid out beforehand, as the ring holds them."""
    from _cfrt import kernels

    kv = kernels.KeyValues(k.numpy(), v.numpy(), "bf16" if precision == "bf16" else "fp32")
    pool, queries, spans = kernels.Threads(threads), q.contiguous().numpy(), [(0, len(k))]
    if precision == "fp32":
        out = np.empty_like(queries)
        return lambda: (kernels.attention(queries, kv, out, ranges=spans, threads=pool), torch.from_numpy(out))[1]
    bits = np.empty(queries.shape, np.uint16)
    result = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    return lambda: (kernels.attention(queries, kv, bits, ranges=spans, threads=pool), result)[1]
