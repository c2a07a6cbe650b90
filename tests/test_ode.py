"""Pairs, their regression, and the rollout of DMD with gradients into its past.

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
from training import data, dmd, loop, ode, recipes, rollout
from training.data import Batch

pytestmark = pytest.mark.cpu

SCRIPT = data.Config(clips=6, units=6, unit=3, switched=1.0)


@pytest.fixture(scope="module", params=[1, 3], ids=["F=1", "F=3"])
def model(request: pytest.FixtureRequest) -> ModelConfig:
    tiny = recipes.tiny().model
    return replace(
        tiny, width=64, depth=2, heads=1, ffn=64, latent_grid=(2, 2), unit=request.param, window=6, trained_frames=6
    )


class _Clips:
    """Six clips of noise under the world's captions."""

    def __init__(self, model: ModelConfig) -> None:
        generator = torch.Generator().manual_seed(3)
        latents = torch.randn(len(self), SCRIPT.units, model.latent_channels, *model.latent_grid, generator=generator)
        self.all = Batch.of(latents, self.prompts(len(self), generator))

    def __len__(self) -> int:
        return SCRIPT.clips

    def batch(self, index: int, size: int) -> Batch:
        rows = torch.arange(index * size, (index + 1) * size) % len(self)
        names = ("latents", "captions", "caption")
        return replace(self.all, **{name: getattr(self.all, name)[rows] for name in names})

    def prompts(self, size: int, generator: torch.Generator) -> data.Prompts:
        return data.prompts(size, generator, SCRIPT)


def test_cached_pairs_equal_masked_ones(model: ModelConfig) -> None:
    """The ring and the teacher-forcing mask give the same trajectories, prompts that switch included."""
    config = ode.Config(euler_steps=4, levels=(1.0, 0.5), guidance=2.0)
    network, batch = random_network(model).eval(), _Clips(model).all
    assert (batch.caption[:, 0] != batch.caption[:, -1]).any()
    cached = ode.causal_pairs(network, model, config, batch, torch.Generator().manual_seed(1))
    masked = ode.forced_pairs(network, model, config, batch, torch.Generator().manual_seed(1))
    torch.testing.assert_close(cached.states, masked.states, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(cached.end, masked.end, atol=2e-5, rtol=1e-4)
    assert not torch.equal(cached.end, cached.states[:, 1])


def test_states_lie_on_the_grid_at_their_levels(model: ModelConfig) -> None:
    """A teacher that always says v = 1 moves every state by exactly the distance in s."""
    config = ode.Config(euler_steps=8, levels=(1.0, 0.75, 0.5, 0.25))
    network = random_network(model)
    nn.init.zeros_(network.dit.head.head.weight)
    nn.init.ones_(network.dit.head.head.bias)
    pairs = ode.bidirectional_pairs(network, model, config, _Clips(model).all, torch.Generator().manual_seed(1))
    moved = (pairs.states - pairs.end[:, None]).mean((0, 2, 3, 4, 5))
    expected = torch.tensor(flow.sigmas(config.levels, model.shift))
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)


def test_a_level_off_the_grid_is_refused(model: ModelConfig) -> None:
    with pytest.raises(ode.ConfigError, match=r"got 0\.3"):
        ode.Config(euler_steps=8, levels=(1.0, 0.3))


@pytest.mark.parametrize("past", ["clean", "noisy"])
def test_regression_learns_the_jump(past: str, model: ModelConfig, tmp_path: Path) -> None:
    clips = _Clips(model)
    config = ode.Config(past=past, pairs=6, euler_steps=4, steps=30, batch=6, lr=2e-3)
    make = ode.causal_pairs if past == "clean" else ode.bidirectional_pairs
    teacher = random_network(model).eval()
    ode.write(tmp_path, config, clips, partial(make, teacher, model, config), seed=1)
    stage = ode.Stage(config, model, ode.read(tmp_path, config), random_network(model, seed=5))
    optimisers = stage.optimisers()
    losses = [loop.take(stage, optimisers, index, seed=0)["loss"] for index in range(config.steps)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_pairs_go_on_where_they_were_stopped(model: ModelConfig, tmp_path: Path) -> None:
    config = ode.Config(pairs=70, euler_steps=4)
    make = partial(ode.bidirectional_pairs, random_network(model).eval(), model, config)
    ode.write(tmp_path / "whole", config, _Clips(model), make, seed=1)
    (tmp_path / "broken").mkdir()
    first, last = sorted((tmp_path / "whole").iterdir())
    (tmp_path / "broken" / first.name).write_bytes(first.read_bytes())
    ode.write(tmp_path / "broken", config, _Clips(model), make, seed=1)
    assert (tmp_path / "broken" / last.name).read_bytes() == last.read_bytes()
    assert len(ode.read(tmp_path / "broken", config)) == 70


def test_the_past_of_a_noisy_prefix_is_noisy(model: ModelConfig) -> None:
    """Its jump ignores the clean clip, and does not look ahead; the causal one reads the clean past."""
    network, batch = random_network(model), _Clips(model).all
    other = replace(batch, latents=torch.randn_like(batch.latents))
    x, s = torch.randn_like(batch.latents), torch.full(batch.caption.shape, 0.8)
    stages = {past: ode.Stage(ode.Config(past=past), model, None, network) for past in ("clean", "noisy")}  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(stages["noisy"].jump(x, s, batch), stages["noisy"].jump(x, s, other))
        assert not torch.allclose(stages["clean"].jump(x, s, batch), stages["clean"].jump(x, s, other))
        later = torch.cat([x[:, :3], torch.randn_like(x[:, 3:])], 1)
        torch.testing.assert_close(
            stages["noisy"].jump(x, s, batch)[:, :3], stages["noisy"].jump(later, s, batch)[:, :3]
        )


def test_gradients_into_the_past_change_the_gradient_and_not_the_clips(model: ModelConfig) -> None:
    """Both ways of rolling out make the same clips; only `context_gradient` hears units through their successors."""
    clips, gradients = [], []
    for through in (False, True):
        network = random_network(model)
        config = dmd.Config(batch=2, context_gradient=through)
        stage = dmd.Stage(config, model, _Clips(model).prompts, network, random_network(model, 1))
        batch, _ = stage.roll(loop.micro_batch(4, 0, 0))
        batch.latents[:, -model.unit :].square().sum().backward()
        clips.append(batch.latents.detach())
        gradients.append(network.dit.blocks[0].self_attn.k.weight.grad)  # type: ignore[union-attr]
    torch.testing.assert_close(clips[0], clips[1], atol=2e-5, rtol=1e-4)
    assert (gradients[0] - gradients[1]).norm() > 0.01 * gradients[0].norm()


def test_a_rollout_longer_than_the_window_has_gradients(model: ModelConfig) -> None:
    """The published trainer can't: its cache is written in place under autograd."""
    short = replace(model, window=3)
    stage = dmd.Stage(
        dmd.Config(batch=2), short, _Clips(model).prompts, random_network(short), random_network(short, 1)
    )
    batch, _ = stage.roll(loop.micro_batch(4, 0, 0))
    batch.latents.square().sum().backward()
    assert all(p.grad is not None for p in stage.student.dit.blocks.parameters())
    assert rollout.levels(short, 0) == flow.sigmas(short.unit_steps(0), short.shift)


def test_a_rollout_longer_than_a_clip_is_judged_at_its_end(model: ModelConfig) -> None:
    """Of 12 frames the last 6 are scored; the first unit of those is given, and earlier ones carry no gradient."""
    network, restarted = random_network(model), []

    def restart(latents: torch.Tensor) -> torch.Tensor:
        restarted.append(latents.shape[1])
        return torch.zeros_like(latents[:, :1])

    config = dmd.Config(batch=2, lengths=(12,), tau=(0.4, 0.5))
    stage = dmd.Stage(config, model, _Clips(model).prompts, network, random_network(model, 1), restart=restart)
    batch, judged = stage.roll(loop.micro_batch(4, 0, 0))
    assert batch.latents.shape[1] == batch.caption.shape[1] == 6
    assert (restarted, judged) == ([7], model.unit)
    assert (batch.latents[:, 0] == 0).all()
    stats = loop.take(stage, stage.optimisers(), 0, seed=0)
    assert stats["norm"] > 0
    with pytest.raises(ode.ConfigError, match="restart"):
        dmd.Stage(config, model, _Clips(model).prompts, network, random_network(model, 1)).roll(
            loop.micro_batch(4, 0, 0)
        )
