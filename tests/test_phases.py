"""Distillation by phases: the teacher as it is led, its trajectories, and the student's steps along them.

Runs on the CPU in seconds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from training_fixture import network as random_network

from cfrt import flow
from cfrt.config import ModelConfig
from training import cd, data, dmd, loop, ode, phases, recipes, rollout
from training.data import Batch, Prompts
from training.network import Network, clone

pytestmark = pytest.mark.cpu

UNITS = 8
SCRIPT = data.Config(clips=6, units=UNITS, switched=0.5)
CONFIG = phases.Config(pairs=6, openings=48, piece=6, euler_steps=4, batch=6)


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    """A student of two steps, and of four for its first unit."""
    tiny = replace(recipes.tiny().model, width=64, depth=2, heads=1, ffn=64, latent_grid=(2, 2))
    return replace(tiny, solver="euler", steps=(1.0, 0.5), first_steps=(1.0, 0.75, 0.5, 0.25))


def prompts(seed: int = 3) -> Prompts:
    return data.prompts(SCRIPT.clips, torch.Generator().manual_seed(seed), SCRIPT)


def noise(model: ModelConfig, seed: int = 5) -> torch.Tensor:
    shape = (SCRIPT.clips, 1, model.latent_channels, *model.latent_grid)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def straight(model: ModelConfig, v: float = 1.0) -> Network:
    """A teacher that always says the same."""
    network = random_network(model).eval()
    nn.init.zeros_(network.dit.head.head.weight)
    nn.init.constant_(network.dit.head.head.bias, v)
    return network


@torch.no_grad()
def said(streams: rollout.Streams, x: torch.Tensor, units: int) -> list[torch.Tensor]:
    """What each unit's velocity is at one level, x being every unit's past."""
    found = []
    for unit in range(units):
        found.append(streams.velocity(x, 0.7, unit))
        streams.commit(x, unit)
    return found


def test_a_led_teacher_is_guided_while_its_caption_is_new_and_led_away_from_the_weaker_one_later(
    model: ModelConfig,
) -> None:
    strong, weak, asked, x = random_network(model).eval(), random_network(model, seed=9).eval(), prompts(), noise(model)
    led = said(rollout.Led(strong, weak, model, asked, guidance=3.0, later=1.0, autoguidance=1.5), x, UNITS)
    plain, guided, weaker = (
        said(rollout.Player(network, model, asked, guidance=scale), x, UNITS)
        for network, scale in ((strong, 1.0), (strong, 3.0), (weak, 1.0))
    )
    switched = asked.caption[:, -1] == 1
    assert 0 < switched.sum() < len(switched)
    for unit in range(UNITS):
        began = torch.where(asked.caption[:, unit] == 1, asked.caption.shape[1] - asked.caption.sum(1), 0)
        fresh = (unit - began < 4)[:, None, None, None, None]
        away = plain[unit] + 0.5 * (plain[unit] - weaker[unit])
        torch.testing.assert_close(led[unit], torch.where(fresh, guided[unit], away), atol=1e-5, rtol=1e-4)


def test_autoguidance_takes_off_an_error_that_both_make(model: ModelConfig) -> None:
    """The weaker one is three times as far from 1: a = 3 / 2 leads right there."""
    strong, weak = straight(model, 1.1), straight(model, 1.3)
    asked = prompts()
    old = replace(asked, caption=torch.zeros_like(asked.caption))
    led = rollout.Led(strong, weak, model, old, guidance=1.0, later=1.0, autoguidance=1.5)
    for v in said(led, noise(model), 6)[4:]:
        torch.testing.assert_close(v, torch.ones_like(v), atol=1e-5, rtol=0)


def test_it_is_led_where_there_is_noise_enough(model: ModelConfig) -> None:
    strong, weak, x = random_network(model).eval(), random_network(model, seed=9).eval(), noise(model)
    asked = replace(prompts(), caption=torch.zeros_like(prompts().caption))
    scales = {"guidance": 2.0, "later": 1.0, "autoguidance": 2.0}
    everywhere = said(rollout.Led(strong, weak, model, asked, **scales), x, UNITS)
    above, below = (said(rollout.Led(strong, weak, model, asked, **scales, above=s), x, UNITS) for s in (0.69, 0.7))
    plain = said(rollout.Player(strong, model, asked), x, UNITS)
    for unit in range(UNITS):
        assert torch.equal(above[unit], everywhere[unit])
        assert torch.allclose(below[unit], everywhere[unit] if unit < 4 else plain[unit], atol=1e-6)
    assert not torch.allclose(everywhere[-1], plain[-1], atol=1e-3)


def test_a_teacher_that_is_not_led_asks_nobody_else(model: ModelConfig) -> None:
    strong, asked, x = random_network(model).eval(), prompts(), noise(model)
    led = rollout.Led(strong, strong, model, asked, guidance=1.0, later=1.0, autoguidance=1.0)
    for other in led.others:
        other.velocity = None  # type: ignore[assignment, method-assign]
    for found, expected in zip(said(led, x, 3), said(rollout.Player(strong, model, asked), x, 3), strict=True):
        assert torch.equal(found, expected)


def test_trajectories_go_on_from_what_the_teacher_played(model: ModelConfig) -> None:
    """They end where its own rollout of the same noise does, and pass through the levels at which a step begins."""
    strong, weak, asked = random_network(model).eval(), random_network(model, seed=9).eval(), prompts()
    pairs = CONFIG.pairs_of(strong, weak, model, _batch(model, asked), torch.Generator().manual_seed(1))
    player = CONFIG.led(strong, weak, model, asked)
    with torch.no_grad():
        played = rollout.play(player, UNITS, rollout.euler(model, 4), torch.Generator().manual_seed(1))
    assert torch.equal(pairs.end, played)
    assert torch.equal(pairs.clean, played)
    assert CONFIG.trajectories(model).levels == (1.0, 0.75, 0.5, 0.25)
    assert pairs.states.shape == (SCRIPT.clips, 4, *played.shape[1:])
    assert not torch.equal(pairs.states[:, 0, 0], pairs.states[:, 0, 1])


def test_the_loss_is_zero_where_every_step_is_the_teachers(model: ModelConfig) -> None:
    teacher, micro = straight(model), loop.micro_batch(0, 0, 0)
    assert made(CONFIG, model, teacher, clone(teacher, model)).loss(micro)[0] < 1e-10
    assert made(CONFIG, model, teacher, random_network(model)).loss(micro)[0] > 0.1


def test_openings_are_the_first_units_of_clips(model: ModelConfig) -> None:
    """And a student says of one alone what it says of it in its clip."""
    teacher, student, batch = random_network(model).eval(), random_network(model, seed=9), _batch(model, prompts())
    pairs = CONFIG.pairs_of(teacher, teacher, model, batch, torch.Generator().manual_seed(1))
    openings = CONFIG.openings_of(teacher, teacher, model, batch, torch.Generator().manual_seed(1))
    torch.testing.assert_close(openings.states, pairs.states[:, :, :1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(openings.end, pairs.end[:, :1], atol=1e-5, rtol=1e-4)
    assert (CONFIG.first_trajectories(model).pairs, CONFIG.first_trajectories(model).piece) == (48, 48)
    stage = phases.Stage(CONFIG, model, pairs, openings, student)
    start, end = stage._steps(UNITS, len(pairs.end), torch.Generator().manual_seed(4))
    whole = stage._error(student.teacher_forced, pairs, start, end)
    alone = stage._error(student.bidirectional, openings, start[:, :1], end[:, :1])
    torch.testing.assert_close(alone, whole[:, :1], atol=1e-4, rtol=1e-3)


def test_the_last_step_and_the_first_unit_weigh_as_their_settings_say(model: ModelConfig) -> None:
    teacher, far = straight(model), straight(model, 3.0)  # off by 2 everywhere

    def weighed(**settings: float) -> torch.Tensor:
        stage = made(replace(CONFIG, **settings), model, teacher, far)
        start, end = stage._steps(UNITS, CONFIG.pairs, torch.Generator().manual_seed(4))
        error = stage._error(far.teacher_forced, stage.pairs[torch.arange(CONFIG.pairs)], start, end)
        last = end == len(stage.levels)
        assert 0 < last.sum() < last.numel()
        torch.testing.assert_close(error[~last], torch.full_like(error[~last], 4.0))
        return error[last]

    torch.testing.assert_close(weighed(last_weight=3.0), 3 * weighed(last_weight=1.0))
    even = {"last_weight": 1.0, "early_weight": 1.0}
    for starts in (0, 5):
        stage = made(replace(CONFIG, first_weight=4.0, starts=starts, **even), model, teacher, far)
        loss, report = stage.loss(loop.micro_batch(0, 0, 0))
        torch.testing.assert_close(loss, torch.tensor(4.0))  # weights are of mean 1, and all errors alike
        torch.testing.assert_close(report["first"], torch.tensor(4.0))


def test_every_unit_takes_steps_of_its_own_list(model: ModelConfig) -> None:
    stage = phases.Stage(CONFIG, model, None, None, random_network(model))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    drawn = [stage._steps(UNITS, CONFIG.batch, generator) for _ in range(50)]
    start, end = (torch.cat(rows) for rows in zip(*drawn, strict=True))
    first = {(a, b) for a, b in zip(start[:, 0].tolist(), end[:, 0].tolist(), strict=True)}
    later = {(a, b) for a, b in zip(start[:, 1:].flatten().tolist(), end[:, 1:].flatten().tolist(), strict=True)}
    assert first == {(0, 1), (1, 2), (2, 3), (3, 4)}
    assert later == {(0, 2), (2, 4)}


def test_the_student_learns_its_steps(model: ModelConfig, tmp_path: Path) -> None:
    """From files, as a run does."""
    teacher, config = random_network(model).eval(), replace(CONFIG, steps=40, lr=2e-3)
    found: list[ode.Trajectories] = []
    for name, kept, make, read in (
        ("pairs", config.trajectories(model), config.pairs_of, ode.read),
        ("openings", config.first_trajectories(model), config.openings_of, ode.Stored),
    ):
        ode.write(tmp_path / name, kept, _Clips(model), partial(make, teacher, teacher, model), seed=1)
        found.append(read(tmp_path / name, kept))
    stage = phases.Stage(config, model, *found, random_network(model, seed=5))
    optimisers = stage.optimisers()
    losses = [loop.take(stage, optimisers, index, seed=0)["loss"] for index in range(config.steps)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_a_student_that_follows_the_flow_plays_as_a_teacher_of_as_many_steps(model: ModelConfig) -> None:
    network, asked = random_network(model).eval(), prompts()
    even = replace(model, first_steps=None, steps=(1.0, 0.75, 0.5, 0.25))
    with torch.no_grad():
        student, teacher = (
            rollout.play(rollout.Player(network, even, asked), 3, denoise, torch.Generator().manual_seed(2))
            for denoise in (rollout.few_step(even, torch.Generator()), rollout.euler(even, 4))
        )
    torch.testing.assert_close(student, teacher, atol=1e-6, rtol=1e-5)


def test_its_consistency_ends_at_its_own_next_level(model: ModelConfig) -> None:
    found = cd._landings(model, 4, torch.device("cpu"))
    s = torch.tensor((*flow.sigmas((0.75, 0.5, 0.25), model.shift), 0.0))
    torch.testing.assert_close(found[0], s)
    torch.testing.assert_close(found[1], torch.stack([s[1], s[1], s[3], s[3]]))
    jumps = cd._landings(replace(model, solver="renoise"), 4, torch.device("cpu"))
    assert not jumps.any()


def test_dmd_reaches_every_pass_of_it(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its estimate before the last pass is no clip: it takes no random exits, and each pass carries the gradient."""
    config = dmd.Config(batch=6, critic_warmup=0)
    stage = dmd.Stage(config, model, _Clips(model).prompts, random_network(model), random_network(model, seed=9))
    passes: list[bool] = []
    said = rollout.Player.velocity

    def counted(player: rollout.Player, x: torch.Tensor, s: float, unit: int) -> torch.Tensor:
        passes.append(torch.is_grad_enabled())
        return said(player, x, s, unit)

    monkeypatch.setattr(rollout.Player, "velocity", counted)
    batch, _ = stage.roll(loop.micro_batch(0, 0, 0))
    assert passes == [True] * (4 + 2 * (UNITS - 1))
    assert batch.latents.requires_grad


class _Clips:
    """Clips of noise under the world's captions."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = model

    def __len__(self) -> int:
        return SCRIPT.clips

    def batch(self, index: int, size: int) -> Batch:
        return _batch(self.model, data.prompts(size, torch.Generator().manual_seed(index), SCRIPT))

    def prompts(self, size: int, generator: torch.Generator) -> Prompts:
        return data.prompts(size, generator, SCRIPT)


def made(config: phases.Config, model: ModelConfig, teacher: Network, student: Network) -> phases.Stage:
    """The stage on what a teacher plays that leads itself."""
    makers = (config.pairs_of, config.openings_of)
    batch = _batch(model, prompts())
    pairs, openings = (make(teacher, teacher, model, batch, torch.Generator().manual_seed(1)) for make in makers)
    return phases.Stage(config, model, pairs, openings, student)


def _batch(model: ModelConfig, asked: Prompts) -> Batch:
    return Batch.of(torch.zeros(len(asked), UNITS, model.latent_channels, *model.latent_grid), asked)
