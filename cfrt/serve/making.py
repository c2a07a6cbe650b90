"""How a server makes its streams, and what it tells visitors about them."""

import warnings
from typing import Any

import numpy as np

from ..stream import Stream
from ..text import PromptWarning
from .presets import presets
from .session import Make


def streams(**options: Any) -> tuple[Make, dict[str, Any]]:
    """How to make streams with these options of `cfrt.Stream`, and their card (`messages.ModelCard` without limits).

    Makes one, and so finds out before anybody comes whether it can be done, by which engine, and in which precision.
    What a model does not understand of a prompt is told to whoever wrote it; it is no warning of this process."""
    warnings.simplefilter("ignore", PromptWarning)

    def make(prompt: str, *, seed: int = 0, image: np.ndarray | None = None) -> Stream:
        return Stream(prompt, seed=seed, image=image, **options)

    with make("a red circle moving left") as probe:
        config = probe.config
        height, width = config.frame_size
        card = {
            "model": config.name,
            "engine": probe.engine,
            "precision": probe.precision,
            "height": height,
            "width": width,
            "fps": config.fps,
            "frames_per_unit": config.unit_frames(1),
            "unit_seconds": config.unit_frames(1) / config.fps,
            "starts_from_picture": config.unit == 1,
            "presets": presets(config),
        }
    return make, card
