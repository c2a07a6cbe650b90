"""Continuous-time causal consistency: the derivative through the mask is exact, and training makes jumps consistent.

Runs on the CPU in seconds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cfrt import flow
from training import ccm, data, loop, recipes
from training.data import Batch, Prompts
from training.network import Network, broadcast

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),  # torch's own forward mode imports it
]

TINY = recipes.tiny().model
MODEL = replace(TINY, width=64, depth=2, heads=1, ffn=64, latent_grid=(2, 2), trained_frames=6)
SCRIPT = data.Config(clips=8, units=6)


class _Clips:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        latents = torch.randn(8, 6, 16, 2, 2, generator=generator)
        self.all = Batch.of(latents, self.prompts(8, generator))

    def __len__(self) -> int:
        return 8

    def batch(self, index: int, size: int) -> Batch:
        return self.all

    def prompts(self, size: int, generator: torch.Generator) -> Prompts:
        return data.prompts(size, generator, SCRIPT)


def _network(std: float = 0.05) -> Network:
    torch.manual_seed(0)
    network = Network(MODEL)
    for silent in (network.dit.head.head, *(block.cross_attn.o for block in network.dit.layers)):
        nn.init.normal_(silent.weight, std=std)
    return network


def test_the_derivative_is_that_of_a_small_step() -> None:
    """Against central differences in fp64, under the mask, with every unit at its own level."""
    network, batch = _network().double(), _Clips().all
    batch = replace(batch, latents=batch.latents.double())
    x, direction = torch.randn(2, *batch.latents.shape, dtype=torch.float64)
    s, h = torch.rand(8, 6, dtype=torch.float64), 1e-6
    v, slope = ccm.along(network, x, s, batch, direction)

    def at(step: float) -> Tensor:
        return network.teacher_forced(x + step * direction, s + step, batch)

    with torch.no_grad():
        torch.testing.assert_close(v, at(0.0))
        torch.testing.assert_close(slope, (at(h) - at(-h)) / (2 * h), atol=1e-5, rtol=1e-5)


def test_in_time_it_may_be_a_difference() -> None:
    """Exact in x, and from one level to the next in s; near s = 0 down to that."""
    network, batch = _network().double(), _Clips().all
    batch = replace(batch, latents=batch.latents.double())
    x, direction = torch.randn(2, *batch.latents.shape, dtype=torch.float64)
    s, h, apart = torch.rand(8, 6, dtype=torch.float64), 1e-6, 0.1
    s[:4, 2] = 0.03
    v, slope = ccm.along(network, x, s, batch, direction, apart)
    with torch.no_grad():
        ahead, behind = (network.teacher_forced(x + step * direction, s, batch) for step in (h, -h))
        lower = network.teacher_forced(x, (s - apart).clamp(min=0), batch)
    in_time = (v - lower) / broadcast(s.clamp(max=apart))
    torch.testing.assert_close(slope, (ahead - behind) / (2 * h) + in_time, atol=1e-5, rtol=1e-5)


def test_training_makes_jumps_consistent() -> None:
    """The jump of the student changes less along its teacher's ODE after training than before."""
    clips = _Clips()
    stage = ccm.Stage(ccm.Config(steps=100, guidance=1.0, lr=1e-3), MODEL, clips, _network(0.3))
    x = torch.randn_like(clips.all.latents)
    s = torch.full((8, 6), 0.8)

    def drift() -> float:
        with torch.no_grad():
            v_teacher = stage.teacher.teacher_forced(x, s, clips.all)
            nearer = flow.euler(x, v_teacher, broadcast(s), broadcast(s - 0.3))
            jumps = [
                flow.x0_from_v(y, stage.student.teacher_forced(y, r, clips.all), broadcast(r))
                for y, r in ((x, s), (nearer, s - 0.3))
            ]
        return (jumps[0] - jumps[1]).square().mean().item()

    before = drift()
    optimisers = stage.optimisers()
    for index in range(100):
        loop.take(stage, optimisers, index, seed=0)
    assert drift() < 0.7 * before
