"""What can be said of a film without any trained network: flicker, motion, sharpness, colour, freezes, cuts, seams.

A `Meter` is given the frames of one clip in order and keeps a few of them: memory does not grow with the picture times
the length. Every number has a clip for which its value is known in closed form (tests/test_measures.py). Some follow
the idea of a VBench dimension (arXiv:2311.17982); none of them is VBench's number, which needs its networks.

Levels are those of uint8, 0 to 255. Motion is in percent of the picture's shorter side a second, so that it does not
depend on resolution or frame rate. Shapes: H, W of the frame; y, x of blocks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = torch.tensor([0.2126, 0.7152, 0.0722])  # ITU-R BT.709, what the films are coded in
MATCHED_SIDE = 96
"""Pixels that the shorter side keeps at least where blocks are matched; larger pictures are averaged down."""
BLOCK, STRIDE = 8, 4
REACH = 10
"""Pixels (of the picture averaged down) within which a block is looked for."""
BASELINE = 1 / 8
"""Seconds between the frames that are matched: VBench's dynamic degree looks at eight frames a second."""
TEXTURE = 4.0  # levels^2: a block of less variance has nothing to match
MATCHED = 0.15  # a block has moved when its best match leaves at most this share of its change unexplained
FASTEST = (
    0.05  # the share of blocks whose motion is the frame's: VBench's dynamic degree takes the same share of pixels
)
DYNAMIC_SPEED, DYNAMIC_SHARE = 18.75, 0.25
"""% of the side a second (6 pixels of 256 in 1/8 s), and share of the moments: where VBench's rule draws the line."""
STILL = 0.25  # share of the blocks that must rest for flicker to be read
FROZEN = 0.5  # levels: two neighbours in which no block changes more are the same picture
CUT, CUT_RATIO = 12.0, 4.0  # a cut changes a frame by so many levels and so many times what its neighbours change
THUMBNAILS, THUMBNAIL_SIDE = 4, 16

Numbers = dict[str, float]
VERSION = 1
"""Raised when a number changes its meaning: films measured before and after are not put into one table."""


class Meter:
    """Measures one clip while it is made. Where the unit of a frame changes there may be a seam.

    fps: frames a second. frames: how many will come, which says when thumbnails are taken."""

    def __init__(self, fps: float, frames: int) -> None:
        self._step = max(1, round(fps * BASELINE))
        self._per_second = fps / self._step
        self._recent: deque[Tensor] = deque(maxlen=self._step)  # matched against, oldest first
        self._last: Tensor | None = None
        self._unit: int | None = None
        self._at = {int((i + 0.5) * frames / THUMBNAILS) for i in range(THUMBNAILS)}
        self._thumbnails: list[np.ndarray] = []
        self._sharpness: list[float] = []
        self._colour: list[float] = []
        self._changes: list[float] = []
        self._peaks: list[float] = []
        self._seams: list[bool] = []
        self._speeds: list[float] = []
        self._still: list[tuple[float, float]] = []  # share of the picture, mean change in it

    def add(self, pixels: np.ndarray, unit: int = 0) -> None:
        """The next frame, (H, W, 3) uint8."""
        frame = torch.from_numpy(np.ascontiguousarray(pixels)).to(torch.float32)
        luma = frame @ LUMA
        if len(self._sharpness) in self._at:
            self._thumbnails.append(thumbnail(frame))
        self._sharpness.append(sharpness(luma))
        self._colour.append(colourfulness(frame))
        small = averaged_down(luma)
        if self._last is not None:
            self._compare(frame, small, seam=unit != self._unit)
        self._last, self._unit = frame, unit
        self._recent.append(small)

    def _compare(self, frame: Tensor, small: Tensor, seam: bool) -> None:
        assert self._last is not None
        change = block_means(averaged_down((frame - self._last).abs().mean(-1)))
        self._changes.append((frame - self._last).abs().mean().item())
        self._peaks.append(change.max().item())
        self._seams.append(seam)
        if len(self._recent) < self._step or len(self._changes) % self._step:
            self._speeds.append(math.nan)
            self._still.append((math.nan, math.nan))
            return
        moved = displacement(self._recent[0], small)
        still = at_rest(moved)
        speed = fastest(moved) * self._per_second / min(small.shape)
        share = still.float().mean().item()
        self._speeds.append(100 * speed)
        self._still.append((share, change[still].mean().item() if share >= STILL else math.nan))

    def read(self) -> Numbers:
        """The clip's numbers; NaN where the clip cannot tell (too short, nothing at rest, ...)."""
        changes = np.array(self._changes)
        cut = cuts(changes)
        spanned = np.array([cut[max(0, i - self._step + 1) : i + 1].any() for i in range(len(cut))], bool)
        speeds = np.where(spanned, np.nan, self._speeds)  # of pictures 1/8 s apart, without a cut between them
        still, flicker = np.where(spanned, np.nan, np.array(self._still).reshape(-1, 2).T)
        seams = np.array(self._seams, bool)
        fast = speeds[np.isfinite(speeds)] > DYNAMIC_SPEED
        return {
            "flicker": _mean(flicker),
            "still": _mean(still),
            "motion": _mean(speeds),
            "dynamic": float(fast.mean() >= DYNAMIC_SHARE) if len(fast) else math.nan,
            "sharpness": _mean(self._sharpness),
            "colourfulness": _mean(self._colour),
            "frozen": _mean(np.array(self._peaks) < FROZEN),
            "cuts": float(cut.sum()),
            "seam": _ratio(_mean(changes[seams & ~cut]), _mean(changes[~seams & ~cut])),
            **_ends("sharpness", self._sharpness),
            **_ends("colourfulness", self._colour),
            **_ends("motion", speeds),
        }

    def thumbnails(self) -> np.ndarray:
        """uint8 [4, 16, 16, 3], evenly spaced in time: what `distance` compares clips by."""
        return np.stack(self._thumbnails)


# ------------------------------------------------------------------------------------------------------- one picture


def sharpness(luma: Tensor) -> float:
    """Variance of the Laplacian (four neighbours) of luma [H, W], in levels^2: falls with blur, rises with noise."""
    inner = luma[1:-1, 1:-1]
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * inner
    return laplacian.var(correction=0).item()


def colourfulness(frame: Tensor) -> float:
    """Of [H, W, 3], in levels: sqrt(var rg + var yb) + 0.3 sqrt(mean rg^2 + mean yb^2), rg = R - G, yb = (R + G)/2 - B
    (Hasler and Süsstrunk, 2003)."""
    red, green, blue = frame.unbind(-1)
    rg, yb = red - green, (red + green) / 2 - blue
    spread = rg.var(correction=0) + yb.var(correction=0)
    return (spread.sqrt() + 0.3 * (rg.mean().square() + yb.mean().square()).sqrt()).item()


def thumbnail(frame: Tensor) -> np.ndarray:
    """uint8 [16, 16, 3] of [H, W, 3], by averaging."""
    small = F.adaptive_avg_pool2d(frame.permute(2, 0, 1), THUMBNAIL_SIDE)
    pixels: np.ndarray = small.permute(1, 2, 0).round().to(torch.uint8).numpy()
    return pixels


def averaged_down(picture: Tensor) -> Tensor:
    """[H, W] by a whole factor, so that the shorter side keeps MATCHED_SIDE pixels or a little more."""
    factor = min(picture.shape) // MATCHED_SIDE
    return picture if factor < 2 else F.avg_pool2d(picture[None], factor)[0]


def block_means(pictures: Tensor) -> Tensor:
    """[..., y, x] means of overlapping blocks of [..., H, W]: of four cells each, since a block is two strides wide."""
    cells = F.avg_pool2d(pictures.flatten(0, -3)[:, None] if pictures.dim() > 2 else pictures[None, None], STRIDE)
    blocks = F.avg_pool2d(cells, BLOCK // STRIDE, 1)
    return blocks.view(*pictures.shape[:-2], *blocks.shape[-2:])


# -------------------------------------------------------------------------------------------------------- two pictures


def displacement(before: Tensor, after: Tensor) -> Tensor:
    """How far each block of `after` [H, W] has come since `before` [H, W], [y, x, 2] in pixels (down, right).

    A place within REACH explains a block when the variance of the difference, which does not see brightness, falls to
    MATCHED of what it is without motion. Of the places that do, and that no neighbour betters, the nearest is taken:
    along a straight edge, on a smooth or a repeated pattern many do. Blocks without texture, and those that no place
    explains, rest."""
    height, width = after.shape
    side = 2 * REACH + 1
    shifted = (
        F.pad(before, [REACH] * 4).unfold(0, height, 1).unfold(1, width, 1)
    )  # [side, side, H, W]: all displacements
    difference = (after - shifted).flatten(0, 1)
    mean, square = block_means(difference), block_means(difference.square_())
    cost = (square - mean.square()).clamp(min=0).masked_fill(_outside(height, width), math.inf)
    cost = cost.unflatten(0, (side, side))  # [dy, dx, y, x]
    lowest, offset = _parabola(cost)
    explains = _least_around(cost) & (lowest < MATCHED * cost[REACH, REACH])
    nearest = torch.where(explains, _length()[..., None, None], math.inf).flatten(0, 1).min(0)
    row, column = nearest.indices // side, nearest.indices % side
    offset = offset.flatten(0, 1).gather(0, nearest.indices[None, ..., None].expand(1, -1, -1, 2))[0]
    # `shifted` at (row, column) is `before` moved by (row - REACH, column - REACH): the block came from there
    travelled = REACH - torch.stack([row, column], -1) - offset
    texture = block_means(after.square()) - block_means(after).square() > TEXTURE
    return _agreed(torch.where(nearest.values.isfinite()[..., None], travelled, 0), texture)


def _agreed(moved: Tensor, texture: Tensor) -> Tensor:
    """Each component [y, x, 2] as the median over the 3 x 3 blocks around that have texture: one false match has no
    say. Blocks without texture rest."""
    known = torch.where(texture[..., None], moved, torch.nan).permute(2, 0, 1)
    around = F.pad(known, [1] * 4, value=torch.nan).unfold(1, 3, 1).unfold(2, 3, 1).flatten(-2)
    return around.nanmedian(-1).values.permute(1, 2, 0).where(texture[..., None], torch.zeros(()))


def _parabola(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The cost [dy, dx, y, x] at the lowest point of the parabolas through each place, and its offset [..., 2] from it.

    An exact match has no offset: the parabola through it may still lean, because its neighbours differ, so the offset
    is not let beyond the one that would explain the cost at the place itself."""
    lowest, offsets = cost, []
    for axis in (0, 1):
        padded = F.pad(cost, [0] * (4 if axis else 6) + [1, 1], value=math.inf)
        less, more = (padded.narrow(axis, start, cost.shape[axis]) for start in (0, 2))
        usable = less.isfinite() & more.isfinite() & cost.isfinite()
        slope = torch.where(usable, less - more, 0)
        bend = torch.where(usable, less - 2 * cost + more, 0).clamp(min=1e-6)
        most = torch.where(usable, (2 * cost / bend).sqrt(), 0).clamp(max=0.5)
        offset = torch.maximum(torch.minimum(slope / (2 * bend), most), -most)
        lowest = lowest - (slope * offset - bend * offset.square()) / 2
        offsets.append(offset)
    return lowest.clamp(min=0), torch.stack(offsets, -1)


def _least_around(cost: Tensor) -> Tensor:
    """bool [dy, dx, y, x]: none of the eight neighbouring displacements costs less."""
    grid = cost.flatten(2).permute(2, 0, 1)
    least = -F.max_pool2d(-grid, 3, 1, 1)
    return (grid <= least).permute(1, 2, 0).view_as(cost)


@lru_cache(1)
def _length() -> Tensor:
    """[dy, dx]: of each displacement."""
    reach = torch.arange(-REACH, REACH + 1, dtype=torch.float32)
    return (reach.square()[:, None] + reach.square()).sqrt()


@lru_cache(8)
def _outside(height: int, width: int) -> Tensor:
    """bool [side^2, y, x]: displaced so, the block would come from beyond the picture."""
    reach = torch.arange(-REACH, REACH + 1)

    def beyond(length: int) -> Tensor:
        start = torch.arange(0, length - BLOCK + 1, STRIDE) + reach[:, None]
        return (start < 0) | (start + BLOCK > length)

    down, right = beyond(height), beyond(width)
    return (down[:, None, :, None] | right[None, :, None, :]).flatten(0, 1)


def fastest(moved: Tensor) -> float:
    """Mean length of the longest 5 % of displacements [y, x, 2], in pixels; at least one block."""
    length = moved.norm(dim=-1).flatten()
    return length.topk(max(1, round(FASTEST * len(length)))).values.mean().item()


def at_rest(moved: Tensor) -> Tensor:
    """bool [y, x]: blocks that neither moved nor lie where a moving one has just been."""
    length = moved.norm(dim=-1)
    swept = math.ceil(length.max().item() / STRIDE) + 1
    near = F.max_pool2d((length > 0).float()[None], 2 * swept + 1, 1, swept)[0]
    return near == 0 if length.max() > 0 else torch.ones_like(length, dtype=torch.bool)


# ------------------------------------------------------------------------------------------------------------ one clip


def cuts(changes: np.ndarray) -> np.ndarray:
    """bool [n]: neighbours that differ by 12 levels or more, and 4 times as much as the clip's median pair."""
    if len(changes) < 3:
        return np.zeros(len(changes), bool)
    return (changes >= CUT) & (changes >= CUT_RATIO * np.median(changes))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square difference of two clips' thumbnails, in levels."""
    return float(np.sqrt(np.mean((a.astype(np.float64) - b) ** 2)))


def diversity(thumbnails: Sequence[np.ndarray]) -> float:
    """Mean distance over all pairs of clips (the seeds of one prompt); NaN for fewer than two."""
    pairs = [distance(a, b) for i, a in enumerate(thumbnails) for b in thumbnails[i + 1 :]]
    return _mean(pairs)


def _ends(name: str, values: Sequence[float] | np.ndarray) -> Numbers:
    """Means over the clip's first and last quarter: their ratio is the drift."""
    quarter = max(1, len(values) // 4)
    return {f"{name}_first": _mean(values[:quarter]), f"{name}_last": _mean(values[-quarter:])}


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """Of what is a number; NaN of nothing."""
    numbers = np.asarray(values, np.float64)
    numbers = numbers[np.isfinite(numbers)]
    return float(numbers.mean()) if len(numbers) else math.nan


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else math.nan
