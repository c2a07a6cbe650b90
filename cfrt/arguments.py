"""What a stream is asked for, read and checked: each error says what was expected before any work is done."""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from .config import ModelConfig
from .errors import EngineError, VideoError
from .text import Text, UMT5Text


def changed(config: ModelConfig, guidance: float | None, schedule: str | None, reference_compat: bool) -> ModelConfig:
    """The config with what a stream may choose."""
    if guidance is not None:
        config = replace(config, guidance=guidance)
    if schedule is not None:
        config = replace(config, schedule=schedule)
    return config.as_reference() if reference_compat else config


def count(config: ModelConfig, n: int | None, seconds: float | None) -> int | None:
    """Frames asked for; None for all there will ever be."""
    if n is not None and seconds is not None:
        raise ValueError("expected n or seconds, got both")
    if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"expected seconds >= 0, got {seconds}")
    if n is not None and n < 0:
        raise ValueError(f"expected n >= 0 frames, got {n}")
    return n if seconds is None else round(seconds * config.fps)


def beat(config: ModelConfig, fps: float | str | None, keep: str) -> float | None:
    """Frames a second, None for as fast as they are made."""
    if keep not in ("all", "latest"):
        raise ValueError(f'expected keep="all" or "latest", got {keep!r}')
    if fps == "max":
        if keep == "latest":
            raise ValueError('keep="latest" needs a beat: give fps a number, or None for the model\'s own')
        return None
    wanted = config.fps if fps is None else fps
    if isinstance(wanted, str) or not (math.isfinite(wanted) and wanted > 0):
        raise ValueError(f'expected fps > 0, "max" or None, got {fps!r}')
    return float(wanted)


def reader(config: ModelConfig, text: Text | str | os.PathLike[str]) -> Text:
    """What reads prompts, given itself or as the folder of umT5's files."""
    if not isinstance(text, str | os.PathLike):
        return text
    if config.text.kind != "umt5":
        raise EngineError(f"{config.name!r} reads through its own table; there is no text encoder to give it")
    return UMT5Text(config.text, [Path(text).expanduser()])


def continuation(config: ModelConfig, image: np.ndarray | None, prefix: np.ndarray | None) -> np.ndarray | None:
    """The pictures that a stream goes on from, (T, H, W, 3) uint8, checked against the model; None for none."""
    height, width = config.frame_size
    if image is not None and prefix is not None:
        raise ValueError("expected image or prefix, got both")
    if image is not None:
        if config.unit != 1:
            raise EngineError(
                f"only a frame-wise model can start from a picture; {config.name!r} makes units of {config.unit} "
                f"latent frames, so give it a film of {config.first_frame(1)} pictures or more as prefix"
            )
        if not isinstance(image, np.ndarray) or image.shape != (height, width, 3) or image.dtype != np.uint8:
            got = f"{image.shape} {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
            raise VideoError(
                f"expected a picture ({height}, {width}, 3) uint8, got {got}; "
                f"cfrt.video.read_picture(path, ({height}, {width})) makes one"
            )
        return image[None]
    if prefix is None:
        return None
    if not isinstance(prefix, np.ndarray) or prefix.shape[1:] != (height, width, 3) or prefix.dtype != np.uint8:
        got = f"{prefix.shape} {prefix.dtype}" if isinstance(prefix, np.ndarray) else type(prefix).__name__
        raise VideoError(f"expected pictures (T, {height}, {width}, 3) uint8, got {got}")
    units = config.unit_at(len(prefix) - 1) + 1
    if len(prefix) == 0 or config.first_frame(units) != len(prefix):
        fitting = ", ".join(str(config.first_frame(n)) for n in (1, 2, 3, max(4, units)))
        raise VideoError(f"expected as many pictures as whole units have ({fitting}, ...), got {len(prefix)}; cut some")
    return prefix
