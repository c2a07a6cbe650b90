"""The stages of a Wan recipe: made without values, shared out over the processes, then filled from files that the first
process reads. No process ever holds a whole network in memory, but for the one that reads it.

`train` is one stage in its folder; `training.loop` does the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cfrt import weights
from cfrt.checkpoint import read_checkpoint
from cfrt.config import ModelConfig
from cfrt.errors import TrainingError
from training import cd, checkpoint, dmd, loop, ode, parallel, teacher
from training.data import Batch, DataSet, Prompts
from training.loop import Average, Stage
from training.network import Network, frozen
from training.wan import Recipe


def build(recipe: Recipe, name: str, data: Any) -> tuple[Stage, Average]:
    """A stage whose networks have no values yet; `data` are its clips, or the trajectories of stage ode."""
    model = recipe.models[name]
    match name:
        case "teacher":
            ar = teacher.Stage(recipe.teacher, model, data, _empty(model))
            return ar, Average(ar.student, recipe.teacher.ema)
        case "ode":
            regression = ode.Stage(recipe.ode, model, data, _empty(model))
            return regression, Average(regression.student, recipe.ode.ema)
        case "cd":
            consistent = cd.Stage(recipe.cd, model, data, _empty(model))
            return consistent, consistent.average
        case "dmd":
            networks = _empty(model), _empty(recipe.real), _empty(recipe.fake)
            matched = dmd.Stage(recipe.dmd, model, data.prompts, *networks)
            return matched, Average(matched.student, recipe.dmd.ema)
    raise TrainingError(f"expected a stage out of teacher, ode, cd, dmd; got {name!r}")


def _empty(model: ModelConfig) -> Network:
    with torch.device("meta"):
        return Network(model)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Files of weights: what a stage starts from, and the scores of DMD. None = random (--smoke)."""

    start: Path | None
    real: Path | None = None
    fake: Path | None = None

    def of(self, label: str) -> Path | None:
        return {"real": self.real, "fake": self.fake}.get(label, self.start)


def fill(networks: Mapping[str, nn.Module], sources: Sources) -> None:
    """Give networks their weights; only the first process reads, each file once."""
    read_from: Path | None = None
    tensors: Mapping[str, Tensor] = {}
    for label, network in sorted(networks.items(), key=lambda item: str(sources.of(item[0]))):
        path = sources.of(label)
        if parallel.first() and (path is None or path != read_from):
            tensors, read_from = (_random(network) if path is None else read(path, network)), path
        parallel.fill(network, tensors)


def read(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """Weights from a checkpoint, official, diffusers' or our own. WeightsError when they are another network's."""
    arrays = read_checkpoint(path)
    arrays = weights.part(arrays, "dit") or arrays
    weights.match({n.removeprefix("dit."): tuple(x.shape) for n, x in network.state_dict().items()}, arrays)
    return {f"dit.{name}": torch.from_numpy(x) for name, x in arrays.items()}


def _random(network: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: 0.1 * torch.randn(x.shape) for name, x in network.state_dict().items()}


def train(recipe: Recipe, name: str, data: Any, sources: Sources, out: Path) -> None:
    """One stage, in OUT/NAME, going on where it stopped."""
    folder = out / name
    if (folder / "average.safetensors").exists():
        return
    if name == "pairs":
        make_pairs(recipe, data, sources, folder)
        return
    stage, average = build(recipe, name, data)
    loop.place(stage, average, recipe.run)
    if checkpoint.latest(folder / "checkpoints") is None:
        fill({**stage.networks, **stage.frozen}, sources)
    else:  # what was learnt comes from the checkpoint
        fill({label: network for label, network in stage.frozen.items() if network is not average.into}, sources)
    if parallel.first():
        folder.mkdir(parents=True, exist_ok=True)
        said = {
            "model": recipe.models[name].to_dict(),
            "stage": asdict(getattr(recipe, name)),
            "run": asdict(recipe.run),
        }
        (folder / "config.json").write_text(json.dumps(said, indent=2) + "\n")
    loop.run(stage, folder, seed=recipe.seed, average=average, config=recipe.run)


def make_pairs(recipe: Recipe, data: DataSet, sources: Sources, folder: Path) -> None:
    """Trajectories of the AR teacher; every process has all of it and makes its share of them."""
    model, where = recipe.models["pairs"], parallel.device(recipe.run.device)
    network = Network(model)
    tensors = _random(network) if sources.start is None else read(sources.start, network)
    network.load_state_dict(tensors)
    network = frozen(network).to(where, torch.bfloat16 if recipe.run.precision == "bf16" else torch.float32)
    ode.write(folder, recipe.ode, data, partial(ode.causal_pairs, network, model, recipe.ode), recipe.seed)
    parallel.barrier()


# ---------------------------------------------------------------------------------------------------------------- data


class Noise:
    """Clips and embeddings of noise, for --smoke."""

    def __init__(self, model: ModelConfig, clips: int = 4) -> None:
        self.model, self.clips = model, clips

    def __len__(self) -> int:
        return self.clips

    def batch(self, index: int, size: int) -> Batch:
        generator = torch.Generator().manual_seed(index % self.clips)
        shape = (size, self.model.trained_frames, self.model.latent_channels, *self.model.latent_grid)
        return Batch.of(torch.randn(shape, generator=generator), self.prompts(size, generator))

    def prompts(self, size: int, generator: torch.Generator) -> Prompts:
        rows = (self.model.text.length, self.model.text.width)
        return Prompts(
            captions=torch.randn(size, 2, *rows, generator=generator),
            caption=torch.zeros(size, self.model.trained_frames, dtype=torch.long),
            null=torch.randn(rows, generator=torch.Generator().manual_seed(0)),
        )


def clips(folder: Path, model: ModelConfig, seed: int, text: Path | None = None, pairs: bool = False) -> Any:
    """The data set in a folder: shards that `python -m training prepare` made, or official LMDB rows, whose prompts the
    encoder of model folder `text` reads. `pairs`: rows as trajectories."""
    from training import encoding, official, shards, wording

    if (folder / shards.MANIFEST).exists():
        return shards.Shards(folder, seed, model)
    if text is None:
        raise TrainingError(
            f"{folder} has no {shards.MANIFEST}. If it holds official LMDB rows, say with --text which model's text "
            "encoder reads their prompts; to make shards of your own clips: python -m training prepare"
        )
    said = wording.Kept(encoding.ModelTools(text, model.text).wording, folder / "embeddings")
    kind = official.Trajectories if pairs else official.Clips
    return kind(folder, model, said, seed, null=torch.from_numpy(said.encode("")))
