"""The plan of a run: FLOP as they are counted on the network, memory as autograd keeps it, the papers' own figures.

Runs on the CPU in seconds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from training_fixture import network, small

from cfrt.config import PRESETS, ModelConfig
from training import __main__, dmd, loop, plan, plan_page, recipes, wan
from training.network import Network

pytestmark = pytest.mark.cpu

WAN = PRESETS["wan-1.3b-framewise-2step"]
SPEED = plan.Speed(flops=1e9, source="stated")
TERA = 1e12


def _model() -> ModelConfig:
    return replace(small(64), latent_grid=(8, 8), ffn=96, heads=2)


def _inputs(model: ModelConfig, captions: int = 1, clips: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    frames = model.trained_frames
    x = torch.randn(clips, frames, model.latent_channels, *model.latent_grid)
    return x, torch.full((clips, frames), 500.0), torch.randn(clips, captions, model.text.length, model.text.width)


def test_flop_are_those_of_the_network() -> None:
    model = _model()
    dit = network(model).dit
    x, t, rows = _inputs(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        dit(x, t, dit.text_kv(rows), backend="sdpa")
    frames = model.trained_frames
    expected = plan.forward(model, frames, frames**2, model.text.length) + plan.text(model, model.text.length)
    counted = counter.get_total_flops()
    if not any("attention" in str(op) for op in counter.get_flop_counts()["Global"]):
        expected -= (
            model.depth
            * 4
            * frames
            * model.frame_tokens
            * model.width
            * (frames * model.frame_tokens + model.text.length)
        )  # a kernel that the counter does not know
    assert counted == pytest.approx(len(x) * expected, rel=1e-6)


def test_forwards_of_the_papers_size_cost_what_the_reference_counts() -> None:
    """TFLOP per forward at 480 x 832: one frame-wise unit at windows of 21 and 9, a chunk-wise one, a whole clip."""
    rows = WAN.text.length
    assert plan.forward(WAN, 1, 21, rows) / TERA == pytest.approx(13.47, rel=1e-3)
    assert plan.forward(WAN, 1, 9, rows) / TERA == pytest.approx(8.09, rel=1e-3)
    assert plan.forward(WAN, 3, 3 * 21, rows) / TERA == pytest.approx(40.40, rel=1e-3)
    assert plan.forward(WAN, 21, 21 * 21, rows) / TERA == pytest.approx(282.8, rel=1e-3)
    assert sum(plan.unit_passes(WAN, 21)) / TERA == pytest.approx(188.6, rel=1e-3)
    assert plan.text(WAN, rows) / TERA == pytest.approx(0.0089 + 0.145, rel=1e-2)
    assert plan.parameters(WAN) == 1_418_996_800
    assert plan.parameters(PRESETS["wan-14b"]) == 14_288_491_584
    tiny = recipes.tiny().model
    assert plan.parameters(tiny) == sum(p.numel() for p in Network(tiny).parameters())


@pytest.mark.parametrize("recomputed", [False, True])
def test_activations_are_what_autograd_keeps(recomputed: bool) -> None:
    """Bytes of distinct storages saved for the backward of a bidirectional forward, weights apart."""
    model = replace(_model(), depth=4)
    dit = network(model).dit
    dit.checkpointing = recomputed
    weights = {p.untyped_storage().data_ptr() for p in dit.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    x, t, rows = _inputs(model, plan.CAPTIONS)
    caption = torch.zeros(t.shape, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        dit(x, t, dit.text_kv(rows), caption)
    measured = sum(x.untyped_storage().nbytes() for x in kept.values())
    graph = plan.Graph(model=model, frames=model.trained_frames)
    predicted = len(x) * graph.bytes(4, recomputed)
    if recomputed:  # what one block keeps while it is recomputed is not there yet
        more = graph.bytes(4, False) - replace(graph, model=replace(model, depth=3)).bytes(4, False)
        predicted -= len(x) * (more - plan.CAPTIONS * model.text.length * model.width * 12)
    assert predicted == pytest.approx(measured, rel=0.15)


def test_sharing_out_divides_what_is_kept_and_not_what_is_computed() -> None:
    recipe = wan.framewise()
    one, eight = (wan.stages(recipe, ["dmd"], count, SPEED)[0] for count in (1, 8))
    for kind in ("weights", "gradients", "moments", "average", "frozen"):
        assert eight.memory[kind] == pytest.approx(one.memory[kind] / 8)
    assert eight.memory["activations"] == one.memory["activations"]
    assert eight.memory["activations_recomputed"] < 0.1 * eight.memory["activations"]
    assert eight.flops == one.flops
    assert eight.hours == pytest.approx(one.hours / 8)
    assert one.clips == recipe.dmd.steps * 64


def test_memory_of_dmd_on_eight_gpus() -> None:
    """The student's and the critic's masters, gradients and moments, the average, and the 14B score in bf16."""
    stage = wan.stages(wan.framewise(), ["dmd"], 8, SPEED)[0]
    small_, large = 1_418_996_800, 14_288_491_584
    kept = sum(stage.memory[kind] for kind in ("weights", "gradients", "moments", "average", "frozen"))
    assert kept == pytest.approx((2 * 16 * small_ + 4 * small_ + 2 * large) / 8)
    assert stage.total < 80e9  # an H100
    plain = replace(wan.framewise(), run=loop.Config(micros=64, precision="bf16"))
    assert wan.stages(plain, ["dmd"], 8, SPEED)[0].total > 80e9


def test_an_update_of_the_student_costs_rollout_scores_and_critic() -> None:
    """DMD without guidance, one step a unit, old rollouts: everything can be counted by hand."""
    model = replace(_model(), steps=(1.0,), first_steps=None)
    config = dmd.Config(critic_updates=2, guidance=1.0)
    work = plan.of_dmd(config, model, model, model, 4)
    passes, whole = plan.unit_passes(model, 4), plan.whole_clip(model, 4)
    assert work.learning == pytest.approx(sum(passes) + plan.text(model, 2 * model.text.length) + 2 * whole)
    assert work.asking == pytest.approx(sum(passes[:-1]) + 2 * whole)


def test_a_dry_run_prints_a_page_or_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "measured", lambda *_: SPEED)
    monkeypatch.setattr("sys.argv", ["training", "tiny", "--dry-run"])
    __main__.main()
    page = capsys.readouterr().out
    assert "*predicted* at 1.0 GFLOP/s each (stated)" in page
    for word in ("autoencoder", "bidirectional", "teacher", "phases", "dmd", "moments", "activations, recomputed"):
        assert word in page
    monkeypatch.setattr("sys.argv", ["training", "tiny", "--dry-run", "--json"])
    __main__.main()
    content = json.loads(capsys.readouterr().out)
    assert content["stages"][0]["name"] == "autoencoder"
    assert content["recipe"]["teacher"]["steps"] == content["stages"][2]["steps"]
    assert all(stage["hours"] > 0 for stage in content["stages"])


def test_a_small_recipe_is_not_for_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["training", "tiny"])
    with pytest.raises(SystemExit, match="tiny is trained by one process"):
        __main__.main()


def test_a_measured_speed_is_one_of_this_machine() -> None:
    speed = plan.measured(_model(), 4, seconds=0.01)
    assert 1e6 < speed.flops < 1e13
    assert speed.source.startswith("measured")


@pytest.mark.parametrize(
    ("x", "text"), [(0, "0 B"), (999, "999 B"), (1234567, "1.2 MB"), (2.5e11, "250 GB"), (1e18, "1.0 EB")]
)
def test_short_numbers(x: float, text: str) -> None:
    assert plan_page.short(x, "B") == text


def test_pairs_in_memory_are_counted() -> None:
    """Byte for byte: states, end and past of clips and openings, in fp16."""
    recipe = recipes.smoke()
    config, model, units = recipe.phases, recipe.model, recipe.long.units
    clip = (16 + 1 + 1) * model.latent_channels * 4 * 4 * 2
    planned = next(
        stage for stage in plan.of_recipe(recipe, plan.Speed(flops=1e9, source="")) if stage.name == "phases"
    )
    assert planned.memory["data"] == clip * (config.pairs * units + config.openings)
    assert planned.total > planned.memory["data"] > 0


def test_a_rollout_by_phases_is_differentiated_whole() -> None:
    """No random exit: every pass of a unit is learnt from, and none comes before."""
    model = replace(_model(), solver="euler", steps=(1.0, 0.5), first_steps=None)
    config = dmd.Config(critic_updates=2, guidance=1.0)
    work = plan.of_dmd(config, model, model, model, 4)
    passes, whole = plan.unit_passes(model, 4), plan.whole_clip(model, 4)
    assert work.learning == pytest.approx(2 * sum(passes) + plan.text(model, 2 * model.text.length) + 2 * whole)
    assert work.asking == pytest.approx(sum(passes[:-1]) + 2 * whole)
