"""Noise that is the same on every machine: Philox4x32-10 counters (Salmon et al., SC 2011) and Box-Muller.

A number depends on where it is used and on nothing else: key = seed, counter = (element / 4, unit, step, purpose).
There is no state to carry, so any unit can be made again, out of order, and every engine can make its own. Integer bits
are equal everywhere; normals to 2 ulp. numpy only.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from .errors import ConfigError

ROUNDS = 10
MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
WEYL = (0x9E3779B9, 0xBB67AE85)
"""Added to the two key words after every round: the golden ratio and sqrt(3) - 1."""

MASK = 0xFFFFFFFF


class Purpose(IntEnum):
    """Last word of the counter: uses that must never share a number."""

    SAMPLE = 0
    """Latents of a stream: the starting noise (step 0) and what is put back after step i (step i + 1)."""


def is_seed(value: object) -> bool:
    """Whether it is a whole number of 64 bits."""
    return isinstance(value, int | np.integer) and 0 <= int(value) < 1 << 64


def normal(seed: int, unit: int, step: int, purpose: int, shape: Sequence[int]) -> np.ndarray:
    """float32 of `shape`, standard normal, |x| < 5.8. ConfigError unless 0 <= seed < 2^64."""
    count = int(np.prod(shape, dtype=np.int64))
    return box_muller(bits(seed, unit, step, purpose, -(-count // 4))).reshape(-1)[:count].reshape(shape)


def bits(seed: int, unit: int, step: int, purpose: int, blocks: int) -> np.ndarray:
    """uint32 [blocks, 4]: the raw numbers; row i is the block of elements 4i to 4i + 3."""
    if not is_seed(seed):
        raise ConfigError(f"expected a seed from 0 to 2^64 - 1, got {seed!r}")
    counter = np.empty((blocks, 4), dtype=np.uint32)
    counter[:, 0] = np.arange(blocks, dtype=np.uint32)
    counter[:, 1:] = np.array([unit, step, purpose], dtype=np.uint32)
    return philox(counter, (seed & MASK, seed >> 32))


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of uint32 counters [n, 4] under two key words -> uint32 [n, 4]."""
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    for i in range(ROUNDS):
        k0, k1 = (np.uint64((word + i * weyl) & MASK) for word, weyl in zip(key, WEYL, strict=True))
        even, odd = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # 32 x 32 -> 64 bits
        c0, c1 = (odd >> np.uint64(32)) ^ c1 ^ k0, odd & np.uint64(MASK)
        c2, c3 = (even >> np.uint64(32)) ^ c3 ^ k1, even & np.uint64(MASK)
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def box_muller(words: np.ndarray) -> np.ndarray:
    """float32 [n, 4] of uint32 [n, 4]: words (0, 1) make normals 0 and 1, words (2, 3) make 2 and 3.

    r = sqrt(-2 ln u), u = (word / 2^8 + 1) 2^-24 in (0, 1]; angle = 2 pi (word' / 2^8) 2^-24, all in fp32 of 24 bits,
    exact until the angle's one rounding. ln, sqrt, cos, sin are evaluated in fp64 and rounded, so that this reference
    does not depend on which vector instructions numpy finds; an engine may use its own fp32 ones.
    """
    pairs = (words >> np.uint32(8)).reshape(-1, 2, 2)
    u = (pairs[..., 0] + np.uint32(1)).astype(np.float32) * np.float32(2**-24)
    angle = pairs[..., 1].astype(np.float32) * np.float32(2**-24) * np.float32(2 * np.pi)
    log = np.log(u.astype(np.float64)).astype(np.float32)
    r = np.sqrt(np.float32(-2) * log)
    cos, sin = (f(angle.astype(np.float64)).astype(np.float32) for f in (np.cos, np.sin))
    return np.stack([r * cos, r * sin], axis=-1).reshape(-1, 4)
