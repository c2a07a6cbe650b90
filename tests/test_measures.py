"""Each offline measure on clips for which its value is known: how far a square went, how bright a flicker is."""

import math

import numpy as np
import pytest
import torch

from training import measures
from training.measures import Meter, Numbers

pytestmark = pytest.mark.cpu

SIDE, FPS, LENGTH = 64, 16.0, 17


def read(frames: list[np.ndarray], units: list[int] | None = None, fps: float = FPS) -> Numbers:
    meter = Meter(fps, len(frames))
    for index, frame in enumerate(frames):
        meter.add(frame, units[index] if units else 0)
    return meter.read()


def flat(level: float | tuple[float, float, float], side: int = SIDE) -> np.ndarray:
    return np.full((side, side, 3), level, np.float64)


def as_frame(picture: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def square(speed: float, *, side: int = SIDE, size: int = 24, frames: int = LENGTH) -> list[np.ndarray]:
    """A bright square that goes right by `speed` pixels a frame on a dark stage; its edges cover pixels in part."""
    made = []
    for index in range(frames):
        x, columns = 4 + speed * index, np.arange(side)
        covered = np.clip(np.minimum(columns + 1, x + size) - np.maximum(columns, x), 0, 1)
        picture = flat(40, side)
        picture[20 : 20 + size] += 160 * covered[:, None]
        made.append(as_frame(picture))
    return made


def texture(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """Smooth noise, [H, W, 3], levels from 60 to 200."""
    noise = np.random.default_rng(seed).uniform(60, 200, (height + 2, width + 2, 3))
    return sum(noise[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)) / 9


# --------------------------------------------------------------------------------------------------------------- motion


@pytest.mark.parametrize("speed", [0.0, 0.5, 1.0, 2.0])
def test_motion_is_the_speed_of_a_moving_square(speed: float) -> None:
    row = read(square(speed, frames=9))
    assert row["motion"] == pytest.approx(100 * speed * FPS / SIDE, rel=0.05, abs=1e-6)
    assert row["dynamic"] == (100 * speed * FPS / SIDE > measures.DYNAMIC_SPEED)


def test_motion_does_not_depend_on_frame_rate() -> None:
    """The same object, filmed at 8, 16 and 32 frames a second."""
    values = [read(square(16 / fps, frames=round(0.8 * fps)), fps=fps)["motion"] for fps in (8.0, 16.0, 32.0)]
    np.testing.assert_allclose(values, 25.0, rtol=0.05)


def test_motion_does_not_depend_on_resolution() -> None:
    """The same scene, three times as large: blocks are matched in a picture averaged down."""
    assert read(square(3, side=3 * SIDE, size=72, frames=5))["motion"] == pytest.approx(25.0, rel=0.1)


@pytest.mark.parametrize("speed", [1, 3])
def test_a_pan_moves_everything(speed: int) -> None:
    scene = texture(64, 120)
    row = read([as_frame(scene[:, speed * index :][:, :90]) for index in range(7)])
    assert row["motion"] == pytest.approx(100 * speed * FPS / 64, rel=0.02)
    assert row["still"] < 0.05
    assert math.isnan(row["flicker"]), "nothing rests, so nothing can be said of flicker"


def test_up_and_left_have_their_sign() -> None:
    scene = torch.from_numpy(texture(96, 112)[..., 0]).float()
    moved = measures.displacement(scene[10:80, 10:110], scene[13:83, 8:108])  # the picture went 3 up and 2 right
    np.testing.assert_allclose(moved[4:-4, 4:-4].flatten(0, 1).mean(0), (-3, 2), atol=0.05)


def test_noise_is_not_motion() -> None:
    rng, still = np.random.default_rng(0), texture()
    row = read([as_frame(still + rng.normal(0, 6, still.shape)) for _ in range(7)])
    assert row["motion"] == 0
    assert row["still"] == 1


# -------------------------------------------------------------------------------------------------------------- flicker


@pytest.mark.parametrize("amplitude", [0.0, 2.0, 10.0])
def test_flicker_is_the_amplitude_of_a_blinking_picture(amplitude: float) -> None:
    row = read([as_frame(np.rint(texture()) + amplitude * (index % 2)) for index in range(9)])
    assert row["flicker"] == pytest.approx(amplitude, abs=1e-4)
    assert row["motion"] == 0


def test_flicker_of_noise() -> None:
    """|x - y| of two normal numbers of deviation s is 2 s / sqrt(pi) on average."""
    rng, still = np.random.default_rng(0), texture()
    row = read([as_frame(still + rng.normal(0, 5, still.shape)) for _ in range(7)])
    assert row["flicker"] == pytest.approx(10 / math.sqrt(math.pi), rel=0.03)


def test_flicker_is_read_beside_a_moving_object() -> None:
    """Half the picture moves, the other half blinks by 3 levels: the movement has no part in it."""
    scene, moving = np.rint(texture(64, 128)), texture(64, 128, seed=1)
    frames = []
    for index in range(9):
        picture = scene + 3.0 * (index % 2)
        picture[:, 72:] = moving[:, 2 * index :][:, :56]
        frames.append(as_frame(picture))
    row = read(frames)
    assert row["flicker"] == pytest.approx(3.0, rel=0.02)
    assert 0.25 < row["still"] < 0.6
    assert row["motion"] == pytest.approx(50.0, rel=0.05)


# ------------------------------------------------------------------------------------------------- sharpness and colour


@pytest.mark.parametrize("period", [4, 8, 16])
def test_sharpness_of_a_grating(period: int) -> None:
    """The Laplacian of a cos(w x) is (2 cos w - 2) times it, and the variance of a cosine is half its amplitude^2."""
    columns = np.arange(SIDE + 2)
    wave = 100 * np.cos(2 * np.pi * columns / period)
    picture = torch.from_numpy(np.broadcast_to(128 + wave, (SIDE + 2, SIDE + 2)).copy()).float()
    expected = (2 * math.cos(2 * math.pi / period) - 2) ** 2 * 100**2 / 2
    assert measures.sharpness(picture) == pytest.approx(expected, rel=1e-4)


def test_colourfulness_in_closed_form() -> None:
    grey, orange = flat(90), flat((200, 100, 50))
    assert measures.colourfulness(torch.from_numpy(grey)) == 0
    assert measures.colourfulness(torch.from_numpy(orange)) == pytest.approx(0.3 * math.hypot(100, 100))
    halves = np.concatenate([flat((200, 100, 150)), flat((100, 200, 150))])  # rg = 100 and -100, yb = 0
    assert measures.colourfulness(torch.from_numpy(halves)) == pytest.approx(100)


def test_drift_compares_the_last_quarter_with_the_first() -> None:
    """Contrast and saturation fall to a half, so variance falls to a quarter and colourfulness to a half."""
    still = texture()
    row = read([as_frame(128 + (still - 128) * (1.0 if index < 8 else 0.5)) for index in range(16)])
    assert row["sharpness_last"] / row["sharpness_first"] == pytest.approx(0.25, rel=0.03)
    assert row["colourfulness_last"] / row["colourfulness_first"] == pytest.approx(0.5, rel=0.02)


# ---------------------------------------------------------------------------------------------- freezes, cuts and seams


def test_freezes_are_counted() -> None:
    frames = square(1.0, frames=5)
    assert read(frames)["frozen"] == 0
    assert read(frames[:4] + 4 * frames[4:])["frozen"] == pytest.approx(3 / 7)
    assert read(5 * frames[:1])["frozen"] == 1


def test_cuts_are_counted() -> None:
    """Two scenes, one after the other; neither a pan nor a blinking light is a cut."""
    first, second = texture(seed=1), 255 - texture(seed=2)
    rng = np.random.default_rng(0)
    frames = [as_frame(scene + rng.normal(0, 2, scene.shape)) for scene in 6 * [first] + 6 * [second]]
    row = read(frames)
    assert row["cuts"] == 1
    assert row["motion"] == 0, "what lies before a cut is not looked for behind it"
    assert read([as_frame(texture(48, 80)[:, 3 * index :][:, :56]) for index in range(7)])["cuts"] == 0
    assert read([as_frame(first + 40 * (index % 2)) for index in range(7)])["cuts"] == 0


def test_seams_are_the_jumps_between_units() -> None:
    """Brightness rises by 1 a frame and by 5 where a unit begins."""
    level, frames, units = 60.0, [], []
    for unit in range(4):
        for place in range(4):
            level += 5 if unit and not place else 1
            frames.append(as_frame(flat(level)))
            units.append(unit)
    assert read(frames, units)["seam"] == pytest.approx(5)
    assert math.isnan(read(frames)["seam"]), "one unit has no boundary"


# ------------------------------------------------------------------------------------------------------------ diversity


def test_diversity_of_plain_clips_is_the_distance_of_their_colours() -> None:
    def thumbnails(level: float) -> np.ndarray:
        meter = Meter(FPS, 8)
        for _ in range(8):
            meter.add(as_frame(flat(level)))
        return meter.thumbnails()

    clips = [thumbnails(level) for level in (50, 60, 80)]
    assert clips[0].shape == (4, 16, 16, 3)
    assert measures.distance(clips[0], clips[1]) == pytest.approx(10)
    assert measures.diversity(clips) == pytest.approx((10 + 30 + 20) / 3)
    assert math.isnan(measures.diversity(clips[:1]))


def test_thumbnails_are_spread_over_the_clip() -> None:
    meter = Meter(FPS, 8)
    for index in range(8):
        meter.add(as_frame(flat(10 * index)))
    assert [int(picture[0, 0, 0]) for picture in meter.thumbnails()] == [10, 30, 50, 70]


def test_a_single_frame_says_what_it_can() -> None:
    row = read([as_frame(texture())])
    assert row["sharpness"] > 0
    assert row["cuts"] == 0
    assert all(math.isnan(row[name]) for name in ("flicker", "motion", "dynamic", "frozen", "seam"))
