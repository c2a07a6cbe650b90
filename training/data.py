"""The data set of the tiny recipe: clips of the world as latents, with the captions that rule each latent frame.

Written once as shards of safetensors by as many processes as there are cores; a shard depends on (seed, its number)
alone.

Shapes: N clips, n latent frames, C x h x w a latent frame, L rows of a caption; every clip has two captions (equal
where it has no switch)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol, Self

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from cfrt.nn.autoencoder import Autoencoder
from training import captions, worlds
from training.loop import step_generator, write_tensors

SHARD = 1000  # clips


@dataclass(frozen=True, kw_only=True)
class Config:
    clips: int = 20_000
    units: int = 10  # latent frames of a clip
    unit: int = 1  # F: captions change between units only
    switched: float = 0.25  # share of clips whose caption changes
    omitted: float = 0.08  # chance that a caption leaves a factor out
    omitted_after: float = 0.3  # the same for the second caption: what it leaves out stays as it was


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What B clips are asked to show."""

    captions: Tensor  # [B, 2, L] rows of the small text table, or [B, 2, L, D] embeddings of a text encoder
    caption: Tensor  # [B, n] which of the two rules each latent frame
    null: Tensor | None = None  # [L, D] embedding of the unconditional prompt; for rows it is row 0

    def __len__(self) -> int:
        return len(self.captions)

    def first(self, count: int) -> Self:
        """The first `count` clips."""
        return replace(self, **{name: getattr(self, name)[:count] for name in self._of_clips})

    def to_null(self) -> Self:
        """The same under the unconditional prompt."""
        blank = torch.zeros_like(self.captions)
        return replace(self, captions=blank if self.null is None else blank + self.null)

    def and_null(self) -> Self:
        """Both in one batch of 2 B, the asked ones first: what classifier-free guidance needs."""
        null = self.to_null()
        pairs = {name: (getattr(self, name), getattr(null, name)) for name in self._of_clips}
        return replace(self, **{name: torch.cat(pair) for name, pair in pairs.items()})

    def drop(self, chance: float, generator: torch.Generator) -> Self:
        """Replace whole captions by the unconditional prompt, so that guidance has an unconditional branch."""
        keep = torch.rand(len(self), generator=generator, device=generator.device).to(self.captions.device) >= chance
        kept = keep.view(-1, *[1] * (self.captions.dim() - 1))
        return replace(self, captions=torch.where(kept, self.captions, self.to_null().captions))

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: x.to(device) for name, x in found.items() if isinstance(x, Tensor)})

    @property
    def _of_clips(self) -> tuple[str, ...]:
        return ("captions", "caption")


@dataclass(frozen=True, kw_only=True)
class Batch(Prompts):
    """B clips and what they were asked to show."""

    latents: Tensor  # [B, n, C, h, w]

    @staticmethod
    def of(latents: Tensor, prompts: Prompts) -> Batch:
        return Batch(latents=latents, captions=prompts.captions, caption=prompts.caption, null=prompts.null)

    @property
    def _of_clips(self) -> tuple[str, ...]:
        return ("latents", "captions", "caption")


class DataSet(Protocol):
    """Where the stages find clips and prompts. Everything is a function of the arguments alone: training resumes
    exactly."""

    def __len__(self) -> int: ...

    def batch(self, index: int, size: int) -> Batch:
        """Batch `index` of an endless walk through permutations of the data set."""

    def prompts(self, size: int, generator: torch.Generator) -> Prompts:
        """Prompts without clips, for rollouts."""


@dataclass(frozen=True, kw_only=True)
class Script:
    """Captions of B clips to come: what a rollout is asked to play."""

    before: Tensor  # [B, 6] factors
    after: Tensor  # [B, 6]
    unit: Tensor  # [B] unit at which `after` takes over; n where it never does
    captions: Tensor  # [B, 2, L]
    steered: Tensor  # [B] bool, whether the second caption names a direction

    def caption(self, units: int) -> Tensor:
        """[B, n] index of the caption that rules each unit."""
        return (torch.arange(units)[None] >= self.unit[:, None]).long()


def script(clips: int, config: Config, generator: torch.Generator) -> Script:
    """Draw factors, what the captions mention, and the switches (at least three units before and four after)."""
    before, fresh = worlds.sample_factors(clips, generator), worlds.sample_factors(clips, generator)
    switched = torch.rand(clips, generator=generator) < config.switched
    first_half = max(1, min(3, config.units - 2))
    unit = torch.randint(first_half, max(first_half + 1, config.units - 3), (clips,), generator=generator)
    unit = unit // config.unit * config.unit
    mentioned = (
        torch.rand(clips, 2, 6, generator=generator) >= torch.tensor([config.omitted, config.omitted_after])[:, None]
    )
    after = torch.where(mentioned[:, 1] & switched[:, None], fresh, before)
    ids = captions.rows(torch.stack([before, after], 1), mentioned)
    ids[:, 1] = torch.where(switched[:, None], ids[:, 1], ids[:, 0])
    return Script(
        before=before,
        after=after,
        unit=torch.where(switched, unit, config.units),
        captions=ids,
        steered=mentioned[:, 1, worlds.DIRECTION] & switched,
    )


def prompts(clips: int, generator: torch.Generator, config: Config) -> Prompts:
    """The captions of a script."""
    plan = script(clips, config, generator)
    return Prompts(captions=plan.captions, caption=plan.caption(config.units))


def play(plan: Script, units: int, generator: torch.Generator) -> worlds.Scene:
    """Real clips of a script."""
    frames = 1 + worlds.UNIT_FRAMES * (units - 1)
    switch = worlds.first_frame(plan.unit).clamp(max=frames)
    return worlds.simulate(plan.before, generator, frames, after=plan.after, switch=switch, steered=plan.steered)


@torch.no_grad()
def encode(autoencoder: Autoencoder, video: Tensor, chunk: int = 8) -> Tensor:
    """Latents of a batch of clips, a few at a time (a convolution over hundreds of units falls out of the cache)."""
    chunk *= worlds.ON_GPU if video.is_cuda else 1
    return torch.cat([autoencoder.encode(video[first : first + chunk]) for first in range(0, len(video), chunk)])


@torch.no_grad()
def decode(autoencoder: Autoencoder, latents: Tensor, chunk: int = 8) -> Tensor:
    """Pixels in [0, 1] of clips that start at their first latent frame."""
    return torch.cat(
        [autoencoder.decode(latents[first : first + chunk])[0].clamp(0, 1) for first in range(0, len(latents), chunk)]
    )


def write_shard(
    folder: Path, number: int, config: Config, autoencoder: Autoencoder, seed: int, clips: int = SHARD
) -> Path:
    """Render and encode one shard, unless it is there already."""
    path = folder / f"{number:04d}.safetensors"
    if path.exists():
        return path
    generator = step_generator(seed, number)
    plan = script(clips, config, generator)
    scene = play(plan, config.units, generator).to(autoencoder.latent_mean.device)
    latents = encode(autoencoder, worlds.render(scene))
    tensors = {"latents": latents.half().cpu(), "captions": plan.captions, "caption": plan.caption(config.units)}
    write_tensors(path, tensors)
    return path


def write(folder: Path, config: Config, autoencoder: Autoencoder, seed: int) -> None:
    """All shards of the data set that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = -(-config.clips // SHARD)
    for number in tqdm(range(shards), desc="data", unit="shard", disable=None):
        write_shard(folder, number, config, autoencoder, seed, min(SHARD, config.clips - number * SHARD))


class Clips:
    """The data set in memory; `batch(index)` is a function of the step alone, so that training resumes exactly."""

    def __init__(self, folder: Path, config: Config, seed: int, device: torch.device | None = None) -> None:
        """`device`: where the clips are kept and batches are made (8 KB a clip of 16 units); default the CPU."""
        shards = [load_file(folder / f"{number:04d}.safetensors") for number in range(-(-config.clips // SHARD))]
        self.latents, self.captions, self.caption = (
            torch.cat([shard[name] for shard in shards]).to(device) for name in ("latents", "captions", "caption")
        )
        self.config, self.seed = config, seed
        self._permutation = lru_cache(4)(self._permuted)

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, index: int, size: int) -> Batch:
        """Batch `index` of an endless walk through permutations of the data set, one permutation an epoch."""
        place, end, parts = index * size, (index + 1) * size, list[Tensor]()
        while place < end:
            epoch, first = divmod(place, len(self))
            parts.append(self._permutation(epoch)[first : first + end - place])
            place += len(parts[-1])
        picks = torch.cat(parts).to(self.latents.device, non_blocking=True)
        return Batch(latents=self.latents[picks].float(), captions=self.captions[picks], caption=self.caption[picks])

    def prompts(self, size: int, generator: torch.Generator) -> Prompts:
        return prompts(size, generator, self.config)

    def _permuted(self, epoch: int) -> Tensor:
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(self.seed * 1000 + epoch))
