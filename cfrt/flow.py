"""What time means: rectified flow, x_s = (1 - s) x0 + s e, v = e - x0, s in [0, 1], s = 1 is pure noise.

Networks are given t = 1000 s. Step lists are written as u, the time before the shift warp. Causal Forcing
(arXiv:2602.02214) keeps one s per unit; everything here broadcasts over it, and works on floats, numpy arrays and torch
tensors alike, since only arithmetic is used. No I/O, no state, no torch.
"""

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from .errors import ConfigError

Array = Any
"""float, numpy array or torch tensor."""

TIME_SCALE = 1000.0
"""t = 1000 s: the range in which Wan's time embedding was trained."""


# ---------------------------------------------------------------------- the time axis


def warp(u: Array, shift: float) -> Array:
    """s = k u / (1 + (k-1) u): spends more steps near noise as `shift` k grows (SD3, arXiv:2403.03206, eq. 23)."""
    return shift * u / (shift * u + (1 - u))  # this way round u = 1 gives 1 exactly


def unwarp(s: Array, shift: float) -> Array:
    """u with warp(u) = s."""
    return s / (s + shift * (1 - s))


def sigmas(us: Iterable[float], shift: float) -> tuple[float, ...]:
    """A step list after the warp: (1, .75, .5, .25) at shift 5 becomes (1, .9375, .8333, .625)."""
    return tuple(warp(float(u), shift) for u in us)


def descent(us: Iterable[float], shift: float) -> tuple[tuple[float, float], ...]:
    """Every level of a step list with the one that follows it; 0 follows the last."""
    return tuple(pairwise((*sigmas(us, shift), 0.0)))


def euler_grid(steps: int, shift: float) -> tuple[float, ...]:
    """`steps` + 1 values of s, from 1 to 0, uniform before the warp."""
    if steps < 1:
        raise ConfigError(f"expected at least one step, got {steps}")
    return sigmas((1 - i / steps for i in range(steps + 1)), shift)


# ---------------------------------------------------------------------- noise, data, velocity


def add_noise(x0: Array, eps: Array, s: Array) -> Array:
    """x_s = (1 - s) x0 + s e."""
    return (1 - s) * x0 + s * eps


renoise = add_noise
"""Few-step sampling puts *new* noise on its x0 estimate; the formula is the same."""


def velocity(x0: Array, eps: Array) -> Array:
    """v = e - x0, what the network is trained to say."""
    return eps - x0


def x0_from_v(x: Array, v: Array, s: Array) -> Array:
    """x0 = x_s - s v."""
    return x - s * v


def eps_from_v(x: Array, v: Array, s: Array) -> Array:
    """e = x_s + (1 - s) v."""
    return x + (1 - s) * v


def v_from_x0(x: Array, x0: Array, s: Array) -> Array:
    """v = (x_s - x0) / s; s must not be 0."""
    return (x - x0) / s


def euler(x: Array, v: Array, s: Array, s_next: Array) -> Array:
    """One Euler step of dx/ds = v, from s to s_next."""
    return x + (s_next - s) * v


def onward(solver: str, x: Array, x0: Array, s: float, s_next: float, noise: Callable[[], Array]) -> Array:
    """A step of sampling from x at s to s_next, given the estimate of x0: "renoise" puts new noise on the estimate,
    "euler" follows the flow through both. The last one, to 0, ends at the estimate itself."""
    if s_next == 0:
        return x0
    return renoise(x0, noise(), s_next) if solver == "renoise" else euler(x, v_from_x0(x, x0, s), s, s_next)


def guide(v_cond: Array, v_null: Array, scale: Array) -> Array:
    """Classifier-free guidance in its usual form: v_null + scale (v_cond - v_null); scale 1 is no guidance."""
    return v_null + scale * (v_cond - v_null)


# ---------------------------------------------------------------------- what training and the network need of time


def loss_weight(s: Array, shift: float, table: int = 1000) -> Array:
    """Weight of the flow-matching loss at s: w = c (exp(-2 ((t-500)/1000)^2) - min), mean 1 over the time table.

    The table is t_j = 1000 warp(1 - j/table); the bell is Causal Forcing's stage 1 (its scheduler). Zero at pure noise,
    largest at t = 500.
    """
    lowest, mean = _bell_statistics(shift, table)
    return (_bell(s) - lowest) / (mean - lowest)


def _bell(s: Array) -> Array:
    return math.e ** (-2 * (s - 0.5) ** 2)  # a power and not exp(): the same line serves floats, numpy and torch


@lru_cache
def _bell_statistics(shift: float, table: int) -> tuple[float, float]:
    bell = [_bell(warp(1 - j / table, shift)) for j in range(table)]
    return min(bell), math.fsum(bell) / table


def time_frequencies(width: int) -> np.ndarray:
    """fp64 [width/2]: w_i = 10000^(-2i/width), the frequencies of the time embedding."""
    half = width // 2
    return 10000.0 ** (-np.arange(half, dtype=np.float64) / half)


def time_embedding(t: Array, width: int) -> np.ndarray:
    """fp64 [..., width]: [cos(t w), sin(t w)] of t = 1000 s, cosines first as Wan has it. Cast after, never before."""
    angle = np.asarray(t, dtype=np.float64)[..., None] * time_frequencies(width)
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
