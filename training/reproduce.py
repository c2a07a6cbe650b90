"""The paper's table on a world whose every factor is known: initialisations x DMD x steps x unit x seeds.

    python -m training reproduce                          the key rows: 3 initialisations, before and after DMD, 3 seeds
    python -m training reproduce --inits causal-cd --steps 1 --seeds 4          other cells of the grid, another seed
    python -m training reproduce --units 3 --seeds 1 --processes 16             the same in processes that share the run
    python -m training reproduce --merge rows                                   rows made elsewhere (OUT/rows there)

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
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from cfrt.errors import CfrtError
from training import chain, claims, preview, recipes, workers, worlds
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
    missing: bool = False
    """Only cells that the results lack."""
    report: Path = Path(__file__).parent / "RESULTS.md"
    smoke: bool = False
    """Everything for seconds, to see that it holds; results and report go to OUT."""
    report_only: bool = False
    """Write the report from the rows that are there."""
    merge: tuple[Path, ...] = ()
    """Folders of rows, one file each (OUT/rows of runs elsewhere), to add to the results; nothing is trained."""
    threads: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Threads of torch; with --processes, of stage 2 only (the rest of a cell has one)."""
    processes: int = 1
    """Cells at a time. A cell whose student another one is training waits for it, and lends it its core: so as many
    of them as --threads are begun together."""


def cells(arguments: Arguments) -> list[Cell]:
    """Seed by seed, so that a run that is stopped leaves whole comparisons."""
    stages = {"both": (False, True), "before": (False,), "after": (True,)}[arguments.dmd]
    names, path = Cell.__dataclass_fields__, arguments.results / "reproduce.json"
    rows = json.loads(path.read_text()) if arguments.missing and path.exists() else []
    there = {Cell(**{name: row[name] for name in names}) for row in rows}
    asked = [
        Cell(init=init, dmd=after, steps=steps, unit=unit, seed=seed)
        for seed in arguments.seeds
        for unit in arguments.units
        for init in arguments.inits
        for steps in arguments.steps
        for after in stages
    ]
    return [cell for cell in asked if cell not in there]


def keep(path: Path, row: Row) -> None:
    """Add a row to the list in the file, in place of one of the same cell."""
    names = Cell.__dataclass_fields__
    rows = [] if not path.exists() else json.loads(path.read_text())
    others = [other for other in rows if any(other[name] != row[name] for name in names)]
    order = [*others, row]
    order.sort(key=lambda r: (r["unit"], r["steps"], INITS.index(r["init"]), r["dmd"], r["seed"]))
    path.write_text(json.dumps(order, indent=1) + "\n")


def side_by_side(folder: Path, cells: Sequence[Cell], path: Path, clips: int = 2) -> None:
    """The same prompts, one line per cell, from the sheets that the evaluation drew, and beside the picture which line
    is what; nothing where one is missing."""
    sheets = [folder / cell.name / "start.png" for cell in cells]
    if all(sheet.exists() for sheet in sheets):
        pictures = [preview.read(sheet) for sheet in sheets]
        lines = [p[clip * worlds.SIDE : (clip + 1) * worlds.SIDE] for clip in range(clips) for p in pictures]
        preview.write(torch.cat(lines), path)
        path.with_suffix(".json").write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n")


def laboratory(arguments: Arguments) -> Laboratory:
    recipe = recipes.smoke() if arguments.smoke else recipes.tiny()
    threads = arguments.threads if arguments.processes > 1 else None
    return Laboratory(arguments.out, _config(arguments), recipe, threads)


def _config(arguments: Arguments) -> Config:
    return SMOKE if arguments.smoke else Config()


def run(arguments: Arguments) -> None:
    results = arguments.out / "results" if arguments.smoke else arguments.results
    page = arguments.out / "RESULTS.md" if arguments.smoke else arguments.report
    results.mkdir(parents=True, exist_ok=True)
    for path in sorted(path for folder in arguments.merge for path in folder.glob("*.json")):
        keep(results / "reproduce.json", json.loads(path.read_text()))
    if not (arguments.report_only or arguments.merge):
        _rows(arguments, results)
    claims.write(results, page)


def _rows(arguments: Arguments, results: Path) -> None:
    """Train and measure, cell by cell; CfrtError at the end where one failed."""
    for unit in arguments.units:
        if not (references := results / claims.REFERENCES.format(unit)).exists():
            references.write_text(json.dumps(laboratory(arguments).references(unit), indent=1) + "\n")
    todo, failed = cells(arguments), 0
    make, alone = partial(_measurer, arguments), arguments.processes == 1
    found = map(make(), todo) if alone else workers.ordered(make, jobs(arguments), arguments.processes)
    for row in found:
        if isinstance(row, str):
            failed += 1
        elif row is not None:
            keep(results / "reproduce.json", row)
            print(claims.line(row), flush=True)
    if failed:
        raise CfrtError(f"{failed} cells failed, as told above; the others are kept")
    for unit in () if arguments.missing else arguments.units:
        shown = (arguments.seeds[0], arguments.steps[0], unit)
        first = sorted((c for c in todo if (c.seed, c.steps, c.unit) == shown), key=lambda cell: cell.dmd)
        side_by_side(arguments.out, first, results / f"sheet-f{unit}.png")


Shard = tuple[int, int]
"""Unit and number of a shard of clips."""


def jobs(arguments: Arguments) -> list[Shard | Cell]:
    """In an order in which processes seldom wait without lending their core: clips, then of each student that is still
    to be trained as many cells as it has threads, then what is ready."""
    out, cohort, todo = arguments.out, arguments.threads or 1, cells(arguments)
    there = [c for c in todo if (out / "rows" / f"{c.name}.json").exists()]
    ready = [c for c in todo if c in there or c.init == "ar-diffusion" or chain.finished(out / c.stage2)]
    waiting = [c for c in todo if c not in ready]
    lots = [[c for c in waiting if c.stage2 == name] for name in dict.fromkeys(c.stage2 for c in waiting)]
    clips = [
        (unit, number) for unit in sorted({c.unit for c in waiting}) for number in range(_config(arguments).shards)
    ]
    first, rest = [c for lot in lots for c in lot[:cohort]], [c for lot in lots for c in lot[cohort:]]
    return [*clips, *first, *ready, *rest]


def _measurer(arguments: Arguments) -> Callable[[Shard | Cell], Row | str | None]:
    """What a process does with a job. A cell that fails does not take the others with it: it says why, and that is
    returned."""
    here = laboratory(arguments)

    def measure(job: Shard | Cell) -> Row | str | None:
        name, began = job.name if isinstance(job, Cell) else "clips {} {}".format(*job), time.monotonic()
        print(f"{name}: begun", file=sys.stderr, flush=True)
        row: Row | None = None
        try:
            if isinstance(job, Cell):
                row = here.row(job)
            else:
                here.shard(*job)
        except Exception as error:
            traceback.print_exc()
            return f"{name}: {error}"
        print(f"{name}: done in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return row

    return measure


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
