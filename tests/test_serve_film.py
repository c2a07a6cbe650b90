"""The one VP8 film of a stream that all who watch by WebRTC share: whoever takes the frames that `follows` lets through
sees what was shown, whenever he came and whatever he has missed."""

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfrt.serve.film import APART, CELL, Coded, Film, stamped

pytestmark = pytest.mark.cpu


def shown(number: int) -> np.ndarray:
    """A bar that wanders over a grey picture."""
    pixels = np.full((64, 64, 3), 128, dtype=np.uint8)
    pixels[:, 2 * number % 56 : 2 * number % 56 + 8] = (230, 40, 30)
    return pixels


class Watcher:
    """A viewer who takes what he can use, and asks when he cannot."""

    def __init__(self, film: Film) -> None:
        self._film, self._codec, self._last = film, av.CodecContext.create("libvpx", "r"), None

    def take(self, coded: Coded) -> np.ndarray | None:
        if not coded.follows(self._last):
            self._film.ask()
            return None
        self._last = coded.number
        (frame,) = self._codec.decode(av.Packet(coded.data))
        return frame.to_ndarray(format="rgb24")


def far(seen: np.ndarray, pixels: np.ndarray) -> float:
    return float(np.abs(seen[:128:2, ::2].astype(int) - pixels).mean())


@given(missed=st.sets(st.integers(0, 29)), comes=st.integers(0, 20), still=st.booleans())
def test_a_viewer_sees_what_is_shown_or_nothing(missed: set[int], comes: int, still: bool) -> None:
    film = Film(16, stamped=False)
    always, late = Watcher(film), Watcher(film)
    seen = []
    for tick in range(30):
        coded, pixels = film.add(shown(tick), tick), shown(tick)
        picture = always.take(coded)
        assert picture is not None, "who misses nothing waits for nothing"
        assert far(picture, pixels) < 6
        if tick == comes and still:
            picture = late.take(film.still(pixels, tick))
            assert picture is not None
            assert far(picture, pixels) < 6
        elif tick >= comes and tick not in missed and (picture := late.take(coded)) is not None:
            assert far(picture, pixels) < 6
            seen.append(tick)
    quiet = max((tick for tick in missed | {comes}), default=0) + APART + 2
    assert set(range(quiet, 30)) <= set(seen), "he was not shown again what he could see"


def test_who_asks_all_the_time_gets_a_key_frame_now_and_then() -> None:
    film = Film(16, stamped=True)
    keys = []
    for tick in range(5 * APART):
        film.ask()
        keys.append(film.add(shown(tick), tick).key)
    assert keys == [tick % APART == 0 for tick in range(5 * APART)]


def test_a_stamp_is_the_tick_in_black_and_white() -> None:
    strip = stamped(shown(0).repeat(2, 0).repeat(2, 1), 0b1011)[128:]
    assert strip.shape == (CELL, 128, 3)
    assert [int(x) for x in strip[4, 4::CELL, 0]] == [255, 255, 0, 255, *[0] * 12]
