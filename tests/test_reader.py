"""The reader is exact on real clips, so what it says of generated ones is a measurement; and it sees what is wrong."""

import pytest
import torch
from torch import Tensor

from training import worlds
from training.reader import Reading, read
from training.worlds import BACKGROUND, COLOUR, DIRECTION, FADE, SHAPE, SIZE, SPEED

pytestmark = pytest.mark.cpu

FRAMES = 9  # three units


def clips(factors: Tensor, frames: int = FRAMES, seed: int = 0) -> tuple[Tensor, worlds.Scene]:
    scene = worlds.simulate(factors, torch.Generator().manual_seed(seed), frames)
    return worlds.render(scene), scene


def covering() -> Tensor:
    """[192, 6]: every size with every shape, colour and background, under all directions and both speeds."""
    sizes, colours, shapes, backgrounds = torch.cartesian_prod(
        torch.arange(2), torch.arange(6), torch.arange(4), torch.arange(4)
    ).unbind(1)
    turn = sizes + 2 * colours + 3 * shapes + backgrounds
    factors = torch.stack([sizes, colours, shapes, turn % 4, (turn // 4 + colours) % 2, backgrounds], 1)
    assert all(len(factors[:, index].unique()) == count for index, count in enumerate((2, 6, 4, 4, 2, 4)))
    return factors


@pytest.fixture(scope="module")
def seen() -> tuple[Reading, worlds.Scene, Tensor]:
    factors = covering()
    video, scene = clips(factors)
    return read(video), scene, factors


def test_every_factor_of_every_clip_is_read(seen: tuple[Reading, worlds.Scene, Tensor]) -> None:
    reading, _, factors = seen
    wrong = (reading.factors != factors).any(1).nonzero()[:, 0].tolist()
    assert wrong == [], [(factors[w].tolist(), reading.factors[w].tolist()) for w in wrong]


def test_positions_are_read_to_a_third_of_a_pixel(seen: tuple[Reading, worlds.Scene, Tensor]) -> None:
    reading, scene, _ = seen
    error = (reading.position - scene.position).norm(dim=-1)
    assert error.mean() < 0.1
    assert error.max() < 0.3
    step = (scene.position[:, 1:] - scene.position[:, :-1]).norm(dim=-1)
    assert (reading.step - step).abs().max() < 0.3


def test_a_drawing_of_what_was_read_fits_the_clip(seen: tuple[Reading, worlds.Scene, Tensor]) -> None:
    reading = seen[0]
    assert reading.overlap.min() > 0.88
    assert reading.valid.all()
    assert reading.residual.max() < 5e-4


def test_clips_are_read_one_by_one(seen: tuple[Reading, worlds.Scene, Tensor]) -> None:
    """What a clip reads does not depend on its neighbours."""
    reading, scene, _ = seen
    alone = read(worlds.render(scene[5:6]))
    for name in Reading.__dataclass_fields__:
        torch.testing.assert_close(getattr(alone, name), getattr(reading, name)[5:6], rtol=0, atol=1e-4, msg=name)


def test_a_single_frame_shows_all_but_motion() -> None:
    factors = covering()[::5]
    video, _ = clips(factors, 2)
    still = read(video[:, :1])
    shown = [SIZE, COLOUR, SHAPE, BACKGROUND]
    assert torch.equal(still.factors[:, shown], factors[:, shown])
    assert still.step.shape == (len(factors), 0)


def test_after_a_switch_the_new_scene_reads_exactly() -> None:
    """Cut FADE frames after the switch, all but the direction of the moment is what the second caption says."""
    at, count = 5, 24
    order = torch.randperm(192, generator=torch.Generator().manual_seed(1))
    before, after = covering()[order[:count]], covering()[order[count : 2 * count]]
    scene = worlds.simulate(
        before, torch.Generator().manual_seed(0), at + FADE + 8, after=after, switch=torch.full((count,), at)
    )
    video = worlds.render(scene)
    shown = [SIZE, COLOUR, SHAPE, SPEED, BACKGROUND]
    old, new = read(video[:, :at]), read(video[:, at + FADE :])
    assert torch.equal(old.factors, before)
    assert torch.equal(new.factors[:, shown], after[:, shown])
    assert new.valid.all()


# ------------------------------------------------------------------------------------------------------- broken clips


def test_noise_and_quantisation_change_nothing() -> None:
    """Eight bits a colour, and noise of 2 %."""
    factors = covering()[::11]
    video, scene = clips(factors)
    noisy = video + 0.02 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    for spoilt in ((video * 255).round() / 255, noisy):
        reading = read(spoilt)
        assert torch.equal(reading.factors, factors)
        assert (reading.position - scene.position).norm(dim=-1).max() < 0.5


def test_an_empty_stage_holds_no_valid_object() -> None:
    _, scene = clips(covering()[::8])
    stages = torch.eye(4)[scene.before[:, BACKGROUND]].repeat_interleave(FRAMES, 0)
    empty = worlds.background_frames(stages, scene.phase.flatten()).view(len(scene), FRAMES, 3, 64, 64)
    reading = read(empty)
    assert not reading.valid.any()
    assert torch.equal(reading.factors[:, BACKGROUND], scene.before[:, BACKGROUND])


def test_two_objects_or_half_a_one_are_not_valid() -> None:
    factors = covering()[::13]
    video, scene = clips(factors)
    double = torch.maximum(video, video.roll(32, -1).flip(-2))
    assert read(double).valid.float().mean() < 0.5
    left = torch.arange(64) + 0.5 < scene.position[..., 0, None, None, None]  # [B, T, 1, 1, 64]
    stages = torch.eye(4)[factors[:, BACKGROUND]].repeat_interleave(FRAMES, 0)
    empty = worlds.background_frames(stages, scene.phase.flatten()).view(video.shape)
    half = torch.where(left, empty, video)
    assert read(half).valid.float().mean() < 0.2


def test_direction_is_that_of_the_first_two_units() -> None:
    """Played backwards, a calm clip shows the opposite direction."""
    factors = covering()[::7]
    video, _ = clips(factors, 5)
    assert torch.equal(read(video.flip(1)).factors[:, DIRECTION], factors[:, DIRECTION] ^ 1)
