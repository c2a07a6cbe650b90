"""Where a run's numbers go: stats.jsonl always, TensorBoard and Weights & Biases by name."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from cfrt.errors import TrainingError

Name = Literal["tensorboard", "wandb"]
Row = dict[str, float]
"""`step` and `clips` done, `seconds` spent, and what the stage reports."""
Log = Callable[[Row], None]

STATISTICS = "stats.jsonl"


@contextmanager
def opened(names: Sequence[Name], folder: Path, stage: str, done: int) -> Iterator[Log]:
    """A function that takes rows. Rows of steps after `done` are dropped: a killed run wrote them after its last
    checkpoint, and those steps will be done again."""
    _forget_after(done, folder / STATISTICS)
    with ExitStack() as stack:
        sinks = [stack.enter_context(SINKS[name](folder, stage, done)) for name in names]

        def log(row: Row) -> None:
            with (folder / STATISTICS).open("a") as lines:
                lines.write(json.dumps(row) + "\n")
            for sink in sinks:
                sink(row)

        yield log


def _forget_after(done: int, path: Path) -> None:
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= done]
    if len(kept) < len(rows):
        path.write_text("".join(kept))


@contextmanager
def _tensorboard(folder: Path, stage: str, done: int) -> Iterator[Log]:
    writer = _optional("torch.utils.tensorboard", "tensorboard").SummaryWriter(
        str(folder / "tensorboard"), purge_step=done + 1
    )

    def log(row: Row) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(f"{stage}/{name}", value, int(row["step"]))

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def _wandb(folder: Path, stage: str, done: int) -> Iterator[Log]:
    """The run's id is its folder's name, so that a resumed run goes on in the same curves."""
    name = "-".join(folder.resolve().parts[-3:])
    run = _optional("wandb", "wandb").init(project="cfrt", name=name, id=name, resume="allow", dir=str(folder))
    try:
        yield lambda row: run.log({f"{stage}/{key}": value for key, value in row.items()}, step=int(row["step"]))
    finally:
        run.finish()


def _optional(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TrainingError(f"--log {package} needs the package {package}: pip install {package}") from error


SINKS = {"tensorboard": _tensorboard, "wandb": _wandb}
