"""Two worlds with a proof: the central claim of Causal Forcing (arXiv:2602.02214, section 3) where it must hold.

Clips are Gaussian (`training.gaussian`), the teachers are their exact velocities, and one small causal DiT learns to
jump. With rho = 0.9 the bidirectional flow map is provably no function of what a causal student sees, so that student
must lose the variance which the theory names; with rho = 0 it provably is one, and nothing may be lost. Pairs of the AR
teacher must lose nothing in either world, and consistency distillation only what its teacher's Euler steps lose.

    measured = Var(G(x_s)^i) / Var(x_end^i),    predicted = 1 - Var(x_end^i | seen) / Var(x_end^i)

Shapes: B clips, n latent frames of C x h x w independent Gaussian videos; x [B, n, C, h, w], s [B, n]."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import torch
from torch import Tensor

from cfrt import flow
from cfrt.config import AutoencoderConfig, ModelConfig, TextConfig
from cfrt.errors import ConfigError
from training import cd, gaussian, loop, ode
from training.data import Batch, Prompts
from training.network import Network, broadcast, clone

Row = dict[str, Any]
"""world, init, seed, level, frame (from 1), measured, predicted, standard_error, clips, seconds (processor time of the
run since it was last started)."""

WORLDS = {"dependent": 0.9, "independent": 0.0}  # name -> rho
INITS = ("sf-ode", "causal-ode", "causal-cd")
HELD_OUT = 4096
"""Clips on which a student is measured."""

FRAMES = 4
MODEL = ModelConfig(
    name="proof",
    width=64,
    depth=1,
    heads=2,
    ffn=128,
    latent_channels=1,  # four numbers a frame: with 16, layer norm hides a lone frame's size, and it takes 5x the steps
    latent_grid=(2, 2),
    text=TextConfig(kind="table", width=8, length=1),
    autoencoder=AutoencoderConfig(kind="tiny", latent_channels=1, spatial=16),
    unit=1,
    window=FRAMES,
    trained_frames=FRAMES,
    steps=(1.0, 0.75, 0.5, 0.25),
    shift=5.0,
    time_width=32,
    rope_theta=100.0,
)
LEVELS = flow.sigmas(MODEL.steps, MODEL.shift)
PAIRS = 16384
REGRESSION = ode.Config(
    batch=64, lr=3e-3, betas=(0.9, 0.99), guidance=1.0, first_weight=1.0, early_weight=1.0, levels=MODEL.steps, ema=0.98
)
CONSISTENCY = cd.Config(
    batch=64,
    lr=3e-3,
    betas=(0.9, 0.99),
    guidance=1.0,
    first_weight=1.0,
    early_weight=1.0,
    levels=24,
    ema=0.9,  # short, since what a level has learnt reaches s = 1 through the averages of all levels below it
)

START, TRAINING, MEASURING = -1, -2, -3  # what a run's randomness is for, beside its steps 0, 1, ...


# ---------------------------------------------------------------------- the worlds and their exact teachers


@dataclass(frozen=True)
class World:
    """A data set without end: clips of N(0, S), a function of (seed, index)."""

    covariance: Tensor  # [n, n]
    seed: int

    def __len__(self) -> int:
        return 2**31

    def batch(self, index: int, size: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * len(self) + index)  # never that of a step
        return Batch.of(draw(self.covariance, size, generator).float(), self.prompts(size, generator))

    def prompts(self, size: int, generator: torch.Generator) -> Prompts:
        """Each frame is told which one it is: what is lost depends on how many are still to come, and the network's
        own positions are relative."""
        frames = torch.arange(len(self.covariance))
        return Prompts(captions=(frames + 1)[:, None].repeat(size, 1, 1), caption=frames.repeat(size, 1))


def draw(covariance: Tensor, clips: int, generator: torch.Generator) -> Tensor:
    """Clips [B, n, C, h, w] of the world, fp64."""
    shape = (clips, MODEL.latent_channels, *MODEL.latent_grid, len(covariance))
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (z @ torch.linalg.cholesky(covariance).T).movedim(-1, 1)


class Exact(Network):
    """The optimum of every way to train on N(0, S), behind a network's interface.

    Its own weights are never asked; a stage that clones its teacher finds the student's first ones in them.
    """

    def __init__(self, model: ModelConfig, covariance: Tensor) -> None:
        super().__init__(model)
        self.covariance = covariance
        self.whole = gaussian.Teacher(covariance, len(covariance))
        self.forced = gaussian.Teacher(covariance, model.unit)

    def bidirectional(self, x: Tensor, s: Tensor, batch: Batch) -> Tensor:
        return from_last(self.whole.velocity(last(x), levels(s), last(batch.latents))).to(x)

    def teacher_forced(self, x: Tensor, s: Tensor, batch: Batch) -> Tensor:
        return from_last(self.forced.velocity(last(x), levels(s), last(batch.latents))).to(x)

    def noisy_prefix(self, x: Tensor, s: Tensor, batch: Batch) -> Tensor:
        every = levels(s).expand(last(x).shape)
        return from_last(gaussian.diffusion_forced_velocity(self.covariance, last(x), every)).to(x)


def last(x: Tensor) -> Tensor:
    """Latents [B, n, C, h, w] as videos [B, C, h, w, n] in fp64."""
    return x.double().movedim(1, -1)


def from_last(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def levels(s: Tensor) -> Tensor:
    """[B, n] -> fp64 [B, 1, 1, 1, n]."""
    return s.double()[:, None, None, None]


def pairs(world: World, init: str, clips: int, generator: torch.Generator) -> ode.Pairs:
    """Trajectories of the world's exact teacher (`sf-ode`: the bidirectional one), by its flow map and so exact too."""
    whole = init == "sf-ode"
    teacher = gaussian.Teacher(world.covariance, len(world.covariance) if whole else MODEL.unit)
    data = draw(world.covariance, clips, generator)
    noise = torch.randn(data.shape, generator=generator, dtype=torch.float64)
    at = [from_last(teacher.flow_map(last(noise), 1.0, s, last(data))).float() for s in (*LEVELS, 0.0)]
    prompts = world.prompts(clips, generator)
    return ode.Pairs(
        states=torch.stack(at[:-1], 1),
        end=at[-1],
        clean=at[-1] if whole else data.float(),
        captions=prompts.captions,
        caption=prompts.caption,
    )


def predicted(covariance: Tensor, init: str, s: float) -> Tensor:
    """[n] the variance ratio that theory gives the best student of its kind."""
    of_end = covariance.diagonal()
    if init == "causal-cd":
        grid = flow.euler_grid(CONSISTENCY.levels, MODEL.shift)
        return gaussian.jump_variance(covariance, s, lambda s, q2: gaussian.euler_gain(s, q2, grid)) / of_end
    if init == "sf-ode":
        return 1 - gaussian.regress_bidirectional(covariance, s, past=s).lost / of_end
    return 1 - gaussian.regress_causal(covariance, s).lost / of_end


# ---------------------------------------------------------------------- the experiment


def run(
    folder: Path,
    seeds: Sequence[int] = (1, 2),
    steps: int = 1000,
    worlds: Sequence[str] = tuple(WORLDS),
    inits: Sequence[str] = INITS,
    clips: int = HELD_OUT,
) -> list[Row]:
    """Train and measure every world x init x seed that `folder` does not hold yet; all rows, in that order."""
    unknown = [name for name in (*worlds, *inits) if name not in (*WORLDS, *INITS)]
    if unknown:
        raise ConfigError(f"expected worlds of {', '.join(WORLDS)} and inits of {', '.join(INITS)}, got {unknown}")
    rows = []
    for world in worlds:
        for init in inits:
            for seed in seeds:
                rows += _run(folder / f"{world}-{init}-{seed}-{steps}-{clips}", world, init, seed, steps, clips)
    return rows


def _run(folder: Path, name: str, init: str, seed: int, steps: int, clips: int) -> list[Row]:
    kept = folder / "rows.json"
    if kept.exists():
        rows: list[Row] = json.loads(kept.read_text())
        return rows
    began = time.process_time()
    world = World(gaussian.covariance(WORLDS[name], FRAMES), seed)
    stage, average = _stage(world, init, steps)
    loop.run(stage, folder, seed=seed, average=average)
    student = clone(stage.student, MODEL, average.weights)
    found = measure(student, world, init, clips)
    seconds = round(time.process_time() - began, 1)
    rows = [{"world": name, "init": init, "seed": seed, **row, "clips": clips, "seconds": seconds} for row in found]
    kept.write_text(json.dumps(rows))
    return rows


def _stage(world: World, init: str, steps: int) -> tuple[ode.Stage | cd.Stage, loop.Average]:
    """The stage as everyone trains it, on a world's exact teacher."""
    loop.step_generator(world.seed, START)
    if init == "causal-cd":
        consistency = cd.Stage(replace(CONSISTENCY, steps=steps), MODEL, world, Exact(MODEL, world.covariance))
        return consistency, consistency.average
    student = Network(MODEL)
    taught = pairs(world, init, PAIRS, loop.step_generator(world.seed, TRAINING))
    config = replace(REGRESSION, steps=steps, past="noisy" if init == "sf-ode" else "clean")
    return ode.Stage(config, MODEL, taught, student), loop.Average(student, config.ema)


@torch.no_grad()
def measure(student: Network, world: World, init: str, clips: int) -> list[Row]:
    """One-jump variance ratios on held-out trajectories: level, frame, measured, predicted, standard_error."""
    held_out = pairs(world, init, clips, loop.step_generator(world.seed, MEASURING))
    batch = Batch.of(held_out.clean, held_out)
    velocity = student.noisy_prefix if init == "sf-ode" else student.teacher_forced
    rows = []
    for index, s in enumerate(LEVELS):
        x, every = held_out.states[:, index], torch.full((clips, FRAMES), s)
        jump = flow.x0_from_v(x, velocity(x, every, batch), broadcast(every))
        ratio, error = variance_ratio(jump, held_out.end)
        theory = predicted(world.covariance, init, s)
        for frame in range(FRAMES):
            rows.append(
                {
                    "level": round(s, 4),
                    "frame": frame + 1,
                    "measured": round(float(ratio[frame]), 4),
                    "predicted": round(float(theory[frame]), 4),
                    "standard_error": round(float(error[frame]), 4),
                }
            )
    return rows


def variance_ratio(jump: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """(Var(jump) / Var(end), its standard error over clips), [n] each, of latents [B, n, C, h, w].

    Both come from the same clips, so what chance does to the one it does to the other; the error is that of a ratio of
    means by the delta method.
    """
    above, below = ((x.double() - x.double().mean(0)).square().mean((2, 3, 4)) for x in (jump, end))  # [B, n]
    ratio = above.mean(0) / below.mean(0)
    error = (above - ratio * below).std(0) / len(above) ** 0.5 / below.mean(0)
    return ratio, error


# ---------------------------------------------------------------------- the table


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line for each world, student and level: measured over the seeds +- standard error (predicted)."""
    groups: dict[tuple[str, str, float, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["world"], row["init"], row["level"], row["frame"]), []).append(row)
    frames = sorted({frame for *_, frame in groups})
    lines = [
        "| world | student | s | " + " | ".join(f"frame {frame}" for frame in frames) + " |",
        "| --- | --- | ---: |" + " ---: |" * len(frames),
    ]
    for world, init, level in dict.fromkeys(key[:3] for key in groups):
        cells = [_cell(groups[world, init, level, frame]) for frame in frames]
        lines.append(f"| {world} (ρ = {WORLDS[world]:g}) | {init} | {level:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(rows: Sequence[Row]) -> str:
    """Mean of the seeds; the error adds their spread to that of the clips."""
    values = [row["measured"] for row in rows]
    spread = variance(values) if len(values) > 1 else 0.0
    error = ((spread + fmean(row["standard_error"] ** 2 for row in rows)) / len(rows)) ** 0.5
    return f"{fmean(values):.3f} ± {error:.3f} ({rows[0]['predicted']:.3f})"
