"""A captured step is the step: the same loss, the same gradient, whatever was replayed before.

Needs a GPU; the optimiser's part runs on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from training import bidirectional, capture, cd, data, ideal, loop, ode, parallel, phases, recipes, rounded, teacher
from training.network import Network
from training.optimisers import StackedMuon, orthogonal

RECIPE = recipes.tiny()
CLIPS = data.Config(clips=96, units=6)
PHASES = phases.Config(pairs=8, openings=24, batch=8, starts=16)


def network() -> Network:
    torch.manual_seed(0)
    made = Network(RECIPE.model)
    for parameter in made.parameters():  # what starts at zero would hide most of the gradient
        parameter.data.add_(0.02 * torch.randn(parameter.shape))
    return made


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> data.Clips:
    """Noise in place of latents: what a batch is, is not looked at here."""
    folder = tmp_path_factory.mktemp("clips")
    plan = data.script(CLIPS.clips, CLIPS, torch.Generator().manual_seed(3))
    tensors = {
        "latents": torch.randn(CLIPS.clips, CLIPS.units, 16, 4, 4).half(),
        "captions": plan.captions,
        "caption": plan.caption(CLIPS.units),
    }
    loop.write_tensors(folder / "0000.safetensors", tensors)
    return data.Clips(Path(folder), CLIPS, 1, torch.device("cuda"))


def played(clips: int, units: int) -> ode.Pairs:
    """Noise in place of trajectories, kept as a run keeps them."""
    states = len(PHASES.trajectories(RECIPE.model).levels)
    clean = torch.randn(clips, units, 16, 4, 4)
    plan = data.script(clips, CLIPS, torch.Generator().manual_seed(3))
    pairs = ode.Pairs(
        states=torch.randn(clips, states, units, 16, 4, 4).half(),
        end=clean.half(),
        clean=clean.half(),
        captions=plan.captions,
        caption=plan.caption(units),
    )
    return pairs.to(torch.device("cuda"))


def answered(clips: int) -> ideal.Answers:
    """Noise in place of answers."""
    shape = (clips, len(RECIPE.model.unit_steps(0)), 1, 16, 4, 4)
    plan = data.script(clips, CLIPS, torch.Generator().manual_seed(4))
    answers = ideal.Answers(
        states=torch.randn(shape).half(),
        answers=torch.randn(shape).half(),
        surprise=torch.rand(shape[:2]),
        captions=plan.captions,
        caption=plan.caption(1),
    )
    return answers.to(torch.device("cuda"))


def stage(name: str, clips: data.Clips) -> loop.Stage:
    match name:
        case "bidirectional":
            return bidirectional.Stage(bidirectional.Config(batch=8), RECIPE.model, clips, network())
        case "teacher":
            config = teacher.Config(batch=8, resampled=0.5, starts=16)
            return teacher.Stage(config, RECIPE.model, clips, network())
        case "phases":
            return phases.Stage(PHASES, RECIPE.model, played(8, CLIPS.units), played(24, 1), network())
        case "rounded":
            settings = rounded.Config(starts=16)
            return rounded.Stage(settings, PHASES, RECIPE.model, played(8, CLIPS.units), answered(24), network())
        case _:
            return cd.Stage(cd.Config(batch=8, guidance_later=2.0, resampled=0.5), RECIPE.model, clips, network())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["bidirectional", "teacher", "phases", "rounded", "cd"])
def test_a_replay_is_the_loss_and_its_gradient(name: str, precision: parallel.Precision, clips: data.Clips) -> None:
    made, config = stage(name, clips), loop.Config(precision=precision, device="cuda")
    average = getattr(made, "average", None) or loop.Average(made.student, 0.9)
    loop.place(made, average, config)
    source = getattr(made, "clips", None)
    captured = loop.capture(made, config)
    assert isinstance(captured, capture.Captured)
    seen = []
    for index in (4, 0, 9, 4):  # the last one again: nothing of the others is left
        update = next(iter(made.step(index)))
        micro = loop.micro_batch(1, index, index)
        loss, report = captured(update.loss, micro)
        seen.append((loss.item(), {k: float(v) for k, v in report.items()}, gradient(made.student)))
        if source is not None:
            made.clips = source  # type: ignore[attr-defined]
        on_gpu = torch.Generator("cuda").manual_seed(micro.generator.initial_seed())
        made.student.zero_grad(set_to_none=True)
        with loop._compute(made.student, config):
            expected, _ = update.loss(replace(micro, generator=on_gpu))
        expected.backward()
        if source is not None:
            made.clips = captured.feed  # type: ignore[attr-defined]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5 if precision == "fp32" else 1e-3)
        exact = gradient(made.student)
        assert (seen[-1][2] - exact).norm() < (1e-4 if precision == "fp32" else 2e-2) * exact.norm()
    assert seen[0][0] == pytest.approx(seen[-1][0], rel=1e-6)
    assert len({row[0] for row in seen}) == 3


def gradient(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten().clone() for p in network.parameters() if p.grad is not None])


@pytest.mark.gpu
def test_a_captured_run_goes_on_bit_for_bit(tmp_path: Path, clips: data.Clips) -> None:
    config = loop.Config(device="cuda", save_seconds=0.0, log_every=3)

    def run(folder: Path, steps: int) -> dict[str, torch.Tensor]:
        made = teacher.Stage(
            teacher.Config(batch=8, steps=9, starts=16, schedule="constant"), RECIPE.model, clips, network()
        )
        made.steps = steps
        average = loop.Average(made.student, 0.9)
        loop.run(made, folder, seed=1, average=average, config=config)
        return {name: value.clone() for name, value in average.weights.items()}

    whole = run(tmp_path / "whole", 9)
    run(tmp_path / "cut", 6)
    (tmp_path / "cut" / "average.safetensors").unlink()
    resumed = run(tmp_path / "cut", 9)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.cpu
def test_stacked_muon_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "bf16_is_fast", lambda device: True)
    torch.manual_seed(0)
    shapes = [(8, 12), (8, 12), (12, 8), (16, 16)]
    ours, theirs = ([nn.Parameter(torch.full(shape, 0.5)) for shape in shapes] for _ in range(2))
    options: dict[str, Any] = {"lr": 2e-3, "momentum": 0.95, "weight_decay": 0.01, "adjust_lr_fn": "match_rms_adamw"}
    optimisers = StackedMuon(ours, **options), torch.optim.Muon(theirs, **options)
    for _ in range(5):
        for own, other in zip(ours, theirs, strict=True):
            own.grad = torch.randn(own.shape)
            other.grad = own.grad.clone()
        for optimiser in optimisers:
            optimiser.step()
    for own, other in zip(ours, theirs, strict=True):
        assert torch.allclose(own, other, rtol=0, atol=1e-5)
        assert (other - 0.5).abs().max() > 1e-3


@pytest.mark.cpu
def test_matrices_are_orthogonalised_in_fp32_where_bf16_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    found = {}
    for fast in (True, False):
        monkeypatch.setattr(parallel, "bf16_is_fast", lambda device, fast=fast: fast)
        found[fast] = orthogonal(x, (3.4445, -4.775, 2.0315), 5, 1e-7)
    assert (found[True].dtype, found[False].dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found[True].float(), found[False], atol=0.05, rtol=0)
    assert ((torch.linalg.svdvals(found[False]) > 0.6) & (torch.linalg.svdvals(found[False]) < 1.3)).all()
