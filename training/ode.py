"""Stage 2, the other way: ODE regression. A teacher's probability-flow ODE is run once for many clips, and the student
learns to jump from states on the way to the end of it.

    min E |G_theta(x_t^i, c, t) - x_end^i|^2,    G(x, s) = x - s v

* *Causal ODE* (arXiv:2602.02214, section 3.3): the AR teacher goes from noise to its end point on the real past, and
  the student is given that past, c = x^{<i}. The pair is a function of what the student sees.
* *Self Forcing's ODE* (arXiv:2506.08009; the baseline): the bidirectional teacher makes whole clips, and the student
  is given the noisy past, c = x_t^{<i}. The end point also depends on the noise of later frames, which the student
  does not see: it learns a mean (arXiv:2602.02214, proposition 3.3).

Shapes: B clips, S stored states, n latent frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol, Self, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from cfrt import flow
from cfrt.config import ModelConfig
from cfrt.errors import ConfigError
from training import parallel, rollout
from training.data import Batch, DataSet, Prompts
from training.loop import SCHEDULES, Micro, Optimisers, Report, Schedule, Update, step_generator, write_tensors
from training.network import Network, Velocity, broadcast, guided, noise_like, unit_weights
from training.optimisers import adam


@dataclass(frozen=True, kw_only=True)
class Config:
    past: Literal["clean", "noisy"] = "clean"
    """What a student's unit is given: the real past (causal ODE), or states as noisy as its own (Self Forcing)."""
    pairs: int = 640
    """Clips whose trajectories are stored."""
    euler_steps: int = 48
    guidance: float = 4.0
    levels: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    """u of the stored states, before the shift warp; each must lie on the Euler grid."""
    piece: int = 64
    """Clips made at a time, and kept in one file."""
    half: bool = False
    """Keep them in fp16, as the official rows are."""
    steps: int = 1000
    batch: int = 16
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Schedule = "cosine"
    ema: float = 0.98
    first_weight: float = 3.0
    early_weight: float = 2.0

    def __post_init__(self) -> None:
        for u in self.levels:
            if abs(u * self.euler_steps - round(u * self.euler_steps)) > 1e-6:
                raise ConfigError(
                    f"expected levels u on a grid of {self.euler_steps} Euler steps (multiples of "
                    f"1/{self.euler_steps}), got {u}"
                )


# -------------------------------------------------------------------------------------------------------------- pairs


@dataclass(frozen=True, kw_only=True)
class Kept(Prompts):
    """What was made once and is drawn from often. Some of them are fp32, whatever all are kept in."""

    def __getitem__(self, clips: Tensor) -> Self:
        return replace(self, **{name: _full(getattr(self, name)[clips]) for name in self._of_clips})

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps."""
        null = {} if self.null is None else {"null": self.null}
        return {name: getattr(self, name) for name in self._of_clips} | null

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """One after the other; all have the same unconditional prompt."""
        return replace(parts[0], **{name: torch.cat([getattr(p, name) for p in parts]) for name in parts[0]._of_clips})


@dataclass(frozen=True, kw_only=True)
class Pairs(Kept):
    """Trajectories of a teacher."""

    states: Tensor  # [B, S, n, C, h, w] on the way, at the levels asked for
    end: Tensor  # [B, n, C, h, w] the teacher's end point
    clean: Tensor  # [B, n, C, h, w] the real clip that was its past; the end point itself where it had none

    @property
    def _of_clips(self) -> tuple[str, ...]:
        return ("captions", "caption", "states", "end", "clean")


class Trajectories(Protocol):
    """Pairs in memory or in files."""

    def __len__(self) -> int: ...

    def __getitem__(self, clips: Tensor, /) -> Pairs: ...


def causal_pairs(
    teacher: Network, model: ModelConfig, config: Config, batch: Batch, generator: torch.Generator
) -> Pairs:
    """Trajectories of the AR teacher unit by unit, against a ring that holds the real past: the same numbers as
    `forced_pairs` without the clean half in every step."""
    batch = batch.to(teacher.device)
    player = rollout.Player(teacher, model, batch, guidance=config.guidance)
    noise, tracks = noise_like(batch.latents, generator), []
    for unit in range(noise.shape[1] // model.unit):
        own = slice(unit * model.unit, (unit + 1) * model.unit)
        tracks.append(_trajectory(partial(player.velocity, unit=unit), noise[:, own], model, config))
        player.commit(batch.latents[:, own], unit)
    return _pairs(torch.cat(tracks, 2), batch, clean=batch.latents)


def led_pairs(teacher: rollout.Led, config: Config, generator: torch.Generator) -> Pairs:
    """Trajectories of an AR teacher that is led, on the past that it played by itself."""
    model, tracks = teacher.model, list[Tensor]()

    def denoise(streams: rollout.Streams, noise: Tensor, unit: int) -> Tensor:
        tracks.append(_trajectory(partial(streams.velocity, unit=unit), noise, model, config))
        return tracks[-1][:, -1]

    played = rollout.play(teacher, teacher.prompts.caption.shape[1] // model.unit, denoise, generator)
    return _pairs(torch.cat(tracks, 2), teacher.prompts, clean=played)


def forced_pairs(
    teacher: Network, model: ModelConfig, config: Config, batch: Batch, generator: torch.Generator
) -> Pairs:
    """Trajectories of the AR teacher on the real past, all units at once under the teacher-forcing mask."""
    batch = batch.to(teacher.device)
    velocity = partial(_clip_velocity, teacher.teacher_forced, batch, config.guidance)
    noise = noise_like(batch.latents, generator)
    return _pairs(_trajectory(velocity, noise, model, config), batch, clean=batch.latents)


def bidirectional_pairs(
    score: Network, model: ModelConfig, config: Config, batch: Batch, generator: torch.Generator
) -> Pairs:
    """Trajectories of the bidirectional teacher under the batch's prompts; its clips are not looked at."""
    batch = batch.to(score.device)
    velocity = partial(_clip_velocity, score.bidirectional, batch, config.guidance)
    noise = noise_like(batch.latents, generator)
    states = _trajectory(velocity, noise, model, config)
    return _pairs(states, batch, clean=states[:, -1])


def _clip_velocity(velocity: Velocity, batch: Batch, guidance: float, x: Tensor, s: float) -> Tensor:
    return guided(velocity, x, torch.full(x.shape[:2], s, device=x.device), batch, guidance)


@torch.no_grad()
def _trajectory(velocity: Callable[[Tensor, float], Tensor], x: Tensor, model: ModelConfig, config: Config) -> Tensor:
    """[B, S + 1, n, C, h, w]: x at each of the levels, then the end point, by Euler steps from noise x."""
    stops = [round((1 - u) * config.euler_steps) for u in config.levels]
    states = []
    for step, (s, s_next) in enumerate(pairwise(flow.euler_grid(config.euler_steps, model.shift))):
        if step in stops:
            states.append(x)
        x = flow.euler(x, velocity(x, s), s, s_next)
    return torch.stack([*states, x], 1)


def _pairs(track: Tensor, prompts: Prompts, clean: Tensor) -> Pairs:
    return Pairs(
        states=track[:, :-1],
        end=track[:, -1],
        clean=clean,
        captions=prompts.captions,
        caption=prompts.caption,
        null=prompts.null,
    )


Maker = Callable[[Batch, torch.Generator], Kept]
K = TypeVar("K", bound=Kept)


def write(folder: Path, config: Config, clips: DataSet, make: Maker, seed: int) -> None:
    """Make and keep all of them, a piece in a file; files that are there already stay. Processes take turns."""
    folder.mkdir(parents=True, exist_ok=True)
    own = list(enumerate(_files(folder, config)))[parallel.rank() :: parallel.count()]
    for piece, path in tqdm(own, desc="pairs", unit="piece", disable=None):
        if not path.exists():
            pairs = make(clips.batch(piece, config.piece), step_generator(seed, piece))
            tensors = pairs[torch.arange(min(config.piece, config.pairs - piece * config.piece))].tensors()
            write_tensors(
                path, {n: x.half() if config.half and x.is_floating_point() else x for n, x in tensors.items()}
            )


def _files(folder: Path, config: Config) -> list[Path]:
    return [folder / f"{piece:04d}.safetensors" for piece in range(-(-config.pairs // config.piece))]


class Stored:
    """The trajectories that `write` left, read when they are asked for. ConfigError when some are missing."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.files, self.config = _files(folder, config), config
        if missing := sum(not path.exists() for path in self.files):
            raise ConfigError(f"expected {len(self.files)} pieces of pairs in {folder}, {missing} are missing")

    def __len__(self) -> int:
        return self.config.pairs

    def __getitem__(self, clips: Tensor) -> Pairs:
        return Pairs.cat([self._one(*divmod(clip, self.config.piece)) for clip in clips.tolist()])

    def _one(self, piece: int, row: int) -> Pairs:
        with safe_open(self.files[piece], "pt") as file:
            found = {n: file.get_tensor(n) if n == "null" else file.get_slice(n)[row : row + 1] for n in file.keys()}  # noqa: SIM118
        return Pairs(**{name: _full(x) for name, x in found.items()})


def _full(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def read(folder: Path, config: Config, kind: type[K] = Pairs) -> K:  # type: ignore[assignment]
    """All of them, in memory, as they are kept."""
    return kind.cat([kind(**load_file(path)) for path in Stored(folder, config).files])


# --------------------------------------------------------------------------------------------------------- regression


class Stage:
    """Regression on stored trajectories; the level is drawn for each unit."""

    name = "ode"

    def __init__(self, config: Config, model: ModelConfig, pairs: Trajectories, start: Network) -> None:
        self.config, self.model, self.pairs, self.steps = config, model, pairs, config.steps
        self.student, self.batch = start, config.batch
        self.networks, self.frozen = {"student": self.student}, dict[str, nn.Module]()
        self.levels = torch.tensor(flow.sigmas(config.levels, model.shift))

    def optimisers(self) -> dict[str, Optimisers]:
        return {"student": adam(self.student, self.config.lr, self.config.betas)}

    def step(self, index: int) -> Iterator[Update]:
        yield Update("student", self.config.lr * SCHEDULES[self.config.schedule](index, self.steps), self.loss)

    def loss(self, micro: Micro) -> tuple[Tensor, Report]:
        config, unit, generator = self.config, self.model.unit, micro.generator
        device = self.student.device
        pairs = self.pairs[torch.randint(len(self.pairs), (config.batch,), generator=generator)].to(device)
        frames = pairs.end.shape[1]
        level = torch.randint(len(self.levels), (config.batch, frames // unit), generator=generator)
        level = level.repeat_interleave(unit, 1)  # [B, n]
        x = pairs.states[torch.arange(config.batch)[:, None], level, torch.arange(frames)[None]]
        jump = self.jump(x, self.levels[level].to(device), Batch.of(pairs.clean, pairs))
        error = (jump - pairs.end).square().mean((0, 2, 3, 4))
        weights = unit_weights(frames, unit, config.first_weight, config.early_weight, error.device)
        return (error * weights).mean(), {"loss": error.mean(), "first": error[:unit].mean()}

    def jump(self, x: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """G(x, s): where the student lands from x [B, n, C, h, w] at levels s [B, n], on the past of `config.past`."""
        velocity = {"clean": self.student.teacher_forced, "noisy": self.student.noisy_prefix}[self.config.past]
        return flow.x0_from_v(x, velocity(x, s, batch), broadcast(s))
