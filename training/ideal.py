"""First units of the procedural world, denoised as well as can be: by the true posterior instead of a network.

    E[x0 | x_s] = int z(w) p(w | x_s) dw,    p(w | x_s) ~ exp(-|x_s - (1 - s) z(w)|^2 / (2 s^2))

A caption that names the look of a scene (size, colour, shape, background) leaves a first picture three unknowns w:
where the object is, (x, y), and the background's phase. All are evenly distributed, and z(w) is the picture's latent
frame. This is the ideal denoiser (arXiv:2206.00364, appendix B.3), of every picture instead of a data set's.

States in which two places are about as likely are rare and hard: a network that has only seen samples draws an object
in both. The answers here are given on states that a student came to by itself (DAgger, arXiv:1011.0686).

z is smooth: it is encoded at every second pixel and six phases, and cubic splines and harmonics go between them.

Shapes: B first units of one look, D = C h w numbers of a latent frame, [X, Y, P] nodes, S noise levels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from cfrt import flow
from cfrt.config import ModelConfig
from cfrt.errors import ConfigError
from cfrt.nn.autoencoder import Autoencoder
from training import captions, data, ode, rollout, worlds
from training.data import Prompts
from training.network import Network

LOOK = [worlds.SIZE, worlds.COLOUR, worlds.SHAPE, worlds.BACKGROUND]
SPACING, PHASES = 2.0, 6  # of the pictures that are encoded: pixels, and phases in a turn
FINER = 4  # nodes from one of them to the next, along each axis
STRIDE = (4, 4, 2)  # from one coarse node to the next
COARSE_ABOVE = 0.68  # noise level s above which the coarse nodes are a quadrature fine enough
CELLS = ((0.55, 32), (0.0, 8))  # below it: around how many of them, the likeliest ones, all nodes are asked
POINT_BELOW = 0.4  # here the posterior is narrower than the nodes lie: the nearest point of the surface between them
MOST = 40.0  # times as likely as another state the most surprising ones are drawn
CHUNK = 8  # rows at a time, so that what they ask stays in the cache


class Look:
    """The first pictures of one look, and the ideal denoiser of them."""

    def __init__(self, autoencoder: Autoencoder, look: Tensor) -> None:
        """look [4]: size, colour, shape, background."""
        self.wall = worlds.RADIUS[look[0]].item() + 1
        places = round((worlds.SIDE - 2 * self.wall) / SPACING) + 1
        nodes = _encoded(autoencoder, look, self.wall, places)
        for axis, finer in enumerate((_spline(places), _spline(places), _harmonics())):
            nodes = torch.tensordot(finer.to(nodes.device), nodes.movedim(axis, 0), 1).movedim(0, axis)
        self.shape = nodes.shape[:3]  # X, Y, P
        self.flat = nodes.flatten(0, 2)
        self.squares = self.flat.square().sum(1)
        ranges = [torch.arange(0, n, step) for n, step in zip(self.shape, STRIDE, strict=True)]
        self.coarse = torch.cartesian_prod(*ranges).to(nodes.device)  # [K, 3]
        self.around = torch.cartesian_prod(*(torch.arange(-(n // 2), n - n // 2) for n in STRIDE)).to(nodes.device)

    def inside(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Places of the nodes [B, 2] between which the scenes `factors` [B, 6] may begin."""
        low, high = ((edge - self.wall) * FINER / SPACING for edge in worlds.starts(factors))
        return low.to(self.flat.device), high.to(self.flat.device)

    def denoise(self, x: Tensor, s: float, low: Tensor, high: Tensor) -> Tensor:
        """E[x0 | x_s] [B, D] of x [B, D] where the object is between low and high [B, 2]."""
        rows = self._index(self.coarse)
        score = _score(x @ self.flat[rows].T, self.squares[rows], s)
        score = score.masked_fill(_outside(self.coarse[None], low, high, STRIDE[0] / 2), -torch.inf)
        if s > COARSE_ABOVE:
            return score.softmax(1) @ self.flat[rows]
        likeliest = score.topk(next(cells for above, cells in CELLS if s > above), 1).indices
        near = (self.coarse[likeliest][:, :, None] + self.around).flatten(1, 2)  # [B, N, 3]
        few = torch.arange(len(x), device=x.device).split(CHUNK)
        return torch.cat([self._near(x[own], s, near[own], low[own], high[own]) for own in few])

    def _near(self, x: Tensor, s: float, near: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The same from the nodes `near` [B, N, 3] alone."""
        last = torch.tensor(self.shape[:2], device=x.device) - 1
        beyond = ((near[..., :2] < 0) | (near[..., :2] > last)).any(-1)
        rows = self._index(near)
        latents = self.flat[rows]
        score = _score(torch.bmm(latents, x[:, :, None])[:, :, 0], self.squares[rows], s)
        score = score.masked_fill(beyond | _outside(near, low, high, 0.5), -torch.inf)
        if s > POINT_BELOW:
            return torch.bmm(score.softmax(1)[:, None], latents)[:, 0]
        best = near[torch.arange(len(x), device=x.device), score.argmax(1)]
        return self._point(x / (1 - s), best, low, high)

    def _point(self, z: Tensor, node: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The point of the surface nearest to z [B, D], by one Gauss-Newton step from `node` [B, 3]."""
        here = self.flat[self._index(node)]
        slopes = []
        for axis in torch.eye(3, dtype=torch.long, device=z.device):
            ahead, behind = self._clamped(node + axis), self._clamped(node - axis)
            apart = torch.where(axis[2] > 0, 2, (ahead - behind).sum(1))
            slopes.append((self.flat[self._index(ahead)] - self.flat[self._index(behind)]) / apart[:, None])
        slope = torch.stack(slopes, 2)  # [B, D, 3]
        step = torch.linalg.lstsq(slope, (z - here)[:, :, None]).solution[:, :, 0].clamp(-1, 1)
        place = node[:, :2]
        step[:, :2] = torch.minimum(torch.maximum(place + step[:, :2], low), high) - place
        return here + torch.bmm(slope, step[:, :, None])[:, :, 0]

    def _clamped(self, node: Tensor) -> Tensor:
        x, y, phase = node.unbind(-1)
        return torch.stack([x.clamp(0, self.shape[0] - 1), y.clamp(0, self.shape[1] - 1), phase], -1)

    def _index(self, node: Tensor) -> Tensor:
        """Rows of `flat` of nodes [..., 3]; beyond the last place stands the last one, and phases go round."""
        x, y, phase = self._clamped(node).unbind(-1)
        return (x * self.shape[1] + y) * self.shape[2] + phase % self.shape[2]


def _score(product: Tensor, squares: Tensor, s: float) -> Tensor:
    """Log-likelihood of x_s under latents z, but for what all share: their product with x_s, their squares."""
    a = 1 - s
    return (a * product - 0.5 * a * a * squares) / (s * s)


def _outside(node: Tensor, low: Tensor, high: Tensor, margin: float) -> Tensor:
    """Whether nodes [B or 1, N, 3] are no places for a start."""
    place = node[..., :2]
    return ((place < low[:, None] - margin) | (place > high[:, None] + margin)).any(-1)


def _spline(places: int) -> Tensor:
    """[X, places]: values at all nodes from those that were encoded."""
    at = np.arange(FINER * (places - 1) + 1) / FINER
    return torch.from_numpy(CubicSpline(np.arange(places), np.eye(places))(at)).float()


def _harmonics() -> Tensor:
    """[P, PHASES]: the same for phases, by the trigonometric polynomial through them."""
    turn = 2 * math.pi * torch.arange(PHASES * FINER) / (PHASES * FINER)
    apart = turn[:, None] - turn[::FINER]
    orders = torch.arange(1, PHASES // 2 + 1)
    twice = torch.where(2 * orders < PHASES, 2.0, 1.0)
    return (1 + (twice * torch.cos(orders * apart[..., None])).sum(-1)) / PHASES


def _encoded(autoencoder: Autoencoder, look: Tensor, wall: float, places: int) -> Tensor:
    """[places, places, PHASES, D] first latent frames of the grid."""
    along = torch.linspace(wall, worlds.SIDE - wall, places)
    grid = torch.cartesian_prod(along, along, 2 * math.pi * torch.arange(PHASES) / PHASES)
    latents = [encoded(autoencoder, look, part[:, :2], part[:, 2]) for part in grid.split(512)]
    return torch.cat(latents).view(places, places, PHASES, -1)


def encoded(autoencoder: Autoencoder, look: Tensor, position: Tensor, phase: Tensor) -> Tensor:
    """First latent frames [B, D] of pictures with the object at position [B, 2]."""
    count = len(phase)
    factors = torch.zeros(count, len(worlds.FACTORS), dtype=torch.long)
    factors[:, LOOK] = look
    scene = worlds.Scene(
        before=factors,
        after=factors,
        switch=torch.ones(count, dtype=torch.long),
        position=position[:, None],
        heading=factors[:, worlds.DIRECTION, None],
        phase=phase[:, None],
    )
    return data.encode(autoencoder, worlds.render(scene.to(autoencoder.latent_mean.device)), 64).float().flatten(1)


# ------------------------------------------------------------------------------------------------------------ answers


@dataclass(frozen=True, kw_only=True)
class Answers(ode.Kept):
    """First units on their way, and what is to be said of each state."""

    states: Tensor  # [B, S, 1, C, h, w] at the levels of the first unit's list
    answers: Tensor  # [B, S, 1, C, h, w] E[x0 | x_s]
    surprise: Tensor  # [B, S] squared error of what the student said, 1 in the mean of a level

    @property
    def _of_clips(self) -> tuple[str, ...]:
        return ("captions", "caption", "states", "answers", "surprise")

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clips and levels of `count` states, [count] each: half of them all as likely, half as they surprise."""
        levels = self.surprise.shape[1]
        point = torch.rand(count, dtype=torch.float64, generator=generator, device=generator.device)
        point = point.to(self.surprise.device)
        state = (point * self.surprise.numel()).long()
        half = count // 2
        state[:half] = torch.searchsorted(self._sums, point[:half] * self._sums[-1])
        state = state.clamp(max=self.surprise.numel() - 1)
        return state // levels, state % levels

    @cached_property
    def _sums(self) -> Tensor:
        return self.surprise.double().clamp(max=MOST).flatten().cumsum(0)


def named(rows: Tensor) -> Tensor:
    """Whether captions [..., L] name all of the look."""
    return torch.stack([rows[..., factor] != 0 for factor in LOOK]).all(0)  # no list as an index: a graph captures it


@torch.no_grad()
def play(
    autoencoder: Autoencoder, student: Network, model: ModelConfig, count: int, generator: torch.Generator
) -> Answers:
    """`count` first units of one look, drawn at random: half of them as the ideal denoiser itself plays them, half as
    the student does. ConfigError where a unit is more than a picture."""
    if model.unit != 1:
        raise ConfigError(f"expected units of one latent frame, got {model.unit}: of more, the first one moves as well")
    factors = _scenes(count, generator)
    look = Look(autoencoder, factors[0, LOOK])
    low, high = look.inside(factors)
    rows = captions.rows(factors)[:, None].expand(-1, 2, -1)
    prompts = Prompts(captions=rows, caption=torch.zeros(count, model.unit, dtype=torch.long)).to(student.device)
    player = rollout.Player(student, model, prompts)
    shape = (count, model.unit, model.latent_channels, *model.latent_grid)
    x = torch.randn(shape, generator=generator).to(student.device)
    played = torch.arange(count, device=x.device).view(-1, *[1] * (x.dim() - 1)) >= count // 2
    states, answers, surprise = [], [], []
    for s, s_next in pairwise([*rollout.levels(model, 0), 0.0]):
        states.append(x)
        answers.append(look.denoise(x.flatten(1), s, low, high).view_as(x))
        v, said = flow.v_from_x0(x, answers[-1], s), player.velocity(x, s, 0).float()
        error = (said - v).square().flatten(1).mean(1)
        surprise.append(error / error.mean())
        x = flow.euler(x, torch.where(played, said, v), s, s_next)
    return Answers(
        states=torch.stack(states, 1),
        answers=torch.stack(answers, 1),
        surprise=torch.stack(surprise, 1),
        **vars(prompts),
    )


def _scenes(count: int, generator: torch.Generator) -> Tensor:
    """[count, 6] factors of one look, none of a scene that is held out."""
    scenes = worlds.all_factors()
    scenes = scenes[~worlds.held_out(scenes)]
    look = scenes[torch.randint(len(scenes), (), generator=generator)][LOOK]
    alike = scenes[(scenes[:, LOOK] == look).all(1)]
    return alike[torch.randint(len(alike), (count,), generator=generator)]
