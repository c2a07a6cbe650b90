"""The ideal denoiser of the world's first pictures, against pictures that were drawn at random, and what is learnt from
its answers.

Runs on the CPU, with the embedded student's weights; half a minute."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from training_fixture import Noise
from training_fixture import network as random_network

from cfrt import flow, students
from cfrt.config import ModelConfig
from cfrt.errors import ConfigError
from cfrt.nn.autoencoder import Autoencoder
from cfrt.weights import load_model, part
from training import captions, data, ideal, loop, ode, phases, reader, recipes, rollout, rounded, worlds
from training.data import Prompts
from training.network import Network, frozen, load

pytestmark = pytest.mark.cpu

SCENE = torch.tensor([0, 1, 3, 2, 1, 2])  # a small green cross that goes down fast over the meadow
LOOK = SCENE[ideal.LOOK]
MODEL = recipes.tiny().model


@lru_cache
def trained() -> tuple[Autoencoder, Network]:
    config, arrays = load_model(students.find("tiny"))
    autoencoder = Autoencoder(config.autoencoder).eval().requires_grad_(False)
    autoencoder.load_state_dict({name: torch.from_numpy(array) for name, array in part(arrays, "autoencoder").items()})
    rest = {name: torch.from_numpy(array) for name, array in arrays.items() if not name.startswith("autoencoder.")}
    return autoencoder, frozen(load(config, rest))


@lru_cache
def look() -> ideal.Look:
    return ideal.Look(trained()[0], LOOK)


def pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First latent frames [B, D] of the scene, and where the object is."""
    generator = torch.Generator().manual_seed(seed)
    scene = worlds.simulate(SCENE.expand(count, -1), generator, 1)
    return ideal.encoded(trained()[0], LOOK, scene.position[:, 0], scene.phase[:, 0]), scene.position[:, 0]


def noised(x0: torch.Tensor, s: float, seed: int = 1) -> torch.Tensor:
    return flow.add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)), s)


def test_between_the_pictures_that_were_encoded_are_those_that_were_not() -> None:
    """Anywhere, not at the nodes: the nearest point of the surface is as near as a spline is true."""
    x0, _ = pictures(64, seed=3)
    low, high = look().inside(SCENE.expand(len(x0), -1))
    found = look().denoise(x0 * (1 - 1e-3), 1e-3, low, high)
    assert (found - x0).square().mean() < 2e-3 * x0.var(0).mean()


@pytest.mark.parametrize("s", [0.95, 0.9, 0.85])
def test_it_is_the_posterior_s_mean(s: float) -> None:
    """Against the same mean over pictures drawn at random (self-normalised, fp64), whose own error follows from how
    many of them count."""
    x0, _ = pictures(12, seed=4)
    x = noised(x0, s)
    drawn = pictures(3000, seed=5)[0].double()
    score = -(x.double()[:, None] - (1 - s) * drawn).square().sum(-1) / (2 * s * s)
    weight = score.softmax(1)
    expected = weight @ drawn
    error = (weight.square()[:, :, None] * (drawn[None] - expected[:, None]).square()).sum(1)  # variance of the mean
    low, high = look().inside(SCENE.expand(len(x), -1))
    found = look().denoise(x, s, low, high)
    assert (found - expected).square().mean() < 1.5 * error.mean() + 1e-3


def test_no_network_is_nearer_to_the_truth() -> None:
    """It has the least expected error at every level of the first unit's list, by definition: less than the student
    that ships."""
    _, student = trained()
    x0, _ = pictures(128, seed=6)
    count = len(x0)
    rows = captions.rows(SCENE.expand(count, -1))[:, None].expand(-1, 2, -1)
    prompts = Prompts(captions=rows, caption=torch.zeros(count, 1, dtype=torch.long))
    player = rollout.Player(student, MODEL, prompts)
    low, high = look().inside(SCENE.expand(count, -1))
    for s in rollout.levels(MODEL, 0)[1:]:
        x = noised(x0, s)
        shaped = x.view(count, 1, MODEL.latent_channels, *MODEL.latent_grid)
        with torch.no_grad():
            guess = flow.x0_from_v(shaped, player.velocity(shaped, s, 0), s).flatten(1)
        ideal_error, error = ((found - x0).square().mean() for found in (look().denoise(x, s, low, high), guess))
        assert ideal_error < error, s


def test_from_noise_alone_it_says_the_mean_picture_and_from_little_noise_the_picture() -> None:
    x0, _ = pictures(256, seed=7)
    low, high = look().inside(SCENE.expand(len(x0), -1))
    mean = look().denoise(torch.randn(256, x0.shape[1]), 1.0, low, high)
    assert torch.equal(mean, mean[:1].expand_as(mean))
    assert (mean[0] - x0.mean(0)).square().mean() < 0.05 * x0.var(0).mean()
    errors = [(look().denoise(noised(x0, s), s, low, high) - x0).square().mean() for s in (0.9, 0.7, 0.5, 0.3, 0.1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2e-3


def test_it_begins_where_a_scene_may_begin() -> None:
    """Even a picture of the object elsewhere is answered by one from which the first frames meet no wall."""
    autoencoder, _ = trained()
    elsewhere = torch.tensor([[32.0, 54.0], [12.0, 55.0]])  # at the floor, and it goes down
    x0 = ideal.encoded(autoencoder, LOOK, elsewhere, torch.tensor([1.0, 2.0]))
    low, high = look().inside(SCENE.expand(2, -1))
    found = look().denoise(x0 * 0.9, 0.1, low, high)
    video = data.decode(autoencoder, found.view(2, 1, MODEL.latent_channels, *MODEL.latent_grid))
    _, edge = worlds.starts(SCENE[None])
    assert (reader.read(video).position[:, 0, 1] < edge[0, 1] + 1).all()


# ------------------------------------------------------------------------------------------------------------ answers


@lru_cache
def played() -> ideal.Answers:
    autoencoder, student = trained()
    return ideal.play(autoencoder, student, MODEL, 32, torch.Generator().manual_seed(8))


def test_what_it_plays_is_right_in_every_clip() -> None:
    """The first half of them, to the last step, which ends at its answer."""
    autoencoder, _ = trained()
    answers, half = played(), len(played()) // 2
    seen = reader.read(data.decode(autoencoder, answers.answers[:half, -1]))
    asked = answers.captions[:half, 0] - captions.rows(torch.zeros(6, dtype=torch.long))
    assert torch.equal(seen.factors[:, ideal.LOOK], asked[:, ideal.LOOK])
    assert seen.valid.all()
    assert (seen.residual < 1e-3).all()
    assert not worlds.held_out(asked[:, :6]).any()


def test_the_other_half_are_the_student_s_own() -> None:
    _, student = trained()
    answers, half = played(), len(played()) // 2
    ladder = rollout.levels(MODEL, 0)
    prompts = Prompts(captions=answers.captions, caption=answers.caption)
    player = rollout.Player(student, MODEL, prompts)
    for step, (s, s_next) in enumerate(pairwise(ladder)):
        x, answer = answers.states[:, step], answers.answers[:, step]
        with torch.no_grad():
            said = player.velocity(x, s, 0)
        v = torch.cat([flow.v_from_x0(x, answer, s)[:half], said[half:]])
        torch.testing.assert_close(answers.states[:, step + 1], flow.euler(x, v, s, s_next), atol=1e-4, rtol=1e-4)
        error = (said - flow.v_from_x0(x, answer, s)).square().flatten(1).mean(1)
        torch.testing.assert_close(answers.surprise[:, step], error / error.mean(), atol=1e-2, rtol=1e-2)


def test_the_same_seed_plays_the_same_and_files_keep_it(tmp_path: Path) -> None:
    """As a run makes them: a piece in a file, and one that is there already stays."""
    autoencoder, student = trained()
    config = rounded.Config(answers=24, piece=16).answered(phases.Config(), MODEL)
    clips = Noise(MODEL)
    made: list[int] = []

    def make(_: data.Batch, generator: torch.Generator) -> ideal.Answers:
        made.append(1)
        return ideal.play(autoencoder, student, MODEL, config.piece, generator)

    ode.write(tmp_path, config, clips, make, seed=2)
    kept = ode.read(tmp_path, config, ideal.Answers)
    (tmp_path / "0001.safetensors").unlink()
    ode.write(tmp_path, config, clips, make, seed=2)
    again = ode.read(tmp_path, config, ideal.Answers)
    assert (len(kept), len(made)) == (24, 3)
    assert all(torch.equal(value, again.tensors()[name]) for name, value in kept.tensors().items())


def test_a_unit_of_three_latent_frames_is_no_picture() -> None:
    autoencoder, student = trained()
    with pytest.raises(ConfigError, match="units of one latent frame, got 3"):
        ideal.play(autoencoder, student, replace(MODEL, unit=3, window=9, trained_frames=12), 2, torch.Generator())


def answers(model: ModelConfig, clips: int = 4) -> ideal.Answers:
    """Of which nothing is true."""
    generator, levels = torch.Generator().manual_seed(0), len(model.unit_steps(0))
    shape = (clips, levels, model.unit, model.latent_channels, *model.latent_grid)
    return ideal.Answers(
        states=torch.randn(shape, generator=generator),
        answers=torch.randn(shape, generator=generator),
        surprise=torch.ones(clips, levels),
        captions=captions.rows(worlds.sample_factors(clips, generator))[:, None].expand(-1, 2, -1),
        caption=torch.zeros(clips, model.unit, dtype=torch.long),
    )


def test_half_of_the_states_are_drawn_as_they_surprise_and_no_one_too_often() -> None:
    rare = torch.zeros(4, 4)
    rare[2, 1], rare[0, 3] = 1.0, 1e9
    found = replace(answers(SMALL), surprise=rare)
    clip, level = found.draw(40_000, torch.Generator().manual_seed(1))
    counts = torch.bincount(4 * clip + level, minlength=16).view(4, 4) / 40_000
    expected = torch.full((4, 4), 0.5 / 16)
    expected[2, 1] += 0.5 * 1 / (1 + ideal.MOST)
    expected[0, 3] += 0.5 * ideal.MOST / (1 + ideal.MOST)
    torch.testing.assert_close(counts, expected, atol=0.01, rtol=0)


SMALL = replace(
    MODEL, width=64, depth=2, heads=1, ffn=64, latent_grid=(2, 2), steps=(1.0, 0.5), first_steps=(1.0, 0.75, 0.5, 0.25)
)


def stage(model: ModelConfig, openings: ideal.Answers, **settings: float) -> phases.Stage:
    plan = data.script(6, data.Config(units=5, omitted=0.3), torch.Generator().manual_seed(3))
    config = phases.Config(pairs=6, openings=6, euler_steps=4, batch=6, **settings)  # type: ignore[arg-type]
    levels = config.trajectories(model).levels
    shape = (6, 5, model.latent_channels, *model.latent_grid)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    pairs = ode.Pairs(
        states=torch.stack([noise + s - 1 for s in flow.sigmas(levels, model.shift)], 1),
        end=noise - 1,
        clean=noise - 1,
        captions=plan.captions,
        caption=plan.caption(5),
    )
    return phases.Stage(config, model, pairs, openings, random_network(model))


def test_a_student_is_told_what_to_say_of_each_state() -> None:
    """The loss of first units against its definition, clip by clip."""
    made = stage(SMALL, answers(SMALL), starts=5)
    found = made.loss(loop.micro_batch(0, 0, 0))[1]["first"]
    generator = loop.micro_batch(0, 0, 0).generator
    pairs = made._drawn(made.pairs, 6, generator)
    steps = made._steps(5, 6, generator)
    own = made._error(made.student.teacher_forced, pairs, *steps)[:, 0]
    clip, level = made.openings.draw(5, generator)  # type: ignore[union-attr]
    errors = []
    for c, k in zip(clip.tolist(), level.tolist(), strict=True):
        one = made.openings[torch.tensor([c])]
        s = rollout.levels(SMALL, 0)[k]
        x, x0 = one.states[:, k], one.answers[:, k]  # type: ignore[union-attr]
        said = made.student.bidirectional(x, torch.full((1, 1), s), data.Batch.of(x, one))
        errors.append(s * (said - (x - x0) / s).square().mean())
    errors += [error for error, rows in zip(own, pairs.captions[:, 0], strict=True) if (rows[ideal.LOOK] == 0).any()]
    assert 5 < len(errors) < 11
    torch.testing.assert_close(found, torch.stack(errors).mean())


def test_it_learns_what_it_is_told() -> None:
    told = answers(SMALL, clips=2)
    told = replace(told, answers=torch.zeros_like(told.answers))
    made = stage(SMALL, told, starts=16, steps=60, lr=5e-3)
    optimisers = made.optimisers()
    first = [loop.take(made, optimisers, index, seed=0)["first"] for index in range(made.steps)]
    assert math.fsum(first[-5:]) < 0.5 * math.fsum(first[:5])


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_caption_that_leaves_something_of_the_look_open_names_none(count: int) -> None:
    mentioned = torch.ones(6, dtype=torch.bool)
    mentioned[ideal.LOOK[:count]] = False
    mentioned[worlds.DIRECTION] = False
    assert bool(ideal.named(captions.rows(SCENE, mentioned))) == (count == 0)
