"""Latents on a GPU: sums of buffers and noise, each times a number, that are computed when a pass needs them.

What happens between two passes is arithmetic (`cfrt.flow`): + and products with floats. Written down instead of done, a
whole step of it is one kernel: (1 - s) x0 + s e is read off as what the re-noise kernel computes, noise included. An
Euler step is the sum of two buffers, x and x0, if x is settled before: else that of all estimates so far, and noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .gpu import Block, Gpu, Stream


@dataclass(frozen=True)
class Noise:
    """Standard normals that a kernel makes in place."""

    unit: int
    step: int


@dataclass(eq=False)
class Buffer:
    """fp32 numbers on the GPU. Its memory goes back to the pool with it."""

    memory: Block
    pool: "Pool"

    def __del__(self) -> None:
        self.pool.give(self.memory)


class Pool:
    """Memory that is asked for again and again, without waiting for the GPU as freeing it would."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._free: dict[int, list[Block]] = {}
        self._closed = False

    def take(self, size: int) -> Buffer:
        free = self._free.get(size)
        return Buffer(free.pop() if free else self._gpu.memory(size), self)

    def give(self, memory: Block) -> None:
        if not self._closed:
            self._free.setdefault(memory.bytes, []).append(memory)

    def close(self) -> None:
        """What is lent out is freed when it is let go of."""
        self._closed = True
        self._free.clear()


Term = Buffer | Noise


class GpuLatents:
    """One unit of latents: the sum of `terms`."""

    def __init__(self, terms: Mapping[Term, float]) -> None:
        self.terms = dict(terms)

    def __add__(self, other: "GpuLatents") -> "GpuLatents":
        terms = dict(self.terms)
        for term, factor in other.terms.items():
            terms[term] = terms.get(term, 0.0) + factor
        return GpuLatents(terms)

    def __mul__(self, factor: float) -> "GpuLatents":
        return GpuLatents({term: factor * own for term, own in self.terms.items()})

    __rmul__ = __mul__

    def __sub__(self, other: "GpuLatents") -> "GpuLatents":
        return self + -1.0 * other

    def __truediv__(self, divisor: float) -> "GpuLatents":
        return self * (1.0 / divisor)

    @property
    def nbytes(self) -> int:
        """On the GPU."""
        return sum(term.memory.bytes for term in self.terms if isinstance(term, Buffer))

    def __repr__(self) -> str:
        return f"GpuLatents({len(self.terms)} terms)"


class Sums:
    """Computes latents of `count` numbers on a stream."""

    def __init__(self, kernels: Any, pool: Pool, stream: Stream, count: int, noise: Any) -> None:
        self._kernels, self.pool, self._stream, self._count = kernels, pool, stream, count
        self._noise = noise  # (unit, step) -> what the kernel names noise by

    def new(self) -> Buffer:
        return self.pool.take(4 * self._count)

    def into(self, out: int, latents: GpuLatents) -> None:
        """The sum, at an address that is not one of its terms'."""
        noises = [(term, factor) for term, factor in latents.terms.items() if isinstance(term, Noise)]
        buffers = [(term.memory.address, factor) for term, factor in latents.terms.items() if isinstance(term, Buffer)]
        if len(noises) == 1 and len(buffers) == 1 and buffers[0][1] == 1 - noises[0][1]:
            self._renoise(out, buffers[0][0], noises[0][1], noises[0][0])
            return
        if not buffers and [factor for _, factor in noises] == [1]:
            self._pure(out, noises[0][0])
            return
        made = [(self.new(), noise, factor) for noise, factor in noises]
        for buffer, noise, _ in made:
            self._pure(buffer.memory.address, noise)
        self._add(out, buffers + [(buffer.memory.address, factor) for buffer, _, factor in made])

    def x0(self, out: int, x: int, v: int, s: float) -> None:
        """x0 = x - s v, of addresses."""
        self._add(out, [(x, 1.0), (v, -s)])

    def single(self, latents: GpuLatents) -> Buffer:
        """The sum as one buffer, which nobody writes to: its only term, where there is one."""
        if len(latents.terms) == 1:
            ((term, factor),) = latents.terms.items()
            if isinstance(term, Buffer) and factor == 1:
                return term
        made = self.new()
        self.into(made.memory.address, latents)
        return made

    def settle(self, latents: GpuLatents) -> None:
        """Computes the sum now, and is done with its terms: it is one buffer from here on."""
        latents.terms = {self.single(latents): 1.0}

    def _pure(self, out: int, noise: Noise) -> None:
        """All noise: what it is mixed with must be a number, or 0 times it would be none."""
        self._stream.zero(out, 4 * self._count)
        self._renoise(out, out, 1.0, noise)

    def _renoise(self, out: int, x0: int, s: float, noise: Noise) -> None:
        self._kernels.renoise(
            out, x0, self._count, "float32", s, self._noise(noise.unit, noise.step), stream=self._stream.handle
        )

    def _add(self, out: int, terms: list[tuple[int, float]]) -> None:
        """The first two at once, each further one onto what is there."""
        (x, a), *rest = terms
        for y, b in rest or [(x, 0.0)]:
            self._kernels.combine(out=out, x=x, a=a, y=y, b=b, count=self._count, stream=self._stream.handle)
            x, a = out, 1.0
