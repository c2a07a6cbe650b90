"""What time means: golden schedules, round trips, and a field with a known integral."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfrt import flow
from cfrt.errors import ConfigError

pytestmark = pytest.mark.cpu

FOUR_STEPS = (1.0, 0.75, 0.5, 0.25)
unit_interval = st.floats(0, 1)
shifts = st.floats(0.1, 20)


def test_warped_steps():
    """The published 4-step list at shift 5, and what a wrong shift of 8 would give."""
    assert np.multiply(1000, flow.sigmas(FOUR_STEPS, 5)) == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-4)
    assert np.multiply(1000, flow.sigmas(FOUR_STEPS, 8)) == pytest.approx([1000, 960, 888.8889, 727.2727], abs=1e-4)


def test_48_grid():
    """The grid of causal consistency distillation; every twelfth entry is the 4-step list."""
    grid = np.multiply(1000, flow.euler_grid(48, 5))
    head = [1000, 995.76, 991.38, 986.84, 982.14, 977.27, 972.22, 966.98, 961.54, 955.88, 950, 943.88, 937.5]
    assert grid[:13] == pytest.approx(head, abs=0.005)
    assert grid[-5:] == pytest.approx([312.5, 250, 178.57, 96.15, 0], abs=0.005)
    assert grid[:48:12] == pytest.approx(np.multiply(1000, flow.sigmas(FOUR_STEPS, 5)))


@given(unit_interval, shifts)
def test_unwarp_undoes_warp(u, shift):
    assert flow.unwarp(flow.warp(u, shift), shift) == pytest.approx(u, abs=1e-9)


@given(shifts)
def test_warp_keeps_the_ends_and_the_order(shift):
    grid = flow.euler_grid(20, shift)
    assert (grid[0], grid[-1]) == (1, 0)
    assert all(a > b for a, b in itertools.pairwise(grid))


def test_a_grid_has_steps():
    with pytest.raises(ConfigError, match="at least one step"):
        flow.euler_grid(0, 5)


@pytest.mark.parametrize("array", [float, np.asarray, torch.tensor], ids=["float", "numpy", "torch"])
@pytest.mark.parametrize("s", [1.0, 0.625, 0.01])
def test_conversions_round_trip(array, s):
    """x0, e, v and x_s determine each other, whatever holds the numbers."""
    x0, eps = array(0.75), array(-1.25)
    x, v = flow.add_noise(x0, eps, s), flow.velocity(x0, eps)
    assert float(flow.x0_from_v(x, v, s)) == pytest.approx(0.75, abs=1e-6)
    assert float(flow.eps_from_v(x, v, s)) == pytest.approx(-1.25, abs=1e-6)
    assert float(flow.v_from_x0(x, x0, s)) == pytest.approx(-2.0, rel=1e-5)
    assert type(flow.add_noise(x0, eps, s)) is type(x0 + x0)


def test_euler_integrates_a_straight_path_exactly():
    """v of one data point does not depend on s, so any grid ends in x0."""
    x0, eps = 3.0, -1.0
    x, grid = eps, flow.euler_grid(7, 5)
    for s, s_next in itertools.pairwise(grid):
        x = flow.euler(x, flow.velocity(x0, eps), s, s_next)
    assert x == pytest.approx(x0)


def test_few_steps_of_a_perfect_network_land_on_the_data():
    rng = np.random.default_rng(0)
    x0, x = rng.normal(size=5), rng.normal(size=5)
    for s, s_next in zip(flow.sigmas(FOUR_STEPS, 5), (*flow.sigmas(FOUR_STEPS, 5)[1:], 0.0), strict=True):
        guess = flow.x0_from_v(x, flow.v_from_x0(x, x0, s), s)
        x = flow.renoise(guess, rng.normal(size=5), s_next)
    assert x == pytest.approx(x0)


@pytest.mark.parametrize("solver", ["renoise", "euler"])
def test_a_step_onward(solver):
    """Both solvers go from noise at 1 to a perfect network's x0; what lies between is new noise on x0, or the line from
    the first noise to it."""
    rng = np.random.default_rng(0)
    x0, eps, drawn = rng.normal(size=5), rng.normal(size=5), []
    x, steps = eps, flow.descent(FOUR_STEPS, 5)
    assert [s for s, _ in steps] == [*flow.sigmas(FOUR_STEPS, 5)] == [1.0, *(s_next for _, s_next in steps[:-1])]
    assert steps[-1][1] == 0
    for s, s_next in steps:
        x = flow.onward(solver, x, x0, s, s_next, lambda: drawn.append(rng.normal(size=5)) or drawn[-1])
        new = drawn[-1] if solver == "renoise" else eps
        assert x == pytest.approx((1 - s_next) * x0 + s_next * new)
    assert x is x0
    assert len(drawn) == (3 if solver == "renoise" else 0)


def test_guidance():
    assert flow.guide(2.0, 1.0, 1) == 2
    assert flow.guide(2.0, 1.0, 0) == 1
    assert flow.guide(2.0, 1.0, 4) == 5


@pytest.mark.parametrize(
    ("t", "weight"), [(1000, 0), (937.5, 0.3980), (2500 / 3, 1.0249), (625, 1.9140), (500, 2.0764)]
)
def test_loss_weight(t, weight):
    assert flow.loss_weight(t / 1000, shift=5) == pytest.approx(weight, abs=1e-4)
    assert float(flow.loss_weight(torch.tensor(t / 1000), shift=5)) == pytest.approx(weight, abs=1e-4)


def test_loss_weight_has_mean_one_over_the_table():
    table = np.array([flow.warp(1 - j / 1000, 3) for j in range(1000)])
    assert flow.loss_weight(table, shift=3).mean() == pytest.approx(1)


def test_time_embedding():
    """Wan's, at t = 833.33: cosines first, then sines, 256 wide."""
    embedding = flow.time_embedding(833.3333333, 256)
    golden = {0: -0.688571, 1: -0.879167, 127: 0.995993, 128: -0.725169, 129: 0.476513, 255: 0.089431}
    assert embedding.dtype == np.float64
    assert [embedding[i] for i in golden] == pytest.approx(list(golden.values()), abs=1e-6)
    assert flow.time_embedding(np.zeros((2, 3)), 8).shape == (2, 3, 8)
