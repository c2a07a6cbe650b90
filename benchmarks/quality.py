"""What a precision costs in quality, of the native engine or of an exported bundle: the embedded student's own card
metrics, pair by pair.

    python -m benchmarks.quality --prompts 1024 --json benchmarks/results/quality.json
    python -m benchmarks.quality --bundle bundle/ --json benchmarks/results/quality_int8.json

A bundle runs in ONNX Runtime, with the rounding that its graphs say, beside the native engine in fp32.

Every prompt is streamed with the same seed in every precision; the exact reader of the card says whether a clip shows
all that was asked, and in which share of its frames the object is valid. Differences to fp32 are of pairs, in points
(hundredths), with their 95 % interval. It changes nothing about speed that other work runs beside it.
"""

import hashlib
import json
import math
from collections.abc import Mapping
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
from cfrt.bundle import Bundle
from cfrt.config import ModelConfig
from cfrt.errors import BundleError
from cfrt.weights import WEIGHTS_FILE
from training import sources
from training.card import machine
from training.evaluate import Config
from training.reader import read
from training.sources import Source, Task

PRECISIONS = ("fp32", "bf16", "int8")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure the quality of each precision."""

    bundle: Path | None = None
    """Measure this export of the embedded student instead."""

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
def measure(prompts: int, players: Mapping[str, Source]) -> dict[str, Any]:
    """Per player: each number, and how it differs from that of "fp32"."""
    config = replace(Config(), prompts=prompts)
    task = config.tasks(ModelConfig.load(students.find("tiny") / students.CONFIG).text)["start"]
    seen: dict[str, dict[str, list[Tensor]]] = {precision: {} for precision in players}
    for first in tqdm(range(0, prompts, config.batch), total=math.ceil(prompts / config.batch), disable=None):
        part = task[first : first + config.batch]
        for precision, play in players.items():
            video = play(part, Generator().manual_seed(config.seed + first))
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


def played(bundle: Path | None) -> dict[str, Source]:
    """What is compared, by precision. BundleError when it is no export of the embedded student."""
    if bundle is None:
        return {precision: sources.streamed("tiny", "native", precision) for precision in PRECISIONS}
    manifest = Bundle.open(bundle).manifest
    if manifest.config.name != "tiny":
        raise BundleError(f"expected an export of the student 'tiny', got one of {manifest.config.name!r}")
    return {"fp32": sources.streamed("tiny", "native", "fp32"), manifest.precision: sources.streamed(bundle, "onnx")}


def digest(model: str) -> str:
    """SHA-256 of a shipped student's weights."""
    return hashlib.sha256((students.find(model) / WEIGHTS_FILE).read_bytes()).hexdigest()


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.quality")
    measured = {
        "measured_on": date.today().isoformat(),
        "model": "tiny",
        "sha256": digest("tiny"),
        "engine": "native" if arguments.bundle is None else "onnx",
        "prompts": arguments.prompts,
        "isa": kernels.isa(),
        "cpu": machine()["cpu"],
        "precisions": measure(arguments.prompts, played(arguments.bundle)),
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
