"""A training step of the recipe tiny-gpu on a GPU: kernel by kernel, and as one CUDA graph (training/capture.py).

    python -m benchmarks.capture --json benchmarks/results/capture.json

Whole steps with optimiser and average, as the loop takes them, and replays of the graph alone; bf16, and TF32 for what
stays in fp32. Weights and latents are noise, which speed does not depend on; batches are made on the GPU, where a run
keeps its clips."""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from training import cd, data, dmd, loop, parallel, recipes, teacher
from training.network import Network

from . import machine
from .gpu import ask_card

RECIPE = recipes.tiny_gpu()
CLIPS = 4096
STEPS, WARM = 30, 4
"""Timed, and before them: the first is the one that is captured."""
CASES = (
    ("teacher_long", 256, False),
    ("teacher_long", 256, True),
    ("teacher_long", 512, True),
    ("teacher_long", 1024, True),
    ("cd", 256, True),
    ("cd", 512, True),
    ("dmd", 512, False),
)
"""Stage, clips of a step, captured. DMD's rollouts are not one graph: their kernels differ from unit to unit."""
Row = dict[str, Any]


def noise(folder: Path, clips: int, device: torch.device) -> data.Clips:
    config, model = replace(RECIPE.long, clips=clips), RECIPE.model
    plan = data.script(clips, config, torch.Generator().manual_seed(0))
    shape = (clips, config.units, model.latent_channels, *model.latent_grid)
    tensors = {"latents": torch.randn(shape).half(), "captions": plan.captions, "caption": plan.caption(config.units)}
    for number, first in enumerate(range(0, clips, data.SHARD)):
        shard = {name: x[first : first + data.SHARD].clone() for name, x in tensors.items()}
        loop.write_tensors(folder / f"{number:04d}.safetensors", shard)
    return data.Clips(folder, config, 1, device)


def stage(name: str, batch: int, clips: data.Clips) -> tuple[loop.Stage, loop.Average]:
    model, student = RECIPE.model, Network(RECIPE.model)
    if name == "teacher_long":
        config = replace(RECIPE.teacher_long, batch=batch, starts=2 * batch)
        return teacher.Stage(config, model, clips, student), loop.Average(student, config.ema)
    if name == "cd":
        config = cd.Config(batch=batch, guidance_later=1.5, levels=48, resampled=0.6, resampled_jumps=2)
        made = cd.Stage(config, model, clips, Network(model), student)
        return made, made.average
    rollouts = replace(RECIPE.dmd, batch=batch, critic_warmup=0)
    prompts = partial(data.prompts, config=RECIPE.long)
    return dmd.Stage(rollouts, model, prompts, student, Network(model)), loop.Average(student, rollouts.ema)


def measured(name: str, batch: int, captured: bool, clips: data.Clips, config: loop.Config, steps: int = STEPS) -> Row:
    """Seconds: of the first step, of those that follow, of the graph alone."""
    made, average = stage(name, batch, clips)
    loop.place(made, average, config)
    optimisers, _ = made.optimisers(), average.weights
    graph = loop.capture(made, replace(config, capture=captured))

    def take(first: int, count: int) -> float:
        began = time.perf_counter()
        for index in range(first, first + count):
            loop.take(made, optimisers, index, 1, config, graph)
            average.update(made.student)
        wait()
        return (time.perf_counter() - began) / count

    first = take(0, 1)
    take(1, WARM - 1)
    row: Row = {"stage": name, "batch": batch, "captured": graph is not None, "first": first, "step": take(WARM, steps)}
    if graph is not None and graph.graph is not None:
        began = time.perf_counter()
        for _ in range(steps):
            graph.graph.replay()
        wait()
        row["graph"] = (time.perf_counter() - began) / steps
    return row


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(config: loop.Config) -> list[Row]:
    rows = list[Row]()
    with tempfile.TemporaryDirectory() as folder:
        clips = noise(Path(folder), CLIPS, parallel.device(config.device))
        for name, batch, captured in CASES:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            steps = STEPS if captured or name != "dmd" else 3
            row = measured(name, batch, captured, clips, config, steps)
            rows.append({**row, "allocated_peak": torch.cuda.max_memory_allocated()})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("capture: expected a GPU, PyTorch sees none, and a CPU captures nothing")
    torch.set_float32_matmul_precision("high")
    found = {**machine.header(), "card": ask_card(), "units": RECIPE.long.units, "rows": run(RECIPE.run)}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
