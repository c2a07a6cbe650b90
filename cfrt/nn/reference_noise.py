"""The noise of the released inference code, draw by draw, for `ModelConfig.reference_compat`.

There, one generator seeded once gives the noise of the whole clip first, [1, T, C, h, w] in the dtype of the network,
and then, unit by unit, that of every re-noising, [F, C, h, w]. So a number depends on all that were drawn before it:
units come in order and once, and a clip has an end. The streams of this library have neither limit (`cfrt.noise`)."""

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import EngineError


class ReferenceNoise:
    """`prefix` latent frames of the clip are given and not drawn."""

    def __init__(self, config: ModelConfig, seed: int, dtype: torch.dtype, device: torch.device, prefix: int) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._config, self._dtype, self._device, self._prefix = config, dtype, device, prefix
        self._clip = self._draw(1, config.trained_frames - prefix)
        self._next = (prefix // config.unit, 0)

    def __call__(self, unit: int, step: int) -> Tensor:
        """[1, F, C, h, w] for a pass; EngineError for one out of order, and beyond the clip."""
        f, frames = self._config.unit, self._config.trained_frames
        if (unit + 1) * f > frames:
            raise EngineError(
                f"reference_compat draws the noise of a clip of {frames} latent frames at once, and unit {unit} is "
                "beyond it; ask for fewer frames, or leave reference_compat out"
            )
        if (unit, step) != self._next:
            raise EngineError(
                f"reference_compat draws noise in one order: expected unit and step {self._next}, got {(unit, step)}; "
                "changes of prompt and rewinds need reference_compat left out"
            )
        own = unit - self._prefix // f  # the unit after the given ones has the step list of a first unit
        last = step + 1 == len(self._config.unit_steps(own)) or self._config.solver != "renoise"
        self._next = (unit + 1, 0) if last else (unit, step + 1)
        if step == 0:
            start = unit * f - self._prefix
            return self._clip[:, start : start + f]
        return self._draw(f)[None]

    def _draw(self, *sizes: int) -> Tensor:
        shape = (*sizes, self._config.latent_channels, *self._config.latent_grid)
        return torch.randn(shape, generator=self._generator, dtype=self._dtype, device=self._device)
