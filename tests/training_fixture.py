"""Stages small enough for a test of the loop, on clips of noise under the world's captions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from cfrt.config import ModelConfig
from training import cd, data, loop, recipes
from training.data import Batch, Prompts
from training.network import Network


def small(width: int = 32, frames: int = 4) -> ModelConfig:
    """The tiny model, smaller: four latent frames of one token."""
    return replace(
        recipes.tiny().model,
        width=width,
        depth=2,
        heads=1,
        ffn=width,
        latent_grid=(2, 2),
        window=frames,
        trained_frames=frames,
    )


def network(model: ModelConfig, seed: int = 0) -> Network:
    """Random weights, none of them silent."""
    torch.manual_seed(seed)
    made = Network(model)
    for silent in (made.dit.head.head, *(block.cross_attn.o for block in made.dit.layers)):
        nn.init.normal_(silent.weight, std=0.05)
    return made


class Noise:
    """Clips of noise; batch `index` walks through them in order."""

    def __init__(self, model: ModelConfig, clips: int = 7) -> None:
        self.script = data.Config(clips=clips, units=model.trained_frames, unit=model.unit)
        generator = torch.Generator().manual_seed(3)
        shape = (clips, model.trained_frames, model.latent_channels, *model.latent_grid)
        self.all = Batch.of(torch.randn(shape, generator=generator), self.prompts(clips, generator))

    def __len__(self) -> int:
        return len(self.all)

    def batch(self, index: int, size: int) -> Batch:
        rows = torch.arange(index * size, (index + 1) * size) % len(self)
        return replace(self.all, **{name: getattr(self.all, name)[rows] for name in ("latents", "captions", "caption")})

    def prompts(self, size: int, generator: torch.Generator) -> Prompts:
        return data.prompts(size, generator, self.script)


def resumable(folder: Path) -> None:
    """A run of consistency distillation, whose target is its average, with a checkpoint after every step."""
    model = small()
    stage = cd.Stage(cd.Config(steps=12, batch=2, levels=4), model, Noise(model), network(model))
    config = loop.Config(micros=2, log_every=1, save_seconds=0.0)
    loop.run(stage, folder, seed=5, average=stage.average, config=config)
