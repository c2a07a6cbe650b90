"""The autoencoder of a model, by its kind: what turns pictures into latents and back, whole or as a stream."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from ..config import AutoencoderConfig
from ..weights import match
from .autoencoder import Autoencoder
from .taehv import TAEHV
from .wan_vae import WanVAE

Codec = Autoencoder | WanVAE | TAEHV
"""Each decodes as a stream: `decode(latents, state) -> pixels, state`. TAEHV does not encode."""
KINDS: dict[str, type[Codec]] = {"tiny": Autoencoder, "wan": WanVAE, "taehv": TAEHV}


def codec(config: AutoencoderConfig, arrays: Mapping[str, np.ndarray]) -> Codec:
    """The autoencoder with these weights, by its published names; WeightsError when they do not fit."""
    with torch.device("meta"):
        module = KINDS[config.kind](config)
    if isinstance(module, TAEHV):  # the released file has an encoder too
        arrays = {name: array for name, array in arrays.items() if not name.startswith("encoder.")}
    match({name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}, arrays)
    module.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()}, assign=True)
    return module


def tiny_decoder(config: AutoencoderConfig, arrays: Mapping[str, np.ndarray]) -> Codec:
    """TAEHV of the released size, for the latents of Wan's autoencoder."""
    return codec(replace(config, kind="taehv", widths=()), arrays)
