"""`_cfrt` mirrors what Python defines: the ring plan of cfrt/blocks.py and the noise of cfrt/noise.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import _cfrt
from cfrt import blocks

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


@pytest.mark.parametrize("sizes", [{"unit": 0, "window": 3}, {"unit": 2, "window": 1}, {"unit": 1, "window": 1, "sinks": -1}])
def test_plan_refuses_the_same_geometries(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError) as python:
        blocks.Geometry(**sizes)
    with pytest.raises(ValueError) as cpp:
        _cfrt.Geometry(**sizes)
    assert str(cpp.value) == str(python.value)


def test_plan_refuses_the_past_of_the_stream() -> None:
    geometry = _cfrt.Geometry(unit=1, window=4)
    with pytest.raises(ValueError, match="expected unit >= 0, got -1"):
        geometry.slots(-1)
    with pytest.raises(ValueError, match="expected frame >= 0, got -2"):
        geometry.slot(-2)


def test_build_info() -> None:
    info = _cfrt.build_info()
    assert set(info) == {"compiler", "isa", "cuda"}
    assert any(character.isdigit() for character in info["compiler"])
    assert info["cuda"] is None or {80, 86, 89, 90} <= set(info["cuda"]["archs"])
