"""The inference of the released code (thu-ml/Causal-Forcing and its long_video folder), written out from its published
behaviour: a cache that is moved when it is full, positions from a table, one text for a frame, one clip at a time.

Plain functions over tensors by Wan's names. Nothing of cfrt is imported, so that a mistake on either side shows.

Legend: f frames of a call, N tokens a frame, H heads, D numbers a head, d width, L text rows; all fp64, no batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
Noise = Callable[[int, int, tuple[int, int]], Tensor]
"""(unit, step, the window's first unit and the one after its last) -> [F, C, h, w]; a unit starts from step 0."""

EPS, THETA, POSITIONS = 1e-6, 10000.0, 1024


@dataclass
class Layer:
    """Keys and values of one layer, [size N, H, D] each, and how far the buffer and the clip have been written."""

    k: Tensor
    v: Tensor
    clip_end: int = 0
    buffer_end: int = 0


@dataclass
class Released:
    """The network of `weights` with a cache of `size` frames, the first `sinks` of which stay."""

    weights: Weights
    heads: int
    grid: tuple[int, int]  # tokens: rows, columns
    size: int
    sinks: int = 0
    seen: int | None = None  # frames that attention reads at most; None = the whole buffer
    layers: list[Layer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.depth = 1 + max(int(name.split(".")[1]) for name in self.weights if name.startswith("blocks."))
        self.width = len(self.weights["patch_embedding.bias"])
        self.tokens = self.grid[0] * self.grid[1]
        shape = (self.size * self.tokens, self.heads, self.width // self.heads)
        self.layers = [Layer(torch.zeros(shape).double(), torch.zeros(shape).double()) for _ in range(self.depth)]
        self.table = _table(self.width // self.heads)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    # ------------------------------------------------------------------ the network

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Sequence[float], rows: Sequence[Tensor], start: int, mode: str) -> Tensor:
        """v [f, C, h, w] of x [f, C, h, w] that begins at frame `start`; t and rows [L, text width] of each frame.
        mode: "unit" (every pass of the ordinary loop), "window" or "clean" (the rolling one)."""
        f, channels, height, width = x.shape
        rows_, columns = self.grid
        patches = x.reshape(f, channels, rows_, height // rows_, columns, width // columns).permute(0, 2, 4, 1, 3, 5)
        h = F.linear(patches.reshape(f, self.tokens, -1), self.weights["patch_embedding.weight"].flatten(1))
        h = h + self.weights["patch_embedding.bias"]
        e = self._time(torch.tensor(t, dtype=torch.float64))
        six = self.linear("time_projection.1", F.silu(e)).unflatten(-1, (6, -1))
        text = [self.linear("text_embedding.2", _gelu(self.linear("text_embedding.0", each))) for each in rows]
        for i in range(self.depth):
            h = self._block(i, h, six, text, start, mode)
        shift, scale = (e[:, None] + self.weights["head.modulation"]).unbind(1)
        y = self.linear("head.head", F.layer_norm(h, h.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None])
        y = y.reshape(f, rows_, columns, height // rows_, width // columns, channels)
        return y.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)

    def _time(self, t: Tensor) -> Tensor:
        half = self.weights["time_embedding.0.weight"].shape[1] // 2
        angle = t[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
        wave = torch.cat([angle.cos(), angle.sin()], 1)
        return self.linear("time_embedding.2", F.silu(self.linear("time_embedding.0", wave)))

    def _block(self, i: int, h: Tensor, six: Tensor, text: list[Tensor], start: int, mode: str) -> Tensor:
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            part[:, None] for part in (six + self.weights[f"{name}.modulation"]).unbind(1)
        )
        a = F.layer_norm(h, h.shape[-1:], eps=EPS) * (1 + scale1) + shift1
        h = h + gate1 * self._look_back(i, a, start, mode)
        c = F.layer_norm(h, h.shape[-1:], self.weights[f"{name}.norm3.weight"], self.weights[f"{name}.norm3.bias"], EPS)
        h = h + torch.stack([self._read(f"{name}.cross_attn", *pair) for pair in zip(c, text, strict=True)])
        m = F.layer_norm(h, h.shape[-1:], eps=EPS) * (1 + scale2) + shift2
        return h + gate2 * self.linear(f"{name}.ffn.2", _gelu(self.linear(f"{name}.ffn.0", m)))

    def _read(self, name: str, x: Tensor, text: Tensor) -> Tensor:
        q = self._heads(self._norm(f"{name}.norm_q", self.linear(f"{name}.q", x)))
        k = self._heads(self._norm(f"{name}.norm_k", self.linear(f"{name}.k", text)))
        return self.linear(f"{name}.o", _attend(q, k, self._heads(self.linear(f"{name}.v", text))))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * self.weights[f"{name}.weight"]

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.heads, self.width // self.heads)

    # ------------------------------------------------------------------ what it looks back at

    def _look_back(self, i: int, a: Tensor, start: int, mode: str) -> Tensor:
        name, layer = f"blocks.{i}.self_attn", self.layers[i]
        q = self._heads(self._norm(f"{name}.norm_q", self.linear(f"{name}.q", a)))
        k = self._heads(self._norm(f"{name}.norm_k", self.linear(f"{name}.k", a)))
        v = self._heads(self.linear(f"{name}.v", a))
        look = self._unit if mode == "unit" else self._rolling
        y = look(layer, q, k, v, start, mode)
        return self.linear(f"{name}.o", y.reshape(a.shape))

    def _turn(self, x: Tensor, start: int) -> Tensor:
        """Rotated by the positions of frames from `start` on, cell by cell."""
        frames, (rows, columns) = len(x) // self.tokens, self.grid
        time, height, width = self.table
        angle = torch.cat(
            [
                time[start : start + frames].view(frames, 1, 1, -1).expand(-1, rows, columns, -1),
                height[:rows].view(1, rows, 1, -1).expand(frames, -1, columns, -1),
                width[:columns].view(1, 1, columns, -1).expand(frames, rows, -1, -1),
            ],
            -1,
        ).reshape(len(x), 1, -1)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * angle).flatten(-2)

    def _unit(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, start: int, _: str) -> Tensor:
        """Keys are kept turned by their own frame. What finds no room moves the rest down, sinks excepted."""
        q, k = self._turn(q, start), self._turn(k, start)
        end = self._write(layer, k, v, start * self.tokens + len(k))
        begin = max(0, end - (self.seen or self.size) * self.tokens)
        return _attend(q, layer.k[begin:end], layer.v[begin:end])

    def _write(self, layer: Layer, k: Tensor, v: Tensor, clip_end: int) -> int:
        """Into the buffer, whose first frames are the sinks; gives where it ends there."""
        new, stay = clip_end - layer.clip_end, self.sinks * self.tokens
        lost = max(0, layer.buffer_end + new - len(layer.k)) if new > 0 else 0
        if lost:
            for buffer in (layer.k, layer.v):
                kept = buffer[stay + lost : layer.buffer_end].clone()
                buffer[stay : stay + len(kept)] = kept
        end = layer.buffer_end + new - lost
        layer.k[end - len(k) : end], layer.v[end - len(k) : end] = k, v
        if new > 0:
            layer.clip_end, layer.buffer_end = clip_end, end
        return end

    def _rolling(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, start: int, mode: str) -> Tensor:
        """Only the first unit of a call goes into the buffer, the very first one not turned: its keys are turned when
        they are read, to be the frames right before the rest. A clean pass reads the last `size` - F frames as they
        are, itself included."""
        one = self.sinks * self.tokens  # a unit, here
        reach = len(layer.k) - one
        turned_q, turned_k = self._turn(q, start), self._turn(k, start)
        kept = k if start == 0 else turned_k
        end = self._write(layer, kept[:one], v[:one], start * self.tokens + one)
        if end == one:
            return _attend(turned_q, turned_k, v)
        if mode == "clean":
            begin = max(0, end - reach)
            keys = layer.k[begin:end].clone()
            if begin == 0:
                keys[:one] = self._turn(keys[:one], 0)
            return _attend(turned_q, keys, layer.v[begin:end])
        own = end - one
        begin = max(one, own - (reach - len(q) - one))
        place = start - (own - begin) // self.tokens - self.sinks
        anchor = self._turn(layer.k[:one], place)
        keys = torch.cat([anchor, layer.k[begin:own], turned_k])
        return _attend(turned_q, keys, torch.cat([layer.v[:one], layer.v[begin:own], v]))


def _table(head: int) -> list[Tensor]:
    """Turns of the first 1024 positions, for time, rows and columns."""
    sides = (head - 4 * (head // 6), 2 * (head // 6), 2 * (head // 6))
    tables = []
    for side in sides:
        frequency = 1 / THETA ** (torch.arange(0, side, 2).double() / side)
        angle = torch.outer(torch.arange(POSITIONS).double(), frequency)
        tables.append(torch.polar(torch.ones_like(angle), angle))
    return tables


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D)) v of q [n, H, D], k and v [m, H, D], as [n, H D]."""
    scores = torch.einsum("nhd,mhd->hnm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v).flatten(1)


# ---------------------------------------------------------------------- noise levels and noise


def warped(steps: Sequence[float], shift: float = 5.0) -> list[float]:
    """sigma of a step list such as (1000, 750, 500, 250): the entries 1000 - step of a table of 1000."""
    u = 1 - torch.arange(1001).double() / 1000
    table = shift * u / (1 + (shift - 1) * u)
    return [float(table[1000 - round(step)]) for step in steps]


def drawn(seed: int, frames: int, unit: int, shape: tuple[int, ...], given: int = 0, rolling: bool = False) -> Noise:
    """The released order of draws from one generator: the clip, then at each re-noising a unit, or a whole window."""
    generator = torch.Generator().manual_seed(seed)
    clip = torch.randn(1, frames - given * unit, *shape, generator=generator, dtype=torch.float64)[0]

    def noise(which: int, step: int, window: tuple[int, int]) -> Tensor:
        if step == 0:
            return clip[(which - given) * unit :][:unit]
        first, end = window if rolling else (which, which + 1)
        draw = torch.randn((end - first) * unit, *shape, generator=generator, dtype=torch.float64)
        return draw[(which - first) * unit :][:unit]

    return noise


# ---------------------------------------------------------------------- the two loops


def one_by_one(
    model: Released,
    rows: Sequence[Tensor],
    unit: int,
    lists: tuple[list[float], list[float]],
    noise: Noise,
    given: Tensor,
) -> Tensor:
    """The clip [units F, C, h, w] of a text for each unit, `given` first; lists: sigmas of the first unit made and of
    the others."""
    clip = []
    made = len(given) // unit
    for which, text in enumerate(rows):
        here, start = [text] * unit, which * unit
        if which < made:
            x0 = given[start : start + unit]
        else:
            levels = lists[0] if which == made else lists[1]
            x = noise(which, 0, (which, which + 1))
            for step, s in enumerate(levels):
                if step:
                    x = (1 - s) * x0 + s * noise(which, step, (which, which + 1))
                x0 = x - s * model.velocity(x, [1000 * s] * unit, here, start, "unit")
        model.velocity(x0, [0.0] * unit, here, start, "unit")
        clip.append(x0)
    return torch.cat(clip)


def rolling(
    model: Released, rows: Sequence[Tensor], unit: int, levels: list[float], noise: Noise, given: Tensor
) -> Tensor:
    """The same by windows of as many units as there are levels; it starts and ends with partial ones."""
    made, count, deep = len(given) // unit, len(rows), len(levels)
    texts = [text for text in rows for _ in range(unit)]
    for which in range(made):
        at = slice(which * unit, (which + 1) * unit)
        model.velocity(given[at], [0.0] * unit, texts[at], at.start, "window")
    clip = torch.cat([given, torch.zeros((count - made) * unit, *given.shape[1:]).double()])
    noisy = torch.zeros_like(clip)
    falling = levels[::-1]  # of a whole window, oldest first
    for window in range(count - made + deep - 1):
        first, end = made + max(0, window - deep + 1), min(count, made + window + 1)
        own = slice(first * unit, end * unit)
        entering = made + window < count
        if entering:
            noisy[(end - 1) * unit : own.stop] = noise(end - 1, 0, (first, end))
        size = end - first
        sigmas = falling[-size:] if entering else falling[:size]
        t = [1000 * s for s in sigmas for _ in range(unit)]
        s = torch.tensor(t, dtype=torch.float64).view(-1, 1, 1, 1) / 1000
        clip[own] = noisy[own] - s * model.velocity(noisy[own], t, texts[own], own.start, "window")
        for which, at in zip(range(first, end), sigmas, strict=True):
            if (step := levels.index(at) + 1) < deep:
                frames = slice(which * unit, (which + 1) * unit)
                lower = levels[step]
                noisy[frames] = (1 - lower) * clip[frames] + lower * noise(which, step, (first, end))
        oldest = slice(own.start, own.start + unit)
        model.velocity(clip[oldest], [0.0] * unit, texts[oldest], own.start, "clean")
    return clip
