"""The world keeps its rules: starts, turns, walls, switches, held-out scenes, a future that the past leaves open."""

import math

import pytest
import torch
from torch import Tensor

from training import worlds
from training.metrics import has_room
from training.worlds import CALM, COLOUR, DIRECTION, FADE, FPS, HEADING, OWN_HEADING, SIDE, SIZE, SPEED, STEP, TURNS

pytestmark = pytest.mark.cpu


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def free_flight(scene: worlds.Scene) -> Tensor:
    """bool [B, T - 1]: steps that met no wall, by their length and direction."""
    moved = scene.position[:, 1:] - scene.position[:, :-1]
    straight = HEADING[scene.heading[:, 1:]] * STEP[scene.before[:, SPEED], None, None]
    return (moved - straight).abs().amax(-1) < 1e-3


# ---------------------------------------------------------------------------------------------------------- randomness


def test_clips_are_a_function_of_the_seed() -> None:
    def clip(seed: int) -> Tensor:
        source = generator(seed)
        return worlds.render(worlds.simulate(worlds.sample_factors(3, source), source, 13))

    assert torch.equal(clip(1), clip(1))
    assert not torch.equal(clip(1), clip(2))


def test_drawing_is_the_same_in_any_company() -> None:
    """A clip's pixels do not depend on what it is rendered with, and stay in [0, 1]."""
    scene = worlds.simulate(worlds.sample_factors(5, generator()), generator(), 3)
    together = worlds.render(scene)
    alone = torch.cat([worlds.render(scene[one : one + 1]) for one in range(5)])
    assert together.shape == (5, 3, 3, SIDE, SIDE)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert together.min() >= 0
    assert together.max() <= 1


def test_the_future_is_random_given_the_past() -> None:
    """The same state goes on in different ways, and how far they part grows with time."""
    past = worlds.simulate(worlds.sample_factors(20, generator()), generator(), 9)
    rows = torch.arange(20).repeat_interleave(64)
    last = (past.position[rows, -1], past.heading[rows, -1], past.phase[rows, -1])
    future = worlds.simulate(past.before[rows], generator(1), 40, start=last, calm=CALM - 8)
    spread = future.position.view(20, 64, 40, 2).var(1).sum(-1).mean(0)  # [40]
    assert spread[: CALM - 9].max() < 1e-6, "nothing turns before the calm is over"
    assert spread[10] < spread[20] < spread[39]
    assert spread[20] > 10


def test_going_on_from_a_state_continues_the_clip() -> None:
    """Position, heading and phase of the frame after are what the uncut clip had, as long as nothing is random."""
    whole = worlds.simulate(worlds.sample_factors(8, generator()), generator(), CALM)
    last = (whole.position[:, 4], whole.heading[:, 4], whole.phase[:, 4])
    rest = worlds.simulate(whole.before, generator(1), CALM - 5, start=last, calm=CALM - 4)
    torch.testing.assert_close(rest.position, whole.position[:, 5:])
    torch.testing.assert_close(rest.phase, whole.phase[:, 5:])
    assert torch.equal(rest.heading, whole.heading[:, 5:])


# -------------------------------------------------------------------------------------------------------------- motion


def test_a_start_meets_no_wall_and_does_not_turn() -> None:
    factors = worlds.all_factors()
    scene = worlds.simulate(factors, generator(), CALM)
    assert torch.equal(scene.heading, factors[:, DIRECTION, None].expand(-1, CALM))
    assert free_flight(scene).all()


def test_objects_stay_on_the_stage() -> None:
    scene = worlds.simulate(worlds.sample_factors(300, generator()), generator(), 120)
    margin = worlds.RADIUS[scene.before[:, SIZE], None, None] + 1
    assert (scene.position >= margin - 1e-4).all()
    assert (scene.position <= SIDE - margin + 1e-4).all()


def test_a_wall_reflects() -> None:
    """Every change of heading without a turn is a reversal at a wall."""
    scene = worlds.simulate(worlds.sample_factors(400, generator()), generator(), CALM + 60)
    before, after = scene.heading[:, :-1], scene.heading[:, 1:]
    reversed_ = after == (before ^ 1)
    edge = torch.minimum(scene.position, SIDE - scene.position).amin(-1)[:, 1:]
    near = edge < worlds.RADIUS[scene.before[:, SIZE], None] + 1 + STEP[1] + 1e-3
    early = torch.arange(1, scene.frames) < CALM
    assert (reversed_ & near).any()
    assert ((before == after) | ~early | near).all(), "in the calm frames only a wall may change the heading"


def test_turns_come_at_the_stated_rate_and_prefer_the_captions_heading() -> None:
    """Binomial bounds at 4.5 standard deviations, on steps that no wall can explain."""
    factors = worlds.sample_factors(1500, generator())
    scene = worlds.simulate(factors, generator(), 80)
    before, after = scene.heading[:, CALM - 1 : -1], scene.heading[:, CALM:]
    inside = torch.minimum(scene.position, SIDE - scene.position).amin(-1)[:, CALM - 1 : -1]
    clear = inside > worlds.RADIUS[factors[:, SIZE], None] + 1 + 2 * STEP[1]
    turned = (before != after) & clear
    within(turned.sum(), clear.sum(), TURNS / FPS)

    own = factors[:, DIRECTION, None].expand_as(before)
    astray = turned & (before != own)  # the caption's heading competes with two others
    within((astray & (after == own)).sum(), astray.sum(), OWN_HEADING / (OWN_HEADING + 2))
    loyal = turned & (before == own)  # three others, equally likely
    for heading in range(4):
        others = loyal & (own != heading)
        within((others & (after == heading)).sum(), others.sum(), 1 / 3)


def within(hits: Tensor, n: Tensor, p: float) -> None:
    bound = 4.5 * math.sqrt(p * (1 - p) / n.item())
    assert n > 500
    assert abs(hits.item() / n.item() - p) < bound, (hits, n, p)


# -------------------------------------------------------------------------------------------------------------- switch


def switched(count: int, at: int, frames: int) -> worlds.Scene:
    before, after = worlds.sample_factors(count, generator(3)), worlds.sample_factors(count, generator(4))
    return worlds.simulate(before, generator(5), frames, after=after, switch=torch.full((count,), at))


def test_a_switch_takes_heading_and_speed_at_once_and_is_calm() -> None:
    at = 13
    scene = switched(300, at, at + CALM)
    before, after = scene.before, scene.after
    roomy = has_room(scene.position[:, at - 1], torch.stack([before, after], 1))
    growing = before[:, SIZE] != after[:, SIZE]  # beside a wall it is also pushed
    assert roomy.sum() > 100
    assert torch.equal(scene.heading[:, at - 1], switched(300, at, at).heading[:, -1]), "nothing changes before"
    run = scene.heading[roomy, at:]
    assert torch.equal(run, after[roomy, DIRECTION, None].expand_as(run))
    step = (scene.position[:, at:] - scene.position[:, at - 1 : -1]).norm(dim=-1)[roomy & ~growing]
    wanted = STEP[after[roomy & ~growing, SPEED], None].expand_as(step)
    torch.testing.assert_close(step, wanted, rtol=0, atol=1e-3)


def test_a_caption_that_names_no_direction_keeps_the_heading() -> None:
    factors = worlds.sample_factors(200, generator(1))
    after = factors.clone()
    after[:, DIRECTION] = (factors[:, DIRECTION] + 2) % 4
    scene = worlds.simulate(
        factors,
        generator(),
        6,
        after=after,
        switch=torch.full((200,), 5),
        steered=torch.arange(200) < 100,
    )
    roomy = has_room(scene.position[:, 4], torch.stack([factors, after], 1))
    steered, free = roomy & (torch.arange(200) < 100), torch.arange(200) >= 100
    assert steered.sum() > 30
    assert torch.equal(scene.heading[steered, 5], after[steered, DIRECTION])
    assert torch.equal(scene.heading[free, 5], factors[free, DIRECTION])


def test_a_cross_fade_runs_from_the_old_picture_to_the_new() -> None:
    """Before the switch the pixels are those of the first scene, FADE frames on exactly those of the second."""
    at, frames = 5, 5 + FADE + 3
    scene = switched(12, at, frames)
    video = worlds.render(scene)
    pure = [
        worlds.Scene(**{**vars(scene), "before": one, "after": one, "switch": torch.full((12,), frames)})
        for one in (scene.before, scene.after)
    ]
    first, second = (worlds.render(one) for one in pure)
    torch.testing.assert_close(video[:, :at], first[:, :at], rtol=0, atol=1e-6)
    torch.testing.assert_close(video[:, at + FADE - 1 :], second[:, at + FADE - 1 :], rtol=0, atol=1e-6)
    changed = (scene.before[:, COLOUR] != scene.after[:, COLOUR]).nonzero()[:, 0]
    between = video[changed, at + FADE // 2]
    assert (between - first[changed, at + FADE // 2]).abs().amax((1, 2, 3)).min() > 0.02
    assert (between - second[changed, at + FADE // 2]).abs().amax((1, 2, 3)).min() > 0.02


def test_units_follow_the_time_law() -> None:
    """Unit u > 0 is frames 4u-3 to 4u: the first unit has one frame, the others four."""
    starts = [0, *(worlds.first_frame(unit) for unit in range(1, 6))]
    assert starts == [0, 1, 5, 9, 13, 17]


# ------------------------------------------------------------------------------------------------------ held-out scenes


def test_one_scene_in_six_is_held_out_and_never_sampled() -> None:
    scenes = worlds.all_factors()
    held = worlds.held_out(scenes)
    assert len(scenes) == 1536
    assert held.sum() == 256
    drawn = worlds.sample_factors(40_000, generator())
    assert not worlds.held_out(drawn).any()
    assert len(drawn.unique(dim=0)) == 1280, "every other scene is drawn"


def test_every_pair_of_values_is_trained_on_and_held_out() -> None:
    """Combinations are new to the model, never a value or a pair of values."""
    scenes = worlds.all_factors()
    held = worlds.held_out(scenes)
    sizes = [len(values) for values in worlds.FACTORS.values()]
    for a in range(6):
        for b in range(a):
            for half in (scenes[held], scenes[~held]):
                assert len(half[:, [a, b]].unique(dim=0)) == sizes[a] * sizes[b], (a, b)
