"""The Wan recipes resolve, carry the published numbers, and run one step of each stage at reduced width.

Runs on the CPU in seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cfrt import flow
from cfrt.config import PRESETS
from cfrt.errors import ConfigError, WeightsError
from training import __main__, loop, ode, wan, wan_run
from training.network import Network
from training.wan_stages import Noise, Sources, build, clips, fill, train

pytestmark = pytest.mark.cpu

NAMES = tuple(wan.RECIPES)
TRAINED = ("teacher", "ode", "cd", "dmd")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", ["1", "2", "4"])
def test_every_recipe_resolves(
    name: str, steps: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [name, "--dry-run", "--json", "--processes", "8", "--steps", steps]
    monkeypatch.setattr("sys.argv", ["training", *words])
    if f"{name}-{steps}step" not in PRESETS:
        with pytest.raises(SystemExit):
            __main__.main()
        assert "4step), got" in capsys.readouterr().err
        return
    __main__.main()
    found = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in found["stages"]] == list(wan.STAGES)
    assert all(stage["total"] < 80e9 and stage["hours"] > 0 for stage in found["stages"])
    assert len(found["recipe"]["models"]["dmd"]["steps"]) == int(steps)


def test_a_page_says_that_times_are_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    wan_run.main(["wan-1.3b-framewise", "--dry-run", "--processes", "8"])
    page = capsys.readouterr().out
    assert "8 processes" in page
    assert "*predicted* at 400 TFLOP/s each (stated: 40 %" in page


def test_published_hyperparameters() -> None:
    """Causal Forcing's released configurations (reference, appendix A)."""
    for recipe, unit in ((wan.framewise(), 1), (wan.chunkwise(), 3)):
        assert {model.unit for model in recipe.models.values()} == {unit}
        assert {model.shift for model in recipe.models.values()} == {5.0}
        assert (recipe.run.micros, recipe.run.clip, recipe.run.precision) == (64, 10.0, "bf16")
        for name in TRAINED:
            config = getattr(recipe, name)
            assert (config.lr, config.batch, config.schedule) == (2e-6, 1, "constant")
            assert config.betas == ((0.9, 0.999) if name == "ode" else (0.0, 0.999))
        assert [round(1000 * s, 1) for s in flow.sigmas(recipe.ode.levels, 5.0)] == [1000, 937.5, 833.3, 625]
        assert (recipe.ode.euler_steps, recipe.ode.guidance) == (48, 6.0)
        assert (recipe.cd.levels, recipe.cd.guidance, recipe.cd.ema) == (48, 3.0, 0.99)
        assert (recipe.dmd.critic_lr, recipe.dmd.critic_updates, recipe.dmd.ema) == (4e-7, 5, 0.99)
        assert (recipe.dmd.guidance, recipe.dmd.tau, recipe.dmd.fresh_rollouts) == (4.0, (0.02, 0.98), True)
        assert recipe.teacher.weighting == "bell"
        assert recipe.real.width == 5120
    assert wan.framewise(2).models["dmd"].first_steps == (1.0, 0.75, 0.5, 0.25)


@pytest.fixture(scope="module", params=NAMES)
def smoked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wan") / "run"
    wan_run.main([request.param, "--smoke", "--out", str(out)])
    return out


def test_one_step_of_each_stage(smoked: Path) -> None:
    for stage in TRAINED:
        row = json.loads((smoked / stage / "stats.jsonl").read_text())
        assert (row["step"], row["clips"]) == (1, 2)
        weights = load_file(smoked / stage / "average.safetensors")
        assert {x.dtype for x in weights.values()} == {torch.float32}
        config = json.loads((smoked / stage / "config.json").read_text())
        assert config["run"]["precision"] == "bf16"
        assert config["stage"]["lr"] == 2e-6
    assert len(list((smoked / "pairs").glob("*.safetensors"))) == 2
    assert load_file(smoked / "pairs" / "0000.safetensors")["states"].dtype == torch.float16


def test_a_finished_stage_starts_the_next(smoked: Path) -> None:
    """Its weights are found in the run's folder, and are what the next stage's networks begin with."""
    asked = wan_run.Arguments(recipe="wan-1.3b-framewise", stage="cd", out=smoked)
    sources = wan_run._sources(asked, smoked)
    assert sources.start == smoked / "teacher" / "average.safetensors"
    kind = wan.chunkwise if "chunkwise" in (smoked / "teacher" / "config.json").read_text() else wan.framewise
    recipe = wan.reduced(kind())
    stage, average = build(recipe, "cd", Noise(recipe.fake))
    loop.place(stage, average, replace(recipe.run, precision="fp32"))
    fill({**stage.networks, **stage.frozen}, sources)
    expected = load_file(sources.start)
    for network in (*stage.networks.values(), *stage.frozen.values()):
        found = network.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_stages_say_what_they_lack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ([], "say which stage to train"),
        (["--stage", "teacher"], "needs clips: --data FOLDER"),
        (["--stage", "dmd", "--data", str(tmp_path)], "it holds official LMDB rows, say with --text"),
        (["--stage", "ode"], "6000 pieces of pairs in"),
    ):
        with pytest.raises(SystemExit):
            wan_run.main(["wan-1.3b-framewise", "--out", str(tmp_path), *words])
        assert message in capsys.readouterr().err
    asked = wan_run.Arguments(recipe="wan-1.3b-framewise", stage="dmd", out=tmp_path)
    with pytest.raises(WeightsError, match="stage dmd needs --weights and --real and --fake"):
        wan_run._sources(asked, tmp_path)


def test_weights_are_read_under_any_of_their_names(tmp_path: Path) -> None:
    """Official, with the wrappers of their trainer; and those of another network are refused."""
    recipe = wan.reduced(wan.framewise())
    torch.manual_seed(0)
    start = Network(recipe.models["teacher"])
    official: dict[str, Tensor] = {
        f"model._fsdp_wrapped_module.{name.removeprefix('dit.')}": x for name, x in start.state_dict().items()
    }
    torch.save({"generator": official}, tmp_path / "official.pt")
    stage, average = build(recipe, "teacher", Noise(recipe.fake))
    loop.place(stage, average, recipe.run)
    fill(stage.networks, Sources(start=tmp_path / "official.pt"))
    assert all(torch.equal(x, start.state_dict()[name]) for name, x in stage.student.state_dict().items())
    save_file({"dit.head.modulation": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="missing"):
        fill(stage.networks, Sources(start=tmp_path / "other.safetensors"))


def test_a_stage_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Three steps in one go, and one step and two more, give the same weights: what was learnt is not filled anew."""
    recipe = wan.reduced(wan.framewise())
    recipe = replace(recipe, run=replace(recipe.run, log_every=1, save_seconds=0.0))
    noise, sources = Noise(recipe.fake), Sources(start=None)
    whole = replace(recipe, cd=replace(recipe.cd, steps=3, lr=1e-2))
    train(whole, "cd", noise, sources, tmp_path / "whole")
    train(replace(whole, cd=replace(whole.cd, steps=1)), "cd", noise, sources, tmp_path / "parts")
    (tmp_path / "parts" / "cd" / "average.safetensors").unlink()
    train(whole, "cd", noise, sources, tmp_path / "parts")
    found, expected = (load_file(tmp_path / name / "cd" / "average.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_the_bell_weighs_levels_as_published() -> None:
    """Stage 1's weight multiplies each unit's error by w(s) of the unit's own level."""
    recipe = wan.reduced(wan.framewise())
    losses = {}
    for weighting in ("uniform", "bell"):
        config = replace(recipe.teacher, weighting=weighting, batch=2)
        stage, average = build(replace(recipe, teacher=config), "teacher", Noise(recipe.fake))
        loop.place(stage, average, loop.Config())
        fill(stage.networks, Sources(start=None))
        s = torch.tensor([[1.0, 0.5, 0.2, 0.2, 0.9, 0.9]] * 2)
        velocity = stage.student.teacher_forced  # type: ignore[operator]
        batch = Noise(recipe.fake).batch(0, 2)
        generator = torch.Generator().manual_seed(1)
        losses[weighting] = stage._error(velocity, batch, s, generator).detach()  # type: ignore[attr-defined]
    torch.testing.assert_close(losses["bell"], losses["uniform"] * flow.loss_weight(s, 5.0))
    assert losses["bell"][0, 0] == pytest.approx(0, abs=1e-6)


def test_stored_pairs_are_read_one_by_one(tmp_path: Path) -> None:
    recipe = wan.reduced(wan.framewise())
    config = replace(recipe.ode, pairs=5, piece=2, half=False)
    recipe = replace(recipe, ode=config)
    train(recipe, "pairs", Noise(recipe.fake), Sources(start=None), tmp_path)
    stored = ode.Stored(tmp_path / "pairs", config)
    everything = ode.read(tmp_path / "pairs", config)
    picks = torch.tensor([4, 0, 3])
    assert torch.equal(stored[picks].states, everything.states[picks])
    assert torch.equal(stored[picks].captions, everything.captions[picks])
    assert len(stored) == 5
    (tmp_path / "pairs" / "0001.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"expected 3 pieces of pairs in .*, 1 are missing"):
        ode.Stored(tmp_path / "pairs", config)


def test_shards_of_your_own_clips_are_found(tmp_path: Path) -> None:
    """A folder with a manifest is opened as shards, which refuse another model's clips."""
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(Exception, match="is damaged, or of another version"):
        clips(tmp_path, wan.framewise().models["teacher"], seed=1)
