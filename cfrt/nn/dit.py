"""The causal Wan2.1 video DiT: one network for training and streaming (Wan2.1, arXiv:2503.20314, section 4.2; made
causal with per-frame time as in Causal Forcing, arXiv:2602.02214). Parameters carry Wan's own names.

It is given noisy latents at t = 1000 s and says v = e - x0. Three ways to call it, one set of blocks:
`forward` over a whole clip (bidirectional, or under a mask), `teacher_forced` over [clean | noisy], and `step` over one
unit against a ring of its past. Theorem: `teacher_forced` equals `step` by `step`.

Shapes: B batch, T latent frames, F of a unit, N tokens a frame, d width, H heads, D = d/H, L text rows, C captions.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from itertools import takewhile
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..blocks import Geometry, Span, teacher_forcing_mod, to_tokens
from ..config import ModelConfig
from ..errors import ConfigError
from ..flow import time_frequencies
from ..weights import match
from .attention import block_mask
from .attention.parts import Part
from .constants import kept
from .layers import Block, Head, Pass
from .ring import Memory, RingCache
from .rope import phases

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TextKV = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of the text for each layer: k, v [B, C, L, H, D]."""


RANGE_TOKENS = 32
"""Tokens a unit from which on teacher forcing by ranges beats the dense mask: on one CPU thread a step is 1.1 times as
fast at 48 tokens, 1.7 times at 64 and 20 frames, and about as fast at 16 (docs/training-speed.md)."""


class CausalDiT(nn.Module):
    """The network of `config`. Latents are [B, T, C, h, w] of `config.latent_channels` and `config.latent_grid`.

    `checkpointing = True` recomputes each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.config = config
        self.checkpointing = False
        self.patch_embedding = nn.Conv3d(config.latent_channels, d, kernel_size=config.patch, stride=config.patch)
        self.text_embedding = nn.Sequential(nn.Linear(config.text.width, d), nn.GELU("tanh"), nn.Linear(d, d))
        self.time_embedding = nn.Sequential(nn.Linear(config.time_width, d), nn.SiLU(), nn.Linear(d, d))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Head(config)
        if not self.patch_embedding.weight.is_meta:  # there, `normal_` would do nothing but import sympy, for 1.2 s
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Wan2.1's own initialisation, from which v = 0 and the text is not heard yet.

        Linear weights: Xavier uniform (the patch embedding as one linear map of its patch), except normal(0.02) for the
        text and time embeddings, and zero for `head.head` and every `cross_attn.o`. Biases: zero. Modulations:
        normal / sqrt(d). Norm weights: one.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Block | Head):
                nn.init.normal_(module.modulation, std=module.modulation.shape[-1] ** -0.5)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        nn.init.zeros_(self.patch_embedding.bias)  # type: ignore[arg-type]
        for layer in (*self.text_embedding, *self.time_embedding):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for silent in (self.head.head, *(block.cross_attn.o for block in self.layers)):
            nn.init.zeros_(silent.weight)

    @classmethod
    def from_arrays(cls, config: ModelConfig, arrays: Mapping[str, np.ndarray]) -> Self:
        """The network with these weights (Wan's names, no prefix), dtype kept; WeightsError when they do not fit."""
        with torch.device("meta"):
            model = cls(config)
        match({name: tuple(p.shape) for name, p in model.state_dict().items()}, arrays)
        model.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()}, assign=True)
        return model

    @property
    def layers(self) -> list[Block]:
        """The blocks, typed."""
        return [block for block in self.blocks if isinstance(block, Block)]

    # ------------------------------------------------------------------ the three ways to call it

    def text_kv(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per layer k and v [B, C, L, H, D] of text rows [B, C, L, text width]; valid while the weights are."""
        embedded = self.text_embedding(rows.to(self.dtype))
        return [block.cross_attn.text_kv(embedded) for block in self.layers]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text_kv: TextKV,
        caption: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        frames: Sequence[int] | Tensor | None = None,
        layout: Literal["mask", "flex"] = "mask",
        backend: str = "sdpa",
    ) -> Tensor:
        """v [B, T, C, h, w] of latents x [B, T, C, h, w] at times t [B, T] in 0..1000.

        caption: long [B, T], which of the C captions each latent frame reads; None when C = 1.
        mask: bool [T, T] over frames, True = may look (`Geometry.causal_mask`); None = bidirectional.
        frames: temporal positions, [T] (default 0, 1, ...).
        layout: "mask" computes what the mask hides, "flex" leaves it to FlexAttention to skip it.
        """
        positions = tuple(range(x.shape[1])) if frames is None else tuple(int(f) for f in frames)
        n = self.config.frame_tokens
        sinks = 0 if mask is None else sum(1 for _ in takewhile(lambda f: f < self.config.sinks, positions))
        mask = None if mask is None else mask.to(x.device)
        flex = None if mask is None or layout == "mask" else _frame_blocks(mask, n)
        p = Pass(
            turn=self._turn(positions, x.device),
            sink_turn=self._sink_turn(positions, sinks, x.device),
            sink_tokens=sinks * n,
            mask=None if mask is None or flex else mask.repeat_interleave(n, 0).repeat_interleave(n, 1),
            blocks=None if flex is None else lambda _: flex,
            text_mask=self._text_mask(text_kv, caption),
            backend=backend,
        )
        return self._run(x, t, text_kv, p)

    def teacher_forced(
        self,
        clean: Tensor,
        noisy: Tensor,
        t: Tensor,
        text_kv: TextKV,
        caption: Tensor | None = None,
        *,
        clean_t: float = 0.0,
        layout: Literal["mask", "ranges", "flex", "auto"] = "auto",
        backend: str = "sdpa",
    ) -> Tensor:
        """v [B, T, C, h, w] of the noisy clip, every unit given the clean past: one forward over [clean | noisy].

        clean, noisy [B, T, C, h, w]; t [B, T] of the noisy frames; caption [B, T] or None, shared by both halves, as
        are the positions. arXiv:2602.02214, section 3.

        layout: "mask" computes all [2 T N, 2 T N] pairs of tokens and hides three quarters of them; "ranges" computes
            what is seen, a unit at a time; "flex" leaves the skipping to FlexAttention, which has a backward on GPUs
            only. "auto" is "flex" on a GPU, and elsewhere the ranges from RANGE_TOKENS tokens a unit on.
        """
        frames, n = clean.shape[1], self.config.frame_tokens
        positions = tuple(range(frames)) * 2
        sinks = min(self.config.sinks, frames)
        if layout == "auto":
            ranges = self.config.unit * n >= RANGE_TOKENS
            layout = "flex" if clean.is_cuda and ranges else "ranges" if ranges else "mask"
        shape = (self.config.geometry, frames, n)
        p = Pass(
            turn=self._turn(positions, clean.device),
            sink_turn=self._sink_turn(positions, sinks, clean.device),
            sink_tokens=sinks * n,
            mask=_teacher_forcing_mask(*shape, clean.device) if layout == "mask" else None,
            parts=teacher_forcing_parts(*shape) if layout == "ranges" else None,
            blocks=partial(_teacher_forcing_blocks, *shape, clean.device) if layout == "flex" else None,
            text_mask=self._text_mask(text_kv, None if caption is None else torch.cat([caption, caption], dim=1)),
            answering=frames,
            backend=backend,
        )
        both_t = torch.cat([torch.full_like(t, clean_t), t], dim=1)
        return self._run(torch.cat([clean, noisy], dim=1), both_t, text_kv, p)

    def step(
        self,
        x: Tensor,
        t: Tensor,
        text_kv: TextKV,
        ring: RingCache,
        unit: int,
        *,
        commit: bool = False,
        backend: str = "sdpa",
    ) -> Tensor:
        """v [B, F, C, h, w] of one unit x [B, F, C, h, w] at time t [B], given the past in the ring (C = 1 caption).

        commit: this is the clean pass (t = 0), whose keys and values stay; it carries no gradient. `commit` does the
        same for less where v is not wanted. In grad mode gradients flow through this unit's own tokens only.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not commit):
            memories, p = self._open(x, text_kv, ring, unit, backend)
            v = self._run(x, t[:, None].expand(x.shape[:2]), text_kv, p, memories)
        if commit:
            ring.commit(unit)
        return v

    @torch.no_grad()
    def step_jointly(
        self,
        x: Tensor,
        t: Tensor,
        text_kv: TextKV,
        ring: RingCache,
        unit: int,
        caption: Tensor | None = None,
        *,
        backend: str = "sdpa",
    ) -> Tensor:
        """v [B, n F, C, h, w] of n consecutive units x [B, n F, C, h, w] from `unit` on, each frame at its own time
        t [B, n F]: they see each other whole, and what the last of them sees of the past in the ring, which stays as it
        is (Rolling Forcing, arXiv:2509.25161). caption as in `forward`."""
        start, frames = unit * self.config.unit, x.shape[1]
        memories, sink_tokens = ring.look(unit, frames // self.config.unit)
        positions = tuple(range(start, start + frames))
        p = Pass(
            turn=self._turn(positions, x.device),
            sink_turn=self._sink_turn(positions, sink_tokens, x.device, end=start + frames),
            sink_tokens=sink_tokens,
            text_mask=self._text_mask(text_kv, caption),
            backend=backend,
        )
        return self._run(x, t, text_kv, p, memories)

    @torch.no_grad()
    def commit(self, x: Tensor, text_kv: TextKV, ring: RingCache, unit: int, *, backend: str = "sdpa") -> None:
        """Leaves the keys and values of a finished unit x [B, F, C, h, w] in the ring: the pass at t = 0, cut short
        after the last layer's keys, since nothing else of that layer is ever seen."""
        memories, p = self._open(x, text_kv, ring, unit, backend)
        h, (_, time) = self._embed(x), self._time(x.new_zeros(x.shape[:2]))
        for block, text, memory in zip(self.layers[:-1], text_kv, memories, strict=False):
            h = block(h, time, text, p, memory)
        self.layers[-1].remember(h, time, p, memories[-1])
        ring.commit(unit)

    # ------------------------------------------------------------------ parts

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.patch_embedding.weight.dtype

    def _run(self, x: Tensor, t: Tensor, text_kv: TextKV, p: Pass, memories: Sequence[Memory] | None = None) -> Tensor:
        h, (e, time) = self._embed(x), self._time(t)  # [B, T, N, d], [B, T, d], [B, T, 6, d]
        last = len(self.layers) - 1
        for i, block in enumerate(self.layers):
            arguments = (h, time, text_kv[i], p, memories and memories[i], p.answering if i == last else 0)
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, *arguments, use_reentrant=False)
            else:
                h = block(*arguments)
        return self._unpatch(self.head(h, e[:, p.answering :]))

    def _embed(self, x: Tensor) -> Tensor:
        """Tokens [B, T, N, d] of latents [B, T, C, h, w]: the Conv3d over patches, as the linear map that it is."""
        config, (rows, columns) = self.config, self.config.token_grid
        expected = (config.latent_channels, *config.latent_grid)
        if x.dim() != 5 or x.shape[2:] != expected:
            raise ConfigError(f"expected latents [B, T, {', '.join(map(str, expected))}], got {list(x.shape)}")
        b, frames, channels = x.shape[:3]
        _, ph, pw = config.patch
        patches = x.to(self.dtype).reshape(b, frames, channels, rows, ph, columns, pw).permute(0, 1, 3, 5, 2, 4, 6)
        weight = self.patch_embedding.weight.flatten(1)  # [d, C ph pw]
        return F.linear(patches.reshape(b, frames, rows * columns, -1), weight, self.patch_embedding.bias)

    def _unpatch(self, y: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] of patches [B, T, N, ph pw C]: channels run fastest, as Wan has it."""
        (rows, columns), (_, ph, pw) = self.config.token_grid, self.config.patch
        b, frames = y.shape[:2]
        grid = y.view(b, frames, rows, columns, ph, pw, -1).permute(0, 1, 6, 2, 4, 3, 5)
        return grid.reshape(b, frames, -1, rows * ph, columns * pw)

    def _time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The time embedding e [B, T, d], and what modulates the blocks, [B, T, 6, d]; angles are fp64."""
        angle = t.to(torch.float64)[..., None] * _time_frequencies(self.config.time_width, t.device)
        e = self.time_embedding(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.dtype))
        return e, self.time_projection(e).unflatten(-1, (6, -1))

    def _open(self, x: Tensor, text_kv: TextKV, ring: RingCache, unit: int, backend: str) -> tuple[list[Memory], Pass]:
        memories, sink_tokens = ring.open(unit)
        start = unit * self.config.unit
        positions = tuple(range(start, start + self.config.unit))
        p = Pass(
            turn=self._turn(positions, x.device),
            sink_turn=self._sink_turn(positions, sink_tokens, x.device),
            sink_tokens=sink_tokens,
            text_mask=self._text_mask(text_kv, None),
            backend=backend,
        )
        return memories, p

    def _turn(self, positions: tuple[int, ...], device: torch.device) -> Tensor:
        c = self.config
        return phases(positions, c.token_grid, c.rope_pairs, c.rope_theta, self.dtype, device)

    def _sink_turn(
        self, positions: tuple[int, ...], sinks: int, device: torch.device, end: int | None = None
    ) -> Tensor | None:
        """Where sinks are looked at from, if not from the frames' own places. Relative sinks: no further away than the
        last frame of a training clip. Sinks before the window: so much nearer as frames have left between them and the
        window, which ends at `end`, or with the unit of each frame."""
        if sinks == 0 or self.config.sink_position == "absolute":
            return None
        if self.config.sink_position == "relative":
            seen_from = tuple(min(f, self.config.trained_frames - 1) for f in positions)
        else:
            unit, reach = self.config.unit, self.config.sinks + self.config.window
            seen_from = tuple(f - max(0, (end or (f // unit + 1) * unit) - reach) for f in positions)
        return None if seen_from == positions else self._turn(seen_from, device)

    def _text_mask(self, text_kv: TextKV, caption: Tensor | None) -> Tensor | None:
        """Bool [B, T N, C L]: each token reads the rows of its frame's caption.

        One masked attention over all captions is 4 times faster than gathering keys per frame (1.5 against 6.7 ms there
        and back for 16 clips of 20 frames, 2 captions of 8 rows, one CPU thread).
        """
        captions, rows = text_kv[0][0].shape[1:3]
        if captions == 1:
            return None
        if caption is None:
            raise ConfigError(f"expected `caption` [B, T] to say which of the {captions} captions each frame reads")
        mine = caption[..., None] == torch.arange(captions, device=caption.device)
        return mine.repeat_interleave(self.config.frame_tokens, 1).repeat_interleave(rows, 2)


def teacher_forcing_parts(geometry: Geometry, frames: int, frame_tokens: int) -> tuple[Part, ...]:
    """`Geometry.teacher_forcing_mask` as ranges of tokens over [clean | noisy]: a clean unit reads what it sees, a
    noisy one what it sees of earlier units and then itself."""
    f, clean, noisy = geometry.unit, [], []
    for unit in range(-(-frames // f)):
        own, end = unit * f, min((unit + 1) * f, frames)
        seen = [(start, min(stop, end)) for start, stop in geometry.visible_frames(unit) if start < end]
        past = [(start, min(stop, own)) for start, stop in seen if start < own]
        clean.append(((own, end), seen))
        noisy.append(((frames + own, frames + end), [*past, (frames + own, frames + end)]))
    return tuple(_part(queries, keys, min(geometry.sinks, frames), frame_tokens) for queries, keys in (*clean, *noisy))


def _part(queries: Span, keys: Sequence[Span], sinks: int, frame_tokens: int) -> Part:
    """From spans of frames to spans of tokens, neighbours joined; sinks are the keys of frames below `sinks`."""
    joined: list[Span] = []
    for start, stop in keys:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    far = sum(max(0, min(stop, sinks) - start) for start, stop in joined)
    tokens = tuple((start * frame_tokens, stop * frame_tokens) for start, stop in joined)
    return Part((queries[0] * frame_tokens, queries[1] * frame_tokens), tokens, far * frame_tokens)


@lru_cache(8)
def _teacher_forcing_blocks(
    geometry: Geometry, frames: int, frame_tokens: int, device: torch.device, skip: int
) -> "BlockMask":
    """`Geometry.teacher_forcing_mask` for FlexAttention, of the queries from token `skip` on."""
    mask_mod = teacher_forcing_mod(geometry, frames, frame_tokens)
    mask = geometry.teacher_forcing_mask(frames)[skip // frame_tokens :]
    return block_mask(mask, frame_tokens, lambda b, h, q, k: mask_mod(b, h, q + skip, k), device)


def _frame_blocks(mask: Tensor, frame_tokens: int) -> "BlockMask":
    """Any mask over frames, bool [T, T], for FlexAttention."""

    def look(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[query // frame_tokens, key // frame_tokens]

    return block_mask(mask.cpu().numpy(), frame_tokens, look, mask.device)


@kept(8)
def _teacher_forcing_mask(geometry: Geometry, frames: int, frame_tokens: int, device: torch.device) -> Tensor:
    return torch.from_numpy(to_tokens(geometry.teacher_forcing_mask(frames), frame_tokens)).to(device)


@kept(8)
def _time_frequencies(width: int, device: torch.device) -> Tensor:
    return torch.from_numpy(time_frequencies(width)).to(device)
