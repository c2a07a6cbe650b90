"""The Gaussian video: a world in which every flow map of causal distillation is a formula.

A clip is n numbers x0 ~ N(0, S), one a frame; a latent frame of many channels is many such clips side by side. All maps
are linear here, so the definitions and propositions of Causal Forcing (arXiv:2602.02214, section 3 and appendix B) and
of Causal Forcing++ (arXiv:2605.15141, section 3.2) become numbers that a test can ask for. Maths only: no network, no
sampling, no I/O; fp64.

Shapes: n frames, F frames a unit; x [..., n] clips; s a level or levels [..., n], equal within a unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from cfrt import flow
from cfrt.errors import ConfigError

Level = float | Tensor


def covariance(rho: float, frames: int) -> Tensor:
    """[n, n] of S_ij = rho^|i-j|: unit variance, one step of memory. rho = 0 is a clip of independent frames."""
    i = torch.arange(frames, dtype=torch.float64)
    return torch.as_tensor(rho, dtype=torch.float64) ** (i[:, None] - i).abs()


# ---------------------------------------------------------------------- one coordinate, x0 ~ N(m, q2)


def variance(q2: Level, s: Level) -> Level:
    """c_s = (1-s)^2 q2 + s^2, the variance of x_s."""
    return (1 - s) ** 2 * q2 + s**2


def velocity(x: Tensor, s: Level, m: Level, q2: Level) -> Tensor:
    """E[e - x0 | x_s] = g (x_s - (1-s) m) - m with g = (s - (1-s) q2) / c_s: what flow matching converges to."""
    v: Tensor = _slope(s, q2) * (x - (1 - s) * m) - m
    return v


def _slope(s: Level, q2: Level) -> Level:
    return (s - (1 - s) * q2) / variance(q2, s)


def flow_map(x: Tensor, s: Level, s_next: Level, m: Level, q2: Level) -> Tensor:
    """Where dx/ds = v leads from s to s': (1-s') m + sqrt(c_s' / c_s) (x_s - (1-s) m)."""
    gain = (variance(q2, s_next) / variance(q2, s)) ** 0.5
    y: Tensor = (1 - s_next) * m + gain * (x - (1 - s) * m)
    return y


# ---------------------------------------------------------------------- the exact teachers of a clip


class Teacher:
    """The exact flow-matching model of N(0, S) that denoises units of F frames, each given the clean past.

    F = n is the bidirectional teacher, F = 1 the frame-wise AR one. Given the past a unit is N(M x0, Q); in the
    eigenbasis of Q its coordinates are independent, so the formulae above apply one by one.
    """

    def __init__(self, covariance: Tensor, unit: int) -> None:
        """covariance [n, n]; ConfigError unless the unit divides n."""
        n = len(covariance)
        if unit < 1 or n % unit:
            raise ConfigError(f"expected a unit that divides the {n} frames of the clip, got {unit}")
        self.past, self.basis = covariance.new_zeros(n, n), covariance.new_zeros(n, n)  # M, and U of Q = U diag(q2) U'
        self.variances = covariance.new_zeros(n)  # q2
        for first in range(0, n, unit):
            past, now = slice(0, first), slice(first, first + unit)
            self.past[now, past] = torch.linalg.solve(covariance[past, past], covariance[past, now]).T
            q = covariance[now, now] - self.past[now, past] @ covariance[past, now]
            self.variances[now], self.basis[now, now] = torch.linalg.eigh(q)

    def mean(self, clean: Tensor) -> Tensor:
        """E[x0 | earlier units of `clean` [..., n]], [..., n]."""
        return clean @ self.past.T

    def velocity(self, x: Tensor, s: Level, clean: Tensor) -> Tensor:
        """E[e - x0 | x_s of the unit, clean past]."""
        u, q2 = self.basis, self.variances
        return velocity(x @ u, s, self.mean(clean) @ u, q2) @ u.T

    def flow_map(self, x: Tensor, s: Level, s_next: Level, clean: Tensor) -> Tensor:
        """The probability-flow ODE's solution from s to s'. For F = n it is C_s'^(1/2) C_s^(-1/2) x."""
        u, q2 = self.basis, self.variances
        return flow_map(x @ u, s, s_next, self.mean(clean) @ u, q2) @ u.T


# ---------------------------------------------------------------------- what regression on a teacher's pairs learns


class Regression(NamedTuple):
    """The minimiser of E |G^i - x_end^i|^2 over students that see their own unit and a past: a conditional mean."""

    past: Tensor
    """[n, n] weights of the past frames."""
    own: Tensor
    """[n, n] weights of the unit's own frames."""
    lost: Tensor
    """[n] Var(x_end^i | what the student sees): the variance that is missing from its output (Prop. 3.3)."""


def regress_bidirectional(covariance: Tensor, s: float, past: float, unit: int = 1) -> Regression:
    """On pairs (x_s, x_end) of the bidirectional teacher.

    The student sees its own unit at level s and earlier frames at level `past` of the same trajectory: `past` = s is
    the noisy prefix of Self Forcing's initialisation, `past` = 0 the clean one. Nothing is lost only where no later
    frame matters to the end point (Lemma 3.2).
    """
    teacher = Teacher(covariance, len(covariance))
    states = {level: _state(teacher, level) for level in (0.0, past, s)}  # x_level = state @ e
    return _regress(states[0.0], states[past], states[s], unit)


def regress_causal(covariance: Tensor, s: float, unit: int = 1) -> Regression:
    """On pairs of the AR teacher, whose student sees the clean past that the teacher saw: nothing is lost (Def. 3.1).

    Here the sources are (z, e), the whitened data and the noise: the past is x0 = S^(1/2) z.
    """
    teacher = Teacher(covariance, unit)
    data, none = _root(covariance), torch.zeros_like(covariance)
    states = [torch.cat([(1 - level) * teacher.past @ data, _state(teacher, level)], 1) for level in (0.0, s)]
    return _regress(states[0], torch.cat([data, none], 1), states[1], unit)


def _state(teacher: Teacher, s: float) -> Tensor:
    """[n, n] C with x_s = (1-s) M x0 + C e on the trajectory that leaves noise e at s = 1."""
    return teacher.basis * torch.as_tensor(variance(teacher.variances, s)).sqrt() @ teacher.basis.T


def _root(covariance: Tensor) -> Tensor:
    """[n, n] symmetric S^(1/2)."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _regress(goal: Tensor, past: Tensor, own: Tensor, unit: int) -> Regression:
    """Rows are linear functions of white noise: each goal is projected on the span of what its frame sees."""
    n = len(goal)
    weights = goal.new_zeros(n, 2 * n)
    for i in range(n):
        start = i // unit * unit
        seen = [*range(start), *range(n + start, n + start + unit)]
        rows = torch.cat([past, own])[seen]  # of rank below its length where the past tells all
        weights[i, seen] = torch.linalg.lstsq(rows.T, goal[i, :, None], driver="gelsd").solution[:, 0]
    lost = (goal - weights @ torch.cat([past, own])).square().sum(1)
    return Regression(weights[:, :n], weights[:, n:], lost)


# ---------------------------------------------------------------------- diffusion forcing


def diffusion_forced_velocity(covariance: Tensor, x: Tensor, s: Tensor) -> Tensor:
    """E[e^i - x0^i | x_s^1 .. x_s^i], s [..., n] a level for each frame: the optimum of diffusion forcing, F = 1."""
    n = len(covariance)
    clean = (1 - s)[..., None] * covariance  # E[x_s^i x0^j], [..., n, n]
    noised = clean * (1 - s)[..., None, :] + torch.diag_embed(s**2)
    cross = torch.diag_embed(s) - clean  # E[x_s^i (e^j - x0^j)]
    v = [
        (torch.linalg.solve(noised[..., :i, :i], cross[..., :i, i - 1, None])[..., 0] * x[..., :i]).sum(-1)
        for i in range(1, n + 1)
    ]
    return torch.stack(v, -1)


def forcing_gap(covariance: Tensor, past: float) -> Tensor:
    """[n] E KL(p(x^i | clean past) || p(x^i | past at level `past`)), the gap of diffusion forcing (Prop. 3.4).

    Both are Gaussian and the second is the first averaged over what the noise hides, so the gap is half the log of
    their variances' ratio. Teacher forcing is `past` = 0: no gap.
    """
    n = len(covariance)
    noised = (1 - past) ** 2 * covariance + past**2 * torch.eye(n, dtype=covariance.dtype)
    gap = covariance.new_zeros(n)
    for i in range(n):
        cross = covariance[:i, i]
        clean = covariance[i, i] - cross @ torch.linalg.solve(covariance[:i, :i], cross)
        hidden = covariance[i, i] - (1 - past) ** 2 * cross @ torch.linalg.solve(noised[:i, :i], cross)
        gap[i] = 0.5 * (hidden / clean).log()
    return gap


# ---------------------------------------------------------------------- few-step students of one coordinate

Gain = Callable[[float], float]
"""s -> a of a student that jumps to x0 = m + a (x_s - (1-s) m). Every student below has this form."""


def exact_gain(s: float, q2: float) -> float:
    """Of the flow map, the goal of causal ODE and consistency distillation: sqrt(q2 / c_s)."""
    return math.sqrt(q2 / float(variance(q2, s)))


def denoising_gain(s: float, q2: float) -> float:
    """Of E[x0 | x_s], one Euler step of the teacher down to 0: (1-s) q2 / c_s."""
    return (1 - s) * q2 / float(variance(q2, s))


def euler_gain(s: float, q2: float, grid: Sequence[float]) -> float:
    """Of the teacher's Euler steps along the part of `grid` from s to 0.

    The minimiser of consistency distillation on that grid (arXiv:2605.15141, section 3.2): G_k = G_(k+1) after one
    step, down to G = x at s = 0. It is one order of the step away from `exact_gain`.
    """
    steps = pairwise(level for level in grid if level <= s)
    return math.prod(1 + (s_next - s) * float(_slope(s, q2)) for s, s_next in steps)


def few_step(levels: Sequence[float], gain: Gain) -> float:
    """Variance of x0 after jumping from each level (from 1 down) and re-noising to the next; the mean stays m.

    Two lines of algebra a step: the jump makes a^2 Var(x_s), new noise makes (1-s')^2 Var(x0) + s'^2.
    """
    of_x = float(variance(0.0, levels[0]))
    for s, s_next in pairwise((*levels, 0.0)):
        of_x = float(variance(gain(s) ** 2 * of_x, s_next))
    return of_x


def jump_variance(covariance: Tensor, s: float, gain: Callable[[float, float], float]) -> Tensor:
    """[n] variance of the frame-wise AR student's jump from noised data, gain(s, q2) given: Var(M x0) + a^2 c_s."""
    q2 = Teacher(covariance, 1).variances
    jumped = [gain(s, float(q)) ** 2 * float(variance(float(q), s)) for q in q2]
    return covariance.diagonal() - q2 + torch.tensor(jumped, dtype=covariance.dtype)


# ---------------------------------------------------------------------- distances, and DMD


class Gaussian(NamedTuple):
    """N(mean [n], covariance [n, n])."""

    mean: Tensor
    covariance: Tensor

    def noised(self, s: float) -> Gaussian:
        """The law of x_s."""
        eye = torch.eye(len(self.mean), dtype=self.mean.dtype)
        return Gaussian((1 - s) * self.mean, (1 - s) ** 2 * self.covariance + s**2 * eye)

    def score(self, x: Tensor, s: float) -> Tensor:
        """Gradient of log p(x_s), [..., n]."""
        law = self.noised(s)
        return -torch.linalg.solve(law.covariance, (x - law.mean)[..., None])[..., 0]

    def denoised(self, x: Tensor, s: float) -> Tensor:
        """E[x0 | x_s] = m + (1-s) S C_s^(-1) (x_s - (1-s) m), [..., n]."""
        law = self.noised(s)
        centred = torch.linalg.solve(law.covariance, (x - law.mean)[..., None])[..., 0]
        return self.mean + (1 - s) * centred @ self.covariance

    def velocity(self, x: Tensor, s: float) -> Tensor:
        """v of the network whose x0 estimate is exact; s must not be 0."""
        v: Tensor = flow.v_from_x0(x, self.denoised(x, s), s)
        return v


def kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q), a scalar."""
    apart = q.mean - p.mean
    spread = torch.linalg.solve(q.covariance, p.covariance).trace() - len(p.mean)
    distance = apart @ torch.linalg.solve(q.covariance, apart)
    return 0.5 * (spread + distance + q.covariance.logdet() - p.covariance.logdet())


def wasserstein2(p: Gaussian, q: Gaussian) -> Tensor:
    """Squared 2-Wasserstein distance, a scalar."""
    root = _root(q.covariance)
    between = _root(root @ p.covariance @ root)
    return (p.mean - q.mean).square().sum() + (p.covariance + q.covariance - 2 * between).trace()


def kl_gradient(fake: Gaussian, real: Gaussian, s: float) -> tuple[Tensor, Tensor]:
    """Gradient of KL(fake_s || real_s) in the mean [n] and in R [n, n] of a generator x0 = mean + R z, R R' = S.

    R is the symmetric root. The parameters act through x0, hence a factor 1-s for the mean and its square for R.
    """
    noisy, goal = fake.noised(s), real.noised(s)
    apart = torch.linalg.solve(goal.covariance, noisy.mean - goal.mean)
    precisions = torch.linalg.inv(goal.covariance) - torch.linalg.inv(noisy.covariance)
    return (1 - s) * apart, (1 - s) ** 2 * precisions @ _root(fake.covariance)


def dmd_gradient(fake: Gaussian, real: Gaussian, s: float) -> tuple[Tensor, Tensor]:
    """(E[f - r], E[(f - r) z']) over x_s of the same generator, f and r the x0 estimates of the two scores.

    DMD's gradient before it is normalised (arXiv:2311.18828, eq. 7). Since x0_hat = (x_s + s^2 score) / (1-s), it is
    s^2 / (1-s)^2 times `kl_gradient`: only the weight of the level differs.
    """
    root = _root(fake.covariance)
    at_mean = fake.noised(s).mean
    mean = fake.denoised(at_mean, s) - real.denoised(at_mean, s)
    along = at_mean + (1 - s) * root.T  # row j is E[x_s | z = basis vector j]
    return mean, (fake.denoised(along, s) - real.denoised(along, s) - mean).T
