"""From readings to numbers: what is asked of a clip, each with a 95 % confidence interval. Pure functions, no models.

Definitions: design section 8. A share of clips has Wilson's interval, everything else the percentiles of a bootstrap
over what was drawn independently (prompts, or pasts). The bootstrap is seeded: the same readings give the same numbers.

Shapes: B clips, T frames, P pasts, N futures of each; factors [B, 6] index `worlds.FACTORS`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from training import worlds
from training.reader import Reading, read_direction
from training.worlds import BACKGROUND, COLOUR, DIRECTION, FACTORS, FPS, HEADING, RADIUS, SHAPE, SIDE, SIZE, SPEED, STEP

RESAMPLES = 1000
Z = 1.959964  # two-sided 95 %
AMPLE_SPEED, AMPLE_TIME = (
    0.5,
    0.8,
)  # a dynamic clip moves at this share of the prompted speed in this share of its frames
SWITCH_FACTORS = (
    SIZE,
    COLOUR,
    SHAPE,
    BACKGROUND,
)  # what one frame after a switch shows; direction and speed need a run
ROOM = 16  # frames ahead that must be free of walls for a new direction to be read
SETTLED = slice(16, 24)  # frames after a switch on which it must be visible: within one second
RUN = slice(7, 16)  # frames after a switch on which the new direction is read: the motion of its third and fourth unit


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % confidence interval, and how many independent draws it rests on. NaN where there was none."""

    value: float
    low: float
    high: float
    n: int

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def share(hits: Tensor) -> Estimate:
    """Share of true among bool [n], with Wilson's score interval."""
    n = hits.numel()
    if n == 0:
        return NOTHING
    p = hits.double().mean().item()
    middle, spread = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    low, high = ((middle + sign * spread) / (1 + Z**2 / n) for sign in (-1, 1))
    return Estimate(p, max(0.0, low), min(1.0, high), n)


def bootstrap(n: int, statistic: Callable[[Tensor], Tensor]) -> Estimate:
    """`statistic` maps weights [R, n] (how often each draw is taken) to R numbers."""
    if n == 0:
        return NOTHING
    picks = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(n))
    weights = torch.zeros(RESAMPLES, n, dtype=torch.float64).scatter_add_(
        1, picks, torch.ones(RESAMPLES, n, dtype=torch.float64)
    )
    low, high = statistic(weights).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(statistic(torch.ones(1, n, dtype=torch.float64)).item(), low, high, n)


def mean(values: Tensor) -> Estimate:
    """Mean of [n]."""
    values = values.double()
    return bootstrap(len(values), lambda weights: weights @ values / len(values))


def ratio(above: Tensor, below: Tensor) -> Estimate:
    """Sum of [n] over sum of [n]."""
    above, below = above.double(), below.double()
    return bootstrap(len(above), lambda weights: (weights @ above) / (weights @ below))


def median(values: Tensor) -> Estimate:
    """Median of [n]."""
    ordered, order = values.double().sort()
    return bootstrap(
        len(values), lambda weights: ordered[(weights[:, order].cumsum(1) >= len(values) / 2).float().argmax(1)]
    )


# ---------------------------------------------------------------------------------------------------------- one clip


def instruction(reading: Reading, wanted: Tensor) -> dict[str, Estimate]:
    """Share of clips that show what was asked, by factor and all six together."""
    right = reading.factors == wanted
    return {name: share(right[:, index]) for index, name in enumerate(FACTORS)} | {"all": share(right.all(1))}


def is_dynamic(reading: Reading, wanted: Tensor) -> Tensor:
    """bool [B]: a valid object moves at half the prompted speed or faster in 80 % of the frames."""
    moving = reading.valid[:, 1:] & (reading.step >= AMPLE_SPEED * STEP[wanted[:, SPEED], None])
    return moving.float().mean(1) >= AMPLE_TIME


def quality(reading: Reading, wanted: Tensor) -> dict[str, Estimate]:
    """What holds frame by frame: dynamic, validity, and the render residual (mean squared error, in 1e-3)."""
    return {
        "dynamic": share(is_dynamic(reading, wanted)),
        "valid": mean(reading.valid.double().mean(1)),
        "residual": mean(1e3 * reading.residual.mean(1)),
    }


# ----------------------------------------------------------------------------------------------------- distributions


def turns(position: Tensor) -> Tensor:
    """How often the heading changes in [B, T, 2], looking at one displacement a unit, of a pixel or more: [B]."""
    coarse = position[:, :: worlds.UNIT_FRAMES]
    moved = coarse[:, 1:] - coarse[:, :-1]
    heading, clear = (moved @ HEADING.T).argmax(-1), moved.norm(dim=-1) >= 1
    return ((heading[:, 1:] != heading[:, :-1]) & clear[:, 1:] & clear[:, :-1]).sum(1)


def turn_rate(reading: Reading) -> Estimate:
    """Changes of heading a second."""
    return mean(turns(reading.position).double() / ((reading.position.shape[1] - 1) / FPS))


def features(position: Tensor, factors: Tensor) -> Tensor:
    """[B, 28] of positions [B, T, 2] and factors [B, 6]: where a clip starts, how far and how long it travels, its
    turns, and what it shows (one-hot, of deviation 1 where all values are equally likely)."""
    start, end = position[:, 0], position[:, -1]
    path = (position[:, 1:] - position[:, :-1]).norm(dim=-1).sum(1)
    motion = [start, end - start, path[:, None], turns(position)[:, None]]
    shown = []
    for column, values in zip(factors.T, FACTORS.values(), strict=True):
        k = len(values)
        shown.append(torch.nn.functional.one_hot(column, k) * k / math.sqrt(k - 1))
    return torch.cat([part.double() for part in (*motion, *shown)], 1)


def distance(clips: Tensor, real: Tensor) -> Estimate:
    """Squared energy distance, 2 E|x - y| - E|x - x'| - E|y - y'|, of features [B, k] to those of real clips.

    Both answer the same prompts in the same order. Features are scaled by their deviation in real clips. Pairs of one
    prompt are left out, so that two sets of real clips are 0 apart on average; a value means something beside theirs
    (Szekely & Rizzo, 2013)."""
    scale = real.std(0).clamp(min=0.5)
    x, y = (clips / scale).double(), (real / scale).double()
    across = torch.cdist(x, y)
    kernel = (across + across.mT - torch.cdist(x, x) - torch.cdist(y, y)).fill_diagonal_(0)
    n = len(x)

    def statistic(weights: Tensor) -> Tensor:
        return ((weights @ kernel) * weights).sum(1) / (n**2 - weights.square().sum(1))

    return bootstrap(n if n > 1 else 0, statistic)


def spread(position: Tensor, valid: Tensor) -> Tensor:
    """[P] variance (x and y added) of positions [P, N, 2] among the valid ones; 0 where fewer than two are."""
    position, count = position.double(), valid.double().sum(1)
    centre = (position * valid[..., None]).sum(1) / count.clamp(min=1)[:, None]
    squares = ((position - centre[:, None]).square().sum(-1) * valid).sum(1)
    return torch.where(count >= 2, squares / (count - 1).clamp(min=1), 0)


def diversity(position: Tensor, valid: Tensor, truth: Tensor) -> Estimate:
    """Variance of the last position over futures of one past, against the true one.

    position [P, N, 2], valid [P, N], truth [P, M, 2]. 1 is right, 0 a collapse. Futures without a valid object don't
    count: broken frames scatter too."""
    return ratio(spread(position, valid), spread(truth, torch.ones(truth.shape[:2], dtype=torch.bool)))


# -------------------------------------------------------------------------------------------------------- the switch


def changed(wanted: Tensor) -> Tensor:
    """bool [B, 6]: what the second of two scenes [B, 2, 6] changes."""
    return wanted[:, 0] != wanted[:, 1]


def shows_switch(factors: Tensor, wanted: Tensor, among: tuple[int, ...] = SWITCH_FACTORS) -> Tensor:
    """bool [B]: everything `among` that changed reads new in factors [B, 6]; wanted [B, 2, 6]."""
    columns = list(among)
    return ((factors == wanted[:, 1]) | ~changed(wanted))[:, columns].all(1)


def has_room(position: Tensor, wanted: Tensor) -> Tensor:
    """bool [B]: from position [B, 2], the second scene's run of ROOM frames meets no wall."""
    after = wanted[:, 1]
    margin = RADIUS[wanted[:, :, SIZE]].amax(1)[:, None] + 1
    end = position + ROOM * STEP[after[:, SPEED], None] * HEADING[after[:, DIRECTION]]
    along = HEADING[after[:, DIRECTION]] != 0
    return (((end >= margin) & (end <= SIDE - margin)) | ~along).all(1)


def new_direction(before: Tensor, run: Tensor, wanted: Tensor) -> Estimate:
    """Share whose motion takes the new direction, where it changed and there was room.

    before [B, 2] is the last position under the old prompt, run [B, t, 2] the positions of RUN."""
    asked = changed(wanted)[:, DIRECTION] & has_room(before, wanted)
    return share((read_direction(run) == wanted[:, 1, DIRECTION])[asked])


def first_shown(shown: Tensor) -> Tensor:
    """[B] index of the first true of bool [B, t], t where there is none."""
    return torch.where(shown.any(1), shown.float().argmax(1), shown.shape[1])
