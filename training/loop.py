"""The one training loop: reseeds from progress, keeps an exponential average, writes checkpoints from which it goes
on bit for bit.

A stage brings its networks, its optimisers and its losses (they live there and nowhere else), and says in which order a
step updates what; the loop brings everything that all stages share. A step is made of micro-batches, and the randomness
of micro-batch m depends on (seed, m) alone: a run that is killed and started again equals one that was never stopped,
and two processes with one micro-batch each equal one process with two. No generator state is saved."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

LOG_EVERY = 25  # steps averaged into one line of stats.jsonl
SAVE_SECONDS = 60.0

Stats = dict[str, float]
Optimisers = Mapping[str, torch.optim.Optimizer]


@dataclass(frozen=True)
class Micro:
    """One micro-batch: its number in the whole run, and the randomness that belongs to it."""

    index: int
    generator: torch.Generator


Loss = Callable[[Micro], tuple[Tensor, Stats]]


@dataclass(frozen=True)
class Update:
    """One descent of one network: the mean of `loss` over the step's micro-batches, at learning rate `lr`."""

    network: str
    lr: float
    loss: Loss


class Stage(Protocol):
    """What a stage gives the loop."""

    name: str
    steps: int

    @property
    def student(self) -> nn.Module:
        """What is averaged and handed on."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Everything trained, `student` among it."""

    @property
    def frozen(self) -> Mapping[str, nn.Module]:
        """Networks that are only asked."""

    def optimisers(self) -> Mapping[str, Optimisers]:
        """New optimisers of each trained network: made after the loop has placed and wrapped the networks."""

    def step(self, index: int) -> Iterator[Update]:
        """The updates of one step, in order."""


class Average:
    """Exponential moving average of a network's weights, with a warm-up so that the first steps are forgotten."""

    def __init__(self, network: nn.Module, decay: float, warm: bool = True) -> None:
        self.decay, self.warm, self.updates = decay, warm, 0
        self.weights = {name: value.detach().clone() for name, value in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warm else self.decay
        torch._foreach_lerp_(list(self.weights.values()), list(network.state_dict().values()), 1 - decay)


def cosine(index: int, steps: int, *, warmup: int = 50, floor: float = 0.01) -> float:
    """Learning-rate factor of a step: linear warm-up, then half a cosine down to `floor`."""
    ramp = min(1.0, (index + 1) / warmup)
    return ramp * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, index / max(1, steps)))))


def constant(index: int, steps: int, *, warmup: int = 20) -> float:
    return min(1.0, (index + 1) / warmup)


def step_generator(seed: int, index: int) -> torch.Generator:
    """The randomness of one step; also reseeds torch's global generator for what takes none."""
    mixed = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63
    torch.manual_seed(mixed)
    return torch.Generator().manual_seed(mixed)


def descend(
    network: nn.Module, optimisers: Optimisers, update: Update, micros: Sequence[Micro], clip: float = 1.0
) -> Stats:
    """One update: gradients averaged over the micro-batches, clipped, and every optimiser's step. Returns what the loss
    reports, averaged, and the gradient's norm before clipping."""
    for optimiser in optimisers.values():
        for group in optimiser.param_groups:
            group["lr"] = update.lr
        optimiser.zero_grad(set_to_none=True)
    reports = []
    for micro in micros:
        loss, report = update.loss(micro)
        (loss / len(micros)).backward()
        reports.append(report)
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), clip).item()
    for optimiser in optimisers.values():
        optimiser.step()
    label = "norm" if update.network == "student" else f"{update.network}_norm"
    return {**_means(reports), label: norm}


def take(stage: Stage, optimisers: Mapping[str, Optimisers], index: int, seed: int, micros: int = 1) -> Stats:
    """Step `index`: all its updates, on the same micro-batches."""
    numbers = range(index * micros, (index + 1) * micros)
    batches = [Micro(number, step_generator(seed, number)) for number in numbers]
    stats: Stats = {}
    for update in stage.step(index):
        stats |= descend(stage.networks[update.network], optimisers[update.network], update, batches)
    return stats


def run(
    stage: Stage,
    folder: Path,
    *,
    seed: int,
    average: Average,
    after: Callable[[int], None] | None = None,
    micros: int = 1,
) -> None:
    """Train `stage` to its end, going on from `folder/checkpoint.safetensors` if it is there; `micros` micro-batches
    make a step.

    Writes stats.jsonl (one line per LOG_EVERY steps) and, at the end, average.safetensors. `after(step)` is called
    after every checkpoint, for previews."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.safetensors"
    optimisers = stage.optimisers()
    start, spent = restore(checkpoint, stage, optimisers, average) if checkpoint.exists() else (0, 0.0)
    _forget_after(start, folder / "stats.jsonl")
    began, saved, sums = time.monotonic() - spent, time.monotonic(), []
    bar = tqdm(
        range(start, stage.steps), initial=start, total=stage.steps, desc=stage.name, disable=not sys.stderr.isatty()
    )
    for index in bar:
        sums.append(take(stage, optimisers, index, seed, micros))
        average.update(stage.student)
        done = index + 1
        if done % LOG_EVERY == 0 or done == stage.steps:
            row = _log(folder / "stats.jsonl", done, time.monotonic() - began, sums)
            bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k not in ("step", "seconds")})
            sums = []
            if time.monotonic() - saved > SAVE_SECONDS or done == stage.steps:
                save(checkpoint, stage, optimisers, average, done, time.monotonic() - began)
                saved = time.monotonic()
                if after is not None:
                    after(done)
    write_tensors(folder / "average.safetensors", average.weights)


def _forget_after(step: int, path: Path) -> None:
    """Drop the rows that a killed run wrote after its last checkpoint: those steps will be done again."""
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step]
    if len(kept) < len(rows):
        path.write_text("".join(kept))


def _log(path: Path, step: int, seconds: float, sums: list[Stats]) -> dict[str, float]:
    means = {key: round(value, 6) for key, value in _means(sums).items()}
    row = {"step": step, "seconds": round(seconds, 1), **means}
    with path.open("a") as lines:
        lines.write(json.dumps(row) + "\n")
    return row


def _means(rows: Sequence[Stats]) -> Stats:
    keys = sorted({key for row in rows for key in row})
    return {key: sum(row[key] for row in rows if key in row) / sum(key in row for row in rows) for key in keys}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, temporary, metadata)
    temporary.chmod(0o644)  # the library makes files that only their owner may read
    os.replace(temporary, path)


def save(
    path: Path, stage: Stage, optimisers: Mapping[str, Optimisers], average: Average, step: int, seconds: float
) -> None:
    """A checkpoint: networks, optimiser moments, average and progress in one safetensors file."""
    tensors: dict[str, Tensor] = {f"average/{name}": value for name, value in average.weights.items()}
    scalars: dict[str, dict[str, float]] = {}
    for label, network in stage.networks.items():
        tensors |= {f"network/{label}/{name}": value for name, value in network.state_dict().items()}
    for label, optimiser in _labelled(optimisers):
        for index, state in optimiser.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimiser/{label}/{index}/{name}"] = value
                else:
                    scalars.setdefault(f"{label}/{index}", {})[name] = value
    progress = {"step": step, "seconds": seconds, "updates": average.updates, "scalars": scalars}
    write_tensors(path, {k: v.clone() for k, v in tensors.items()}, {"progress": json.dumps(progress)})


def _labelled(optimisers: Mapping[str, Optimisers]) -> list[tuple[str, torch.optim.Optimizer]]:
    return [(f"{network}.{label}", o) for network, group in optimisers.items() for label, o in group.items()]


def restore(path: Path, stage: Stage, optimisers: Mapping[str, Optimisers], average: Average) -> tuple[int, float]:
    """Load a checkpoint into the stage; returns (steps done, seconds spent)."""
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
    tensors = load_file(path)
    average.weights = {
        name: tensors[f"average/{name}"] for name in average.weights
    }  # the file sorts names, updates go by order
    average.updates = progress["updates"]
    for label, network in stage.networks.items():
        prefix = f"network/{label}/"
        network.load_state_dict(
            {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        )
    for label, optimiser in _labelled(optimisers):
        state: dict[int, dict[str, object]] = {}
        for name, value in tensors.items():
            kind, *rest = name.split("/")
            if kind == "optimiser" and rest[0] == label:
                state.setdefault(int(rest[1]), {})[rest[2]] = value
        for key, values in progress["scalars"].items():
            owner, index = key.split("/")
            if owner == label:
                state.setdefault(int(index), {}).update(values)
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return progress["step"], progress["seconds"]
