"""A model of the official checkpoints' kind at a size of seconds: Wan's autoencoder, umT5's text, random weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from student_fixture import small_config, weights_of
from umt5_fixture import save_umt5

from benchmarks.full_size_video import randomise
from cfrt.config import AutoencoderConfig, ModelConfig, TextConfig
from cfrt.nn.dit import CausalDiT
from cfrt.nn.taehv import TAEHV
from cfrt.nn.wan_vae import WanVAE
from cfrt.weights import save_model

FOX, SNOW, BAD = "a red fox in the snow", "the snow runs", "a blue a a a"


def wan_config(**changes: object) -> ModelConfig:
    """16 x 32 pixels, two tokens a latent frame."""
    config = small_config(
        name="small-wan",
        latent_grid=(2, 4),
        text=TextConfig(kind="umt5", width=16, length=12, negative=BAD),
        autoencoder=AutoencoderConfig(
            kind="wan", latent_channels=4, spatial=8, widths=(4, 6, 8, 8),
            mean=(0.1, -0.2, 0.3, 0.0), std=(1.5, 0.5, 1.0, 2.0),
        ),
        shift=5.0,
        rope_theta=10000.0,
    )  # fmt: skip
    return replace(config, **changes)  # type: ignore[arg-type]


def wan_weights(config: ModelConfig, *, taehv: bool = False) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    modules: dict[str, torch.nn.Module] = {"dit": CausalDiT(config), "autoencoder": WanVAE(config.autoencoder)}
    if taehv:
        modules["taehv"] = randomise(TAEHV(replace(config.autoencoder, kind="taehv", widths=())))
    return weights_of(modules)


def save_wan(folder: Path, config: ModelConfig, *, taehv: bool = False) -> Path:
    """A model folder that also holds the text encoder."""
    save_model(folder, config, wan_weights(config, taehv=taehv))
    return save_umt5(folder)
