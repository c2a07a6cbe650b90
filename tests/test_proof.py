"""The learned experiment of training/proof.py: the effect where it must be and nowhere else, and honest errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cfrt import flow
from cfrt.errors import ConfigError
from training import gaussian, loop, proof

pytestmark = pytest.mark.cpu

RESULTS = Path(proof.__file__).parent / "results" / "proof.json"
RUNS = (
    {"worlds": ("dependent",), "inits": ("sf-ode", "causal-ode")},
    {"worlds": ("independent",), "inits": ("sf-ode",)},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proof")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[proof.Row]:
    """A fifth of the real experiment's steps: frames that have a past are nearly learnt by then."""
    return [row for arguments in RUNS for row in proof.run(folder, seeds=(1,), steps=200, clips=1024, **arguments)]


def measured(rows: list[proof.Row], world: str, init: str) -> float:
    """Variance ratio of the second and third frame at the two highest levels."""
    found = [
        row["measured"]
        for row in rows
        if (row["world"], row["init"]) == (world, init) and row["frame"] in (2, 3) and row["level"] > 0.9
    ]
    assert len(found) == 4
    return sum(found) / 4


def test_variance_is_lost_where_it_must_be_and_nowhere_else(rows: list[proof.Row]) -> None:
    """Prop. 3.3: the student of bidirectional pairs loses a quarter when frames depend on each other and nothing when
    they do not; the student of causal pairs, same network and same steps, loses nothing where the other does."""
    assert measured(rows, "dependent", "sf-ode") < 0.85  # predicted 0.758
    assert measured(rows, "dependent", "causal-ode") > 0.95
    assert measured(rows, "independent", "sf-ode") == pytest.approx(1, abs=0.03)


def test_what_is_there_is_not_run_again(folder: Path, rows: list[proof.Row], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "run", None)
    again = proof.run(folder, seeds=(1,), steps=200, clips=1024, **RUNS[0])
    assert again == [row for row in rows if row["world"] == "dependent"]


def test_rows_depend_on_the_seed_alone(tmp_path: Path) -> None:
    def short(name: str, seed: int) -> list[proof.Row]:
        found = proof.run(tmp_path / name, seeds=(seed,), steps=3, worlds=("dependent",), clips=64)
        return [{key: value for key, value in row.items() if key != "seconds"} for row in found]

    first = short("a", 1)
    assert [row["init"] for row in first[::16]] == list(proof.INITS)
    assert short("b", 1) == first
    assert [row["measured"] for row in short("c", 2)] != [row["measured"] for row in first]


@pytest.mark.slow
def test_a_trained_student_is_where_theory_and_the_kept_rows_say(tmp_path: Path) -> None:
    """All three students within 0.08 of their predictions in every frame and at every level; and the rows of
    training/results/proof.json come again, up to what another machine's sums do to a training."""
    found = proof.run(tmp_path, seeds=(1,), worlds=("dependent",))
    assert [row for row in found if abs(row["measured"] - row["predicted"]) > 0.08] == []
    kept = {_place(row): row for row in json.loads(RESULTS.read_text())}
    assert [row for row in found if abs(row["measured"] - kept[_place(row)]["measured"]) > 0.05] == []


def _place(row: proof.Row) -> tuple[object, ...]:
    return tuple(row[name] for name in ("world", "init", "seed", "level", "frame"))


def test_predictions() -> None:
    dependent, independent = (gaussian.covariance(rho, proof.FRAMES) for rho in proof.WORLDS.values())
    lost = 1 - proof.predicted(dependent, "sf-ode", 0.9375)
    assert lost.tolist() == pytest.approx([0.382, 0.285, 0.196, 0.000], abs=5e-4)
    assert proof.predicted(independent, "sf-ode", 0.9375).tolist() == pytest.approx([1] * 4)
    assert proof.predicted(dependent, "causal-ode", 0.9375).tolist() == pytest.approx([1] * 4)
    by_euler = proof.predicted(dependent, "causal-cd", 1.0)
    gain = gaussian.euler_gain(1.0, 1.0, flow.euler_grid(proof.CONSISTENCY.levels, proof.MODEL.shift))
    assert by_euler[0].item() == pytest.approx(gain**2)
    assert (by_euler < 0.95).all()  # Euler's steps lose variance: this is not the student's doing
    finer = gaussian.jump_variance(dependent, 1.0, lambda s, q2: gaussian.euler_gain(s, q2, flow.euler_grid(4000, 5.0)))
    assert finer.tolist() == pytest.approx([1] * 4, abs=2e-3)


def test_the_standard_error_is_the_spread_over_repetitions() -> None:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(300):
        end = torch.randn(200, 2, 1, 2, 2, generator=generator)
        jump = 0.8 * end + 0.3 * torch.randn(end.shape, generator=generator) + 5  # a constant is no variance
        found.append(torch.stack(proof.variance_ratio(jump, end)))
    ratio, error = torch.stack(found).unbind(1)  # [300, n]
    assert ratio.mean(0).tolist() == pytest.approx([0.8**2 + 0.3**2] * 2, abs=0.005)
    assert (error.mean(0) / ratio.std(0)).tolist() == pytest.approx([1, 1], abs=0.15)


def test_the_table_averages_seeds_and_adds_their_spread() -> None:
    row = {"world": "dependent", "init": "sf-ode", "level": 0.9375, "predicted": 0.618, "clips": 9, "seconds": 1.0}
    rows = [
        {**row, "seed": seed, "frame": frame, "measured": value, "standard_error": 0.03}
        for frame in (1, 2)
        for seed, value in ((1, 0.60), (2, 0.68))
    ]
    head, rule, line = proof.table(rows).splitlines()
    assert head == "| world | student | s | frame 1 | frame 2 |"
    assert rule.count("|") == head.count("|")
    expected = ((0.04**2 * 2 + 0.03**2) / 2) ** 0.5  # sample variance of the two seeds, plus that of the clips
    assert line == "| dependent (ρ = 0.9) | sf-ode | 0.9375 |" + f" 0.640 ± {expected:.3f} (0.618) |" * 2


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="causal-ode"):
        proof.run(tmp_path, inits=("sf",))
