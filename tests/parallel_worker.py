"""What two processes do in tests/test_parallel.py; torchrun starts it."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from training_fixture import Noise, network, small

from cfrt.config import ModelConfig
from training import cd, data, dmd, loop, parallel, teacher, wan, wan_run
from training.loop import Average, Stage

CONFIG = loop.Config(micros=2, log_every=1, save_seconds=0.0, keep=9, device="cpu")
STEPS = 4


MODEL = replace(small(), depth=1)  # the Wan recipe below has more blocks


def stages(model: ModelConfig = MODEL) -> dict[str, tuple[Stage, Average]]:
    """Every kind of loss and optimiser: Muon and AdamW, an average that is a network, rollouts and two networks."""
    clips = Noise(model)
    ar = teacher.Stage(teacher.Config(steps=STEPS, batch=2, starts=3, lr=1e-2), model, clips, network(model))
    consistent = cd.Stage(cd.Config(steps=STEPS, batch=2, levels=4, lr=1e-2), model, clips, network(model))
    draw = partial(data.prompts, config=data.Config(units=model.trained_frames))
    config = dmd.Config(steps=STEPS, batch=2, critic_warmup=0, critic_updates=1, lr=2e-3, critic_lr=2e-3)
    matched = dmd.Stage(config, model, draw, network(model), network(model, 1))
    return {
        "teacher": (ar, Average(ar.student, 0.9)),
        "cd": (consistent, consistent.average),
        "dmd": (matched, Average(matched.student, 0.9)),
    }


def train(out: Path, config: loop.Config = CONFIG) -> None:
    """All stages, each in its folder."""
    for name, (stage, average) in stages().items():
        loop.run(stage, out / name, seed=2, average=average, config=config)


def smoke(out: Path) -> None:
    """A Wan recipe: bf16 compute, recomputed blocks, and values that the first process alone knows."""
    wan_run.smoke(wan.reduced(wan.framewise()), out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with parallel.processes():
        out = Path(sys.argv[1])
        assert parallel.count() == 2
        train(out / "two")
        train(out / "one-then-two")
        smoke(out / "wan-two")
