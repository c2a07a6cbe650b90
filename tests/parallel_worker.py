"""What two processes do in tests/test_parallel.py; torchrun starts it."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from training_fixture import Noise, network, small

from cfrt.config import ModelConfig
from training import bidirectional, cd, data, dmd, loop, parallel, teacher
from training.loop import Average, Stage
from training.network import Network, frozen

CONFIG = loop.Config(micros=2, log_every=1, save_seconds=0.0, keep=9, device="cpu")
STEPS = 4


def stages(model: ModelConfig) -> dict[str, tuple[Stage, Average]]:
    """Every kind of loss and optimiser: Muon and AdamW, an average that is a network, rollouts and two networks."""
    clips = Noise(model)
    ar = teacher.Stage(teacher.Config(steps=STEPS, batch=2, starts=3, lr=1e-2), model, clips, network(model))
    consistent = cd.Stage(cd.Config(steps=STEPS, batch=2, levels=4, lr=1e-2), model, clips, network(model))
    draw = partial(data.prompts, config=data.Config(units=model.trained_frames))
    config = dmd.Config(steps=STEPS, batch=2, critic_warmup=1, critic_updates=1, lr=2e-3, critic_lr=2e-3)
    matched = dmd.Stage(config, model, draw, network(model), network(model, 1))
    return {
        "teacher": (ar, Average(ar.student, 0.9)),
        "cd": (consistent, consistent.average),
        "dmd": (matched, Average(matched.student, 0.9)),
    }


def train(out: Path, config: loop.Config = CONFIG) -> None:
    """All stages, each in its folder."""
    for name, (stage, average) in stages(small()).items():
        loop.run(stage, out / name, seed=2, average=average, config=config)


def sample(folder: Path) -> None:
    """bf16 compute and recomputed blocks, from values that the first process alone knows."""
    model = small()
    with torch.device("meta"):
        start = Network(model)
    stage = bidirectional.Stage(bidirectional.Config(steps=2, batch=2), model, Noise(model), start)
    average = Average(stage.student, 0.9)
    config = replace(CONFIG, precision="bf16", checkpointing=True)
    parallel.place(start, parallel.device("cpu"), "bf16", constant=False)
    parallel.fill(start, network(model).state_dict() if parallel.first() else {})
    constant = frozen(network(model))
    parallel.place(constant, parallel.device("cpu"), "bf16", constant=True)
    assert all(p.dtype == torch.bfloat16 for p in constant.parameters())
    loop.run(stage, folder, seed=2, average=average, config=config)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with parallel.processes():
        out = Path(sys.argv[1])
        assert parallel.count() == 2
        train(out / "two")
        train(out / "one-then-two")
        sample(out / "bf16")
