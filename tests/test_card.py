"""The card, the committed numbers and the README's table are worded from one JSON and agree with it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from cfrt import students
from training import card, evaluate, metrics, recipes, table

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]


def row(hits: int) -> evaluate.Row:
    """A row in which `hits` of 50 clips are right."""
    right = metrics.share(torch.arange(50) < hits)
    some = metrics.mean(torch.arange(50) / hits)
    shares = {line.key: right if line.percent else some for line in table.LINES}
    stretch = {key: right for key, _ in table.DRIFT}
    drift = [stretch | {"seconds": [5 * i, 5 * i + 5]} for i in range(6)]
    return shares | {"drift": drift, "switch_curve": [right] * 24}


@pytest.fixture
def results() -> card.Results:
    rows = {name: row(hits) for name, hits in (("real", 50), ("reconstruction", 49), ("teacher", 46), ("student", 43))}
    rows["teacher"]["diversity"] = metrics.NOTHING
    made: dict[str, Any] = {
        "recipe": "smoke",
        "date": "2026-11-23",
        "machine": card.machine(),
        "parameters": {"transformer and text": 2_345_678, "autoencoder": 1_500_000},
        "teacher": {"steps": 24, "guidance": 2.0},
        "stages": {
            "autoencoder": {"steps": 10, "seconds": 45.0},
            "dmd": {"steps": 2, "seconds": 7260.0, "where": "one GPU"},
        },
        "evaluation_seconds": 300,
        "config": asdict(recipes.smoke()),
        "rows": evaluate.plain(rows),
    }
    return json.loads(json.dumps(made, allow_nan=False))


def test_the_card_says_what_was_measured(results: card.Results) -> None:
    text = card.card(results)
    _, front, body = text.split("---\n", 2)
    assert "license: apache-2.0" in front
    assert '          - type: colour\n            name: "colour right"\n            value: 0.86' in front
    assert (
        "| colour right (%) | 100.0 [92.9, 100.0] | 98.0 [89.5, 99.6] | 92.0 [81.2, 96.8] | 86.0 [73.8, 93.0] | 50 |"
        in body
    )
    assert "**student, 4 steps**" in body
    assert "AR teacher, 24 guided steps" in body
    assert "| dmd | 2 | 2 h 01 min | one GPU |" in body
    assert "| **total** (data and evaluation not counted) | | **2 h 02 min** | |" in body
    for said in (results["machine"]["cpu"], torch.__version__, "Seed 1", "8 prompts", "25–30 s", "2.35 M"):
        assert said in body, said


def test_what_could_not_be_measured_is_a_dash(results: card.Results) -> None:
    line = next(line for line in card.card(results).splitlines() if line.startswith("| diversity |"))
    assert line.count("–") == 1 + line.split("|")[-2].count("–")


def test_the_readme_gets_the_table_between_its_markers(results: card.Results, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{card.BEGIN}\nold numbers\n{card.END}\nafter\n", encoding="utf-8")
    card.update_readme(readme, results)
    once = readme.read_text(encoding="utf-8")
    assert once.startswith(f"before\n{card.BEGIN}\n|")
    assert once.endswith(f"{card.END}\nafter\n")
    assert "old numbers" not in once
    assert "| starting direction right (%) | 100.0" in once
    card.update_readme(readme, results)
    assert readme.read_text(encoding="utf-8") == once


def test_what_the_student_was_on_its_way_is_on_the_card_alone(results: card.Results) -> None:
    between = {**results, "rows": {**results["rows"], "phases": results["rows"]["student"]}}
    title = card.COLUMNS["phases"].format(steps=4)
    assert title in card.card(between)
    assert card.readme_section(between) == card.readme_section(results)


def test_a_readme_without_markers_is_left_alone(results: card.Results, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no place for numbers\n", encoding="utf-8")
    with pytest.raises(ValueError, match="generated:student"):
        card.update_readme(readme, results)
    assert readme.read_text(encoding="utf-8") == "no place for numbers\n"


def test_a_stage_is_as_long_as_its_last_line_says(tmp_path: Path) -> None:
    stats = tmp_path / "stats.jsonl"
    stats.write_text('{"step": 25, "seconds": 3.5, "loss": 1.0}\n{"step": 40, "seconds": 6.0, "loss": 0.5}\n')
    assert card.spent(stats) == {"steps": 40, "seconds": 6.0}


@pytest.mark.parametrize("name", sorted(students.embedded()))
def test_what_is_committed_was_generated(name: str) -> None:
    """Each embedded student's card is worded from its committed results, and so is the README's table."""
    results = json.loads((card.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    folder = ROOT / "cfrt" / "students" / name
    where = folder.relative_to(ROOT)
    again = f"run python -m training.card training/results/{name}.json --student {where} --readme README.md"
    assert (folder / "card.md").read_text(encoding="utf-8") == card.card(results), again
    if name == "tiny":
        assert card.readme_section(results) in (ROOT / "README.md").read_text(encoding="utf-8"), again
