"""What is read of a video: the frames that a player shows, upright, in its colours; and which clips are made of it."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from footage_fixture import encoded, film, numbered, numbers
from hypothesis import given
from hypothesis import strategies as st

from cfrt.errors import VideoError
from training import (
    footage,
)
from training.footage import Cut, Film, Video

pytestmark = pytest.mark.cpu


def shown(count: int, source: Fraction, start: float, cut: Cut) -> list[int]:
    """What a player shows at the clip's times: exact arithmetic, no files."""
    times = [Fraction(start).limit_denominator(10**6) + k / Fraction(cut.fps) for k in range(cut.frames)]
    return [min(count - 1, int((t + Fraction(1, 10**4)) * source)) for t in times]


@pytest.mark.parametrize(
    ("fps", "suffix"),
    [(16.0, ".mp4"), (25.0, ".mkv"), (30000 / 1001, ".mov"), (60.0, ".mp4"), (12.0, ".mkv"), (20.0, ".gif")],
)
def test_a_clip_is_what_a_player_shows(fps: float, suffix: str, tmp_path: Path) -> None:
    count, cut = round(2.2 * fps), Cut(frames=17, fps=16.0, size=(32, 32))
    path = film(tmp_path / f"x{suffix}", count, fps)
    for start in (0.0, 0.5, 1.0625):
        expected = shown(count, Fraction(fps).limit_denominator(1001), start, cut)
        assert numbers(footage.read(path, start, cut)) == expected
    assert footage.probe(path).seconds == pytest.approx(count / fps, abs=0.002)
    assert footage.probe(path).fps == pytest.approx(fps, abs=0.01)


def test_entering_a_file_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    """Key frames are far apart, so a clip from the middle begins with frames that depend on others before it."""
    path, cut = film(tmp_path / "x.mp4", 160), Cut(frames=5, fps=16.0, size=(32, 32))
    whole = footage.read(path, 0.0, replace(cut, frames=160))
    for first in (1, 40, 97, 155):
        np.testing.assert_array_equal(footage.read(path, first / 16, cut), whole[first : first + 5])


def test_a_stream_without_an_index_is_read_from_its_start(tmp_path: Path) -> None:
    """Raw H.264 has neither time stamps nor a length."""
    cut = Cut(frames=5, fps=25.0, size=(32, 32))
    encoded(tmp_path / "x.ts", numbered(50), 25.0)
    assert numbers(footage.read(tmp_path / "x.ts", 1.0, cut)) == [25, 26, 27, 28, 29]
    assert footage.probe(tmp_path / "x.ts").seconds == pytest.approx(2.0)


def test_the_end_of_a_video_is_the_end(tmp_path: Path) -> None:
    path, cut = film(tmp_path / "x.mp4", 20), Cut(frames=17, fps=16.0, size=(32, 32))
    assert numbers(footage.read(path, 3 / 16, cut)) == list(range(3, 20))
    with pytest.raises(VideoError, match=r"the video ends at 1\.25 s; is the file cut off"):
        footage.read(path, 4 / 16, cut)


def quadrants(height: int, width: int) -> np.ndarray:
    """Red, green / blue, white; edges that are cut off are black."""
    frame = np.zeros((height, width, 3), np.uint8)
    half = height // 2, width // 2
    frame[: half[0], : half[1], 0] = frame[: half[0], half[1] :, 1] = frame[half[0] :, : half[1], 2] = 255
    frame[half[0] :, half[1] :] = 255
    return frame


def corners(picture: np.ndarray) -> str:
    """The nearest colours in the middle of a picture's quadrants, row by row."""
    names = {"r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255), "w": (255, 255, 255), "k": (0, 0, 0)}
    height, width, _ = picture.shape
    seen = [picture[y, x] for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return "".join(min(names, key=lambda name: int(np.abs(colour.astype(int) - names[name]).sum())) for colour in seen)


def still(path: Path, picture: np.ndarray, **tags: Any) -> Path:
    return encoded(path, [picture] * 2, **tags)


def first(path: Path, *size: int) -> np.ndarray:
    return footage.read(path, 0.0, Cut(frames=1, fps=16.0, size=size))[0]


@pytest.mark.parametrize(
    ("turn", "seen"),
    [((1, 0, 0, 1), "rgbw"), ((0, 1, -1, 0), "brwg"), ((-1, 0, 0, -1), "wbgr"), ((0, -1, 1, 0), "gwrb")],
)
def test_a_phone_held_upright_gives_upright_clips(turn: tuple[int, ...], seen: str, tmp_path: Path) -> None:
    """The matrix in an mp4 says how it is to be turned; it lies 44 bytes behind the name of its box."""
    path = still(tmp_path / "x.mp4", quadrants(64, 96))
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    a, b, c, d = (value % 2**16 * 2**16 for value in turn)
    content[at : at + 36] = b"".join(v.to_bytes(4, "big") for v in (a, b, 0, c, d, 0, 0, 0, 2**30))
    path.write_bytes(content)
    upright = abs(turn[0])
    assert footage.probe(path).size == ((64, 96) if upright else (96, 64))
    assert corners(first(path, 32, 32)) == seen


def test_pixels_need_not_be_square(tmp_path: Path) -> None:
    """Twice as wide as high: the left and right quarters of what is shown are cut off, and not of what is stored."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, 16:48] = 255
    path = still(tmp_path / "x.mp4", picture, sample_aspect_ratio=Fraction(2))
    assert footage.probe(path).size == (64, 128)
    assert first(path, 32, 32).min() > 230
    assert first(still(tmp_path / "y.mp4", picture), 32, 32).mean() < 140


def test_clips_cover_their_size_about_the_centre(tmp_path: Path) -> None:
    tall = np.zeros((128, 64, 3), np.uint8)
    tall[32:96] = 255
    path = still(tmp_path / "x.mp4", tall)
    assert first(path, 32, 32)[1:-1].min() > 230
    assert first(path, 64, 32).shape == (64, 32, 3)
    assert corners(first(still(tmp_path / "y.mp4", quadrants(64, 64)), 17, 23)) == "rgbw"


@pytest.mark.parametrize(("height", "tag", "matrix"), [(64, 1, 1), (64, 2, 5), (720, 2, 1), (720, 5, 5)])
def test_colours_are_what_the_file_means(height: int, tag: int, matrix: int, tmp_path: Path) -> None:
    """Tagged (1 is BT.709, 5 is BT.601), or as players take untagged video: BT.709 from 720 lines on."""
    colour = np.full((height, 64, 3), (200, 60, 30), np.uint8)
    path = still(tmp_path / "x.mp4", colour, matrix=matrix, colorspace=tag)
    np.testing.assert_allclose(first(path, 64, 64).mean((0, 1)), (200, 60, 30), atol=3)


# ---------------------------------------------------------------------- which clips


@given(
    seconds=st.floats(0.1, 100),
    stride=st.none() | st.floats(0.05, 10),
    most=st.none() | st.integers(1, 9),
    begin=st.floats(0, 3),
    length=st.none() | st.floats(0.1, 50),
)
def test_clips_lie_inside_their_segment(
    seconds: float, stride: float | None, most: int | None, begin: float, length: float | None
) -> None:
    cut = Cut(frames=21, fps=16.0, size=(32, 32))
    end = None if length is None else begin + length
    video = Video(path=Path("x"), name="x", caption="x", start=begin, end=end)
    segment = min(seconds, seconds if end is None else end) - begin
    film = Film(seconds=seconds, fps=16.0, size=(32, 32))
    if segment <= cut.seconds + footage.INSTANT:
        with pytest.raises(VideoError, match="too short"):
            footage.starts(video, film, cut, stride=stride, most=most)
        return
    starts = footage.starts(video, film, cut, stride=stride, most=most)
    step = cut.frames / cut.fps if stride is None else stride
    assert starts == sorted(set(starts))
    assert begin - 1e-6 <= starts[0]
    assert starts[-1] + cut.seconds <= begin + segment + 1e-6
    assert np.allclose(np.mod(np.array(starts) - begin + step / 2, step), step / 2, atol=1e-4)
    if most is None:
        assert starts[-1] + step + cut.seconds > begin + segment - 2e-4
    else:
        assert len(starts) <= most


def test_a_long_video_is_sampled_all_along() -> None:
    video = Video(path=Path("x"), name="x", caption="x")
    found = Film(seconds=600, fps=25.0, size=(480, 832))
    starts = footage.starts(video, found, Cut(frames=81, fps=16.0, size=(480, 832)), stride=1.0, most=3)
    assert starts == [99.0, 297.0, 495.0]  # the middles of thirds
