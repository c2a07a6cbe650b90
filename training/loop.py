"""The one training loop: reseeds from progress, keeps an exponential average, writes checkpoints from which it goes
on bit for bit.

A stage brings its networks, its optimisers and its losses (they live there and nowhere else), and says in which order a
step updates what; the loop brings everything that all stages share. A step is made of micro-batches, and the randomness
of micro-batch m depends on (seed, m) alone: a run that is killed and started again equals one that was never stopped,
and two processes with one micro-batch each equal one process with two. No generator state is saved."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from cfrt.errors import TrainingError
from cfrt.nn.dit import CausalDiT
from training import checkpoint, logs, parallel
from training.capture import Capturable, Captured

Stats = dict[str, float]
Report = Mapping[str, Tensor | float]
"""What a loss says of itself, for the statistics: numbers, or tensors of one that nothing has waited for yet."""
Optimisers = Mapping[str, torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a stage is run; what it learns from is its own config."""

    micros: int = 1
    """Micro-batches of a step, all processes together: a step sees micros x the stage's batch clips."""
    clip: float = 1.0
    """Longest gradient; a longer one is shortened to it."""
    precision: parallel.Precision = "fp32"
    """Of the compute. What is trained, its moments and its average are fp32 either way: updates of 2e-6 vanish in
    bf16."""
    checkpointing: bool = False
    """Recompute blocks in the backward pass instead of keeping their activations."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    capture: bool = True
    """On a GPU, launch a step as one CUDA graph where the stage allows it (`training.capture`) and this process takes
    all of it in one micro-batch."""
    log_every: int = 25
    """Steps averaged into one row of statistics."""
    log: tuple[logs.Name, ...] = ()
    """Where the rows go beside stats.jsonl."""
    save_seconds: float = 60.0
    """Least time between checkpoints; they are written where a row is."""
    keep: int = 2
    """Checkpoints kept."""

    def __post_init__(self) -> None:
        for name in ("micros", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise TrainingError(f"expected {name} >= 1, got {getattr(self, name)}")


DEFAULT = Config()


@dataclass(frozen=True)
class Micro:
    """One micro-batch: its number in the whole run, and the randomness that belongs to it."""

    index: int
    generator: torch.Generator
    common: torch.Generator
    """Draws the same in all micro-batches of a step. What decides how many passes are made comes from here: processes
    that share a network must agree on it."""


Loss = Callable[[Micro], tuple[Tensor, Report]]


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
    batch: int
    """Clips of a micro-batch."""

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
        """New optimisers of each trained network: made after the loop has placed the networks."""

    def step(self, index: int) -> Iterator[Update]:
        """The updates of one step, in order."""


class Average:
    """Exponential moving average of a network's weights, with a warm-up so that the first steps are forgotten.

    `into`: a network that holds the average as its own weights, where a stage asks it (consistency distillation)."""

    def __init__(self, network: nn.Module, decay: float, warm: bool = True, into: nn.Module | None = None) -> None:
        self.network, self.decay, self.warm, self.into, self.updates = network, decay, warm, into, 0

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Taken when first asked for: by then the loop has placed the network, and has not moved it yet."""
        if self.into is not None:
            return {name: value.detach() for name, value in self.into.state_dict().items()}
        return {name: value.detach().clone() for name, value in self.network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warm else self.decay
        torch._foreach_lerp_(list(self.weights.values()), list(network.state_dict().values()), 1 - decay)


# ------------------------------------------------------------------------------------------------------ learning rates


def cosine(index: int, steps: int, *, warmup: int = 50, floor: float = 0.01) -> float:
    """Learning-rate factor of a step: linear warm-up, then half a cosine down to `floor`."""
    ramp = min(1.0, (index + 1) / warmup)
    return ramp * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, index / max(1, steps)))))


def constant(index: int, steps: int, *, warmup: int = 20) -> float:
    return min(1.0, (index + 1) / warmup)


Schedule = Literal["cosine", "constant"]
SCHEDULES: Mapping[Schedule, Callable[[int, int], float]] = {"cosine": cosine, "constant": constant}


# ---------------------------------------------------------------------------------------------------------- randomness


def _mixed(seed: int, index: int) -> int:
    return (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63


def step_generator(seed: int, index: int) -> torch.Generator:
    """The randomness of one step; also reseeds torch's global generator for what takes none."""
    torch.manual_seed(_mixed(seed, index))
    return torch.Generator().manual_seed(_mixed(seed, index))


def micro_batch(seed: int, step: int, index: int) -> Micro:
    """Micro-batch `index` of the run, which belongs to step `step`."""
    common = torch.Generator().manual_seed(_mixed(~seed, step))
    return Micro(index, torch.Generator().manual_seed(_mixed(seed, index)), common)


# ------------------------------------------------------------------------------------------------------------ one step


def take(
    stage: Stage,
    optimisers: Mapping[str, Optimisers],
    index: int,
    seed: int,
    config: Config = DEFAULT,
    captured: Captured | None = None,
) -> Stats:
    """Step `index`: all its updates, on the same micro-batches, of which this process takes its share."""
    numbers = [index * config.micros + own for own in parallel.share(config.micros)]
    micros = [micro_batch(seed, index, number) for number in numbers]
    stats: Stats = {}
    for position, update in enumerate(stage.step(index)):
        network, own = stage.networks[update.network], optimisers[update.network]
        where = f"{stage.name}: step {index}, update {position} of it ({update.network})"
        reseeded = update if captured else _reseeded(update, seed, position)
        stats |= descend(network, own, reseeded, micros, config, where, captured)
    return stats


def _reseeded(update: Update, seed: int, position: int) -> Update:
    """The same, for a loss that draws from torch's global generator as well."""

    def loss(micro: Micro) -> tuple[Tensor, Report]:
        torch.manual_seed(_mixed(seed, micro.index) ^ position)
        return update.loss(micro)

    return replace(update, loss=loss)


def descend(
    network: nn.Module,
    optimisers: Optimisers,
    update: Update,
    micros: Sequence[Micro],
    config: Config,
    where: str,
    captured: Captured | None = None,
) -> Stats:
    """One update: gradients averaged over the micro-batches, shortened, and every optimiser's step. Returns what the
    loss reports, averaged, and the gradient's norm before shortening. TrainingError where a number is not finite: then
    nothing has been updated."""
    for optimiser in optimisers.values():
        for group in optimiser.param_groups:
            group["lr"] = update.lr
        optimiser.zero_grad(set_to_none=True)
    reports = []
    for micro in micros:
        loss, report = (captured or partial(_gradient, network, config, len(micros)))(update.loss, micro)
        if not math.isfinite(loss.item()):
            raise TrainingError(f"{where}, micro-batch {micro.index}: the loss is {loss.item()}")
        reports.append({name: _number(value) for name, value in report.items()})
    norm = parallel.norm(nn.utils.clip_grad_norm_(network.parameters(), config.clip))
    if not math.isfinite(norm):
        numbers = ", ".join(str(micro.index) for micro in micros)
        raise TrainingError(f"{where}, micro-batch {numbers}: the loss is finite, its gradient's norm is {norm}")
    for optimiser in optimisers.values():
        optimiser.step()
    label = "norm" if update.network == "student" else f"{update.network}_norm"
    return {**_means(reports), label: norm}


def _gradient(network: nn.Module, config: Config, parts: int, loss: Loss, micro: Micro) -> tuple[Tensor, Report]:
    """Add a micro-batch's part of the gradient to what is there; returns what the loss does."""
    with _compute(network, config):
        found, report = loss(micro)
    (found / parts).backward()
    return found.detach(), report


def _compute(network: nn.Module, config: Config) -> AbstractContextManager[object]:
    """bf16 compute where FSDP does not see to it. Casts of weights are not cached: one made without gradients, early in
    a rollout, would be used again where they are wanted."""
    if config.precision == "fp32" or parallel.count() > 1:
        return nullcontext()
    return torch.autocast(next(network.parameters()).device.type, torch.bfloat16, cache_enabled=False)


def _number(value: Tensor | float) -> float:
    return value.detach().item() if isinstance(value, Tensor) else value


def _means(rows: Sequence[Stats]) -> Stats:
    keys = sorted({key for row in rows for key in row})
    return {key: sum(row[key] for row in rows if key in row) / sum(key in row for row in rows) for key in keys}


# ------------------------------------------------------------------------------------------------------------- the run


def place(stage: Stage, average: Average, config: Config) -> None:
    """Put the stage's networks where they are trained, shared out over the processes. Done twice, it is done once."""
    where = parallel.device(config.device)
    for network in stage.networks.values():
        parallel.place(network, where, config.precision, constant=False)
        for module in network.modules():
            if isinstance(module, CausalDiT):
                module.checkpointing = config.checkpointing
    for network in stage.frozen.values():
        parallel.place(network, where, config.precision, constant=network is not average.into)


def capture(stage: Stage, config: Config) -> Captured | None:
    """The stage's loss as a CUDA graph, where there is a GPU and it can be one."""
    device = parallel.device(config.device)
    if not config.capture or device.type == "cpu" or config.micros * parallel.count() > 1:
        return None
    if not isinstance(stage, Capturable) or not stage.capturable:
        return None
    return Captured(stage, stage.student, partial(_compute, stage.student, config))


def run(
    stage: Stage,
    folder: Path,
    *,
    seed: int,
    average: Average,
    after: Callable[[int], None] | None = None,
    config: Config = DEFAULT,
) -> None:
    """Train `stage` to its end, going on from the last checkpoint in `folder` if there is one.

    Writes stats.jsonl, FOLDER/checkpoints and, at the end, average.safetensors. `after(step)` is called after
    every checkpoint of a single process, for previews. TrainingError where a number is not finite."""
    clips = config.micros * stage.batch
    parallel.share(config.micros)  # refused before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    place(stage, average, config)
    optimisers, _ = stage.optimisers(), average.weights  # both of what was placed
    captured = capture(stage, config)
    saved = checkpoint.latest(folder / "checkpoints")
    start, spent = checkpoint.restore(saved, stage, optimisers, average) if saved else (0, 0.0)
    began, written, recent = time.monotonic() - spent, time.monotonic(), list[Stats]()
    loud = parallel.first() and sys.stderr.isatty()
    bar = tqdm(desc=stage.name, unit="clip", total=stage.steps * clips, initial=start * clips, disable=not loud)
    with bar, logs.opened(config.log if parallel.first() else (), folder, stage.name, start) as log:
        for index in range(start, stage.steps):
            try:
                recent.append(take(stage, optimisers, index, seed, config, captured))
            except TrainingError as error:
                raise TrainingError(f"{error}. {_advice(folder, index)}") from None
            average.update(stage.student)
            bar.update(clips)
            done = index + 1
            if done % config.log_every and done != stage.steps:
                continue
            row = _row(done, clips, time.monotonic() - began, recent)
            recent.clear()
            if parallel.first():
                log(row)
                bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k not in ("step", "clips", "seconds")})
            late = parallel.first() and time.monotonic() - written > config.save_seconds
            if parallel.anywhere(late) or done == stage.steps:
                _save(stage, optimisers, average, folder, done, time.monotonic() - began, config.keep)
                written = time.monotonic()
                if after is not None and parallel.count() == 1:
                    after(done)
    finished = parallel.gather(average.weights)
    if parallel.first():
        write_tensors(folder / "average.safetensors", finished)
    parallel.barrier()


def _row(step: int, clips: int, seconds: float, recent: Sequence[Stats]) -> logs.Row:
    means = {key: float(f"{value:.7g}") for key, value in parallel.mean(_means(recent)).items()}
    return {"step": step, "clips": step * clips, "seconds": round(seconds, 1), **means}


def _advice(folder: Path, index: int) -> str:
    last = checkpoint.latest(folder / "checkpoints")
    kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
    return (
        f"Nothing of this was kept; {kept}. The same command would come to the same end, since step {index} depends on "
        "the seed and its number alone: lower the learning rate or the guidance, look at these clips, or train in fp32"
    )


def _save(
    stage: Stage,
    optimisers: Mapping[str, Optimisers],
    average: Average,
    folder: Path,
    step: int,
    seconds: float,
    keep: int,
) -> None:
    tensors = checkpoint.learnt(stage, average)
    if not parallel.finite(tensors.values()):
        raise TrainingError(f"{stage.name}: a weight is not finite after step {step - 1}. {_advice(folder, step - 1)}")
    checkpoint.save(folder / "checkpoints", stage, optimisers, average, step, seconds, keep)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, temporary, metadata)
    temporary.chmod(0o644)  # the library makes files that only their owner may read
    os.replace(temporary, path)
