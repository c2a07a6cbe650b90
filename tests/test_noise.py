"""The same noise on every machine: published vectors, a slow twin, and the shape of a normal distribution."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfrt import noise
from cfrt.errors import ConfigError

pytestmark = pytest.mark.cpu

words = st.integers(0, 2**32 - 1)
GOLDEN_SEED_7 = [0x3998CE71, 0xBE9C14E1, 0x3FE4F600, 0x3F88B007]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter, key, expected):
    """The known-answer vectors published with Random123 for philox4x32, 10 rounds."""
    assert tuple(noise.philox(np.array([counter], dtype=np.uint32), key)[0]) == expected


def philox_in_integers(counter, key):
    """Salmon et al. 2011, section 3.3, one counter, Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (odd >> 32) ^ c1 ^ k0, odd % 2**32, (even >> 32) ^ c3 ^ k1, even % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@given(st.tuples(words, words, words, words), st.tuples(words, words))
def test_slow_twin(counter, key):
    assert tuple(noise.philox(np.array([counter], dtype=np.uint32), key)[0]) == philox_in_integers(counter, key)


def test_counter_is_element_unit_step_purpose():
    seed = 0x0123456789ABCDEF
    rows = noise.bits(seed, unit=5, step=2, purpose=9, blocks=3)
    assert rows.dtype == np.uint32
    assert tuple(rows[2]) == philox_in_integers((2, 5, 2, 9), (0x89ABCDEF, 0x01234567))


def test_a_number_depends_on_its_place_only():
    """Not on how many are asked for: a longer draw begins with the shorter one."""
    long, short = (noise.normal(7, 3, 1, 0, shape) for shape in ((4, 5, 7), (2, 3)))
    assert np.array_equal(long.ravel()[:6], short.ravel())
    assert noise.normal(7, 3, 1, 0, ()).shape == ()
    assert noise.normal(7, 3, 1, 0, (0, 4)).shape == (0, 4)


def test_places_do_not_repeat():
    draws = [
        noise.normal(*place, (8,)) for place in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))
    ]
    draws.append(noise.normal(1 << 32, 0, 0, 0, (8,)))
    assert len({draw.tobytes() for draw in draws}) == len(draws)


def test_golden_normals():
    """Bytes that must never change: streams of old seeds hang on them."""
    got = noise.normal(7, 0, 0, noise.Purpose.SAMPLE, (4,))
    assert got.dtype == np.float32
    assert got.view(np.uint32).tolist() == GOLDEN_SEED_7


def test_normal_distribution():
    x = noise.normal(2026, 1, 0, 0, (1 << 18,)).astype(np.float64)
    assert abs(x.mean()) < 0.01
    assert x.std() == pytest.approx(1, abs=0.01)
    assert (x**3).mean() == pytest.approx(0, abs=0.03)
    assert (x**4).mean() == pytest.approx(3, abs=0.06)
    assert np.corrcoef(x[0::2], x[1::2])[0, 1] == pytest.approx(0, abs=0.01)


def test_every_word_gives_a_finite_normal():
    """Also the corners: u = 2^-24 is the longest radius, u = 1 the shortest."""
    corners = np.array([[a, b, a, b] for a in (0, 255, 256, 2**32 - 1) for b in (0, 2**31, 2**32 - 1)], dtype=np.uint32)
    x = noise.box_muller(corners)
    assert np.isfinite(x).all()
    assert np.abs(x).max() < 5.8


@given(st.lists(words, min_size=4, max_size=4))
def test_box_muller_to_two_ulp(row):
    """Against the formula in fp64 from the fp32 angle."""
    got = noise.box_muller(np.array([row], dtype=np.uint32))[0]
    for pair in range(2):
        u = ((row[2 * pair] >> 8) + 1) * 2.0**-24
        angle = float(np.float32((row[2 * pair + 1] >> 8) * 2.0**-24) * np.float32(2 * np.pi))
        r = np.sqrt(-2 * np.log(u))
        for mine, exact in zip(got[2 * pair :], (r * np.cos(angle), r * np.sin(angle)), strict=False):
            assert abs(float(mine) - exact) <= 2 * float(np.spacing(np.float32(abs(exact))))


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_seeds_out_of_range(seed):
    with pytest.raises(ConfigError, match="seed"):
        noise.normal(seed, 0, 0, 0, (1,))
