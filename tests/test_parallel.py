"""Two processes train what one does: losses, weights, checkpoints read by another number of processes.

One launch of torchrun on two CPU processes (gloo) does all that these tests look at. Half a minute."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_worker import STEPS, smoke, stages, train
from safetensors.torch import load_file
from torch import Tensor
from training_fixture import network, small

from cfrt.errors import TrainingError
from cfrt.nn.autoencoder import Autoencoder
from training import checkpoint, parallel, recipes

pytestmark = pytest.mark.cpu

STAGES = ("teacher", "cd", "dmd")
HALF = STEPS // 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one: a run of one process; two: of two; A-then-B: the second half of a run by B processes."""
    out = tmp_path_factory.mktemp("runs")
    train(out / "one")
    _halve(out / "one", out / "one-then-two")
    here = Path(__file__).parent
    command = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *sys.path]), "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(
        [sys.executable, "-m", *command, str(here / "parallel_worker.py"), str(out)],
        env=environment,
        check=True,
        timeout=1200,
    )
    _halve(out / "two", out / "two-then-one")
    train(out / "two-then-one")
    smoke(out / "wan-one")
    return out


def _halve(run: Path, copy: Path) -> None:
    """The run as it was after half of its steps."""
    for name in STAGES:
        half = f"checkpoints/{HALF:08d}"
        shutil.copytree(run / name / half, copy / name / half)
        rows = (run / name / "stats.jsonl").read_text().splitlines(keepends=True)[:HALF]
        (copy / name / "stats.jsonl").write_text("".join(rows))


def _rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(row) for row in (folder / "stats.jsonl").read_text().splitlines()]


def _close(a: list[dict[str, float]], b: list[dict[str, float]]) -> None:
    assert len(a) == len(b) == STEPS
    for mine, theirs in zip(a, b, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"seconds"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=2e-6), name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("other", ["two", "one-then-two", "two-then-one"])
def test_any_number_of_processes_has_the_same_losses(other: str, stage: str, runs: Path) -> None:
    """Also after a run was taken over by more or fewer: moments, averages and progress come along."""
    _close(_rows(runs / other / stage), _rows(runs / "one" / stage))
    losses = [row["fake" if stage == "dmd" else "loss"] for row in _rows(runs / "one" / stage)]
    assert len(set(losses)) > 1


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("other", ["two", "one-then-two", "two-then-one"])
def test_the_average_is_handed_on_whole(other: str, stage: str, runs: Path) -> None:
    start = stages()[stage][0].student.state_dict()
    expected, found = (load_file(runs / run / stage / "average.safetensors") for run in ("one", other))
    assert found.keys() == expected.keys() == start.keys()
    # softmax does not see a key's bias: its gradient is rounding alone, of which AdamW makes a full step
    seen = [name for name in start if not name.endswith("attn.k.bias")]
    moved = torch.cat([(expected[name] - start[name]).flatten() for name in seen])
    apart = torch.cat([(found[name] - expected[name]).flatten() for name in seen])
    assert moved.abs().max() > 5e-5
    assert apart.norm() < 1e-2 * moved.norm()  # AdamW takes full steps along gradients that are mostly rounding


def test_each_process_writes_its_part_alone(runs: Path) -> None:
    """A checkpoint of two is one folder with a file of each, none of which holds everything."""
    last = checkpoint.latest(runs / "two" / "dmd" / "checkpoints")
    assert last is not None
    parts = sorted(path.stat().st_size for path in last.glob("*.distcp"))
    alone = checkpoint.latest(runs / "one" / "dmd" / "checkpoints")
    assert alone is not None
    whole = sum(path.stat().st_size for path in alone.glob("*.distcp"))
    assert len(parts) == 2
    assert parts[1] < 0.75 * whole
    assert [path.name for path in checkpoint.whole(runs / "two" / "dmd" / "checkpoints")] == [
        f"{step:08d}" for step in range(1, STEPS + 1)
    ]


@pytest.mark.parametrize("stage", ["teacher", "ode", "cd", "dmd"])
def test_a_wan_recipe_in_bf16_over_two_processes(stage: str, runs: Path) -> None:
    """FSDP's bf16 is autocast's, to rounding; the second process was never told a weight; what is kept is fp32."""
    (one,), (two,) = (_rows(runs / run / stage) for run in ("wan-one", "wan-two"))
    assert one.keys() == two.keys()
    for name in one.keys() - {"seconds"}:
        assert two[name] == pytest.approx(one[name], rel=0.02), name
    saved = load_file(runs / "wan-two" / stage / "average.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}


# ---------------------------------------------------------------------------------------------------- in one process


def test_one_process_needs_no_process_group() -> None:
    with parallel.processes():
        assert not torch.distributed.is_initialized()
        assert (parallel.count(), parallel.rank(), parallel.first()) == (1, 0, True)
        assert parallel.share(3) == range(3)
        assert parallel.anywhere(True)
        assert parallel.mean({"loss": 1.5}) == {"loss": 1.5}
        assert parallel.finite([torch.ones(2)])
        assert not parallel.finite([torch.tensor([1.0, float("nan")])])


def test_micro_batches_are_shared_evenly_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "count", lambda: 4)
    monkeypatch.setattr(parallel, "rank", lambda: 2)
    assert parallel.share(8) == range(4, 6)
    with pytest.raises(TrainingError, match=r"4 processes can share evenly, got 6 a step: set micros to a multiple"):
        parallel.share(6)


def test_only_a_transformer_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "count", lambda: 2)
    network = Autoencoder(recipes.tiny().model.autoencoder)
    with pytest.raises(TrainingError, match="got Autoencoder: run this stage in one process"):
        parallel.place(network, torch.device("cpu"), "fp32", constant=False)


def test_filling_a_network_that_has_no_values_yet() -> None:
    model = small()
    with torch.device("meta"):
        empty = type(network(model))(model)
    expected: dict[str, Tensor] = network(model, 4).state_dict()
    parallel.place(empty, torch.device("cpu"), "fp32", constant=False)
    parallel.fill(empty, expected)
    assert all(torch.equal(value, expected[name]) for name, value in empty.state_dict().items())
