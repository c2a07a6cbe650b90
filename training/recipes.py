"""Recipes: one function each, returning everything a run needs. The table of what reproduces what.

| recipe | what | where |
| --- | --- | --- |
| tiny | the embedded student, 64x64, 4 steps, frame-wise | two CPU cores, hours: the card says how long |
| tiny-gpu | the same chain with five to ten times the clips | one GPU: docs/training-speed.md says how long |
| smoke | the same chain, every stage for seconds; the result is noise | CI |
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from cfrt.config import PRESETS, ModelConfig, TextConfig
from training import autoencoder, bidirectional, captions, data, decoder, dmd, evaluate, loop, phases, rounded, teacher

# In the class, `data` and `teacher` are its fields.
_Clips = data.Config
_Teacher = teacher.Config


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    model: ModelConfig
    seed: int = 1
    shards: str | None = None
    """Folder of one's own clips (`python -m training prepare`) instead of the world's."""
    ships: Literal["phases", "rounded", "dmd"] = "rounded"
    """The stage whose averaged weights become the student."""
    data: data.Config = field(default_factory=lambda: data.Config(clips=40_000))
    autoencoder: autoencoder.Config = field(default_factory=autoencoder.Config)
    score: bidirectional.Config = field(
        default_factory=lambda: bidirectional.Config(steps=5500, shift=5.0, first_weight=2.0, early_weight=2.0)
    )
    bidirectional: bidirectional.Config = field(default_factory=bidirectional.Config)
    teacher: teacher.Config = field(default_factory=lambda: teacher.Config(steps=14_400, ema=0.998))
    long: _Clips = field(default_factory=lambda: data.Config(clips=15_000, units=16))
    """Longer clips, for the second part of the AR teacher and for distillation."""
    teacher_long: _Teacher = field(
        default_factory=lambda: teacher.Config(steps=2550, batch=10, lr=1.2e-3, ema=0.998, resampled=0.6)
    )
    phases: phases.Config = field(default_factory=phases.Config)
    rounded: rounded.Config = field(default_factory=rounded.Config)
    decoder: decoder.Config = field(default_factory=decoder.Config)
    dmd: dmd.Config = field(default_factory=lambda: dmd.Config(steps=80, tau=(0.02, 0.6)))
    evaluate: evaluate.Config = field(default_factory=lambda: evaluate.Config(prompts=1000, long=32, long_units=121))
    run: loop.Config = field(default_factory=loop.Config)


def tiny() -> Recipe:
    """The embedded student."""
    table = PRESETS["tiny"]
    vocabulary = TextConfig(
        kind="table",
        width=table.text.width,
        length=captions.LENGTH,
        vocab=captions.VOCABULARY,
        ignored=captions.FILLERS,
    )
    return Recipe(name="tiny", model=replace(table, text=vocabulary))


def tiny_gpu() -> Recipe:
    """The same student where a step of 256 clips takes less than one of 16 on two cores."""
    return replace(
        tiny(),
        name="tiny-gpu",
        data=data.Config(clips=200_000),
        bidirectional=bidirectional.Config(steps=2000, batch=512),
        teacher=teacher.Config(steps=4000, batch=512, ema=0.998),
        score=bidirectional.Config(steps=2000, batch=512, shift=5.0, first_weight=2.0, early_weight=2.0),
        long=data.Config(clips=150_000, units=16),
        teacher_long=teacher.Config(steps=12_000, batch=256, ema=0.999, resampled=0.6, resampled_jumps=2, starts=512),
        phases=phases.Config(
            pairs=98_304,
            openings=262_144,
            piece=8192,
            steps=5000,
            batch=256,
            starts=512,
            lr=1.2e-3,
            ema=0.999,
        ),
        rounded=rounded.Config(steps=3000, answers=262_144, piece=2048, starts=4096),
        dmd=dmd.Config(
            steps=60,
            batch=512,
            scores="causal",
            guidance=2.0,
            guidance_later=1.0,
            tau=(0.02, 0.98),
            lr=2e-4,
            critic_lr=4e-4,
        ),
        run=loop.Config(precision="bf16", save_seconds=300.0),
    )


RECIPES = {"tiny": tiny, "tiny-gpu": tiny_gpu}


def smoke() -> Recipe:
    """Every stage of `tiny` for a few steps, to see that the chain holds."""
    return replace(
        tiny(),
        name="smoke",
        data=data.Config(clips=32),
        autoencoder=autoencoder.Config(steps=12, batch=4),
        bidirectional=bidirectional.Config(steps=6, batch=8),
        teacher=teacher.Config(steps=6, batch=4, starts=8),
        score=bidirectional.Config(steps=4, batch=8),
        decoder=decoder.Config(steps=2, batch=2, units=4),
        long=data.Config(clips=16, units=12),
        teacher_long=teacher.Config(steps=4, batch=4, starts=8, resampled=0.5),
        phases=phases.Config(pairs=8, openings=32, piece=4, steps=6, batch=4, starts=8),
        rounded=rounded.Config(steps=3, answers=16, piece=8, starts=8),
        dmd=dmd.Config(steps=2, batch=4, critic_warmup=1),
        evaluate=evaluate.Config(prompts=8, switches=8, pasts=2, futures=3, long=2, long_units=17),
    )
