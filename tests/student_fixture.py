"""A student with random weights, for every test of the runtime that cares about behaviour and not about beauty."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cfrt.config import PRESETS, AutoencoderConfig, ModelConfig, TextConfig
from cfrt.nn.autoencoder import Autoencoder
from cfrt.nn.dit import CausalDiT
from cfrt.weights import save_model

VOCAB = {"red": 1, "crimson": 1, "blue": 2, "circle": 3, "square": 4, "left": 5, "right": 6, "night": 7, "night sky": 7}
IGNORED = ("a", "the", "moving", "over", "at")
RED, BLUE = "a red circle moving left", "a blue square moving right"


def small_config(**changes: object) -> ModelConfig:
    """A model of a few thousand parameters: 32 x 32 pixels, one token a latent frame."""
    config = ModelConfig(
        name="small",
        width=24,
        depth=2,
        heads=2,
        ffn=48,
        latent_channels=4,
        latent_grid=(2, 2),
        text=TextConfig(kind="table", width=16, length=4, vocab=VOCAB, ignored=IGNORED),
        autoencoder=AutoencoderConfig(kind="tiny", latent_channels=4, spatial=16, widths=(8, 8, 8, 8, 8, 8)),
        time_width=32,
        unit=1,
        window=4,
        trained_frames=6,
        steps=(1.0, 0.5),
        first_steps=(1.0, 0.75, 0.5, 0.25),
        shift=3.0,
        rope_theta=100.0,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def tiny_config() -> ModelConfig:
    """The size of the embedded student, with a small vocabulary."""
    tiny = PRESETS["tiny"]
    widths = tiny.autoencoder.widths or (64, 96, 128, 128, 96, 64)
    return replace(
        tiny,
        text=replace(tiny.text, vocab=VOCAB, ignored=IGNORED),
        autoencoder=replace(tiny.autoencoder, widths=widths),
    )


def weights_of(modules: Mapping[str, nn.Module]) -> dict[str, np.ndarray]:
    """The modules' weights under their prefixes, such that everything matters: no layer is left at zero."""
    return {
        f"{prefix}.{name}": torch.where(tensor == 0, 0.1 * torch.randn_like(tensor), tensor).numpy()
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    torch.manual_seed(seed)
    weights = weights_of({"dit": CausalDiT(config), "autoencoder": Autoencoder(config.autoencoder)})
    table = torch.randn(1 + max(config.text.vocab.values()), config.text.width)
    table[0] = 0
    return weights | {"text.table": table.numpy()}


def save_student(folder: Path, config: ModelConfig | None = None, seed: int = 0) -> Path:
    """A model folder with random weights."""
    config = small_config() if config is None else config
    save_model(folder, config, random_weights(config, seed))
    return folder
