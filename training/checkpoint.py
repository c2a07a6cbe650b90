"""Checkpoints: a stage's networks, moments, average and progress, of which the last few are kept.

One is written beside its place and moved in when it is whole, so that a crash leaves those before it. It holds every
tensor once, however many processes have a part of it, and any number of processes can read it
(torch.distributed.checkpoint). Its files are pickles in part: read only what you wrote."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training import parallel

if TYPE_CHECKING:
    from training.loop import Average, Optimisers, Stage

PROGRESS = "progress.json"


def whole(folder: Path) -> list[Path]:
    """The finished checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if (path / PROGRESS).exists())


def latest(folder: Path) -> Path | None:
    return next(reversed(whole(folder)), None)


def learnt(stage: Stage, average: Average) -> dict[str, Tensor]:
    """The weights of the trained networks and their average, by name; not copies."""
    tensors = {f"average/{name}": value for name, value in average.weights.items()}
    for label, network in stage.networks.items():
        tensors |= {f"network/{label}/{name}": value for name, value in network.state_dict().items()}
    return tensors


def save(
    folder: Path,
    stage: Stage,
    optimisers: Mapping[str, Optimisers],
    average: Average,
    step: int,
    seconds: float,
    keep: int,
) -> None:
    """Write FOLDER/STEP after `step` steps that took `seconds`, and forget all but the last `keep`. Every process
    calls it with its own part."""
    tensors, scalars = learnt(stage, average), dict[str, dict[str, float]]()
    for label, optimiser in _labelled(optimisers):
        for index, state in optimiser.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimiser/{label}/{index}/{name}"] = value
                else:
                    scalars.setdefault(f"{label}/{index}", {})[name] = value
    progress = {"step": step, "seconds": seconds, "updates": average.updates, "scalars": scalars}
    _write(folder, f"{step:08d}", tensors, progress, keep)


def restore(path: Path, stage: Stage, optimisers: Mapping[str, Optimisers], average: Average) -> tuple[int, float]:
    """Read a checkpoint into the stage, in place; returns (steps done, seconds spent)."""
    progress, sizes = json.loads((path / PROGRESS).read_text()), _sizes(path)
    tensors, states = learnt(stage, average), dict[str, dict[int, dict[str, Any]]]()
    for label, optimiser in _labelled(optimisers):
        parameters = [parameter.detach() for group in optimiser.param_groups for parameter in group["params"]]
        state = states[label] = {}
        for key, (size, dtype) in sizes.items():
            kind, owner, *rest = key.split("/")
            if (kind, owner) == ("optimiser", label):
                like = parameters[int(rest[0])]
                tensors[key] = torch.zeros_like(like) if like.shape == size else torch.zeros(size, dtype=dtype)
                state.setdefault(int(rest[0]), {})[rest[1]] = tensors[key]
        for key, values in progress["scalars"].items():
            owner, index = key.split("/")
            if owner == label:
                state.setdefault(int(index), {}).update(values)
    _read(path, tensors)
    for label, optimiser in _labelled(optimisers):
        optimiser.load_state_dict({"state": states[label], "param_groups": optimiser.state_dict()["param_groups"]})
    average.updates = progress["updates"]
    return progress["step"], progress["seconds"]


def _labelled(optimisers: Mapping[str, Optimisers]) -> list[tuple[str, torch.optim.Optimizer]]:
    return [(f"{network}.{label}", o) for network, group in optimisers.items() for label, o in group.items()]


# -------------------------------------------------------------------------------------------------------------- files


def _write(folder: Path, name: str, tensors: Mapping[str, Tensor], progress: dict[str, Any], keep: int) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter  # a second to import
    from torch.distributed.checkpoint.state_dict_saver import save

    path, draft = folder / name, folder / f".{name}"
    if parallel.first():
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in [*folder.glob(".[0-9]*"), path]:
            shutil.rmtree(leftover, ignore_errors=True)
    parallel.barrier()
    with _alone():
        save(dict(tensors), storage_writer=FileSystemWriter(draft), no_dist=parallel.count() == 1)
    parallel.barrier()
    if parallel.first():
        (draft / PROGRESS).write_text(json.dumps(progress))
        os.replace(draft, path)
        for old in whole(folder)[:-keep]:
            shutil.rmtree(old)
    parallel.barrier()


def _read(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _alone():
        load(dict(tensors), storage_reader=FileSystemReader(path), no_dist=parallel.count() == 1)


def _sizes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = FileSystemReader(path).read_metadata().state_dict_metadata
    return {k: (x.size, x.properties.dtype) for k, x in found.items() if isinstance(x, TensorStorageMetadata)}


@contextmanager
def _alone() -> Iterator[None]:
    """One process needs no process group; torch warns of it even when it is told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
