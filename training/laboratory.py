"""Where cells of the paper's table are trained and measured: one folder with the teachers, the data and the pairs that
they share, and a folder for each student.

Everything in it is made once; a laboratory that was stopped goes on where it was. Processes may share one: what one of
them is making the others wait for."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor

from cfrt.bench import processor
from cfrt.config import ModelConfig
from training import ccm, cd, chain, data, dmd, evaluate, loop, ode, recipes, sources, teacher, worlds
from training.data import Batch
from training.loop import Average, step_generator
from training.network import Network, clone, load

Init = Literal["sf-ode", "ar-diffusion", "causal-ode", "causal-cd", "causal-ccm"]
INITS: tuple[Init, ...] = get_args(Init)

STEP_LISTS = {1: (1.0,), 2: (1.0, 0.5), 4: (1.0, 0.75, 0.5, 0.25)}
"""u before the warp; fewer than four get the four for their first unit (the published lists)."""
RELEASED = tuple(Path(__file__).parent / "weights" / name for name in ("reproduce", "tiny"))
"""In the checkout: the AR teachers of the committed rows, and what else they share with the embedded student."""

Row = dict[str, Any]
Built = tuple[loop.Stage, Average]


@dataclass(frozen=True, kw_only=True)
class Cell:
    init: Init
    dmd: bool
    steps: int
    unit: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.init}-{'dmd-' if self.dmd else ''}{self.steps}step-f{self.unit}-seed{self.seed}"

    @property
    def stage2(self) -> str:
        """The student that it begins with, which other cells share."""
        return f"{self.init}-f{self.unit}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every cell spends: the same for all of them."""

    clips: int = 8000
    guidance: float = 3.0
    """Of every teacher: in ODE pairs and in the steps of consistency distillation."""
    ode: ode.Config = field(default_factory=lambda: ode.Config(pairs=512, euler_steps=24, steps=600))
    cd: cd.Config = field(default_factory=lambda: cd.Config(steps=600, levels=24))
    ccm: ccm.Config = field(default_factory=lambda: ccm.Config(steps=600, lr=2e-4, apart=0.02))
    dmd: dmd.Config = field(default_factory=lambda: dmd.Config(steps=60))
    teacher: teacher.Config = field(default_factory=lambda: teacher.Config(steps=1600))
    """AR teachers of units other than the released one's, trained from it."""
    evaluate: evaluate.Config = field(default_factory=lambda: evaluate.Config(prompts=192, pasts=24, long=16))
    flow_clips: int = 128
    """Held-out trajectories on which the flow map is measured."""

    @property
    def shards(self) -> int:
        """Files of clips."""
        return -(-self.clips // data.SHARD)


SMOKE = Config(
    clips=32,
    ode=ode.Config(pairs=16, euler_steps=4, steps=3),
    cd=cd.Config(steps=3, batch=4, levels=4),
    ccm=ccm.Config(steps=3, batch=4),
    dmd=dmd.Config(steps=1, batch=4, critic_warmup=1),
    teacher=teacher.Config(steps=2, batch=4, starts=4),
    evaluate=evaluate.Config(prompts=4, pasts=1, futures=2, long=1),
    flow_clips=8,
)


class Laboratory:
    """Everything that cells share, made once and kept in a folder."""

    def __init__(self, folder: Path, config: Config, recipe: recipes.Recipe, threads: int | None = None) -> None:
        """`threads`: of stage 2; processes that wait for a student lend it their cores so. None = as anything else."""
        self.folder, self.config, self.recipe, self.threads = folder, config, recipe, threads
        self.chain = folder / "teachers"
        with alone(self.chain):
            for folder in RELEASED if recipe.name == "tiny" else ():
                if folder.is_dir():
                    chain.adopt(folder, self.chain)
            chain.train(recipe, self.chain, until="score")

    @cached_property
    def score(self) -> Network:
        return chain.trained_network(self.recipe, self.chain, "score")

    def model(self, unit: int, steps: int) -> ModelConfig:
        frames = self.recipe.data.units // unit * unit
        first = STEP_LISTS[4] if steps < 4 else None
        window = -(-self.recipe.model.window // unit) * unit
        plain = replace(self.recipe.model, solver="renoise", first_steps=None, steps=STEP_LISTS[steps])
        return replace(plain, unit=unit, window=window, trained_frames=frames, first_steps=first)

    def script(self, unit: int) -> data.Config:
        units = self.recipe.data.units // unit * unit
        return replace(self.recipe.data, clips=self.config.clips, units=units, unit=unit)

    def clips(self, unit: int) -> data.Clips:
        for number in range(self.config.shards):
            self.shard(unit, number)
        return data.Clips(self._data(unit), self.script(unit), self.recipe.seed)

    def shard(self, unit: int, number: int) -> None:
        """Make one shard of the clips, if it is not there."""
        size = min(data.SHARD, self.config.clips - number * data.SHARD)
        with alone(self._data(unit) / f"{number:04d}"):
            autoencoder = chain.trained_autoencoder(self.recipe, self.chain)
            data.write_shard(self._data(unit), number, self.script(unit), autoencoder, self.recipe.seed, size)

    def _data(self, unit: int) -> Path:
        return self.folder / f"data-f{unit}"

    def teacher(self, unit: int) -> Network:
        """The AR teacher; of another unit than the released one, trained from that."""
        released = chain.trained_network(self.recipe, self.chain, "teacher")
        if unit == self.recipe.model.unit:
            return released
        model = self.model(unit, 4)

        def build() -> Built:
            stage = teacher.Stage(self.config.teacher, model, self.clips(unit), clone(released, model))
            return stage, Average(stage.student, self.config.teacher.ema)

        return self._trained(f"teachers/teacher_f{unit}", build, model)

    # ------------------------------------------------------------------------------------------------------ training

    def student(self, cell: Cell) -> Network:
        """The network of a cell, trained if need be."""
        model = self.model(cell.unit, cell.steps)
        start = self.initialised(cell)
        if not cell.dmd:
            return start

        def build() -> Built:
            prompts = partial(data.prompts, config=self.script(cell.unit))
            return dmd.Stage(self.config.dmd, model, prompts, start, self.score), Average(start, self.config.dmd.ema)

        return self._trained(cell.name, build, model, cell.seed)

    def initialised(self, cell: Cell) -> Network:
        """Stage 2, which knows nothing of the number of steps."""
        if cell.init == "ar-diffusion":
            return self.teacher(cell.unit)
        builders = {"causal-cd": self._consistency, "causal-ccm": self._continuous}
        build = partial(builders.get(cell.init, self._regression), cell)
        with threads(self.threads):
            return self._trained(cell.stage2, build, self.model(cell.unit, 4), cell.seed)

    def _consistency(self, cell: Cell) -> Built:
        config, model = replace(self.config.cd, guidance=self.config.guidance), self.model(cell.unit, 4)
        stage = cd.Stage(config, model, self.clips(cell.unit), self.teacher(cell.unit))
        return stage, stage.average

    def _continuous(self, cell: Cell) -> Built:
        config, model = replace(self.config.ccm, guidance=self.config.guidance), self.model(cell.unit, 4)
        stage = ccm.Stage(config, model, self.clips(cell.unit), self.teacher(cell.unit))
        return stage, Average(stage.student, config.ema)

    def _regression(self, cell: Cell) -> Built:
        config, make = self._ode(cell.init, cell.unit)
        model, clips = self.model(cell.unit, 4), self.clips(cell.unit)
        folder = self.folder / cell.stage2 / "pairs"
        with self._timed(self.folder / cell.stage2):
            ode.write(folder, config, clips, make, cell.seed)
        stage = ode.Stage(config, model, ode.read(folder, config), clone(self.teacher(cell.unit), model))
        return stage, Average(stage.student, config.ema)

    def _ode(self, init: Init, unit: int) -> tuple[ode.Config, ode.Maker]:
        config, model = replace(self.config.ode, guidance=self.config.guidance), self.model(unit, 4)
        if init == "sf-ode":
            config = replace(config, past="noisy")
            return config, partial(ode.bidirectional_pairs, self.score, model, config)
        return config, partial(ode.causal_pairs, self.teacher(unit), model, config)

    def _trained(self, name: str, build: Callable[[], Built], model: ModelConfig, seed: int = 0) -> Network:
        folder = self.folder / name
        with alone(folder):
            if not chain.finished(folder):
                stage, average = build()
                with self._timed(folder):
                    loop.run(stage, folder, seed=1000 * seed + 7, average=average)
        return load(model, chain.weights(self.folder, name))

    # ----------------------------------------------------------------------------------------------------- measuring

    def row(self, cell: Cell) -> Row:
        """The row of a cell: trained, played, read, and kept in the folder."""
        path = self.folder / "rows" / f"{cell.name}.json"
        if path.exists():
            return dict(json.loads(path.read_text()))
        network = self.student(cell).eval().requires_grad_(False)
        model = self.model(cell.unit, cell.steps)
        autoencoder = chain.trained_autoencoder(self.recipe, self.chain)
        source = sources.generated(autoencoder, sources.student(network, model))
        config = self.evaluation(cell.unit, cell.seed)
        tasks = config.tasks(model.text)
        del tasks["switch"]
        measured = evaluate.plain(evaluate.measure({"student": source}, tasks, config, self.folder / cell.name))
        row = {**asdict(cell), **_numbers(measured["student"]), **self.flow_map(cell, network)}
        row |= {"clips": config.prompts, **self.cost(cell)}
        write_json(path, row)
        return row

    def references(self, unit: int) -> dict[str, Row]:
        """What cells are compared with. F = 1: real clips, their reconstructions, and both teachers at many steps.
        Otherwise the AR teacher of that unit alone, on prompts and not over ten seconds."""
        path = self.folder / f"references-f{unit}.json"
        if not path.exists():
            autoencoder, model = chain.trained_autoencoder(self.recipe, self.chain), self.model(unit, 4)
            config, guidance = self.evaluation(unit, 0), self.config.guidance
            unit_by_unit = sources.teacher(self.teacher(unit).eval(), model, guidance=guidance)
            at_once = sources.whole(self.score.eval(), model, guidance=guidance)
            real = {"real clips": sources.real, "through the autoencoder": sources.reconstruction(autoencoder)}
            causal = {"AR teacher, 24 steps": sources.generated(autoencoder, unit_by_unit)}
            whole = {"bidirectional teacher, 24 steps": sources.generated(autoencoder, at_once)}
            tasks = config.tasks(model.text)
            del tasks["switch"]
            full, short = (real | causal, whole) if unit == 1 else ({}, causal)
            measured = evaluate.measure(full, tasks, config, self.folder / "references")
            measured |= evaluate.measure(short, {"start": tasks["start"]}, config)
            write_json(path, {name: _numbers(row) for name, row in evaluate.plain(measured).items()})
        return dict(json.loads(path.read_text()))

    def evaluation(self, unit: int, seed: int) -> evaluate.Config:
        config = replace(self.config.evaluate, seed=40_000 + 100 * seed)
        if unit == 1:
            return config
        lengths = {"units": config.units, "future_units": config.future_units, "long_units": config.long_units}
        whole = {name: -(-value // unit) * unit for name, value in lengths.items()}
        return replace(config, past_units=unit, **whole)

    @torch.no_grad()
    def flow_map(self, cell: Cell, network: Network) -> Row:
        """One jump from pure noise, against the end points of the teacher that the cell learnt from.

        `flow_map` = Var(jump) / Var(end) on the first unit: 1 where the teacher's map is a function of what the student
        sees, less where it learnt a mean. `flow_lost` = E|jump - end|^2 / Var(end) for each unit."""
        config, pairs = self._unseen_pairs("sf-ode" if cell.init == "sf-ode" else "causal-ode", cell.unit)
        stage = ode.Stage(config, self.model(cell.unit, 4), pairs, network)
        jump = stage.jump(pairs.states[:, 0], torch.ones(pairs.caption.shape), Batch.of(pairs.clean, pairs))
        spread, end, lost = _variance(jump, cell.unit), _variance(pairs.end, cell.unit), (jump - pairs.end).square()
        missing = lost.mean((0, 2, 3, 4)).view(-1, cell.unit).mean(1) / end
        return {
            "flow_map": round((spread / end)[0].item(), 4),
            "flow_lost": [round(value, 4) for value in missing.tolist()],
        }

    def _unseen_pairs(self, init: Init, unit: int) -> tuple[ode.Config, ode.Pairs]:
        """Trajectories on clips that no training saw."""
        config, make = self._ode(init, unit)
        path = self.folder / f"unseen-{init}-f{unit}.safetensors"
        with alone(path):
            if not path.exists():
                loop.write_tensors(path, make(self._unseen(unit), step_generator(99, unit)).tensors())
        return config, ode.Pairs(**load_file(path))

    def _unseen(self, unit: int) -> Batch:
        script, generator = self.script(unit), step_generator(98, unit)
        plan = data.script(self.config.flow_clips, script, generator)
        video = worlds.render(data.play(plan, script.units, generator))
        latents = data.encode(chain.trained_autoencoder(self.recipe, self.chain), video)
        return Batch(latents=latents, captions=plan.captions, caption=plan.caption(script.units))

    # ---------------------------------------------------------------------------------------------------------- cost

    @contextmanager
    def _timed(self, folder: Path) -> Iterator[None]:
        """Add the processor seconds of what is inside to those that the folder has cost, and on what."""
        before, began = self._spent(folder), time.process_time()
        yield
        seconds = before["seconds"] + time.process_time() - began
        write_json(folder / "cost.json", {"seconds": seconds, "on": sorted({*before["on"], place()})})

    @staticmethod
    def _spent(folder: Path) -> Row:
        path = folder / "cost.json"
        return dict(json.loads(path.read_text())) if path.exists() else {"seconds": 0.0, "on": []}

    def cost(self, cell: Cell) -> Row:
        """`seconds` of processor time of training (stage 2, and DMD where the cell has it; teachers are shared and left
        out), and `on` what."""
        folders = [cell.stage2, cell.name] if cell.dmd else [cell.stage2]
        spent = [self._spent(self.folder / name) for name in folders]
        on = sorted({where for part in spent for where in part["on"]})
        return {"seconds": round(sum(part["seconds"] for part in spent), 1), "on": on}


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time makes what belongs there. The others wait, and then find it made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads of torch for what is inside; None = as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def place() -> str:
    """What computes here."""
    return f"{processor()}, torch {torch.__version__}, threads: {torch.get_num_threads()}"


def write_json(path: Path, value: Row) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(draft, path)


def _variance(x: Tensor, unit: int) -> Tensor:
    """Variance over clips, averaged over the numbers of each unit: [units]."""
    return x.var(0).mean((1, 2, 3)).view(-1, unit).mean(1)


def _numbers(measured: Row) -> Row:
    """The columns of the table, with what stands behind them."""
    names = {"instruction": "all", "dynamic": "dynamic", "sharpness": "residual", "distance": "distance"}
    names |= {"diversity": "diversity"} if "diversity" in measured else {}
    row: Row = {name: round(measured[key]["value"], 5) for name, key in names.items()}
    row["intervals"] = {name: [round(measured[key][end], 5) for end in ("low", "high")] for name, key in names.items()}
    row["factors"] = {name: round(measured[name]["value"], 5) for name in worlds.FACTORS}
    row["valid"] = round(measured["valid"]["value"], 5)
    if "drift" in measured:
        stretches = [stretch["valid"]["value"] for stretch in measured["drift"]]
        row["drift"] = round(stretches[-1] - stretches[0], 5)
        row["valid_over_time"] = [round(value, 5) for value in stretches]
    return row
