"""A procedural world: one object over a living background, 64x64 at 16 fps, every factor known exactly.

Six factors make a scene (`FACTORS`); a caption names them (`training.captions`) and `training.reader` reads them back
from pixels. The future is random given the past: the object turns at Poisson times and bounces off the walls. Without
that, a regression on the wrong pairs could not blur, and the effect the paper describes could not appear
(arXiv:2602.02214, Lemma 3.2).

The rules of motion:
* A scene starts with `CALM` frames without a turn, heading where the caption says, clear of the wall ahead.
* Afterwards the object turns with rate `TURNS` a second. The new heading is one of the other three, the caption's own
  three times as likely as another. A wall reflects it.
* A switch of caption at a unit boundary takes heading and speed at once and starts `CALM` anew; size, colour, shape and
  background cross-fade over `FADE` frames (0.5 s). What the new caption does not mention stays as it was.

Shapes: B clips, T frames, U units (latent frames; unit 0 is frame 0, unit u > 0 is frames 4u-3 .. 4u), 6 factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

SIDE = 64  # pixels
FPS = 16
UNIT_FRAMES = 4  # pixel frames of one latent frame after the first (Wan's time law)
CALM = 12  # frames without a turn after a start or a switch
FADE = 8  # frames over which a switch of caption fades
TURNS = 1.0  # a second
OWN_HEADING = 3.0  # weight of the caption's heading among the new ones

FACTORS: dict[str, tuple[str, ...]] = {
    "size": ("small", "large"),
    "colour": ("red", "green", "blue", "yellow", "pink", "white"),
    "shape": ("circle", "square", "triangle", "cross"),
    "direction": ("right", "left", "down", "up"),
    "speed": ("slow", "fast"),
    "background": ("night", "ocean", "meadow", "dusk"),
}
SIZE, COLOUR, SHAPE, DIRECTION, SPEED, BACKGROUND = range(6)

RADIUS = torch.tensor([7.0, 11.0])
STEP = torch.tensor([0.8, 1.6])  # pixels a frame
HEADING = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
PALETTE = torch.tensor(
    [
        [0.87, 0.14, 0.14],
        [0.16, 0.80, 0.24],
        [0.22, 0.46, 0.88],
        [0.87, 0.78, 0.14],
        [0.86, 0.30, 0.80],
        [0.86, 0.86, 0.86],
    ]
)
DRIFT = 2 * math.pi / 48  # phase of the background a frame: one wave passes in three seconds
SHADE = 0.012  # brightness a pixel above the object's centre, so that it looks lit from above
SHADE_LIMIT = 0.13
ON_GPU = 16  # times as many clips at once: what is too much for a CPU's cache is too little for a GPU


def _pixel_grid() -> tuple[Tensor, Tensor]:
    centre = torch.arange(SIDE) + 0.5
    return centre[None, :], centre[:, None]  # x [1, SIDE], y [SIDE, 1]


X, Y = _pixel_grid()


def _background_basis() -> Tensor:
    """[4, 3, 3, SIDE, SIDE]: still part, sine part and cosine part of each background; a frame is still + cos(p) sine
    + sin(p) cosine."""
    sky = {  # top colour, bottom colour, wave colour, wave vector in waves per picture
        "night": ((0.03, 0.04, 0.13), (0.09, 0.09, 0.24), (0.01, 0.05, 0.05), (1.0, 1.0)),
        "ocean": ((0.04, 0.27, 0.40), (0.02, 0.11, 0.27), (0.03, 0.07, 0.08), (0.0, -2.0)),
        "meadow": ((0.17, 0.33, 0.19), (0.08, 0.20, 0.07), (0.05, 0.06, 0.03), (2.0, 0.0)),
        "dusk": ((0.20, 0.09, 0.28), (0.42, 0.20, 0.17), (0.06, 0.03, 0.02), (-1.0, 2.0)),
    }
    basis = torch.zeros(len(sky), 3, 3, SIDE, SIDE)
    for index, (top, bottom, wave, (kx, ky)) in enumerate(sky.values()):
        height = (Y / SIDE).expand(SIDE, SIDE)
        angle = 2 * math.pi * (kx * X + ky * Y) / SIDE
        for channel in range(3):
            basis[index, 0, channel] = torch.lerp(torch.tensor(top[channel]), torch.tensor(bottom[channel]), height)
            basis[index, 1, channel] = wave[channel] * angle.sin()
            basis[index, 2, channel] = wave[channel] * angle.cos()
    stars = torch.Generator().manual_seed(5)
    for _ in range(14):
        x, y = (torch.rand(2, generator=stars) * (SIDE - 4) + 2).tolist()
        glow = 0.30 * torch.exp(-((X - x) ** 2 + (Y - y) ** 2) / 1.2)
        basis[0, 0] += glow
    return basis


BACKGROUNDS = _background_basis()


def _circle(dx: Tensor, dy: Tensor, r: Tensor) -> Tensor:
    return torch.sqrt(dx * dx + dy * dy) - r


def _square(dx: Tensor, dy: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(dx.abs(), dy.abs()) - 0.88 * r


def _triangle(dx: Tensor, dy: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(dy - 0.65 * r, 0.866025 * dx.abs() - 0.5 * dy - 0.65 * r)


def _cross(dx: Tensor, dy: Tensor, r: Tensor) -> Tensor:
    ax, ay = dx.abs(), dy.abs()
    long, wide = 1.05 * r, 0.36 * r
    return torch.minimum(torch.maximum(ax - long, ay - wide), torch.maximum(ax - wide, ay - long))


_DISTANCES = (_circle, _square, _triangle, _cross)


def _distance(position: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Signed distance to the outline, negative inside: position [N, 2], radius [N], shape [N] -> [N, SIDE, SIDE]."""
    distance = position.new_empty(len(position), SIDE, SIDE)
    across, down = X.to(position.device), Y.to(position.device)
    for index, outline in enumerate(_DISTANCES):
        rows = (shape == index).nonzero()[:, 0]
        if len(rows):
            dx = across[None] - position[rows, 0, None, None]  # [n, 1, SIDE]
            dy = down[None] - position[rows, 1, None, None]  # [n, SIDE, 1]
            distance[rows] = outline(dx, dy, radius[rows, None, None])
    return distance


def coverage(
    position: Tensor, radius: Tensor, shape: Tensor, other: Tensor | None = None, mix: Tensor | None = None
) -> Tensor:
    """How much of each pixel the object covers, by its signed distance: [N, SIDE, SIDE] in [0, 1].

    position [N, 2] is the centre (x, y) in pixels, radius [N], shape [N] indices; where 0 < mix < 1 the distance to
    `other` is blended in, which is the morph of a switch."""
    distance = _distance(position, radius, shape)
    if other is not None and mix is not None:
        rows = ((mix > 0) & (mix < 1)).nonzero()[:, 0]
        if len(rows):
            target = _distance(position[rows], radius[rows], other[rows])
            distance[rows] = torch.lerp(distance[rows], target, mix[rows, None, None])
    return (0.5 - distance).clamp_(0, 1)


def background_frames(background: Tensor, phase: Tensor) -> Tensor:
    """The empty stage: background [N, 4] weights, phase [N] -> [N, 3, SIDE, SIDE]."""
    wave = torch.stack([torch.ones_like(phase), phase.cos(), phase.sin()], dim=1)  # [N, 3]
    weights = (background[:, :, None] * wave[:, None, :]).flatten(1)  # [N, 12]
    return (weights @ BACKGROUNDS.to(phase.device).flatten(0, 1).flatten(1)).view(-1, 3, SIDE, SIDE)


def shaded(colour: Tensor, position: Tensor) -> Tensor:
    """The object's colour on every row of the picture: colour [N, 3], position [N, 2] -> [N, 3, SIDE, 1]."""
    above = position[:, 1, None, None] - Y.to(position.device)[None]  # [N, SIDE, 1]
    light = 1 + (SHADE * above).clamp_(-SHADE_LIMIT, SHADE_LIMIT)
    return colour[:, :, None, None] * light[:, None]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """B clips before they are drawn. `before` holds until frame `switch`, `after` from there (switch = T: no
    switch)."""

    before: Tensor  # [B, 6] long
    after: Tensor  # [B, 6] long
    switch: Tensor  # [B] long, the first frame under `after`
    position: Tensor  # [B, T, 2] pixels
    heading: Tensor  # [B, T] long, index into HEADING
    phase: Tensor  # [B, T] radians

    def __len__(self) -> int:
        return len(self.before)

    def __getitem__(self, clips: slice | Tensor) -> Scene:
        return Scene(**{name: getattr(self, name)[clips] for name in Scene.__dataclass_fields__})

    def to(self, device: torch.device) -> Scene:
        """The same on another device."""
        return Scene(**{name: getattr(self, name).to(device) for name in Scene.__dataclass_fields__})

    @property
    def frames(self) -> int:
        return self.position.shape[1]


Index = TypeVar("Index", int, Tensor)


def first_frame(unit: Index) -> Index:
    """First pixel frame of a latent frame after the first (Wan's time law)."""
    return UNIT_FRAMES * unit - 3


def sample_factors(n: int, generator: torch.Generator) -> Tensor:
    """[n, 6] factors, uniform over all scenes but the held-out ones."""
    sizes = [len(values) for values in FACTORS.values()]
    factors = torch.stack([torch.randint(0, size, (n,), generator=generator) for size in sizes], dim=1)
    held = held_out(factors)
    if held.any():
        factors[held] = sample_factors(int(held.sum()), generator)
    return factors


def held_out(factors: Tensor) -> Tensor:
    """[..., 6] -> bool [...]: one scene in six never enters training. A sum modulo 6 leaves every pair of factors
    represented."""
    return (factors * torch.tensor([1, 1, 2, 3, 3, 4])).sum(-1) % 6 == 0


def all_factors() -> Tensor:
    """Every scene: [1536, 6]."""
    return torch.cartesian_prod(*[torch.arange(len(values)) for values in FACTORS.values()])


def _walls(radius: Tensor) -> tuple[Tensor, Tensor]:
    margin = (radius + 1)[:, None]
    return margin, SIDE - margin


def starts(factors: Tensor) -> tuple[Tensor, Tensor]:
    """Where a scene may begin: the least and the largest position, [B, 2] each, from which the first CALM frames meet
    no wall."""
    low, high = (edge.expand(-1, 2) for edge in _walls(RADIUS[factors[:, SIZE]]))
    run = CALM * STEP[factors[:, SPEED], None]
    ahead = HEADING[factors[:, DIRECTION]]
    return torch.where(ahead < 0, low + run, low), torch.where(ahead > 0, high - run, high)


def _start(factors: Tensor, generator: torch.Generator) -> Tensor:
    """[B, 2] positions, evenly from where a scene may begin."""
    low, high = starts(factors)
    return low + (high - low) * torch.rand(len(factors), 2, generator=generator)


def _turn(heading: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
    """A heading other than the present one, the caption's own OWN_HEADING times as likely."""
    weights = torch.ones(len(heading), len(HEADING))
    weights.scatter_(1, wanted[:, None], OWN_HEADING)
    weights.scatter_(1, heading[:, None], 0.0)
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


def simulate(
    before: Tensor,
    generator: torch.Generator,
    frames: int,
    *,
    after: Tensor | None = None,
    switch: Tensor | None = None,
    steered: Tensor | None = None,
    start: tuple[Tensor, Tensor, Tensor] | None = None,
    calm: int = CALM,
) -> Scene:
    """Play the rules of motion for `frames` frames. Factors [B, 6]; `switch` [B] frames at which `after` takes over,
    and `steered` [B] bool whether its caption names a direction (otherwise the object keeps its heading).

    `start` = (position [B, 2], heading [B], phase [B]) of the frame before the first one goes on from a given state,
    with `calm` frames left without a turn; otherwise the scene opens by the rule of starts."""
    n = len(before)
    after = before if after is None else after
    switch = torch.full((n,), frames) if switch is None else switch
    if start is None:
        position, heading = _start(before, generator), before[:, DIRECTION].clone()
        phase = torch.rand(n, generator=generator) * 2 * math.pi
    else:
        position, heading, phase = start[0].clone(), start[1].clone(), start[2] + DRIFT
    calm_left = torch.full((n,), calm)
    positions, headings = [], []
    for frame in range(frames):
        if frame or start is not None:
            now = torch.where((switch <= frame)[:, None], after, before)
            switched = switch == frame
            heading = torch.where(switched if steered is None else switched & steered, after[:, DIRECTION], heading)
            calm_left = torch.where(switched, CALM, calm_left - 1)
            turns = (torch.rand(n, generator=generator) < TURNS / FPS) & (calm_left <= 0)
            heading = torch.where(turns, _turn(heading, now[:, DIRECTION], generator), heading)
            position, heading = _advance(position, heading, _radius(before, after, switch, frame), STEP[now[:, SPEED]])
        positions.append(position)
        headings.append(heading)
    phases = phase[:, None] + DRIFT * torch.arange(frames)
    return Scene(
        before=before,
        after=after,
        switch=switch,
        position=torch.stack(positions, 1),
        heading=torch.stack(headings, 1),
        phase=phases,
    )


def fade(switch: Tensor, frame: Tensor | int) -> Tensor:
    """How far the cross-fade of a switch has come, in [0, 1]."""
    return ((frame - switch + 1) / FADE).clamp(0, 1)


def _radius(before: Tensor, after: Tensor, switch: Tensor, frame: Tensor | int) -> Tensor:
    return torch.lerp(RADIUS[before[:, SIZE]], RADIUS[after[:, SIZE]], fade(switch, frame))


def _advance(position: Tensor, heading: Tensor, radius: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """One frame of motion with reflection at the walls (an object that grows beside a wall is pushed off it)."""
    low, high = _walls(radius)
    moved = position + HEADING[heading] * step[:, None]
    reflected = torch.where(moved > high, 2 * high - moved, torch.where(moved < low, 2 * low - moved, moved))
    ahead = HEADING[heading]
    hit = (((moved > high) & (ahead > 0)) | ((moved < low) & (ahead < 0))).any(1)
    return reflected.clamp(low, high), torch.where(hit, heading ^ 1, heading)


def render(scene: Scene, chunk: int = 4) -> Tensor:
    """[B, T, 3, SIDE, SIDE] float32 in [0, 1]. Drawn `chunk` clips at a time: what fits the cache is several times
    faster."""
    chunk *= ON_GPU if scene.position.is_cuda else 1
    parts = [_render(scene, slice(first, first + chunk)) for first in range(0, len(scene), chunk)]
    return torch.cat(parts)


def _render(scene: Scene, clips: slice) -> Tensor:
    before, after, switch = scene.before[clips], scene.after[clips], scene.switch[clips]
    position, phase = scene.position[clips].flatten(0, 1), scene.phase[clips].flatten()
    count, frames = len(before), scene.frames
    mix = fade(switch[:, None], torch.arange(frames, device=switch.device)[None]).flatten()  # [B T]

    def blended(table: Tensor, factor: int) -> Tensor:
        table = table.to(mix.device)
        a = table[before[:, factor]].repeat_interleave(frames, 0)
        b = table[after[:, factor]].repeat_interleave(frames, 0)
        return torch.lerp(a, b, mix.view(-1, *[1] * (a.dim() - 1)))

    shape_a, shape_b = (f[:, SHAPE].repeat_interleave(frames) for f in (before, after))
    shape = torch.where(mix < 1, shape_a, shape_b)
    alpha = coverage(position, blended(RADIUS, SIZE), shape, shape_b, mix)[:, None]
    stage = background_frames(blended(torch.eye(len(BACKGROUNDS)), BACKGROUND), phase)
    object_ = shaded(blended(PALETTE, COLOUR), position)
    return torch.addcmul(stage, alpha, object_ - stage).clamp_(0, 1).view(count, frames, 3, SIDE, SIDE)
