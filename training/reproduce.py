"""The paper's table on a world whose every factor is known: initialisations x DMD x steps x unit x seeds.

    python -m training reproduce                          the key rows: 3 initialisations, before and after DMD, 3 seeds
    python -m training reproduce --inits causal-cd --steps 1 --seeds 4          other cells of the grid, another seed

A cell is {init, dmd, steps, unit, seed}. Teachers, autoencoder and data are shared by all cells; a seed decides the
pairs, the order of training and the noise of the evaluation, the same for every initialisation. Everything goes on
where it was stopped, and rows of other runs stay in the results. `training.claims` turns the rows into RESULTS.md.

| init | stage 2 |
| --- | --- |
| sf-ode | Self Forcing's: ODE pairs of the bidirectional teacher, regressed on a noisy past |
| ar-diffusion | none: the AR teacher itself |
| causal-ode | ODE pairs of the AR teacher on the real past (arXiv:2602.02214) |
| causal-cd | causal consistency distillation (arXiv:2605.15141) |
| causal-ccm | the same in continuous time (not in the papers): `training.ccm` |"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from cfrt.errors import CfrtError
from training import claims, preview, recipes, worlds
from training.laboratory import INITS, SMOKE, Cell, Config, Init, Laboratory, Row


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train and measure cells of the paper's table, then write the report. Run it again to go on."""

    out: Path = Path("runs/reproduce")
    """Folder of the run: teachers, data, students, rows."""
    inits: tuple[Init, ...] = ("sf-ode", "causal-ode", "causal-cd")
    seeds: tuple[int, ...] = (1, 2, 3)
    steps: tuple[Literal[1, 2, 4], ...] = (2,)
    units: tuple[Literal[1, 3], ...] = (1,)
    dmd: Literal["both", "before", "after"] = "both"
    results: Path = Path(__file__).parent / "results"
    """Folder of reproduce.json, the rows of all runs: those of this one are added or replaced."""
    report: Path = Path(__file__).parent / "RESULTS.md"
    smoke: bool = False
    """Everything for seconds, to see that it holds; results and report go to OUT."""
    report_only: bool = False
    """Write the report from the rows that are there."""
    threads: Annotated[int | None, tyro.conf.arg(metavar="N")] = None


def cells(arguments: Arguments) -> list[Cell]:
    """Seed by seed, so that a run that is stopped leaves whole comparisons."""
    stages = {"both": (False, True), "before": (False,), "after": (True,)}[arguments.dmd]
    return [
        Cell(init=init, dmd=after, steps=steps, unit=unit, seed=seed)
        for seed in arguments.seeds
        for unit in arguments.units
        for init in arguments.inits
        for steps in arguments.steps
        for after in stages
    ]


def keep(path: Path, row: Row) -> None:
    """Add a row to the list in the file, in place of one of the same cell."""
    names = Cell.__dataclass_fields__
    rows = [] if not path.exists() else json.loads(path.read_text())
    others = [other for other in rows if any(other[name] != row[name] for name in names)]
    order = [*others, row]
    order.sort(key=lambda r: (r["unit"], r["steps"], INITS.index(r["init"]), r["dmd"], r["seed"]))
    path.write_text(json.dumps(order, indent=1) + "\n")


def side_by_side(folder: Path, cells: Sequence[Cell], path: Path, clips: int = 2) -> None:
    """The same prompts, one line per cell, from the sheets that the evaluation drew; nothing where one is missing."""
    sheets = [folder / cell.name / "start.png" for cell in cells]
    if all(sheet.exists() for sheet in sheets):
        pictures = [preview.read(sheet) for sheet in sheets]
        lines = [p[clip * worlds.SIDE : (clip + 1) * worlds.SIDE] for clip in range(clips) for p in pictures]
        preview.write(torch.cat(lines), path)


def run(arguments: Arguments) -> None:
    out = arguments.out
    recipe = recipes.smoke() if arguments.smoke else recipes.tiny()
    results = out / "results" if arguments.smoke else arguments.results
    page = out / "RESULTS.md" if arguments.smoke else arguments.report
    results.mkdir(parents=True, exist_ok=True)
    if not arguments.report_only:
        laboratory = Laboratory(out, SMOKE if arguments.smoke else Config(), recipe)
        (results / "references.json").write_text(json.dumps(laboratory.references(), indent=1) + "\n")
        todo = cells(arguments)
        for number, cell in enumerate(todo, 1):
            print(f"[{number}/{len(todo)}] {cell.name}", file=sys.stderr, flush=True)
            row = laboratory.row(cell)
            keep(results / "reproduce.json", row)
            print(claims.line(row), flush=True)
        first = [cell for cell in todo if cell.seed == arguments.seeds[0]]
        first.sort(key=lambda cell: cell.dmd)
        side_by_side(out, first, results / "reproduce.png")
    claims.write(results, page)


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = tyro.cli(Arguments, args=arguments, prog="python -m training reproduce", config=(tyro.conf.DisallowNone,))
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    try:
        run(parsed)
    except CfrtError as error:
        raise SystemExit(f"training reproduce: {error}") from None


if __name__ == "__main__":
    main()
