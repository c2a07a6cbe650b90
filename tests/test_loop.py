"""The loop: a killed run ends where an unbroken one does, numbers that are not finite stop it, and what it writes.

Runs on the CPU in seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_fixture import Noise, small

from cfrt.errors import TrainingError
from training import checkpoint, data, dmd, loop, recipes, teacher
from training.network import Network

pytestmark = pytest.mark.cpu


class _Line:
    """A stage small enough to compare bit for bit: a linear layer that fits noise."""

    name, batch = "line", 4

    def __init__(self, steps: int) -> None:
        torch.manual_seed(0)
        self.steps, self.worse = steps, dict[int, float]()
        self.student = nn.Linear(3, 3)
        self.networks, self.frozen = {"student": self.student}, dict[str, nn.Module]()

    def optimisers(self) -> dict[str, loop.Optimisers]:
        return {"student": {"adam": torch.optim.AdamW(self.student.parameters(), lr=1e-2)}}

    def step(self, index: int) -> Iterator[loop.Update]:
        yield loop.Update("student", 1e-2, self.loss)

    def loss(self, micro: loop.Micro) -> tuple[Tensor, loop.Stats]:
        x = torch.randn(4, 3, generator=micro.generator) + torch.randn(4, 3)
        loss = self.student(x).square().mean() * self.worse.get(micro.index, 1.0)
        return loss, {"loss": loss.item()}


FAST = loop.Config(log_every=5, save_seconds=0.0)


def _run(folder: Path, stage: _Line | None = None, config: loop.Config = FAST) -> dict[str, Tensor]:
    stage = stage or _Line(30)
    average = loop.Average(stage.student, 0.9)
    loop.run(stage, folder, seed=3, average=average, config=config)
    return average.weights | {f"live/{k}": v for k, v in stage.student.state_dict().items()}


def _rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(row) for row in (folder / "stats.jsonl").read_text().splitlines()]


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


# ------------------------------------------------------------------------------------------------- kill and resume

SCRIPT = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
torch.set_num_threads(1)
from training_fixture import resumable
resumable(Path(sys.argv[1]))
"""


def test_a_run_killed_at_any_moment_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    """SIGKILL to a real process that distils by consistency; the rest of the run is done in this one."""
    from training_fixture import resumable

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    resumable(whole)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, str(broken), str(Path(__file__).parent)]
    with subprocess.Popen(command, env=environment) as process:
        deadline = time.monotonic() + 240
        while checkpoint.latest(broken / "checkpoints") is None:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (broken / "average.safetensors").exists()
    resumable(broken)
    assert [row["step"] for row in _rows(broken)] == [row["step"] for row in _rows(whole)]
    for found, expected in zip(_rows(broken), _rows(whole), strict=True):
        assert found | {"seconds": 0} == expected | {"seconds": 0}
    last = [checkpoint.latest(folder / "checkpoints") for folder in (broken, whole)]
    assert (broken / "average.safetensors").read_bytes() == (whole / "average.safetensors").read_bytes()
    _equal(*(_tensors(path) for path in last if path))


def _tensors(path: Path) -> dict[str, Tensor]:
    """Everything in a checkpoint: networks, moments, averages."""
    found = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in checkpoint._sizes(path).items()}
    checkpoint._read(path, found)
    assert {name.split("/")[0] for name in found} == {"network", "optimiser", "average"}
    return found


def test_a_resumed_run_does_steps_again_that_no_checkpoint_covers(tmp_path: Path) -> None:
    whole = _run(tmp_path / "whole")
    _run(tmp_path / "broken", _Line(15))
    with (tmp_path / "broken" / "stats.jsonl").open("a") as lines:  # killed after a line that no checkpoint covers
        lines.write('{"step": 20, "loss": 0.0}\n{"step": 2')
    draft = tmp_path / "broken" / "checkpoints" / ".00000020"  # and while it wrote one
    draft.mkdir()
    (draft / "__0_0.distcp").write_bytes(b"half")
    _equal(whole, _run(tmp_path / "broken"))
    assert [row["step"] for row in _rows(tmp_path / "broken")] == [5, 10, 15, 20, 25, 30]
    assert not draft.exists()


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    _run(tmp_path, config=replace(FAST, keep=3))
    assert [path.name for path in checkpoint.whole(tmp_path / "checkpoints")] == ["00000020", "00000025", "00000030"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    loop.write_tensors(path, {"a": torch.ones(2)})
    before = path.read_bytes()
    monkeypatch.setattr(loop.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        loop.write_tensors(path, {"a": torch.zeros(2)})
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("factor", "what"), [(float("nan"), "the loss is nan"), (float("inf"), "the loss is inf"), (1e38, "norm is inf")]
)
def test_what_is_not_finite_stops_the_run_and_is_named(factor: float, what: str, tmp_path: Path) -> None:
    stage = _Line(30)
    stage.worse[2 * 12 + 1] = factor
    with pytest.raises(TrainingError, match=what) as caught:
        _run(tmp_path, stage, replace(FAST, micros=2))
    message = str(caught.value)
    assert "line: step 12, update 0 of it (student), micro-batch" in message
    assert "25" in message.split(":")[1] + message.split(":")[2]
    kept = checkpoint.latest(tmp_path / "checkpoints")
    assert kept is not None
    assert str(kept) in message
    assert kept.name == "00000010"
    assert all(bool(x.isfinite().all()) for x in _tensors(kept).values())


def test_weights_that_are_not_finite_are_never_kept(tmp_path: Path) -> None:
    """The loss and its gradient are fine, and a step of length 1e38 is taken all the same."""

    class Leap(_Line):
        def step(self, index: int) -> Iterator[loop.Update]:
            yield loop.Update("student", 1e-2 if index < 7 else float("inf"), self.loss)

    with pytest.raises(TrainingError, match=r"line: (a weight is not finite after step 9|step 8)"):
        _run(tmp_path, Leap(30))
    assert [path.name for path in checkpoint.whole(tmp_path / "checkpoints")] == ["00000005"]


def test_micro_batches_of_a_step_make_its_gradient() -> None:
    """Two micro-batches of one clip are one batch of two."""
    stage, whole = _Line(1), _Line(1)
    numbers = [loop.micro_batch(0, 0, index) for index in (0, 1)]
    update = loop.Update("student", 0.0, stage.loss)
    torch.manual_seed(1)
    loop.descend(stage.student, stage.optimisers()["student"], update, numbers, loop.Config(clip=1e9), "")
    torch.manual_seed(1)
    losses = [whole.loss(loop.micro_batch(0, 0, index))[0] for index in (0, 1)]
    torch.stack(losses).mean().backward()
    for mine, theirs in zip(stage.student.parameters(), whole.student.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_long_gradient_is_shortened() -> None:
    stage = _Line(1)
    stage.worse[0] = 1e3
    update = loop.Update("student", 0.0, stage.loss)
    config = loop.Config(clip=0.5)
    stats = loop.descend(stage.student, stage.optimisers()["student"], update, [loop.micro_batch(0, 0, 0)], config, "")
    length = torch.cat([p.grad.flatten() for p in stage.student.parameters() if p.grad is not None]).norm()
    assert stats["norm"] > 10
    torch.testing.assert_close(length, torch.tensor(0.5), atol=1e-4, rtol=1e-4)


def test_rows_count_clips(tmp_path: Path) -> None:
    _run(tmp_path, config=replace(FAST, micros=3))
    assert [(row["step"], row["clips"]) for row in _rows(tmp_path)][-1] == (30, 30 * 3 * _Line.batch)


# ------------------------------------------------------------------------------------------- bf16, checkpointing


@pytest.mark.parametrize("name", ["teacher", "dmd"])
def test_bf16_compute_keeps_fp32_weights_and_reaches_all_of_them(name: str, tmp_path: Path) -> None:
    """Rollouts compute without gradients first: no weight may be left out by a cast that was kept from then."""
    model = small()
    losses = {}
    for precision in ("fp32", "bf16"):
        stage = _teacher(model) if name == "teacher" else _dmd(model)
        config = loop.Config(precision=precision, log_every=1, checkpointing=precision == "bf16")
        loop.run(stage, tmp_path / precision, seed=1, average=loop.Average(stage.student, 0.9), config=config)
        assert all(p.dtype == torch.float32 for n in stage.networks.values() for p in n.parameters())
        assert all(p.grad is not None for n in stage.networks.values() for p in n.parameters())
        losses[precision] = [row["loss" if name == "teacher" else "fake"] for row in _rows(tmp_path / precision)]
        if precision == "bf16":
            assert all(p.dtype == torch.bfloat16 for n in stage.frozen.values() for p in n.parameters())
    assert losses["bf16"] != losses["fp32"]
    torch.testing.assert_close(torch.tensor(losses["bf16"]), torch.tensor(losses["fp32"]), atol=0, rtol=0.02)


def _teacher(model: recipes.ModelConfig) -> teacher.Stage:
    torch.manual_seed(0)
    return teacher.Stage(teacher.Config(steps=2, batch=2, starts=2), model, Noise(model), Network(model))


def _dmd(model: recipes.ModelConfig) -> dmd.Stage:
    torch.manual_seed(0)
    prompts = partial(data.prompts, config=data.Config(units=model.trained_frames))
    config = dmd.Config(steps=2, batch=2, critic_warmup=1, critic_updates=1)
    return dmd.Stage(config, model, prompts, Network(model), Network(model))


def test_recomputing_blocks_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        stage = _teacher(small())
        loop.place(stage, loop.Average(stage.student, 0.9), loop.Config(checkpointing=checkpointing))
        assert stage.student.dit.checkpointing is checkpointing
        stage.loss(loop.micro_batch(0, 0, 0))[0].backward()
        gradients.append([p.grad for p in stage.student.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------------------------------------------------------- logs


def test_rows_go_to_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert folder == str(tmp_path / "tensorboard")
            assert purge_step == 1

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed", 0, 0))

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    _run(tmp_path, config=replace(FAST, log=("tensorboard",)))
    losses = [(step, value) for name, value, step in written if name == "line/loss"]
    assert losses == [(row["step"], row["loss"]) for row in _rows(tmp_path)]
    assert written[-1][0] == "closed"


def test_rows_go_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    rows: list[tuple[int, dict[str, float]]] = []

    class Run:
        def log(self, row: dict[str, float], step: int) -> None:
            rows.append((step, row))

        def finish(self) -> None:
            asked["finished"] = True

    def init(**options: object) -> Run:
        asked.update(options)
        return Run()

    fake = types.ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    _run(tmp_path, config=replace(FAST, log=("wandb",)))
    assert asked["resume"] == "allow"
    assert asked["finished"]
    assert [(step, row["line/loss"]) for step, row in rows] == [(r["step"], r["loss"]) for r in _rows(tmp_path)]


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_log_that_is_not_installed_is_named(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TrainingError, match=f"pip install {name}"):
        _run(tmp_path, config=replace(FAST, log=(name,)))  # type: ignore[arg-type]


def test_the_bar_counts_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[dict[str, object]] = []

    class Bar:
        def __init__(self, **options: object) -> None:
            bars.append({**options, "n": options["initial"]})

        def update(self, clips: int) -> None:
            bars[-1]["n"] += clips  # type: ignore[operator]

        def set_postfix(self, numbers: object) -> None:
            pass

        @contextmanager
        def _open(self) -> Iterator[None]:
            yield

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(loop, "tqdm", Bar)
    _run(tmp_path, _Line(10), replace(FAST, micros=2))
    _run(tmp_path, _Line(30), replace(FAST, micros=2))
    clips = 2 * _Line.batch
    assert [(bar["unit"], bar["initial"], bar["n"], bar["total"]) for bar in bars] == [
        ("clip", 0, 10 * clips, 10 * clips),
        ("clip", 10 * clips, 30 * clips, 30 * clips),
    ]
