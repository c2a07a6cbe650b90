"""Where measured clips come from: the world itself, its reconstruction, a model in training, or the shipped stream.

A source is a function from a `Task` to pixels. All sources of one evaluation get the same tasks, so that their numbers
stand beside each other. Prompts go in as text and through the tokenizer that people use.

Shapes: B clips, n latent frames, T = 1 + 4 (n - 1) pixel frames, L rows of a caption."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cfrt.config import ModelConfig, TextConfig
from cfrt.errors import EngineError
from cfrt.nn.autoencoder import Autoencoder
from cfrt.text import TableText
from training import bidirectional, captions, data, phases, rollout, worlds
from training.data import Prompts
from training.network import Network


@dataclass(frozen=True, kw_only=True)
class Task:
    """What B clips of n latent frames are asked to show: one scene up to latent frame `switch`, another from there."""

    wanted: Tensor  # [B, 2, 6] factors
    texts: list[tuple[str, str]]
    captions: Tensor  # [B, 2, L] rows of the text table
    switch: int
    units: int
    past: worlds.Scene | None = None
    """Real frames that each clip goes on from."""

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, clips: slice) -> Task:
        past = None if self.past is None else self.past[clips]
        return replace(
            self, wanted=self.wanted[clips], texts=self.texts[clips], captions=self.captions[clips], past=past
        )

    @property
    def frames(self) -> int:
        return 1 + worlds.UNIT_FRAMES * (self.units - 1)

    @property
    def prompts(self) -> Prompts:
        caption = (torch.arange(self.units) >= self.switch).long().expand(len(self), -1)
        return Prompts(captions=self.captions, caption=caption)


Source = Callable[[Task, torch.Generator], Tensor]  # -> pixels [B, T, 3, SIDE, SIDE]


class Sampler(Protocol):
    """Plays latents [B, n, C, h, w] of prompts, after a real prefix."""

    def __call__(self, prompts: Prompts, generator: torch.Generator, prefix: Tensor | None = None) -> Tensor: ...


# -------------------------------------------------------------------------------------------------------------- tasks


class Tokenizer:
    """The student's own tokenizer, asked for the rows of the table instead of what is in them."""

    def __init__(self, config: TextConfig) -> None:
        self._text = TableText(replace(config, width=1), np.arange(captions.ROWS, dtype=np.float32)[:, None])

    def __call__(self, prompt: str) -> Tensor:
        """[L] rows of the text table."""
        return torch.from_numpy(self._text.encode(prompt).rows[:, 0]).long()


def held_out_scenes(count: int, generator: torch.Generator) -> Tensor:
    """[count, 6] scenes that training never showed, in shuffled rounds: none comes up twice before all have."""
    scenes = worlds.all_factors()
    scenes = scenes[worlds.held_out(scenes)]
    rounds = [scenes[torch.randperm(len(scenes), generator=generator)] for _ in range(-(-count // len(scenes)))]
    return torch.cat(rounds)[:count]


def start_task(tokenizer: Tokenizer, count: int, units: int, seed: int) -> Task:
    """One held-out prompt for the whole clip."""
    scenes = held_out_scenes(count, torch.Generator().manual_seed(seed))
    return _worded(tokenizer, torch.stack([scenes, scenes], 1), switch=units, units=units, seed=seed)


def switch_task(tokenizer: Tokenizer, count: int, units: int, switch: int, seed: int) -> Task:
    """A held-out prompt, then another one of a different colour or shape."""
    generator = torch.Generator().manual_seed(seed)
    before, after = held_out_scenes(count, generator), held_out_scenes(count, generator)
    alike = [worlds.COLOUR, worlds.SHAPE]
    while (same := (before[:, alike] == after[:, alike]).all(1)).any():
        after[same] = held_out_scenes(int(same.sum()), generator)
    return _worded(tokenizer, torch.stack([before, after], 1), switch=switch, units=units, seed=seed)


def future_task(tokenizer: Tokenizer, pasts: int, futures: int, past_units: int, units: int, seed: int) -> Task:
    """`futures` clips in a row for each of `pasts` real beginnings under held-out prompts."""
    opening = start_task(tokenizer, pasts, past_units, seed)
    past = worlds.simulate(opening.wanted[:, 0], torch.Generator().manual_seed(seed), opening.frames)
    rows = torch.arange(pasts).repeat_interleave(futures)
    texts = [opening.texts[row] for row in rows.tolist()]
    return Task(
        wanted=opening.wanted[rows],
        texts=texts,
        captions=opening.captions[rows],
        switch=units,
        units=units,
        past=past[rows],
    )


def _worded(tokenizer: Tokenizer, wanted: Tensor, *, switch: int, units: int, seed: int) -> Task:
    chooser = random.Random(seed)
    firsts = [captions.caption(scene, chooser) for scene in wanted[:, 0]]
    seconds = [captions.caption(scene, chooser) for scene in wanted[:, 1]] if switch < units else firsts
    texts = list(zip(firsts, seconds, strict=True))
    ids = torch.stack([torch.stack([tokenizer(text) for text in pair]) for pair in texts])
    return Task(wanted=wanted, texts=texts, captions=ids, switch=switch, units=units)


# ------------------------------------------------------------------------------------------------------------ sources


def real(task: Task, generator: torch.Generator) -> Tensor:
    """Clips of the world."""
    return worlds.render(play(task, generator))


def play(task: Task, generator: torch.Generator) -> worlds.Scene:
    """The world's own answer to a task."""
    if task.past is not None:
        return _joined(task.past, go_on(task.past, task.frames - task.past.frames, generator))
    switch = torch.full((len(task),), min(int(worlds.first_frame(task.switch)), task.frames))
    return worlds.simulate(task.wanted[:, 0], generator, task.frames, after=task.wanted[:, 1], switch=switch)


def go_on(past: worlds.Scene, frames: int, generator: torch.Generator) -> worlds.Scene:
    """One of the futures that the world has for each clip (of one caption, seen from its start)."""
    last = (past.position[:, -1], past.heading[:, -1], past.phase[:, -1])
    return worlds.simulate(past.before, generator, frames, start=last, calm=worlds.CALM - past.frames + 1)


def _joined(past: worlds.Scene, future: worlds.Scene) -> worlds.Scene:
    track = {
        name: torch.cat([getattr(past, name), getattr(future, name)], 1) for name in ("position", "heading", "phase")
    }
    return replace(past, switch=past.switch + future.frames, **track)


def reconstruction(autoencoder: Autoencoder) -> Source:
    """Clips of the world through the autoencoder: what a perfect model of its latents would show."""
    return lambda task, generator: data.decode(autoencoder, data.encode(autoencoder, real(task, generator)))


def generated(autoencoder: Autoencoder, sampler: Sampler) -> Source:
    """Clips of a model."""

    def source(task: Task, generator: torch.Generator) -> Tensor:
        prefix = None if task.past is None else data.encode(autoencoder, worlds.render(task.past))
        return data.decode(autoencoder, sampler(task.prompts, generator, prefix))

    return source


def streamed(model: str | Path, engine: str = "auto", precision: str = "auto", threads: int | None = None) -> Source:
    """Clips of the runtime itself: each one a `cfrt.Stream` read frame by frame, its prompt changed while it runs.

    It knows nothing of the training code, so it checks the numbers of `student`. It can't go on from a real past."""
    from cfrt.stream import Stream  # with codecs, which no training needs

    def source(task: Task, generator: torch.Generator) -> Tensor:
        seeds = torch.randint(2**31, (len(task),), generator=generator).tolist()
        return torch.stack([clip(texts, task, seed) for texts, seed in zip(task.texts, seeds, strict=True)])

    def clip(texts: tuple[str, str], task: Task, seed: int) -> Tensor:
        until = min(int(worlds.first_frame(task.switch)), task.frames)
        with Stream(
            texts[0], model=model, engine=engine, precision=precision, threads=threads, seed=seed, fps="max"
        ) as stream:
            frames = list(stream.frames(until))
            if until < task.frames:
                change = stream.prompt(texts[1])
                if change.unit * stream.config.unit != task.switch:
                    raise EngineError(
                        f"expected the prompt to change at latent frame {task.switch}, got unit {change.unit}"
                    )
                frames += stream.frames(task.frames - until)
        return torch.from_numpy(np.stack([frame.pixels for frame in frames])).permute(0, 3, 1, 2) / 255

    return source


def whole(network: Network, model: ModelConfig, steps: int = 24, guidance: float = 2.0) -> Sampler:
    """The bidirectional network, the whole clip at once. It can't go on from a real past."""

    def sample(prompts: Prompts, generator: torch.Generator, prefix: Tensor | None = None) -> Tensor:
        if prefix is not None:
            raise EngineError("the bidirectional network makes whole clips: leave out the task 'futures'")
        return bidirectional.sample(network, model, prompts, generator, steps=steps, guidance=guidance)

    return sample


def student(network: Network, model: ModelConfig) -> Sampler:
    """The few-step student, as it streams."""

    def sample(prompts: Prompts, generator: torch.Generator, prefix: Tensor | None = None) -> Tensor:
        player = rollout.Player(network, model, prompts)
        units = prompts.caption.shape[1] // model.unit
        return rollout.play(player, units, rollout.few_step(model, generator), generator, prefix)

    return sample


def led(strong: Network, weak: Network, model: ModelConfig, config: phases.Config) -> Sampler:
    """The autoregressive teacher as distillation by phases follows it."""

    def sample(prompts: Prompts, generator: torch.Generator, prefix: Tensor | None = None) -> Tensor:
        units = prompts.caption.shape[1] // model.unit
        player = config.led(strong, weak, model, prompts)
        return rollout.play(player, units, rollout.euler(model, config.euler_steps), generator, prefix)

    return sample


def teacher(network: Network, model: ModelConfig, steps: int = 24, guidance: float = 2.0) -> Sampler:
    """The autoregressive teacher: guided Euler steps through the same ring."""

    def sample(prompts: Prompts, generator: torch.Generator, prefix: Tensor | None = None) -> Tensor:
        player = rollout.Player(network, model, prompts, guidance=guidance)
        units = prompts.caption.shape[1] // model.unit
        return rollout.play(player, units, rollout.euler(model, steps), generator, prefix)

    return sample
