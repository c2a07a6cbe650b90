"""The data set is a function of its seed, and every stage learns from what it should.

Runs on the CPU in seconds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from cfrt import flow
from cfrt.errors import WeightsError
from cfrt.nn.autoencoder import Autoencoder
from training import bidirectional, cd, chain, data, decoder, dmd, loop, recipes, rollout, teacher
from training.data import Batch
from training.network import Network, broadcast, guided, resampled

pytestmark = pytest.mark.cpu

DATA = data.Config(clips=12, units=6)


def _losses(stage: loop.Stage, steps: int) -> list[float]:
    optimisers = stage.optimisers()
    return [loop.take(stage, optimisers, index, seed=0).get("loss", 0.0) for index in range(steps)]


@pytest.fixture(scope="module")
def recipe() -> recipes.Recipe:
    tiny = recipes.tiny()
    model = replace(tiny.model, width=64, depth=1, heads=1, ffn=64)
    return replace(tiny, model=model, data=DATA)


@pytest.fixture(scope="module")
def clips(recipe: recipes.Recipe, tmp_path_factory: pytest.TempPathFactory) -> data.Clips:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("data")
    data.write(folder, DATA, Autoencoder(recipe.model.autoencoder).eval(), seed=1)
    return data.Clips(folder, DATA, seed=1)


def test_batches_depend_on_the_step_alone(clips: data.Clips) -> None:
    first = clips.batch(5, 4)
    clips.batch(0, 4)
    again = clips.batch(5, 4)
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.captions, again.captions)
    epoch = torch.cat([clips.batch(i, 4).latents for i in range(3)])
    assert len(epoch.flatten(1).unique(dim=0)) == len(clips)


def test_captions_switch_where_the_scene_does() -> None:
    plan = data.script(400, data.Config(), loop.step_generator(1, 2))
    switched = plan.unit < 10
    assert 0.18 < switched.float().mean() < 0.32
    assert (plan.captions[~switched, 0] == plan.captions[~switched, 1]).all()
    assert (plan.before[~switched] == plan.after[~switched]).all()
    assert plan.caption(10).sum(1).eq(10 - plan.unit).all()


@pytest.mark.parametrize("name", ["bidirectional", "teacher"])
def test_a_teacher_learns(name: str, recipe: recipes.Recipe, clips: data.Clips) -> None:
    """Loss on the same few clips falls."""
    torch.manual_seed(0)
    stage: loop.Stage
    if name == "bidirectional":
        config = bidirectional.Config(steps=40, batch=8)
        stage = bidirectional.Stage(config, recipe.model, clips, Network(recipe.model))
    else:
        stage = teacher.Stage(teacher.Config(steps=40, batch=8, starts=4), recipe.model, clips, Network(recipe.model))
    losses = _losses(stage, 40)
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


def test_consistency_distillation_ends_at_the_clean_side(recipe: recipes.Recipe, clips: data.Clips) -> None:
    """With one level, s = 1 -> 0, the goal is the guided teacher's one-step sample: the student comes to make it."""
    torch.manual_seed(0)
    start = Network(recipe.model)
    for linear in (start.dit.head.head, start.dit.blocks[0].cross_attn.o):  # both are zero in a new network
        nn.init.normal_(linear.weight, std=0.3)
    config = cd.Config(steps=60, batch=4, levels=1, guidance=4.0, lr=2e-3)
    stage = cd.Stage(config, recipe.model, clips, start)
    frozen = {name: value.clone() for name, value in stage.teacher.state_dict().items()}
    losses = _losses(stage, 60)
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])
    assert all(torch.equal(value, stage.teacher.state_dict()[name]) for name, value in frozen.items())


@pytest.mark.parametrize("scores", ["bidirectional", "causal"])
def test_dmd_moves_the_student_and_not_the_real_score(
    recipe: recipes.Recipe, scores: Literal["bidirectional", "causal"]
) -> None:
    torch.manual_seed(0)
    config = dmd.Config(steps=4, batch=2, critic_warmup=1, scores=scores)
    prompts = partial(data.prompts, config=DATA)
    stage = dmd.Stage(config, recipe.model, prompts, Network(recipe.model), Network(recipe.model))
    real = {k: v.clone() for k, v in stage.real.state_dict().items()}
    before = {k: v.clone() for k, v in stage.student.state_dict().items()}
    _losses(stage, 2)
    assert all(torch.equal(v, stage.real.state_dict()[k]) for k, v in real.items())
    assert any(not torch.equal(v, stage.student.state_dict()[k]) for k, v in before.items())


def test_a_causal_score_judges_a_unit_by_its_own_past_alone(recipe: recipes.Recipe, clips: data.Clips) -> None:
    """The gradient up to unit u does not change with what the student made after it."""
    torch.manual_seed(0)
    real, fake = Network(recipe.model), Network(recipe.model)
    for network in (real, fake):
        nn.init.normal_(network.dit.head.head.weight, std=0.05)
    config, prompts = dmd.Config(scores="causal"), partial(data.prompts, config=DATA)
    stage = dmd.Stage(config, recipe.model, prompts, Network(recipe.model), real, fake=fake)
    batch, kept = clips.batch(0, 2), 2
    after = batch.latents.clone()
    after[:, kept:] += 1
    one, other = (
        stage.gradient(x, replace(batch, latents=x), torch.Generator().manual_seed(1)) for x in (batch.latents, after)
    )
    whole = (1, 2, 3, 4)  # the normaliser is the whole clip's
    scale = one[:, :kept].abs().sum(whole, keepdim=True) / other[:, :kept].abs().sum(whole, keepdim=True)
    torch.testing.assert_close(one[:, :kept], scale * other[:, :kept], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(one[:, kept:], scale * other[:, kept:], rtol=1e-2)


def test_a_share_of_distillation_s_clips_is_played_by_the_target(recipe: recipes.Recipe, clips: data.Clips) -> None:
    """Those clips are rollouts of other prompts, and the rest is the data's."""
    torch.manual_seed(0)
    seen: list[Batch] = []
    stage = cd.Stage(cd.Config(batch=4, own=0.5), recipe.model, clips, Network(recipe.model))
    forward = stage.student.teacher_forced
    stage.student.teacher_forced = lambda x, s, batch: seen.append(batch) or forward(x, s, batch)  # type: ignore
    _losses(stage, 1)
    given = clips.batch(0, 4)
    assert torch.equal(seen[0].latents[:2], given.latents[:2])
    assert torch.equal(seen[0].captions[:2], given.captions[:2])
    assert seen[0].latents.shape == given.latents.shape
    assert not any(torch.equal(seen[0].latents[i], given.latents[i]) for i in (2, 3))


def test_a_resampled_past_is_the_networks_guess_in_a_share_of_the_clips(
    recipe: recipes.Recipe, clips: data.Clips
) -> None:
    """Up to noise level 0 a guess is the clip itself; above, it is x - s v given the clean past; captions stay."""
    torch.manual_seed(0)
    network = Network(recipe.model)
    nn.init.normal_(network.dit.head.head.weight, std=0.05)
    batch, shift = clips.batch(0, 4), recipe.model.shift
    assert resampled(network, batch, 0.0, 0.7, shift, torch.Generator().manual_seed(1)) is batch
    same = resampled(network, batch, 1.0, 0.0, shift, torch.Generator().manual_seed(1))
    torch.testing.assert_close(same.latents, batch.latents)
    half = resampled(network, batch, 0.5, 0.7, shift, torch.Generator().manual_seed(1))
    assert torch.equal(half.latents[2:], batch.latents[2:])
    assert torch.equal(half.captions, batch.captions)
    generator = torch.Generator().manual_seed(1)
    s = flow.warp(flow.unwarp(0.7, shift) * torch.rand(2, 1, generator=generator), shift).expand(2, DATA.units)
    own = batch.first(2)
    x = flow.add_noise(own.latents, torch.randn(own.latents.shape, generator=generator), broadcast(s))
    torch.testing.assert_close(half.latents[:2], x - broadcast(s) * network.teacher_forced(x, s, own))


def test_the_decoder_is_trained_and_the_encoder_stays(recipe: recipes.Recipe) -> None:
    torch.manual_seed(0)
    start, guesser = Autoencoder(recipe.model.autoencoder), Network(recipe.model)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    stage = decoder.Stage(decoder.Config(steps=40, batch=2, units=3), recipe.model, DATA, start, guesser)
    first, optimisers = stage.loss(loop.micro_batch(0, 0, 1000))[1]["loss"], stage.optimisers()
    for index in range(40):
        loop.take(stage, optimisers, index, seed=0)
    assert stage.loss(loop.micro_batch(0, 0, 1000))[1]["loss"] < 0.95 * first
    moved = {name for name, value in stage.student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("decoder.") for name in moved)


def test_guidance_of_one_is_the_plain_velocity(recipe: recipes.Recipe, clips: data.Clips) -> None:
    torch.manual_seed(0)
    network = Network(recipe.model)
    nn.init.normal_(network.dit.head.head.weight)
    batch = clips.batch(0, 3)
    s = torch.rand(3, DATA.units)
    plain = guided(network.teacher_forced, batch.latents, s, batch, 1.0)
    null = guided(network.teacher_forced, batch.latents, s, batch.to_null(), 1.0)
    twice = guided(network.teacher_forced, batch.latents, s, batch, 2.0)
    torch.testing.assert_close(twice, 2 * plain - null, atol=1e-5, rtol=1e-4)
    assert broadcast(s).shape == (3, DATA.units, 1, 1, 1)


def test_rollout_of_the_teacher_equals_its_training_forward(recipe: recipes.Recipe, clips: data.Clips) -> None:
    """One Euler step down from noise, on a real past: the player's velocity is the teacher-forced one."""
    torch.manual_seed(0)
    network = Network(recipe.model).eval()
    nn.init.normal_(network.dit.head.head.weight, std=0.05)
    batch = clips.batch(0, 3)
    noise, s = torch.randn_like(batch.latents), torch.full((3, DATA.units), 0.7)
    with torch.no_grad():
        expected = network.teacher_forced(noise, s, batch)
        player = rollout.Player(network, recipe.model, batch)
        for unit in range(DATA.units):
            v = player.velocity(noise[:, unit : unit + 1], 0.7, unit)
            torch.testing.assert_close(v[:, 0], expected[:, unit], atol=2e-5, rtol=1e-4)
            player.commit(batch.latents[:, unit : unit + 1], unit)


def test_released_stages_start_a_run(tmp_path: Path) -> None:
    """What `release` keeps, `adopt` gives back to fp16 precision, and a stage that is there already is not touched."""
    recipe, run, kept = recipes.smoke(), tmp_path / "run", tmp_path / "kept"
    (run / "teacher").mkdir(parents=True)
    weights = {"dit.x": torch.randn(4, 4)}
    loop.write_tensors(run / "teacher" / "average.safetensors", weights)
    (run / "teacher" / "stats.jsonl").write_text("{}\n")
    chain.release(recipe, run, kept)
    chain.adopt(kept, tmp_path / "other")
    assert chain.finished(tmp_path / "other" / "teacher")
    torch.testing.assert_close(chain.weights(tmp_path / "other", "teacher"), weights, atol=1e-3, rtol=1e-3)
    chain.adopt(kept, run)
    assert torch.equal(chain.weights(run, "teacher")["dit.x"], weights["dit.x"])
    with pytest.raises(WeightsError, match="found none"):
        chain.adopt(tmp_path / "nothing", run)
