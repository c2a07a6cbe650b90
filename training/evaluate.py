"""The measuring: how well a model does what prompts ask, beside real clips, their reconstructions and the teacher.

Four tasks on held-out scenes, each read by the exact reader and reduced by `training.metrics`:

| task | clips | numbers |
| --- | --- | --- |
| start | one prompt, as long as a training clip | instruction following, dynamic, validity, residual, turns, distance |
| switch | a second prompt at a unit boundary | seen within a second, frames until the change, new direction |
| futures | several continuations of one real past | diversity |
| long | ten seconds or more | the same by stretches of it (drift) |

    python -m training evaluate --student cfrt/students/tiny            what ships, pixel by pixel through `cfrt.Stream`
    python -m training evaluate --run runs/tiny --stages teacher dmd    the stages of a run

Everything is a function of the weights and `Config.seed`. Models of the real world have no exact reader: for them
`python -m training evaluate --model M --prompts FILE` is `training.vbench`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from torch import Generator, Tensor
from tqdm.auto import tqdm

from cfrt import students
from cfrt.config import ModelConfig, TextConfig
from cfrt.errors import CfrtError, ConfigError
from training import metrics, preview, sources, table, worlds
from training.metrics import Estimate
from training.network import frozen
from training.reader import Reading, read
from training.sources import Source, Task, Tokenizer

EXAMPLES = 6  # clips of each task that go on the contact sheet
TRUE_FUTURES = 256  # simulated for each past

Row = dict[str, Any]  # nested dicts and lists of Estimate


@dataclass(frozen=True, kw_only=True)
class Config:
    prompts: int = 512
    switches: int = 256
    pasts: int = 48
    futures: int = 12
    long: int = 24
    """Clips of `long_units`."""
    units: int = 10
    """Latent frames of a start."""
    switch_unit: int = 6
    switch_units: int = 12
    past_units: int = 3
    future_units: int = 5
    long_units: int = 41
    batch: int = 64
    """Clips played together; part of what the noise depends on."""
    seed: int = 20_000

    def tasks(self, text: TextConfig) -> dict[str, Task]:
        """The four tasks, the same for every source."""
        tokenizer, seed = Tokenizer(text), self.seed
        past, future = self.past_units, self.past_units + self.future_units
        return {
            "start": sources.start_task(tokenizer, self.prompts, self.units, seed),
            "switch": sources.switch_task(tokenizer, self.switches, self.switch_units, self.switch_unit, seed + 1),
            "futures": sources.future_task(tokenizer, self.pasts, self.futures, past, future, seed + 2),
            "long": sources.start_task(tokenizer, self.long, self.long_units, seed + 3),
        }


@torch.no_grad()
def measure(
    rows: Mapping[str, Source], tasks: Mapping[str, Task], config: Config, folder: Path | None = None
) -> dict[str, Row]:
    """The numbers of every source on the given tasks, by the name of the source."""
    batches = [
        (name, task, first) for task in tasks for name in rows for first in range(0, len(tasks[task]), config.batch)
    ]
    seen: dict[tuple[str, str], list[Look]] = {}
    shown: dict[tuple[str, str], Tensor] = {}
    for name, task, first in tqdm(batches, desc="evaluate", unit="batch", disable=None):
        video = _played(rows[name], tasks[task], first, config, salt=list(MEASURES).index(task))
        seen.setdefault((task, name), []).append(MEASURES[task].look(video, tasks[task]))
        shown.setdefault((task, name), video[:EXAMPLES].clone())
    if folder is not None:
        _draw(shown, folder)
    return {
        name: {
            key: value
            for task in tasks
            for key, value in MEASURES[task].numbers(_whole(seen[task, name]), tasks[task], config).items()
        }
        for name in rows
    }


def _played(source: Source, task: Task, first: int, config: Config, salt: int) -> Tensor:
    """One batch of a task; its noise depends on the task and its place in it alone, so sources share it."""
    generator = Generator().manual_seed((config.seed + salt) * 1_000_003 + first)
    return source(task[first : first + config.batch], generator)


# --------------------------------------------------------------------------------------------------------------- tasks

Look = dict[str, Reading]


def _whole(looks: Sequence[Look]) -> Look:
    """The readings of all batches, in order."""
    return {name: Reading.cat([look[name] for look in looks]) for name in looks[0]}


def _see_start(video: Tensor, task: Task) -> Look:
    return {"clip": read(video)}


def _start(look: Look, task: Task, config: Config) -> Row:
    clip, wanted = look["clip"], task.wanted[:, 0]
    real = metrics.features(sources.play(task, Generator().manual_seed(config.seed)).position, wanted)
    return {
        **metrics.instruction(clip, wanted),
        **metrics.quality(clip, wanted),
        "turns": metrics.turn_rate(clip),
        "distance": metrics.distance(metrics.features(clip.position, clip.factors), real),
    }


def _see_switch(video: Tensor, task: Task) -> Look:
    """Before the switch; while the object takes its new direction; once it must be visible; and frame by frame."""
    at = int(worlds.first_frame(task.switch))
    after = video[:, at : at + metrics.SETTLED.stop]
    return {
        "before": read(video[:, at - worlds.UNIT_FRAMES : at]),
        "run": read(after[:, metrics.RUN]),
        "settled": read(after[:, metrics.SETTLED]),
        "frames": read(after.flatten(0, 1)[:, None]),
    }


def _switch(look: Look, task: Task, config: Config) -> Row:
    wanted, frames = task.wanted, metrics.SETTLED.stop
    each = wanted.repeat_interleave(frames, 0)
    curve = metrics.shows_switch(look["frames"].factors, each).view(-1, frames)
    outline = metrics.shows_switch(look["frames"].factors, each, (worlds.COLOUR, worlds.SHAPE)).view(-1, frames)
    return {
        "switch": metrics.share(metrics.shows_switch(look["settled"].factors, wanted)),
        "switch_direction": metrics.new_direction(look["before"].position[:, -1], look["run"].position, wanted),
        "switch_frames": metrics.median(metrics.first_shown(outline)),
        "switch_curve": [metrics.share(column) for column in curve.T],
    }


def _see_futures(video: Tensor, task: Task) -> Look:
    return {"end": read(video[:, -worlds.UNIT_FRAMES :])}


def _futures(look: Look, task: Task, config: Config) -> Row:
    """Diversity of the last position, and the share of futures that end with a valid object."""
    assert task.past is not None
    past = task.past[slice(None, None, config.futures)]
    rows = past[_repeated(len(past), TRUE_FUTURES)]
    truth = sources.go_on(rows, task.frames - past.frames, Generator().manual_seed(config.seed)).position[:, -1]
    position, valid = look["end"].position[:, -1], look["end"].valid[:, -1]
    valid = valid.view(-1, config.futures)
    spread = metrics.diversity(position.view(*valid.shape, 2), valid, truth.view(-1, TRUE_FUTURES, 2))
    return {"diversity": spread, "diversity_valid": metrics.mean(valid.double().mean(1))}


def stretches(frames: int) -> list[tuple[int, int]]:
    """The stretches of a long clip that are read by themselves: of two seconds, or of five in a clip over ten."""
    length = (2 if frames <= 10 * worlds.FPS + 1 else 5) * worlds.FPS
    return [(first, first + length) for first in range(0, frames - length + 1, length)]


def _see_long(video: Tensor, task: Task) -> Look:
    return {str(first): read(video[:, first:last]) for first, last in stretches(task.frames)}


def _long(look: Look, task: Task, config: Config) -> Row:
    wanted, spans = task.wanted[:, 0], stretches(task.frames)
    return {"drift": [_stretch(reading, wanted, span) for reading, span in zip(look.values(), spans, strict=True)]}


def _stretch(reading: Reading, wanted: Tensor, span: tuple[int, int]) -> Row:
    right = metrics.instruction(reading, wanted)
    kept = {name: right[name] for name in ("size", "colour", "shape", "speed", "background")}
    return {"seconds": [frame // worlds.FPS for frame in span], **metrics.quality(reading, wanted), **kept}


def _repeated(count: int, times: int) -> Tensor:
    return torch.arange(count).repeat_interleave(times)


class Measure(NamedTuple):
    look: Callable[[Tensor, Task], Look]
    numbers: Callable[[Look, Task, Config], Row]


MEASURES = {
    "start": Measure(_see_start, _start),
    "switch": Measure(_see_switch, _switch),
    "futures": Measure(_see_futures, _futures),
    "long": Measure(_see_long, _long),
}


# -------------------------------------------------------------------------------------------------------------- output


def _draw(shown: Mapping[tuple[str, str], Tensor], folder: Path) -> None:
    """One contact sheet a task: for each example one line per source, in the order of the rows."""
    for task in dict.fromkeys(task for task, _ in shown):
        lines = torch.stack([clips for (of, _), clips in shown.items() if of == task], 1).flatten(0, 1)
        every = worlds.FPS // 2 if task == "long" else worlds.UNIT_FRAMES
        preview.sheet(lines, folder / f"{task}.png", every)


def plain(value: Any) -> Any:
    """Rows as JSON: estimates as {value, low, high, n}, what is not a number as null."""
    if isinstance(value, Estimate):
        return {key: None if math.isnan(number) else round(number, 5) for key, number in asdict(value).items()}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


# ------------------------------------------------------------------------------------------------------------- command


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure a student beside real clips: --student through the runtime, --run through the training code."""

    student: Path | None = None
    """Folder of a shipped student, or its name."""
    engine: str = "auto"
    """Engine of the runtime."""
    run: Path | None = None
    """Folder of a training run, e.g. runs/tiny."""
    stages: tuple[Literal["bidirectional", "teacher", "teacher_long", "led", "phases", "rounded", "dmd"], ...] = (
        "teacher_long",
        "rounded",
    )
    """Stages of the run to measure; `led`: the teacher as distillation by phases follows it."""
    tasks: tuple[Literal["start", "switch", "futures", "long"], ...] = ("start", "switch", "long")
    """What to measure; `futures` only of a run."""
    prompts: int = 64
    """Clips of `start`; the other tasks shrink in proportion."""
    out: Path | None = None
    """Folder for rows.json and the contact sheets."""
    threads: int | None = None
    """Threads of torch; default: all cores."""

    @property
    def config(self) -> Config:
        full, share = Config(), self.prompts / Config.prompts
        part = {name: max(2, round(share * getattr(full, name))) for name in ("switches", "pasts", "long")}
        return replace(full, prompts=self.prompts, **part)


def shipped(folder: Path, engine: str) -> tuple[dict[str, Source], TextConfig]:
    """Rows for a student behind `cfrt.Stream`, with the text configuration it ships."""
    config = ModelConfig.load(students.find(folder) / students.CONFIG)
    return {"real": sources.real, config.name: sources.streamed(folder, engine)}, config.text


LED = {"led": ("teacher_long", "teacher")}
"""What is measured of a run and is no stage: the stages that it is made of."""


def trained(run: Path, stages: Sequence[str]) -> tuple[dict[str, Source], TextConfig]:
    """Rows for stages of a run, real clips and reconstructions first."""
    from training import chain, recipes  # they import this file

    recipe = recipes.tiny()
    parts = {stage: LED.get(stage, (stage,)) for stage in stages}
    for stage in ("autoencoder", *(part for of in parts.values() for part in of)):
        if not chain.finished(run / stage):
            raise ConfigError(
                f"expected a finished stage in {run / stage}; run python -m training tiny --until {stage}"
            )
    makers: dict[str, Callable[..., sources.Sampler]] = dict.fromkeys(("phases", "rounded", "dmd"), sources.student)
    makers |= dict.fromkeys(("teacher", "teacher_long"), sources.teacher)
    makers |= {"bidirectional": sources.whole, "led": partial(sources.led, config=recipe.phases)}
    autoencoder, model = chain.shown(recipe, run), recipe.model
    rows = {"real": sources.real, "reconstruction": sources.reconstruction(autoencoder)}
    for stage, of in parts.items():
        networks = [frozen(chain.trained_network(recipe, run, part)) for part in of]
        rows[stage] = sources.generated(autoencoder, makers[stage](*networks, model))
    return rows, model.text


def main(arguments: Sequence[str]) -> None:
    """`python -m training evaluate`: of a list of prompts, for any model; with --student or --run, this exact one."""
    if any(word.partition("=")[0] in ("--student", "--run") for word in arguments):
        exact(arguments)
        return
    from training import vbench

    vbench.main(arguments)


def exact(command: Sequence[str]) -> None:
    """`python -m training evaluate --student` or `--run`."""
    arguments = tyro.cli(Arguments, prog="python -m training evaluate", args=command, config=(tyro.conf.DisallowNone,))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        if arguments.student is not None:
            rows, text = shipped(arguments.student, arguments.engine)
        elif arguments.run is not None:
            rows, text = trained(arguments.run, arguments.stages)
        else:
            raise ConfigError("expected --student FOLDER or --run FOLDER; see --help")
        tasks = arguments.config.tasks(text)
        for left_out in tasks.keys() - set(arguments.tasks):
            del tasks[left_out]
        measured = measure(rows, tasks, arguments.config, arguments.out)
    except CfrtError as error:
        raise SystemExit(f"training evaluate: {error}") from None
    numbers = plain(measured)
    if arguments.out is not None:
        (arguments.out / "rows.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(table.tables(numbers))


if __name__ == "__main__":
    exact(sys.argv[1:])
