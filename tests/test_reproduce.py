"""The paper's table: its cells, its rows, its verdicts, and a run of everything for seconds.

Runs on the CPU; the run itself takes most of a minute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cfrt.errors import TrainingError
from training import claims, reproduce
from training.laboratory import Cell, Laboratory
from training.reproduce import Arguments

pytestmark = pytest.mark.cpu


def _row(init: str, seed: int, instruction: float, dmd: bool = False, **more: Any) -> dict[str, Any]:
    row = {"init": init, "dmd": dmd, "steps": 2, "unit": 1, "seed": seed, "instruction": instruction, "dynamic": 0.5}
    row |= {"sharpness": 1.0, "diversity": 0.5, "distance": 0.1, "drift": 0.0, "valid": 0.9, "flow_map": 0.9}
    row |= {"flow_lost": [0.1, 0.1], "seconds": 100.0, "clips": 192}
    return {**row, "intervals": {"instruction": [instruction - 0.04, instruction + 0.04]}, **more}


def test_key_rows_are_three_inits_before_and_after_three_seeds() -> None:
    cells = reproduce.cells(Arguments())
    assert len(cells) == len(set(cells)) == 18
    assert {cell.init for cell in cells} == {"sf-ode", "causal-ode", "causal-cd"}
    assert {(cell.steps, cell.unit) for cell in cells} == {(2, 1)}
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


def test_a_row_takes_the_place_of_its_cell(tmp_path: Path) -> None:
    path = tmp_path / "reproduce.json"
    for row in (_row("sf-ode", 1, 0.2), _row("sf-ode", 2, 0.3), _row("sf-ode", 1, 0.4)):
        reproduce.keep(path, row)
    rows = json.loads(path.read_text())
    assert [(row["seed"], row["instruction"]) for row in rows] == [(1, 0.4), (2, 0.3)]


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ((0.30, 0.31, 0.29), "appears"),
        ((-0.30, -0.31, -0.29), "the reverse appears"),
        ((0.01, -0.01, 0.02), "not decided"),
        ((0.60, 0.00, 0.05), "not decided"),  # three seeds that disagree decide nothing
        ((), "not run"),
    ],
)
def test_a_verdict_follows_from_the_interval(gaps: tuple[float, ...], verdict: str) -> None:
    rows = [_row("sf-ode", seed, 0.3) for seed, _ in enumerate(gaps)]
    rows += [_row("causal-cd", seed, 0.3 + gap) for seed, gap in enumerate(gaps)]
    claim = next(line for line in claims.claims(rows).splitlines() if "causal CD beats SF ODE in instr" in line)
    assert claim.rstrip(" |").rsplit("| ", 1)[1].startswith(verdict)


def test_clips_bound_the_interval_when_seeds_agree() -> None:
    rows = [_row(init, seed, value) for init, value in (("sf-ode", 0.3), ("causal-cd", 0.5)) for seed in (1, 2, 3)]
    gap = claims.difference(rows, {"init": "causal-cd"}, {"init": "sf-ode"}, "instruction")
    assert gap["value"] == pytest.approx(0.2)
    assert gap["half"] == pytest.approx(0.04 * 2**0.5 / 3**0.5)


def test_one_seed_without_an_interval_decides_nothing() -> None:
    rows = [_row("sf-ode", 1, 0.3, flow_map=0.6), _row("causal-cd", 1, 0.3, flow_map=0.8)]
    claim = next(line for line in claims.claims(rows).splitlines() if "causal CD beats SF ODE in flow map" in line)
    assert claim.endswith("| +0.200 | 1 | one seed, no interval |")


def test_steps_are_compared_after_dmd_alone() -> None:
    rows = [_row(init, 1, value, dmd=True, steps=1) for init, value in (("ar-diffusion", 0.6), ("causal-cd", 0.4))]
    rows += [_row(init, 1, value, steps=4) for init, value in (("ar-diffusion", 0.2), ("causal-cd", 0.7))]
    lines = [line for line in claims.by_steps(rows, 1).splitlines() if "in instruction" in line]
    assert len(lines) == 4
    assert lines[3] == (
        "| causal CD beats AR diffusion (no stage 2) in instruction "
        "| -20.0 ± 5.7: the reverse appears | not run | not run |"
    )
    assert all(line.endswith("| not run | not run | not run |") for line in lines[:3])


def test_costs_of_different_machines_are_not_compared() -> None:
    ode, cd = _row("causal-ode", 1, 0.3, on=["Xeon"], seconds=90.0), _row("causal-cd", 1, 0.3, seconds=10.0)
    here = _row("causal-cd", 1, 0.3, on=["Xeon"], seconds=30.0)
    cost = [line for line in claims.claims([ode, cd]).splitlines() if "about a quarter" in line]
    assert cost == ["| CD costs about a quarter of ODE in stage 2 | not run | 0 | not run |"]
    assert "| 30 s against 90 s of one core | 1 | appears |" in claims.claims([ode, cd, here])


def test_what_was_not_run_says_so(tmp_path: Path) -> None:
    reproduce.keep(tmp_path / "reproduce.json", _row("causal-cd", 1, 0.5))
    claims.write(tmp_path, tmp_path / "RESULTS.md")
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| causal CD | not run | 50 / 50 | not run |" in page
    assert "| SF ODE collapses frame-wise (dynamic near 0 after DMD) | not run |" in page


def test_rows_made_elsewhere_are_merged(tmp_path: Path) -> None:
    results, rows = tmp_path / "results", tmp_path / "rows"
    for folder in (results, rows):
        folder.mkdir()
    reproduce.keep(results / "reproduce.json", _row("sf-ode", 1, 0.2))
    for row in (_row("sf-ode", 1, 0.4), _row("causal-cd", 1, 0.5, unit=3)):
        (rows / f"{row['init']}.json").write_text(json.dumps(row))
    page = tmp_path / "RESULTS.md"
    reproduce.main(["--merge", str(rows), "--results", str(results), "--report", str(page)])
    merged = json.loads((results / "reproduce.json").read_text())
    assert [(row["init"], row["unit"], row["instruction"]) for row in merged] == [
        ("sf-ode", 1, 0.4),
        ("causal-cd", 3, 0.5),
    ]
    assert "| causal CD | 50.0 ± 4.0 |" in page.read_text().partition("(F = 3)")[2]


def test_missing_cells_are_those_without_a_row(tmp_path: Path) -> None:
    reproduce.keep(tmp_path / "reproduce.json", _row("sf-ode", 1, 0.2))
    asked = Arguments(inits=("sf-ode",), seeds=(1, 2), dmd="before", missing=True, results=tmp_path)
    assert [cell.name for cell in reproduce.cells(asked)] == ["sf-ode-2step-f1-seed2"]


def test_processes_begin_a_student_with_as_many_cells_as_it_has_threads(tmp_path: Path) -> None:
    """Clips first; then two cells of each student to be trained; then what needs none; then the rest."""
    asked = Arguments(
        smoke=True, out=tmp_path, inits=("causal-cd", "ar-diffusion", "sf-ode"), seeds=(1,), steps=(2, 4), threads=2
    )
    (tmp_path / "sf-ode-f1-seed1").mkdir()
    (tmp_path / "sf-ode-f1-seed1" / "average.safetensors").touch()
    order = reproduce.jobs(asked)
    assert order[0] == (1, 0)
    names = [cell.name for cell in order[1:] if isinstance(cell, Cell)]
    assert names[:2] == ["causal-cd-2step-f1-seed1", "causal-cd-dmd-2step-f1-seed1"]
    assert [name.startswith("causal-cd") for name in names] == [True] * 2 + [False] * 8 + [True] * 2


def test_cost_is_told_by_machine() -> None:
    rows = [_row("sf-ode", 1, 0.3), _row("sf-ode", 2, 0.3, on=["Xeon"], seconds=40.0)]
    lines = [line for line in claims.cost(rows).splitlines() if line.startswith("| SF ODE")]
    assert lines == ["| SF ODE | 1 | first run | 100 | – |", "| SF ODE | 1 | Xeon | 40 | – |"]


def test_a_failed_cell_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(self: Laboratory, cell: Cell) -> dict[str, Any]:
        if cell.init == "sf-ode":
            raise TrainingError("the loss is nan")
        return _row(cell.init, cell.seed, 0.5)

    monkeypatch.setattr(Laboratory, "row", row)
    monkeypatch.setattr(Laboratory, "__init__", lambda self, *_: None)
    (tmp_path / "references-f1.json").write_text("{}")
    arguments = ["--inits", "sf-ode", "causal-cd", "--seeds", "1", "--dmd", "before", "--results", str(tmp_path)]
    with pytest.raises(SystemExit, match="1 cells failed"):
        reproduce.main([*arguments, "--report", str(tmp_path / "page.md"), "--out", str(tmp_path)])
    assert [row["init"] for row in json.loads((tmp_path / "reproduce.json").read_text())] == ["causal-cd"]


@pytest.mark.slow
def test_processes_share_a_run(tmp_path: Path) -> None:
    """Four cells of one student in two processes: it is trained once, and every cell gets its row."""
    arguments = ["--smoke", "--out", str(tmp_path), "--seeds", "1", "--inits", "causal-cd", "--steps", "2", "4"]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "references-f1.json").write_text("{}")
    reproduce.main([*arguments, "--processes", "2", "--threads", "1"])
    rows = json.loads((tmp_path / "results" / "reproduce.json").read_text())
    assert [(row["steps"], row["dmd"]) for row in rows] == [(2, False), (2, True), (4, False), (4, True)]
    before = [row["seconds"] for row in rows if not row["dmd"]]
    assert before[0] == before[1] > 0
    assert all("threads: 1" in row["on"][-1] for row in rows)
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "causal-cd-f1-seed1" / "stats.jsonl").read_text().splitlines()
    ]
    assert steps == [3]


def test_the_whole_of_it_runs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--smoke", "--out", str(tmp_path), "--seeds", "1", "--inits", "sf-ode", "causal-cd", "--dmd", "after"]
    reproduce.main(arguments)
    rows = json.loads((tmp_path / "results" / "reproduce.json").read_text())
    assert [(row["init"], row["dmd"]) for row in rows] == [("sf-ode", True), ("causal-cd", True)]
    for row in rows:
        assert {"init", "dmd", "steps", "unit", "seed", "instruction", "dynamic", "sharpness"} < set(row)
        assert {"diversity", "distance", "drift", "clips", "seconds", "flow_map"} < set(row)
        assert row["seconds"] > 0
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert any("pairs" in str(path) for path in written)
    reproduce.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == written
    assert "not run" in (tmp_path / "RESULTS.md").read_text()
    assert capsys.readouterr().out.count("causal-cd, after DMD") == 2


def test_cells_have_names_of_their_own() -> None:
    everything = Arguments(inits=("sf-ode", "ar-diffusion"), steps=(1, 2, 4), units=(1, 3))
    names = [cell.name for cell in reproduce.cells(everything)]
    assert len(set(names)) == len(names) == 72
    assert Cell(init="sf-ode", dmd=True, steps=1, unit=3, seed=2).name == "sf-ode-dmd-1step-f3-seed2"
