"""A model of the official checkpoints' kind at a size of seconds: Wan's autoencoder, umT5's text, random weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from umt5_fixture import save_umt5

from cfrt.config import AutoencoderConfig, ModelConfig, TextConfig
from cfrt.nn.dit import CausalDiT
from cfrt.nn.taehv import TAEHV
from cfrt.nn.wan_vae import WanVAE
from cfrt.weights import save_model

FOX, SNOW, BAD = "a red fox in the snow", "the snow runs", "a blue a a a"


def wan_config(**changes: object) -> ModelConfig:
    """16 x 32 pixels, two tokens a latent frame."""
    config = ModelConfig(
        name="small-wan",
        width=24,
        depth=2,
        heads=2,
        ffn=48,
        latent_channels=4,
        latent_grid=(2, 4),
        text=TextConfig(kind="umt5", width=16, length=12, negative=BAD),
        autoencoder=AutoencoderConfig(
            kind="wan", latent_channels=4, spatial=8, widths=(4, 6, 8, 8),
            mean=(0.1, -0.2, 0.3, 0.0), std=(1.5, 0.5, 1.0, 2.0),
        ),
        time_width=32,
        unit=1,
        window=4,
        trained_frames=6,
        steps=(1.0, 0.5),
        first_steps=(1.0, 0.75, 0.5, 0.25),
        shift=5.0,
    )  # fmt: skip
    return replace(config, **changes)  # type: ignore[arg-type]


def wan_weights(config: ModelConfig, *, taehv: bool = False) -> dict[str, np.ndarray]:
    """Weights under which everything matters: no layer is left at zero."""
    torch.manual_seed(0)
    modules: dict[str, torch.nn.Module] = {"dit": CausalDiT(config), "autoencoder": WanVAE(config.autoencoder)}
    if taehv:
        modules["taehv"] = TAEHV(replace(config.autoencoder, kind="taehv", widths=()))
    return {
        f"{prefix}.{name}": torch.where(tensor == 0, 0.1 * torch.randn_like(tensor), tensor).numpy()
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def save_wan(folder: Path, config: ModelConfig, *, taehv: bool = False) -> Path:
    """A model folder that also holds the text encoder."""
    save_model(folder, config, wan_weights(config, taehv=taehv))
    return save_umt5(folder)
