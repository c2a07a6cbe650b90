"""What a precision of the native engine costs in quality: the embedded student's own card metrics, pair by pair.

    python -m benchmarks.quality --prompts 1024 --json benchmarks/results/quality.json

Every prompt is streamed with the same seed in every precision; the exact reader of the card says whether a clip shows
all that was asked, and in which share of its frames the object is valid. Differences to fp32 are of pairs, in points
(hundredths), with their 95 % interval. It changes nothing about speed that other work runs beside it.
"""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Generator, Tensor
from tqdm.auto import tqdm

from _cfrt import kernels
from cfrt import students
from cfrt.config import ModelConfig
from cfrt.weights import WEIGHTS_FILE
from training import sources
from training.card import machine
from training.evaluate import Config
from training.reader import read
from training.sources import Task

PRECISIONS = ("fp32", "bf16", "int8")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure the quality of each precision."""

    prompts: int = 1024
    """Clips of each precision, as long as the card's."""
    json: Path | None = None
    """Where to write the numbers."""


def judged(video: Tensor, task: Task) -> dict[str, Tensor]:
    """Of each clip, in points: shows everything that was asked; share of frames with a valid object."""
    reading = read(video)
    followed = (reading.factors == task.wanted[:, 0]).all(1)
    return {"instruction": 100 * followed.double(), "valid": 100 * reading.valid.double().mean(1)}


def estimate(points: Tensor) -> dict[str, float]:
    """Mean and half of its 95 % interval."""
    return {"mean": round(points.mean().item(), 3), "margin": round(1.96 * points.std().item() / len(points) ** 0.5, 3)}


@torch.no_grad()
def measure(prompts: int) -> dict[str, Any]:
    """Per precision: each number, and how it differs from fp32's."""
    config = replace(Config(), prompts=prompts)
    task = config.tasks(ModelConfig.load(students.find("tiny") / students.CONFIG).text)["start"]
    seen: dict[str, dict[str, list[Tensor]]] = {precision: {} for precision in PRECISIONS}
    for first in tqdm(range(0, prompts, config.batch), total=math.ceil(prompts / config.batch), disable=None):
        part = task[first : first + config.batch]
        for precision in PRECISIONS:
            video = sources.streamed("tiny", "native", precision)(part, Generator().manual_seed(config.seed + first))
            for name, points in judged(video, part).items():
                seen[precision].setdefault(name, []).append(points)
    whole = {precision: {name: torch.cat(parts) for name, parts in of.items()} for precision, of in seen.items()}
    return {
        precision: {
            name: {**estimate(points), "difference": estimate(points - whole["fp32"][name])}
            for name, points in of.items()
        }
        for precision, of in whole.items()
    }


def digest(model: str) -> str:
    """SHA-256 of a shipped student's weights."""
    return hashlib.sha256((students.find(model) / WEIGHTS_FILE).read_bytes()).hexdigest()


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.quality")
    measured = {
        "measured_on": date.today().isoformat(),
        "model": "tiny",
        "sha256": digest("tiny"),
        "prompts": arguments.prompts,
        "isa": kernels.isa(),
        "cpu": machine()["cpu"],
        "precisions": measure(arguments.prompts),
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")
    for precision, numbers in measured["precisions"].items():
        for name, n in numbers.items():
            change = n["difference"]
            print(
                f"{precision}  {name:12} {n['mean']:6.2f} +- {n['margin']:.2f}   "
                f"against fp32 {change['mean']:+.2f} +- {change['margin']:.2f}"
            )


if __name__ == "__main__":
    main()
