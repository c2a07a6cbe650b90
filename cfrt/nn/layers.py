"""The layers of the Wan2.1 DiT: self-attention, text cross-attention, feed-forward, all modulated by time.

Parameters carry Wan's own names (arXiv:2503.20314, section 4.2). The layers know nothing of clips, units or rings: what
they look at comes in a `Pass` and a `Memory`.

Shapes: B batch, T latent frames, N tokens a frame, d width, H heads, D = d/H, L text rows, C captions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from .attention import attention, attention_by_blocks
from .attention.parts import Part, attention_by_parts
from .norms import RMSNorm
from .ring import Memory
from .rope import rotate

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What all layers of one pass share."""

    turn: Tensor
    """Rotary phases of the tokens, complex [T N, 1, D/2]."""
    sink_turn: Tensor | None = None
    """Phases at which the tokens look at sinks, where those differ."""
    sink_tokens: int = 0
    mask: Tensor | None = None
    """Who sees whom among tokens, bool [T N, T N]."""
    parts: Sequence[Part] | None = None
    """The same as ranges of queries and keys, in place of `mask`."""
    blocks: "Callable[[int], BlockMask] | None" = None
    """The same for FlexAttention, in place of `mask`: of the queries from the given token on."""
    text_mask: Tensor | None = None
    """Which captions' rows each token reads, bool [B, T N, C L]."""
    answering: int = 0
    """First frame whose output is wanted from the last layer; earlier ones are only looked at there."""
    backend: str


class SelfAttention(nn.Module):
    """RMS norm over all heads jointly, then rotary positions, then attention (Wan2.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(d, config.eps), RMSNorm(d, config.eps)

    def keys(self, x: Tensor, p: Pass) -> tuple[Tensor, Tensor]:
        """k (rotated) and v, each [B, T N, H, D], of x [B, T, N, d]."""
        return rotate(self.split(self.norm_k(self.k(x))), p.turn), self.split(self.v(x))

    def forward(self, x: Tensor, p: Pass, memory: Memory | None, answering: int) -> Tensor:
        """What x [B, T, N, d] sees in the pass and in its memory, [B, T - answering, N, d]."""
        k, v = self.keys(x, p)  # [B, T N, H, D]
        x = x[:, answering:]
        skip = answering * x.shape[2]
        q = self.split(self.norm_q(self.q(x)))  # [B, T' N, H, D]
        q_sink = None if p.sink_turn is None else rotate(q, p.sink_turn[skip:])
        q = rotate(q, p.turn[skip:])
        if p.parts is not None:
            y = attention_by_parts(q, k, v, _from(skip, p.parts), q_sink=q_sink, backend=p.backend)
            return self.o(y.reshape(x.shape))
        if p.blocks is not None:
            return self.o(attention_by_blocks(q, k, v, p.blocks(skip)).reshape(x.shape))
        k, v, ranges = (k, v, None) if memory is None else memory.extend(k, v)
        y = attention(
            q,
            k,
            v,
            mask=None if p.mask is None else p.mask[skip:],
            ranges=ranges,
            q_sink=q_sink,
            sink_tokens=p.sink_tokens,
            backend=p.backend,
        )
        return self.o(y.reshape(x.shape))

    def split(self, x: Tensor) -> Tensor:
        """[B, T, N, d] -> [B, T N, H, D]."""
        return x.view(x.shape[0], -1, self.heads, x.shape[-1] // self.heads)


def _from(skip: int, parts: Sequence[Part]) -> list[Part]:
    """The parts of the queries from token `skip` on, counted from there."""
    return [Part((start - skip, stop - skip), keys, sinks) for (start, stop), keys, sinks in parts if start >= skip]


class CrossAttention(nn.Module):
    """Every token looks at all rows of its frame's caption, padding included, as in Wan2.1; text has no positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(d, config.eps), RMSNorm(d, config.eps)

    def text_kv(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """k and v [B, C, L, H, D] of embedded text rows [B, C, L, d]."""
        k, v = self.norm_k(self.k(rows)), self.v(rows)
        return k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor], p: Pass, answering: int) -> Tensor:
        """What x [B, T', N, d], the frames from `answering` on, reads of the text, [B, T', N, d]."""
        q = self.norm_q(self.q(x)).view(x.shape[0], -1, self.heads, x.shape[-1] // self.heads)
        mask = None if p.text_mask is None else p.text_mask[:, answering * x.shape[2] :]
        backend = "sdpa" if mask is not None and p.backend in ("cuda", "flash") else p.backend  # they take no mask
        y = attention(q, text[0].flatten(1, 2), text[1].flatten(1, 2), mask=mask, backend=backend)
        return self.o(y.reshape(x.shape))


class Block(nn.Module):
    """Self-attention and feed-forward, both modulated and gated by time; text between them, neither."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.eps = config.eps
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(d, config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(nn.Linear(d, config.ffn), nn.GELU("tanh"), nn.Linear(config.ffn, d))
        self.modulation = nn.Parameter(torch.empty(1, 6, d))

    def forward(
        self,
        x: Tensor,  # [B, T, N, d]
        time: Tensor,  # [B, T, 6, d]
        text: tuple[Tensor, Tensor],  # [B, C, L, H, D] each
        p: Pass,
        memory: Memory | None = None,
        answering: int = 0,
    ) -> Tensor:  # [B, T - answering, N, d]
        m = self.modulation_of(time)
        a = self.self_attn(modulate(x, m[0], m[1], self.eps), p, memory, answering)
        if answering:
            x, m = x[:, answering:], [part[:, answering:] for part in m]
        x = torch.addcmul(x, a, m[2])
        x = x + self.cross_attn(self.norm3(x), text, p, answering)
        return torch.addcmul(x, self.ffn(modulate(x, m[3], m[4], self.eps)), m[5])

    def remember(self, x: Tensor, time: Tensor, p: Pass, memory: Memory) -> None:
        """Only the part of `forward` that later units can see: this layer's keys and values."""
        m = self.modulation_of(time)
        memory.extend(*self.self_attn.keys(modulate(x, m[0], m[1], self.eps), p))

    def modulation_of(self, time: Tensor) -> Sequence[Tensor]:
        """Shift, scale, gate of self-attention, then of the feed-forward: six of [B, T, 1, d]."""
        return (time + self.modulation).unsqueeze(-2).unbind(2)


class Head(nn.Module):
    """From tokens to patches of v."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.width, config.patch_width)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[B, T, N, patch width] of x [B, T, N, d] and time [B, T, d]."""
        shift, scale = (time.unsqueeze(2) + self.modulation).unsqueeze(-2).unbind(2)
        return self.head(modulate(x, shift, scale, self.eps))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LN(x) (1 + scale) + shift: x [B, T, N, d], shift and scale [B, T, 1, d]; the norm has no parameters."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)
