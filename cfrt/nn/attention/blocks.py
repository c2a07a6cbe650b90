"""Attention under a mask that is skipped by blocks: FlexAttention, and its form of our masks over frames."""

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...blocks import MaskMod

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


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
