"""Weights that are trained rounded: E4M3 and int8 hold them under powers of two, and an export changes none."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_fixture import network as random_network

from cfrt import flow, students
from cfrt.weights import load_model
from export import quantize
from training import data, loop, ode, phases, recipes, rounded
from training.network import Network

pytestmark = pytest.mark.cpu

UNITS = 5
CONFIG = phases.Config(pairs=6, openings=6, euler_steps=4, batch=6, starts=4)
TINY = replace(recipes.tiny().model, width=64, depth=2, heads=1, ffn=64, latent_grid=(2, 2))
MODEL = replace(TINY, solver="euler", steps=(1.0, 0.5), first_steps=(1.0, 0.75, 0.5, 0.25))


def straight(units: int) -> ode.Pairs:
    """Trajectories along which the velocity is 1."""
    plan = data.script(CONFIG.pairs, data.Config(units=10), torch.Generator().manual_seed(3))
    shape = (CONFIG.pairs, units, MODEL.latent_channels, *MODEL.latent_grid)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    sigmas = flow.sigmas(CONFIG.trajectories(MODEL).levels, MODEL.shift)
    return ode.Pairs(
        states=torch.stack([noise + s - 1 for s in sigmas], 1),
        end=noise - 1,
        clean=noise - 1,
        captions=plan.captions,
        caption=plan.caption(10)[:, :units],
    )


def stage(start: Network, **settings: float) -> rounded.Stage:
    config = replace(rounded.Config(steps=30, starts=4), **settings)
    return rounded.Stage(config, CONFIG, MODEL, straight(UNITS), straight(1), start)


@given(exponent=st.integers(-40, 40), seed=st.integers(0, 2**16))
def test_four_bits_are_e4m3_scaled_by_a_power_of_two(exponent: int, seed: int) -> None:
    x = torch.randn(512, generator=torch.Generator().manual_seed(seed)).clamp(min=2.0**-6)  # its normal numbers
    narrow = x.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(rounded.four_bits(x * 2.0**exponent).numpy(), narrow * 2.0**exponent)


def test_ties_go_to_the_even_and_what_fits_stays() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, 15.0, 17.0, 19.0, -17.0, 31.9])
    assert rounded.four_bits(x).tolist() == [0.0, -0.0, 1.0, 15.0, 16.0, 20.0, -16.0, 32.0]
    assert torch.equal(rounded.four_bits(rounded.four_bits(x)), rounded.four_bits(x))


@given(seed=st.integers(0, 2**16), spread=st.floats(0, 3))
def test_an_output_s_weights_are_whole_steps_of_four_significant_bits(seed: int, spread: float) -> None:
    """The largest is of 64 to 120 steps; nothing moves by more than a sixteenth of itself or half a step; what was
    rounded stays."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 40, generator=generator) * torch.exp(spread * torch.randn(6, 1, generator=generator))
    weight[:, ::7] *= 0.01
    found = rounded.narrowed(weight)
    top = found.abs().amax(1, keepdim=True)
    step = torch.exp2(torch.floor(torch.log2(top)) - 6)
    steps = found / step
    assert torch.equal(steps, steps.round())
    assert (top / step >= 64).all()
    assert (top / step <= 120).all()
    assert torch.equal(rounded.four_bits(found), found)
    assert ((found - weight).abs() <= torch.maximum(weight.abs() / 16, step / 2)).all()
    assert torch.equal(rounded.narrowed(found), found)


def test_the_student_that_ships_is_held_by_both_formats() -> None:
    _, weights = load_model(students.find("tiny"))
    held = {name: torch.from_numpy(array) for name, array in weights.items()}
    changed = [name for name, value in rounded.shipped(held).items() if not torch.equal(value, held[name])]
    assert changed == []


def test_weights_of_zero_stay() -> None:
    assert not rounded.narrowed(torch.zeros(2, 3)).any()


def test_they_are_the_products_that_an_export_makes_of_8_bits() -> None:
    """fp8 leaves one of them in bf16, which holds four significant bits as well."""
    assert tuple(layer for row in quantize.table("int8") for layer in row.layers) == rounded.LAYERS
    assert {layer for row in quantize.table("fp8") for layer in row.layers} < {*rounded.LAYERS}


@pytest.mark.parametrize("precision", sorted(quantize.FORMATS))
@pytest.mark.parametrize("balanced", [False, True])
def test_an_export_changes_no_such_weight(balanced: bool, precision: str) -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((24, 16)).astype(np.float32) * 10.0 ** generator.uniform(-2, 1, 16)
    weight = weight.astype(np.float32)
    high = 10.0 ** generator.uniform(-2, 2, 24)
    inputs = quantize.Inputs(low=-high, high=high, mean=high)
    for kept, fine in ((weight, True), (rounded.narrowed(torch.from_numpy(weight.T)).T.numpy(), False)):
        product = quantize.quantise(kept, inputs, precision, balanced=balanced)
        factors = np.ones(24) if product.inverse_factors is None else product.inverse_factors
        moved = np.abs(product.dequantised() * factors[:, None] - kept).max() > 0
        assert moved == fine
        assert (np.abs(product.shift).max() > 0) == fine


def test_what_is_trained_is_rounded_and_the_gradient_goes_through() -> None:
    start, plain = random_network(MODEL), random_network(MODEL)
    plain.load_state_dict(rounded.shipped(plain.state_dict()))
    made = stage(start)
    other = phases.Stage(made.config, MODEL, made.pairs, made.openings, plain)
    losses = [found.loss(loop.micro_batch(0, 0, 0))[0] for found in (made, other)]
    torch.testing.assert_close(*losses, atol=0, rtol=1e-6)
    for loss in losses:
        loss.backward()
    for (name, own), expected in zip(start.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad, msg=name)


def test_it_learns_and_ships_what_it_has_trained() -> None:
    made = stage(random_network(MODEL), lr=8e-3)
    optimisers = made.optimisers()
    losses = [loop.take(made, optimisers, index, seed=0)["loss"] for index in range(made.steps)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    weights = made.student.state_dict()
    shipped = rounded.shipped(weights)
    changed = {name for name, value in shipped.items() if not torch.equal(value, weights[name])}
    assert changed == {f"dit.blocks.{block}.{layer}.weight" for block in range(MODEL.depth) for layer in rounded.LAYERS}
    plain = Network(MODEL)
    plain.load_state_dict(shipped)
    start, end = made._steps(UNITS, CONFIG.pairs, torch.Generator().manual_seed(4))
    with torch.no_grad():
        found, expected = (
            made._error(network.teacher_forced, made.pairs[torch.arange(CONFIG.pairs)], start, end)
            for network in (plain, made.student)
        )
    torch.testing.assert_close(found, expected)


def test_its_settings_are_those_of_the_phases_but_for_its_own() -> None:
    made = stage(random_network(MODEL), lr=1e-4, ema=0.9, starts=9)
    assert made.config == replace(CONFIG, steps=30, lr=1e-4, ema=0.9, starts=9)
    assert (made.name, made.steps, made.batch) == ("rounded", 30, CONFIG.batch)
