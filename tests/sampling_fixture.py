"""A unit from noise to clean, in the plainest way and for both solvers: what streams, engines and exports are held
against. It shares the arithmetic of time with the library, and no loop."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from cfrt import flow
from cfrt.config import ModelConfig
from cfrt.engines import Engine

EULER = {"solver": "euler", "steps": (1.0, 0.75, 0.5, 0.25), "first_steps": (1.0, 0.8, 0.6, 0.4, 0.2)}
"""Of a student that follows the flow; its first unit takes more and other steps."""


def sample(
    config: ModelConfig, unit: int, noise: Callable[[int, int], Any], denoise: Callable[[Any, float], Any], number: int
) -> Any:
    """Clean latents of a unit, the `number`-th that is made. noise: of a unit and step; denoise: x0 of x at s."""
    levels = flow.sigmas(config.unit_steps(number), config.shift)
    x = noise(unit, 0)
    x0 = denoise(x, levels[0])
    for step, (above, s) in enumerate(pairwise(levels), 1):
        if config.solver == "renoise":
            x = (1 - s) * x0 + s * noise(unit, step)
        else:
            x = x + (s - above) * ((x - x0) / above)
        x0 = denoise(x, s)
    return x0


def sampled(engine: Engine, config: ModelConfig, unit: int, commit: Any = None, number: int | None = None) -> Any:
    """The same by an engine, which commits the unit before in its first pass if that is given."""
    owed = [commit]  # by the first pass alone

    def denoise(x: Any, s: float) -> Any:
        return engine.denoise(x, 1000 * s, unit, commit=owed.pop() if owed else None)

    return sample(config, unit, engine.noise, denoise, unit if number is None else number)
