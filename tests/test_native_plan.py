"""`_cfrt` mirrors what Python defines: the ring plan of cfrt/blocks.py and the noise of cfrt/noise.py."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import _cfrt
from cfrt import blocks, flow, noise
from cfrt.errors import ConfigError

pytestmark = pytest.mark.cpu


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, int]:
    unit = draw(st.integers(1, 9))
    return {"unit": unit, "window": draw(st.integers(unit, 40)), "sinks": draw(st.integers(0, 12))}


@given(sizes=geometries(), unit=st.one_of(st.integers(0, 60), st.integers(0, 2**40)), offset=st.integers(-60, 12))
def test_plan_is_the_same_in_cpp(sizes: dict[str, int], unit: int, offset: int) -> None:
    """Capacity, visibility, visible ranges, slots and slot ranges: equal, from the first units to very late ones."""
    python, cpp = blocks.Geometry(**sizes), _cfrt.Geometry(**sizes)
    frame = (unit + 1) * sizes["unit"] + offset
    assert cpp.capacity == python.capacity
    assert cpp.visible_frames(unit) == python.visible_frames(unit)
    assert cpp.slots(unit) == python.slots(unit)
    assert cpp.visible(unit, frame) == python.visible(unit, frame)
    if frame >= 0:
        assert cpp.slot(frame) == python.slot(frame)


@pytest.mark.parametrize(("unit", "window", "sinks"), [(0, 3, 0), (2, 1, 0), (1, 1, -1)])
def test_plan_refuses_the_same_geometries(unit: int, window: int, sinks: int) -> None:
    """And in the same words."""
    with pytest.raises(ConfigError) as python:
        blocks.Geometry(unit=unit, window=window, sinks=sinks)
    with pytest.raises(ValueError, match=re.escape(str(python.value))):
        _cfrt.Geometry(unit=unit, window=window, sinks=sinks)


def test_plan_refuses_the_past_of_the_stream() -> None:
    geometry = _cfrt.Geometry(unit=1, window=4)
    with pytest.raises(ValueError, match="expected unit >= 0, got -1"):
        geometry.slots(-1)
    with pytest.raises(ValueError, match="expected frame >= 0, got -2"):
        geometry.slot(-2)


WORDS = st.integers(0, 2**32 - 1)
KEYS = st.tuples(st.integers(0, 2**64 - 1), WORDS, WORDS, WORDS)


def ulps(a: np.ndarray, b: np.ndarray) -> int:
    """The largest distance between float32 arrays, counted in representable numbers."""
    lines = [np.where(x.view(np.int32) < 0, -(x.view(np.int32) & 0x7FFFFFFF), x.view(np.int32)) for x in (a, b)]
    return int(np.abs(lines[0].astype(np.int64) - lines[1]).max(initial=0))


@given(key=KEYS, count=st.integers(0, 70))
def test_random_words_are_the_same_in_cpp(key: tuple[int, int, int, int], count: int) -> None:
    np.testing.assert_array_equal(_cfrt.Noise(*key).bits(count), noise.bits(*key, -(-count // 4)).ravel()[:count])


def test_random_words_are_philox() -> None:
    """The published test vector of Philox4x32-10 at counter 0, key 0 (Random123, kat_vectors)."""
    words = _cfrt.Noise(0, 0, 0, 0).bits(4)
    assert [f"{word:08x}" for word in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@given(key=KEYS, count=st.integers(0, 4099))
def test_normals_are_the_same_in_cpp(key: tuple[int, int, int, int], count: int) -> None:
    assert ulps(_cfrt.Noise(*key).normal(count), noise.normal(*key, (count,))) <= 2


@given(key=KEYS, count=st.integers(0, 300), s=st.floats(0, 1))
def test_renoise_is_the_formula_of_flow(key: tuple[int, int, int, int], count: int, s: float) -> None:
    """Within the rounding of the two products and their sum; in place as well."""
    x0 = np.random.default_rng(key[0]).normal(size=count).astype(np.float32)
    eps = noise.normal(*key, (count,))
    out = np.full(count, np.nan, dtype=np.float32)
    _cfrt.renoise(x0, s, _cfrt.Noise(*key), out)
    bound = 2.0**-22 * ((1 - s) * np.abs(x0) + s * np.abs(eps))
    assert (np.abs(out - flow.renoise(x0.astype(np.float64), eps.astype(np.float64), s)) <= bound).all()
    _cfrt.renoise(x0, s, _cfrt.Noise(*key), x0)
    np.testing.assert_array_equal(x0, out)


def test_renoise_refuses_what_it_would_have_to_copy() -> None:
    key, x0 = _cfrt.Noise(1, 2, 3, 0), np.zeros((4, 6), dtype=np.float32)
    frozen = x0.copy()
    frozen.flags.writeable = False
    for out in (x0[:, ::2], x0.astype(np.float64)):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            _cfrt.renoise(out, 0.5, key, out)
    with pytest.raises(ValueError, match="expected out with as many elements as x0, 24, got 12"):
        _cfrt.renoise(x0, 0.5, key, x0[:2].copy())
    with pytest.raises(ValueError, match="not writeable"):
        _cfrt.renoise(x0, 0.5, key, frozen)


def test_build_info() -> None:
    info = _cfrt.build_info()
    assert set(info) == {"compiler", "isa", "cuda"}
    assert any(character.isdigit() for character in info["compiler"])
    assert info["cuda"] is None or (info["cuda"]["version"] and info["cuda"]["archs"])
