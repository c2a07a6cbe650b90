"""What an exported bundle of a student loses to the student's own weights, by the card's measures, pair by pair.

    python -m training quality bundle_int8/ bundle_fp8/

Every prompt is streamed with the same seed by the native engine in fp32 and by each bundle's graphs in ONNX Runtime,
with the rounding that they and the ring on a GPU have; the exact reader of the card says what each clip shows. What was
found is written into the bundle's manifest, under `notes.quality`. Differences are of pairs, in points (hundredths),
with their 95 % interval. It changes nothing that other work runs beside it."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Generator, Tensor
from tqdm.auto import tqdm

from cfrt import students
from cfrt.bundle import Bundle
from cfrt.config import ModelConfig
from cfrt.engines import Spec
from cfrt.engines.chorus import ChorusEngine
from cfrt.errors import BundleError, CfrtError
from cfrt.text import encoder
from cfrt.weights import WEIGHTS_FILE, load_model
from training import metrics, sources, worlds
from training.evaluate import Config
from training.reader import read
from training.sources import Source, Task

NOTE = "quality"
"""Of a manifest."""
REFERENCE = "fp32"
"""What everything is compared with."""
BATCH = 32
"""Clips played together: a chorus of more is no faster, and ten seconds of video take memory."""
ALLOWED = 1.0
"""Points that a bundle may lose."""

Numbers = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure what bundles lose, and write it into their manifests."""

    bundles: tyro.conf.Positional[tuple[Path, ...]]
    """Exports of the embedded student."""
    model: str | None = None
    """The student that they were exported from: a name or a folder. Default: the embedded one of their name."""
    prompts: int = 1024
    frames: int = 201
    """Of each clip: 1 + 4 n."""
    threads: int = 1
    json: Path | None = None
    """Write all numbers there as well."""


def main(command: Sequence[str]) -> None:
    """`python -m training quality`: exit code 1 when a bundle surely loses more than a point, or something is wrong."""
    arguments = tyro.cli(Arguments, prog="python -m training quality", args=command, config=(tyro.conf.DisallowNone,))
    torch.set_num_threads(arguments.threads)
    try:
        found = of_bundles(arguments)
    except CfrtError as error:
        raise SystemExit(f"training quality: {error}") from None
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for path, numbers in found.items():
        print("\n".join([path, *lines(numbers["measures"])]))
    worse = [path for path, numbers in found.items() if lost(numbers["measures"]) > ALLOWED]
    if worse:
        raise SystemExit(f"training quality: more than {ALLOWED:g} point is lost by {', '.join(worse)}")


def of_bundles(arguments: Arguments) -> dict[str, Numbers]:
    """Note of each bundle, by its folder's name; they are in the manifests by then. BundleError when one is no export
    of the model."""
    opened = {path.name: Bundle.open(path) for path in arguments.bundles}
    if not opened or len(opened) < len(arguments.bundles):
        raise BundleError("expected bundles in folders of different names")
    model = arguments.model or next(iter(opened.values())).manifest.config.name
    folder = students.find(model)
    for bundle in opened.values():
        check_origin(bundle, folder)
    units, left = divmod(arguments.frames - 1, worlds.UNIT_FRAMES)
    if left or units < 1 or arguments.prompts < 2:
        raise BundleError(f"expected --frames 1 + 4 n and two --prompts or more, got {arguments.frames}")
    config = replace(Config(), prompts=arguments.prompts, units=units + 1, batch=BATCH)
    players: dict[str, Source] = {REFERENCE: sources.streamed(folder, "native", "fp32", arguments.threads)}
    players |= {name: chorus(bundle, arguments.threads) for name, bundle in opened.items()}
    begin = time.perf_counter()
    measured = measure(config, players)
    common = {
        "measured_on": time.strftime("%Y-%m-%d"),
        "against": "the native engine in fp32, on the weights that were exported",
        "rounded": "products as the graphs say; in 8 bits also queries, keys and values, not probabilities",
        "model_sha256": digest(folder),
        "prompts": arguments.prompts,
        "frames": arguments.frames,
        "seconds": round(time.perf_counter() - begin),
    }
    notes = {name: common | {"measures": measured[name]} for name in opened}
    for name, bundle in opened.items():
        bundle.annotate(NOTE, notes[name])
    return notes


def check_origin(bundle: Bundle, folder: Path) -> None:
    """BundleError unless it was exported from the weights in the folder: the norms of q, which no format changes much,
    must be theirs."""
    config, weights = load_model(folder)
    own = bundle.manifest.config
    _, held = load_model(bundle.folder)
    expected = [weights[f"dit.blocks.{layer}.self_attn.norm_q.weight"] for layer in range(config.depth)]
    if own.name != config.name or own.depth != config.depth or not _alike(held["norm_q"], np.stack(expected)):
        raise BundleError(
            f"expected {bundle.folder} to be an export of {config.name!r} as it is now in {folder}, and its weights "
            "are others: export it again, or name the student that it is of with --model"
        )


def _alike(held: np.ndarray, weights: np.ndarray) -> bool:
    """But for rounding to 8 bits of mantissa."""
    return held.shape == weights.shape and bool(np.allclose(held, weights, rtol=1 / 128))


# ----------------------------------------------------------------------------------------------------------- measuring


def chorus(bundle: Bundle, threads: int = 1) -> Source:
    """Clips of a bundle's graphs in ONNX Runtime, all of a task in step: the same bytes as one by one
    (tests/test_chorus.py)."""
    config, weights = load_model(bundle.folder)
    text = encoder(config, weights)

    def source(task: Task, generator: torch.Generator) -> Tensor:
        seeds = torch.randint(2**31, (len(task),), generator=generator).tolist()
        engine = ChorusEngine(seeds)
        engine.prepare(Spec(config=config, weights=weights, threads=threads, bundle=bundle))
        engine.set_text(np.stack([text.encode(first).rows for first, _ in task.texts]))
        frames = torch.from_numpy(np.concatenate(list(engine.play(task.units // config.unit))))
        engine.close()
        return frames.permute(1, 0, 4, 2, 3) / 255

    return source


def judged(video: Tensor, task: Task) -> dict[str, Tensor]:
    """Of each clip, in points: shows everything that was asked; moves as it should; share of frames with a valid
    object."""
    reading, wanted = read(video), task.wanted[:, 0]
    followed, dynamic = (reading.factors == wanted).all(1), metrics.is_dynamic(reading, wanted)
    clips = {"instruction": followed, "dynamic": dynamic, "valid": reading.valid.double().mean(1)}
    return {name: 100 * of.double() for name, of in clips.items()}


def estimate(points: Tensor) -> dict[str, float]:
    """Mean and half of its 95 % interval."""
    return {"mean": round(points.mean().item(), 3), "margin": round(1.96 * points.std().item() / len(points) ** 0.5, 3)}


@torch.no_grad()
def measure(config: Config, players: Mapping[str, Source]) -> dict[str, Numbers]:
    """Per player: each number, and how it differs from that of the first one."""
    task = config.tasks(ModelConfig.load(students.find("tiny") / students.CONFIG).text)["start"]
    seen: dict[str, dict[str, list[Tensor]]] = {player: {} for player in players}
    parts = range(0, config.prompts, config.batch)
    for first in tqdm(parts, total=math.ceil(config.prompts / config.batch), unit="batch", disable=None):
        part = task[first : first + config.batch]
        for player, play in players.items():
            video = play(part, Generator().manual_seed(config.seed + first))
            for name, points in judged(video, part).items():
                seen[player].setdefault(name, []).append(points)
    whole = {player: {name: torch.cat(points) for name, points in of.items()} for player, of in seen.items()}
    first_one = whole[next(iter(players))]
    return {
        player: {
            name: {**estimate(points), "difference": estimate(points - first_one[name])} for name, points in of.items()
        }
        for player, of in whole.items()
    }


def lost(measures: Mapping[str, Any]) -> float:
    """The most points that any measure loses for certain, at the near end of its interval."""
    return max(-n["difference"]["mean"] - n["difference"]["margin"] for n in measures.values())


def digest(folder: Path) -> str:
    """SHA-256 of a student's weights."""
    return hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()


def lines(measures: Mapping[str, Any]) -> list[str]:
    """A player's numbers, for people."""
    return [
        f"  {name:12} {n['mean']:6.2f} +- {n['margin']:.2f}   difference {n['difference']['mean']:+.2f} "
        f"+- {n['difference']['margin']:.2f}"
        for name, n in measures.items()
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
