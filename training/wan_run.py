"""`python -m training wan-1.3b-framewise` and `wan-1.3b-chunkwise`: one stage of a Wan recipe, or its plan.

torchrun --nproc-per-node 8 -m training wan-1.3b-framewise --stage teacher --data clips/ --weights Wan2.1-1.3B.pt
torchrun --nproc-per-node 8 -m training wan-1.3b-framewise --stage cd --data clips/
torchrun --nproc-per-node 8 -m training wan-1.3b-framewise --stage dmd --data clips/ --fake 1.3B.pt --real 14B.pt
python -m training wan-1.3b-framewise --dry-run --processes 8"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from cfrt.errors import CfrtError, TrainingError, WeightsError
from training import logs, ode, parallel, plan, plan_page, wan
from training.wan_stages import Noise, Sources, clips, train


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train a stage of a Wan recipe; run the same command again to go on after an interruption.

    A stage starts from the one before it in OUT, or from --weights. Under torchrun, networks are shared out over the
    processes. Every stage leaves config.json, stats.jsonl, its last checkpoints and, when it is done, its averaged
    weights (average.safetensors) in OUT/STAGE."""

    recipe: tyro.conf.Positional[Literal["wan-1.3b-framewise", "wan-1.3b-chunkwise"]]
    """What to train."""
    stage: wan.Name | None = None
    """teacher, pairs and ode, or cd, then dmd."""
    steps: Literal[1, 2, 4] | None = None
    """Denoising steps of the student; default: 2 frame-wise, 4 chunk-wise."""
    data: Path | None = None
    """Shards of `python -m training prepare`, or official LMDB rows (stage ode: their trajectories)."""
    text: Path | None = None
    """Model folder whose text encoder reads the prompts of official rows."""
    weights: Path | None = None
    """What the stage starts from; teacher: Wan2.1-T2V-1.3B. Default: the stage before it in OUT."""
    real: Path | None = None
    """Stage dmd: weights of Wan2.1-T2V-14B, the score that is only asked."""
    fake: Path | None = None
    """Stage dmd: weights of Wan2.1-T2V-1.3B, where the learning score starts."""
    out: Path | None = None
    """Folder of the run; default runs/RECIPE."""
    micros: int | None = None
    """Micro-batches (of one clip) in a step; default 64, as published."""
    keep: int = 2
    """Checkpoints kept."""
    log: tuple[logs.Name, ...] = ()
    """Where statistics go beside stats.jsonl."""
    smoke: bool = False
    """One step of every stage at reduced width on noise: shows that it holds."""
    dry_run: bool = False
    """Print the resolved plan and stop: steps, clips, memory, FLOP and predicted time of every stage."""
    json: bool = False
    """The plan as JSON."""
    processes: int | None = None
    """Processes to plan for; default: those that torchrun started, or one."""
    flops: float | None = None
    """FLOP a second of a process to plan with; default: 400e12, 40 % of an H100."""


def main(words: Sequence[str]) -> None:
    """`words` is the command line, the recipe first."""
    asked = tyro.cli(Arguments, args=words, prog="python -m training", config=(tyro.conf.DisallowNone,))
    try:
        with parallel.processes():
            _run(asked)
    except CfrtError as error:
        print(f"training: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _run(asked: Arguments) -> None:
    make = wan.RECIPES[asked.recipe]
    recipe = make() if asked.steps is None else make(asked.steps)
    run = replace(recipe.run, keep=asked.keep, log=asked.log, micros=asked.micros or recipe.run.micros)
    recipe = replace(recipe, run=run)
    out = asked.out or Path("runs") / recipe.name
    if asked.dry_run:
        _print_plan(asked, recipe)
    elif asked.smoke:
        smoke(wan.reduced(recipe), out)
    elif asked.stage is None:
        raise TrainingError(f"say which stage to train: --stage {' | '.join(wan.STAGES)}, or --dry-run to see them all")
    else:
        train(recipe, asked.stage, _data(asked, recipe, out), _sources(asked, out), out)


def _print_plan(asked: Arguments, recipe: wan.Recipe) -> None:
    speed = wan.STATED if asked.flops is None else plan.Speed(flops=asked.flops, source="stated")
    planned = wan.stages(
        recipe, [asked.stage] if asked.stage else wan.STAGES, asked.processes or parallel.count(), speed
    )
    if parallel.first():
        print((plan_page.as_json if asked.json else plan_page.page)(recipe.name, planned, speed, asdict(recipe)))


def smoke(recipe: wan.Recipe, out: Path) -> None:
    noise, random = Noise(recipe.fake), Sources(start=None)
    for name in wan.STAGES:
        data = ode.Stored(out / "pairs", recipe.ode) if name == "ode" else noise
        train(recipe, name, data, random, out)


def _data(asked: Arguments, recipe: wan.Recipe, out: Path) -> Any:
    assert asked.stage is not None
    if asked.stage == "ode" and asked.data is None:
        return ode.Stored(out / "pairs", recipe.ode)
    if asked.data is None:
        raise TrainingError(f"stage {asked.stage} needs clips: --data FOLDER (python -m training prepare makes one)")
    return clips(asked.data, recipe.models[asked.stage], recipe.seed, asked.text, pairs=asked.stage == "ode")


BEFORE: Mapping[str, tuple[str, ...]] = {
    "pairs": ("teacher",),
    "ode": ("teacher",),
    "cd": ("teacher",),
    "dmd": ("cd", "ode"),
}


def _sources(asked: Arguments, out: Path) -> Sources:
    assert asked.stage is not None
    finished = [out / name / "average.safetensors" for name in BEFORE.get(asked.stage, ())]
    start = asked.weights or next((path for path in finished if path.exists()), None)
    missing = {"--weights": start}
    if asked.stage == "dmd":
        missing |= {"--real": asked.real, "--fake": asked.fake}
    lacking = [flag for flag, path in missing.items() if path is None]
    if lacking:
        raise WeightsError(f"stage {asked.stage} needs {' and '.join(lacking)}: files of weights to start from")
    return Sources(start=start, real=asked.real, fake=asked.fake)
