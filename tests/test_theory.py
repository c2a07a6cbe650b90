"""The theory of causal distillation on Gaussian videos, where it is exact: goldens, simulation, and our own losses.

Each test names the equation it holds; docs/theory.md points here. A = arXiv:2602.02214 (Causal Forcing),
B = arXiv:2605.15141 (Causal Forcing++). Where a stage is tested, the networks are the exact ones, so what it computes
has a known value."""

from __future__ import annotations

import ast
import importlib
import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cfrt import flow
from cfrt.errors import ConfigError
from training import bidirectional, ccm, cd, dmd, gaussian, ode, proof, teacher
from training.data import Batch
from training.gaussian import Gaussian, Teacher
from training.loop import Micro
from training.network import Network
from training.proof import MODEL, Exact, World

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
S = gaussian.covariance(0.9, 4)
LOOSE = torch.tensor([[2.0, 0.3, -0.4], [0.3, 1.0, 0.5], [-0.4, 0.5, 0.7]], dtype=torch.float64)  # of no special form


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clips(covariance: Tensor, count: int, seed: int = 0) -> Tensor:
    """[count, n] of N(0, S)."""
    z = torch.randn(count, len(covariance), generator=generator(seed), dtype=torch.float64)
    return z @ torch.linalg.cholesky(covariance).T


def noise(count: int, frames: int, seed: int = 1) -> Tensor:
    return torch.randn(count, frames, generator=generator(seed), dtype=torch.float64)


def least_squares(goal: Tensor, seen: Tensor) -> Tensor:
    """[k, m] with the least |goal - seen @ weights|, of samples goal [N, m] and seen [N, k]."""
    return torch.linalg.lstsq(seen.T @ seen, seen.T @ goal, driver="gelsd").solution


def unexplained(goal: Tensor, seen: Tensor) -> float:
    """Mean squared residual of that prediction, goal [N]."""
    return (goal - (seen @ least_squares(goal[:, None], seen))[:, 0]).square().mean().item()


# ---------------------------------------------------------------------- rectified flow and its ODE (A, section 2)


def test_velocity_is_what_regression_on_noise_minus_data_finds() -> None:
    """v*(x, s) = E[e - x0 | x_s]: least squares on samples gives the closed form, for clips and for a clean past."""
    x0, e, s, eye = clips(LOOSE, 40_000), noise(40_000, 3), 0.6, torch.eye(3, dtype=torch.float64)
    x, v = flow.add_noise(x0, e, s), flow.velocity(x0, e)
    torch.testing.assert_close(Teacher(LOOSE, 3).velocity(eye, s, eye), least_squares(v, x), atol=0.03, rtol=0)

    seen = torch.cat([x0[:, :2], x[:, 2:]], 1)  # what the AR teacher is given for the third frame
    forced = Teacher(LOOSE, 1).velocity(eye, s, eye)[:, 2]  # linear, so the basis vectors say it all
    torch.testing.assert_close(forced, least_squares(v, seen)[:, 2], atol=0.03, rtol=0)


@pytest.mark.parametrize("unit", [1, 2, 4], ids=["AR", "AR by chunks", "bidirectional"])
def test_flow_map_is_where_the_ode_leads(unit: int) -> None:
    """dx/ds = v: many Euler steps of `cfrt.flow` end where the closed form says, twice as near with twice the steps."""
    exact, data, start = Teacher(S, unit), clips(S, 64), noise(64, 4)
    errors = []
    for steps in (200, 400):
        x = start
        for s, s_next in pairwise(flow.euler_grid(steps, 5.0)):
            x = flow.euler(x, exact.velocity(x, s, data), s, s_next)
        errors.append((x - exact.flow_map(start, 1.0, 0.0, data)).abs().max().item())
    assert errors[0] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)


def test_bidirectional_flow_map_is_a_ratio_of_roots() -> None:
    """phi(x, s) = S^(1/2) C_s^(-1/2) x with C_s = (1-s)^2 S + s^2, the two square roots taken apart."""
    s, x = 0.7, noise(5, 3)
    (law, u), (of_x, w) = (torch.linalg.eigh(c) for c in (LOOSE, 0.3**2 * LOOSE + s**2 * torch.eye(3).double()))
    ratio = (u * law.sqrt() @ u.T) @ (w / of_x.sqrt() @ w.T)
    torch.testing.assert_close(Teacher(LOOSE, 3).flow_map(x, s, 0.0, x), x @ ratio.T)


@pytest.mark.parametrize("unit", [1, 3], ids=["AR", "bidirectional"])
def test_flow_maps_carry_noise_to_the_data_s_law(unit: int) -> None:
    """The end points, given clean pasts of the data, have the data's covariance; and two half ways are the whole."""
    exact, data, start = Teacher(LOOSE, unit), clips(LOOSE, 40_000), noise(40_000, 3)
    half = exact.flow_map(start, 1.0, 0.4, data)
    end = exact.flow_map(start, 1.0, 0.0, data)
    torch.testing.assert_close(exact.flow_map(half, 0.4, 0.0, data), end)
    past = data.clone()
    past[:, -1] = end[:, -1]  # the last frame is made on the real past of the others
    torch.testing.assert_close((past if unit == 1 else end).T.cov(), LOOSE, atol=0.06, rtol=0)


def test_a_unit_divides_the_clip() -> None:
    with pytest.raises(ConfigError, match="divides the 4 frames"):
        Teacher(S, 3)


# ---------------------------------------------------------------------- frame-level injectivity (A, section 3.2)


def test_only_the_ar_teacher_is_injective_frame_by_frame() -> None:
    """Def. 3.1 and Lemma 3.2: the end point of a frame depends on the noise of other frames under the bidirectional
    teacher, and on its own alone under the AR teacher of a fixed past."""
    data = clips(S, 1)[0]
    jacobians = [
        torch.autograd.functional.jacobian(lambda x, exact=exact: exact.flow_map(x, 0.9375, 0.0, data), noise(1, 4)[0])
        for exact in (Teacher(S, 4), Teacher(S, 1))
    ]
    others = [jacobian - jacobian.diagonal().diag() for jacobian in jacobians]
    assert others[0].abs().min(1).values.max() == 0  # the diagonal itself
    assert others[0].abs().max(1).values.min() > 0.1
    assert others[1].abs().max() < 1e-12


def test_lost_variance() -> None:
    """Prop. 3.3 at rho = 0.9, s = 0.9375: what a student of bidirectional pairs loses in frames 1 to 4."""
    noisy = gaussian.regress_bidirectional(S, 0.9375, past=0.9375).lost
    clean = gaussian.regress_bidirectional(S, 0.9375, past=0.0).lost
    assert noisy.tolist() == pytest.approx([0.382, 0.285, 0.196, 0.000], abs=5e-4)
    assert clean.tolist() == pytest.approx([0.382, 0.065, 0.049, 0.000], abs=5e-4)
    assert gaussian.regress_causal(S, 0.9375).lost.abs().max() < 1e-24


@pytest.mark.parametrize("unit", [1, 3])
def test_lost_variance_of_any_covariance(unit: int) -> None:
    """The end of the last unit has no future, independent frames have none that matters, a clip that is one unit has
    none at all; and a clean past never hides more than a noisy one... of the frame's own past, not of its future."""
    six = gaussian.covariance(0.7, 6) + 0.2 * torch.eye(6, dtype=torch.float64)
    lost = gaussian.regress_bidirectional(six, 0.8, past=0.8, unit=unit).lost
    assert (lost[:-unit] > 1e-3).all()
    assert lost[-unit:].max() < 1e-20
    assert gaussian.regress_causal(six, 0.8, unit=unit).lost.max() < 1e-20
    assert gaussian.regress_bidirectional(six.diag().diag(), 0.8, past=0.8, unit=unit).lost.max() < 1e-20
    assert gaussian.regress_bidirectional(six, 0.8, past=0.8, unit=6).lost.max() < 1e-20


@pytest.fixture(scope="module")
def trajectories() -> dict[float, Tensor]:
    """States [N, 4] of the bidirectional ODE at s = 0.9375 and 0, by many Euler steps."""
    exact, x, states = Teacher(S, 4), noise(6000, 4), {}
    for s, s_next in pairwise(flow.euler_grid(320, 5.0)):
        states[round(s, 6)] = x
        x = flow.euler(x, exact.velocity(x, s, x), s, s_next)
    return {0.9375: states[0.9375], 0.0: x}


@pytest.mark.parametrize("past", [0.9375, 0.0], ids=["noisy past", "clean past"])
def test_lost_variance_by_simulation(past: float, trajectories: dict[float, Tensor]) -> None:
    """Prop. 3.3 from nothing but the ODE: regress numerical end points on what a student sees."""
    seen, own, end = trajectories[past], trajectories[0.9375], trajectories[0.0]
    lost = [unexplained(end[:, i], torch.cat([seen[:, :i], own[:, i : i + 1]], 1)) for i in range(4)]
    theory = gaussian.regress_bidirectional(S, 0.9375, past).lost
    for i in range(4):  # chance: 2 % of a variance; the solver: 2 % too
        assert lost[i] == pytest.approx(theory[i].item(), rel=0.06, abs=1e-4)


# ---------------------------------------------------------------------- our losses on the exact networks


def world(rho: float = 0.9, seed: int = 3) -> World:
    return World(gaussian.covariance(rho, proof.FRAMES), seed)


def exact(rho: float = 0.9) -> Exact:
    return Exact(MODEL, gaussian.covariance(rho, proof.FRAMES))


def micro(index: int) -> Micro:
    return Micro(index, generator(index), generator(index))


AnyStage = bidirectional.Stage | teacher.Stage | ode.Stage | cd.Stage


def mean_loss(stage: AnyStage, micros: int = 8) -> float:
    with torch.no_grad():
        return sum(stage.loss(micro(i))[0].item() for i in range(micros)) / micros


@pytest.mark.parametrize("forcing", ["bidirectional", "teacher", "diffusion"])
def test_flow_matching_is_least_at_the_exact_velocity(forcing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """E |v - (e - x0)|^2 (A, section 2): at the exact network the stages' loss is Var(e - x0 | seen), q2 / c_s for each
    Gaussian coordinate averaged over the levels, and other networks have more. A noisy past tells less than a clean one
    (Prop. 3.4)."""
    network, common = exact(), {"batch": 2048, "caption_dropout": 0.0}
    even = {"starts": 0, "first_weight": 1.0, "early_weight": 1.0}
    if forcing == "bidirectional":
        stage: AnyStage = bidirectional.Stage(bidirectional.Config(**common), MODEL, world(), network)
    else:
        stage = teacher.Stage(teacher.Config(**common, **even, forcing=forcing), MODEL, world(), network)
    method = {"bidirectional": "bidirectional", "teacher": "teacher_forced", "diffusion": "noisy_prefix"}[forcing]
    best = mean_loss(stage)

    q2 = (network.whole if forcing == "bidirectional" else network.forced).variances
    us = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:, None]
    theory = (q2 / gaussian.variance(q2, flow.warp(us, MODEL.shift))).mean().item()
    if forcing == "diffusion":
        assert best > 1.1 * theory
    else:
        assert best == pytest.approx(theory, rel=0.03)

    ask = getattr(network, method)
    monkeypatch.setattr(network, method, lambda x, s, batch: ask(x, s, batch) + 0.1 * x)
    assert mean_loss(stage) > best + 0.002
    monkeypatch.setattr(network, method, lambda x, s, batch: 0.95 * ask(x, s, batch))
    assert mean_loss(stage) > best + 0.0005


def test_diffusion_forcing_has_a_gap() -> None:
    """Prop. 3.4: E KL(p(x^i | x^<i) || p(x^i | x_s^<i)) is positive for every frame with a past, grows with the noise
    on it, and is 0 for a clean one (teacher forcing). Against its definition, on samples."""
    data, s = clips(S, 40_000), 0.5
    noisy = flow.add_noise(data, noise(40_000, 4), s)
    gap = gaussian.forcing_gap(S, s)
    for i in (1, 3):
        clean_mean, noisy_mean = (past[:, :i] @ least_squares(data[:, [i]], past[:, :i]) for past in (data, noisy))
        p, q = ((data[:, [i]] - mean).square().mean() for mean in (clean_mean, noisy_mean))
        divergence = 0.5 * ((q / p).log() + p / q - 1 + (clean_mean - noisy_mean).square().mean() / q)
        assert divergence.item() == pytest.approx(gap[i].item(), rel=0.03)
    assert gaussian.forcing_gap(S, 0.0).abs().max() < 1e-12
    assert gaussian.forcing_gap(S, 0.3)[0] == 0
    assert (gaussian.forcing_gap(S, 0.3)[1:] > 0.01).all()
    assert (gap[1:] > gaussian.forcing_gap(S, 0.3)[1:]).all()
    assert gaussian.forcing_gap(gaussian.covariance(0.0, 4), s).abs().max() < 1e-12


def test_diffusion_forced_velocity_is_the_teacher_forced_one_where_the_past_is_clean() -> None:
    """Per-frame levels are not the trouble (A, appendix B.2): at level 0 of the past the two agree."""
    data, x = clips(S, 8), noise(8, 4)
    for i in range(4):
        s = torch.zeros(8, 4, dtype=torch.float64)
        s[:, i:] = 0.8
        seen = torch.cat([data[:, :i], x[:, i:]], 1)
        forced = Teacher(S, 1).velocity(x, 0.8, data)[:, i]
        torch.testing.assert_close(gaussian.diffusion_forced_velocity(S, seen, s)[:, i], forced)


# ---------------------------------------------------------------------- ODE regression (A, section 3.3)


class Jumper(Exact):
    """A student whose one jump is linear in what it sees: G(x_s) = x_s - s v, with `weights(s)` -> (past, own)."""

    def __init__(self, weights: Callable[[float], tuple[Tensor, Tensor]]) -> None:
        super().__init__(MODEL, gaussian.covariance(0.9, proof.FRAMES))
        self.weights = weights

    def _jump(self, x: Tensor, s: Tensor, past: Tensor) -> Tensor:
        goal = torch.zeros_like(proof.last(x))
        for level in s.unique().tolist():
            of_past, of_own = self.weights(round(level, 6))
            jump = proof.last(past) @ of_past.T + proof.last(x) @ of_own.T
            goal = torch.where(proof.levels(s) == level, jump, goal)
        positive = proof.levels(s).clamp(min=1e-9)  # at s = 0 the jump is x itself, whatever v
        return proof.from_last(flow.v_from_x0(proof.last(x), goal, positive)).to(x)

    def noisy_prefix(self, x: Tensor, s: Tensor, batch: Batch) -> Tensor:
        return self._jump(x, s, x)

    def teacher_forced(self, x: Tensor, s: Tensor, batch: Batch) -> Tensor:
        return self._jump(x, s, batch.latents)


def ode_loss(init: str, past: str, weights: Callable[[float], tuple[Tensor, Tensor]], level: float) -> float:
    """Loss of `ode.Stage` on exact pairs cut to one level, for a student of these weights."""
    taught = proof.pairs(world(), init, 4096, generator(5))
    index = proof.LEVELS.index(level)
    taught = replace(taught, states=taught.states[:, [index]])
    config = ode.Config(
        past=past, levels=(MODEL.steps[index],), batch=4096, guidance=1.0, first_weight=1.0, early_weight=1.0
    )
    return mean_loss(ode.Stage(config, MODEL, taught, Jumper(weights)), 2)


@pytest.mark.parametrize("level", proof.LEVELS[1:])
@pytest.mark.parametrize("past", ["noisy", "clean"])
def test_regression_on_bidirectional_pairs_cannot_reach_zero(past: str, level: float) -> None:
    """Prop. 3.3 through `ode.Stage`: its loss at the best student is the mean lost variance, and the jump's own
    variance is short of the data's by as much (E|Y|^2 = E|Yhat|^2 + E Var(Y|U)); other students have more."""
    best = gaussian.regress_bidirectional(S, level, past=level if past == "noisy" else 0.0)
    loss = ode_loss("sf-ode", past, lambda s: (best.past, best.own), level)
    assert loss == pytest.approx(best.lost.mean().item(), rel=0.05)
    assert ode_loss("sf-ode", past, lambda s: (best.past, 1.1 * best.own), level) > loss + 0.002


@pytest.mark.parametrize("level", proof.LEVELS)
def test_regression_on_causal_pairs_reaches_zero(level: float) -> None:
    """Def. 3.1 through `ode.Stage`: the flow map of the AR teacher is a student, with loss 0."""
    best = gaussian.regress_causal(S, level)
    assert ode_loss("causal-ode", "clean", lambda s: (best.past, best.own), level) < 1e-10


# ---------------------------------------------------------------------- consistency distillation (B, section 3.2)


def test_euler_s_error_is_of_first_order() -> None:
    """The end point of K Euler steps on the shift-5 grid, by `cfrt.flow`: m = 0.7, q2 = 0.19, x_1 = 1.3."""
    m, q2, errors = 0.7, 0.19, []
    for steps in (12, 24, 48, 96, 192):
        grid = flow.euler_grid(steps, 5.0)
        x = torch.tensor(1.3, dtype=torch.float64)
        end = gaussian.flow_map(x, 1.0, 0.0, m, q2)
        for s, s_next in pairwise(grid):
            x = flow.euler(x, gaussian.velocity(x, s, m, q2), s, s_next)
        errors.append((x - end).item())
        assert errors[-1] == pytest.approx(1.3 * (gaussian.euler_gain(1.0, q2, grid) - gaussian.exact_gain(1.0, q2)))
    assert errors == pytest.approx([-0.205, -0.109, -0.0567, -0.0290, -0.0147], rel=5e-3)
    assert errors[-2] / errors[-1] == pytest.approx(2, rel=0.03)


@pytest.mark.parametrize(("steps", "variance"), [(24, 0.808), (48, 0.899), (1000, 0.995)])
def test_euler_steps_shrink(steps: int, variance: float) -> None:
    """Var of a unit-variance frame without a past after K Euler steps at shift 5: less than 1, by cfrt.flow's own."""
    grid, x = flow.euler_grid(steps, 5.0), torch.ones(1, dtype=torch.float64)
    for s, s_next in pairwise(grid):
        x = flow.euler(x, gaussian.velocity(x, s, 0.0, 1.0), s, s_next)
    assert x.square().item() == pytest.approx(variance, abs=6e-4)
    jumped = gaussian.jump_variance(S, 1.0, lambda s, q2: gaussian.euler_gain(s, q2, grid))
    assert jumped[0].item() == pytest.approx(x.square().item())
    assert (jumped[0] < jumped[1:]).all()  # what the past tells needs no steps


def test_the_flow_map_is_its_phases_one_after_another() -> None:
    """The whole jump is the jumps of the phases, and one Euler step in each is not."""
    teacher, clean, x = Teacher(S, 1), noise(6, 4), noise(6, 4, seed=1)
    levels = (*flow.sigmas((1.0, 0.75, 0.5, 0.25), MODEL.shift), 0.0)
    by_phases = by_euler = x
    for s, e in pairwise(levels):
        by_phases = teacher.flow_map(by_phases, s, e, clean)
        by_euler = flow.euler(by_euler, teacher.velocity(by_euler, s, clean), s, e)
    whole = teacher.flow_map(x, 1.0, 0.0, clean)
    torch.testing.assert_close(by_phases, whole)
    assert (by_euler - whole).abs().max() > 0.05


def cd_stage(rho: float, count: int, gain: Callable[[float, float], float]) -> cd.Stage:
    """Consistency distillation whose student and target jump by `gain(s, q2)` from the AR teacher's mean."""
    covariance = gaussian.covariance(rho, proof.FRAMES)
    even = {"guidance": 1.0, "first_weight": 1.0, "early_weight": 1.0}
    stage = cd.Stage(cd.Config(**even, levels=count, batch=512), MODEL, world(rho), Exact(MODEL, covariance))
    known = Teacher(covariance, 1)

    def weights(s: float) -> tuple[Tensor, Tensor]:
        own = torch.tensor([gain(s, q2) for q2 in known.variances.tolist()], dtype=torch.float64)
        return (1 - (1 - s) * own)[:, None] * known.past, own.diag()

    stage.student = stage.target = Jumper(weights)
    return stage


def test_consistency_distillation_is_least_at_the_euler_map() -> None:
    """Its minimiser on a grid is the composition of the teacher's Euler steps, G_k = G_(k+1) o step: `cd.Stage`'s loss
    there is 0 to rounding, and the exact flow map's is not."""
    grid = flow.euler_grid(6, MODEL.shift)
    assert mean_loss(cd_stage(0.9, 6, lambda s, q2: gaussian.euler_gain(s + 1e-6, q2, grid)), 2) < 1e-10
    assert mean_loss(cd_stage(0.9, 6, gaussian.exact_gain), 2) > 1e-4


def test_consistency_of_the_exact_flow_map_is_of_first_order() -> None:
    """One Euler step is wrong by O(dt^2), so the root of `cd.Stage`'s loss at the exact flow map falls 4 times with
    twice the levels, K of which add up to the O(dt) of B, section 3.2."""
    roots = [mean_loss(cd_stage(0.9, count, gaussian.exact_gain), 2) ** 0.5 for count in (24, 48, 96)]
    assert [a / b for a, b in pairwise(roots)] == pytest.approx([4, 4], rel=0.15)


class FlowMap(Exact):
    """The student that is the AR teacher's flow map, differentiable in x and s."""

    def teacher_forced(self, x: Tensor, s: Tensor, batch: Batch) -> Tensor:
        state, level = proof.last(x), proof.levels(s)
        end = self.forced.flow_map(state, level, 0.0, proof.last(batch.latents))
        return proof.from_last(flow.v_from_x0(state, end, level)).to(x)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own forward mode imports it
def test_continuous_consistency_holds_for_the_flow_map_alone() -> None:
    """d/ds G(x_s, s) = 0 along the teacher's ODE, with no step and so no order: the residual that `ccm.Stage` brings to
    zero is zero for the flow map (to fp32), and not for the teacher itself, whose G is one Euler step."""
    even = {"guidance": 1.0, "first_weight": 1.0, "early_weight": 1.0}
    stage = ccm.Stage(ccm.Config(**even, batch=512), MODEL, world(), exact())
    stage.fade = 1.0
    residuals = {}
    for student in (FlowMap(MODEL, S), exact()):
        stage.student = student
        residuals[type(student)] = stage.loss(micro(0))[1]["loss"]
    assert residuals[FlowMap] < 1e-4
    assert residuals[Exact] > 0.1


# ---------------------------------------------------------------------- distribution matching (A, section 3.1)


FAKE = Gaussian(torch.tensor([0.3, -0.2, 0.0, 0.5]).double(), 1.8 * gaussian.covariance(0.2, 4))
REAL = Gaussian(torch.zeros(4).double(), S)


def root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.sqrt() @ vectors.T


@pytest.mark.parametrize("s", [0.2, 0.7])
def test_dmd_s_gradient_is_that_of_kl(s: float) -> None:
    """DMD (arXiv:2311.18828, eq. 7): for a generator x0 = m + R z and exact scores, the mean of f - r and of (f - r) z'
    is s^2 / (1-s)^2 times the gradient of KL(fake_s || real_s) in m and R, which autograd gives from KL alone."""
    m, r = FAKE.mean.clone().requires_grad_(), root(FAKE.covariance).requires_grad_()
    gaussian.kl(Gaussian(m, r @ r.T).noised(s), REAL.noised(s)).backward()
    of_kl, of_dmd = gaussian.kl_gradient(FAKE, REAL, s), gaussian.dmd_gradient(FAKE, REAL, s)
    torch.testing.assert_close(of_kl, (m.grad, r.grad))
    torch.testing.assert_close(of_dmd, tuple(s**2 / (1 - s) ** 2 * g for g in of_kl))


def test_scores_and_estimates_of_x0_say_the_same() -> None:
    """x0_hat = (x_s + s^2 score) / (1-s), Tweedie's formula; the velocity agrees with that of the exact teacher."""
    x, s = noise(6, 4), 0.4
    torch.testing.assert_close(FAKE.denoised(x, s), (x + s**2 * FAKE.score(x, s)) / (1 - s))
    torch.testing.assert_close(REAL.velocity(x, s), Teacher(S, 4).velocity(x, s, x))
    at = x[0].requires_grad_()
    law = FAKE.noised(s)
    torch.distributions.MultivariateNormal(law.mean, law.covariance).log_prob(at).backward()
    torch.testing.assert_close(FAKE.score(at.detach(), s), at.grad)


class Score(Network):
    """The bidirectional network of a Gaussian."""

    def __init__(self, law: Gaussian) -> None:
        super().__init__(MODEL)
        self.law = law

    def bidirectional(self, x: Tensor, s: Tensor, batch: Batch) -> Tensor:
        return proof.from_last(self.law.velocity(proof.last(x), s.unique().item())).to(x)


def test_the_dmd_stage_s_gradient_is_that_of_kl() -> None:
    """`dmd.Stage.gradient` with exact scores, freed of its normaliser and averaged over clips and noise, is the same
    gradient: in the mean and in R, to chance."""
    s, count = 0.5, 20_000
    settings = dmd.Config(tau=(s, s), guidance=1.0)
    stage = dmd.Stage(settings, MODEL, world().prompts, Score(REAL), Score(REAL), fake=Score(FAKE))
    z = noise(4 * count, 4).reshape(count, 1, 2, 2, 4)
    x = proof.from_last(FAKE.mean + z @ root(FAKE.covariance)).float()
    batch = Batch.of(x, world().prompts(count, generator()))
    g = stage.gradient(x, batch, generator(7))
    x_tau, tau, _ = stage.noised(x, generator(7))  # the same draws
    r = flow.x0_from_v(x_tau, Score(REAL).bidirectional(x_tau, tau, batch), s)
    apart = proof.last(g * (x - r).abs().mean((1, 2, 3, 4), keepdim=True)).reshape(-1, 4)  # f - r
    in_mean, in_root = gaussian.dmd_gradient(FAKE, REAL, s)
    torch.testing.assert_close(apart.mean(0), in_mean, atol=0.02, rtol=0)
    torch.testing.assert_close(apart.T @ z.reshape(-1, 4) / len(apart), in_root, atol=0.02, rtol=0)
    assert in_mean.abs().max() > 0.2
    assert in_root.abs().max() > 0.2


def test_a_student_that_is_the_data_is_left_alone() -> None:
    """The gradient's zero: equal laws. And KL and Wasserstein are distances of laws."""
    for g in gaussian.dmd_gradient(REAL, REAL, 0.6):
        assert g.abs().max() < 1e-12
    assert gaussian.kl(FAKE, REAL) > 0.1
    assert gaussian.kl(REAL, REAL).abs() < 1e-12
    assert gaussian.wasserstein2(REAL, REAL).abs() < 1e-7
    a, b = (Gaussian(torch.tensor([m]).double(), torch.tensor([[v]]).double()) for m, v in ((1.0, 4.0), (0.0, 1.0)))
    assert gaussian.wasserstein2(a, b).item() == pytest.approx(1 + (2 - 1) ** 2)
    assert gaussian.kl(a, b).item() == pytest.approx(0.5 * (4 + 1 - 1 - math.log(4)))


# ---------------------------------------------------------------------- few steps


@pytest.mark.parametrize("levels", [(1.0,), (1.0, 0.8333), proof.LEVELS], ids=["1 step", "2 steps", "4 steps"])
def test_few_step_sampling_by_simulation(levels: tuple[float, ...]) -> None:
    """Jump to x0, put new noise on it, go on: closed form and `cfrt.flow` agree. The exact flow map keeps the law at
    any number of steps; one Euler step of the teacher loses variance (A, section 2)."""
    m, q2, size = 0.7, 0.19, 40_000
    for gain in (gaussian.exact_gain, gaussian.denoising_gain):
        x = noise(size, 1)[:, 0]
        for index, s in enumerate(levels):
            x0 = m + gain(s, q2) * (x - (1 - s) * m)
            if index + 1 < len(levels):
                x = flow.renoise(x0, noise(size, 1, seed=10 + index)[:, 0], levels[index + 1])
        theory = gaussian.few_step(levels, lambda s, gain=gain: gain(s, q2))
        assert x0.var().item() == pytest.approx(theory, rel=0.03, abs=1e-6)
        assert x0.mean().item() == pytest.approx(m, abs=0.01)
    assert gaussian.few_step(levels, lambda s: gaussian.exact_gain(s, q2)) == pytest.approx(q2)


def test_a_denoiser_needs_many_steps() -> None:
    collapsed = [
        gaussian.few_step(flow.sigmas(us, 5.0), lambda s: gaussian.denoising_gain(s, 0.19))
        for us in ((1.0,), (1.0, 0.5), (1.0, 0.75, 0.5, 0.25))
    ]
    assert collapsed[0] == 0
    assert collapsed == sorted(collapsed)
    assert collapsed[-1] < 0.5 * 0.19


# ---------------------------------------------------------------------- the page


LINK = re.compile(r"\[`([\w.]+)`\]\((\.\./[^)#]+\.py)\)")


def names(tree: ast.AST, prefix: str = "") -> set[str]:
    """Functions, classes and variables that a module defines, with Class.method."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found |= {prefix + node.name, *names(node, f"{prefix}{node.name}.")}
        elif isinstance(node, ast.Assign):
            found |= {prefix + target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def test_the_theory_page_links_to_what_exists() -> None:
    """docs/theory.md: every linked file is there and defines the function that the link names."""
    page = ROOT / "docs" / "theory.md"
    links = LINK.findall(page.read_text())
    assert len(links) >= 40
    defined = {path: names(ast.parse((page.parent / path).read_text())) for path in {path for _, path in links}}
    assert [(name, path) for name, path in links if name not in defined[path]] == []


def test_the_theory_page_has_no_other_links_that_break() -> None:
    text = (ROOT / "docs" / "theory.md").read_text()
    local = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    files = [target for target in local if not target.startswith("#")]
    assert [target for target in files if not (ROOT / "docs" / target).exists()] == []
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert {target[1:] for target in local if target.startswith("#")} <= anchors


def test_the_theory_page_s_figure_and_table_are_made_from_the_oracle_and_the_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`python tools/theory.py` would change nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool = importlib.import_module("theory")
    assert tool.FIGURE.read_text() == tool.figure()
    assert tool.table() in tool.PAGE.read_text()
