"""The noise of the released inference code, draw by draw, for `ModelConfig.reference_compat`.

There, one generator seeded once gives the noise of the whole clip first, [1, T, C, h, w] in the dtype of the network,
and then, unit by unit, that of every re-noising, [F, C, h, w]; the rolling schedule draws that of a whole window for
each unit in it. So a number depends on all that were drawn before it: units come in order and once, and a clip has an
end. The streams of this library have neither limit (`cfrt.noise`)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..blocks import Span
from ..config import ModelConfig
from ..errors import EngineError

Call = tuple[int, int]
"""Unit and step, counted from the start of the stream."""


class ReferenceNoise:
    """`prefix` latent frames of the clip are given and not drawn."""

    def __init__(self, config: ModelConfig, seed: int, dtype: torch.dtype, device: torch.device, prefix: int) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._config, self._dtype, self._device, self._prefix = config, dtype, device, prefix
        self._clip = self._draw(1, config.trained_frames - prefix)
        self._given, self._count = prefix // config.unit, (config.trained_frames - prefix) // config.unit
        self._order = self._rolling() if config.schedule == "rolling" else self._sequential()
        self._next = next(self._order, None)

    def __call__(self, unit: int, step: int) -> Tensor:
        """[1, F, C, h, w] for a pass; EngineError for one out of order, and beyond the clip."""
        self._check(unit, step)
        self._next = next(self._order, None)
        f = self._config.unit
        if step == 0:
            start = unit * f - self._prefix
            return self._clip[:, start : start + f]
        first, end = self._window(unit - self._given, step)
        place = (unit - self._given - first) * f
        return self._draw((end - first) * f)[None, place : place + f]

    def _check(self, unit: int, step: int) -> None:
        frames = self._config.trained_frames
        if (unit + 1) * self._config.unit > frames:
            raise EngineError(
                f"reference_compat draws the noise of a clip of {frames} latent frames at once, and unit {unit} is "
                "beyond it; ask for fewer frames, or leave reference_compat out"
            )
        if (unit, step) != self._next:
            raise EngineError(
                f"reference_compat draws noise in one order: expected unit and step {self._next}, got {(unit, step)}; "
                "changes of prompt and rewinds need reference_compat left out"
            )

    def _sequential(self) -> Iterator[Call]:
        """Unit by unit; the one after the given ones has the step list of a first unit."""
        for unit in range(self._count):
            drawn = len(self._config.unit_steps(unit)) if self._config.solver == "renoise" else 1
            yield from ((self._given + unit, step) for step in range(drawn))

    def _rolling(self) -> Iterator[Call]:
        """Window by window: the unit that enters, then every one that goes on to another level, oldest first."""
        levels = len(self._config.steps)
        for window in range(self._count + levels - 1):
            if window < self._count:
                yield self._given + window, 0
            for unit in range(*self._units(window)):
                if (step := window - unit + 1) < levels:
                    yield self._given + unit, step

    def _window(self, unit: int, step: int) -> Span:
        """The units whose noise is drawn together, after the pass that takes `unit` to level `step`."""
        return self._units(unit + step - 1) if self._config.schedule == "rolling" else (unit, unit + 1)

    def _units(self, window: int) -> Span:
        return max(0, window - len(self._config.steps) + 1), min(self._count, window + 1)

    def _draw(self, *sizes: int) -> Tensor:
        shape = (*sizes, self._config.latent_channels, *self._config.latent_grid)
        return torch.randn(shape, generator=self._generator, dtype=self._dtype, device=self._device)
