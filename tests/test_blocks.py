"""Who sees whom, and where a key lives: every form of the rule against the rule written out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfrt import blocks
from cfrt.blocks import Geometry
from cfrt.errors import ConfigError

pytestmark = pytest.mark.cpu


@st.composite
def geometries(draw):
    unit = draw(st.integers(1, 4))
    return Geometry(unit=unit, window=draw(st.integers(unit, 12)), sinks=draw(st.integers(0, 5)))


def sees(g: Geometry, unit: int, frame: int) -> bool:
    """Design: f < (u+1)F and (f < K or f >= (u+1)F - W)."""
    end = (unit + 1) * g.unit
    return frame < end and (frame < g.sinks or frame >= end - g.window)


def frames_of(spans):
    return [frame for span in spans for frame in range(*span)]


def test_published_windows():
    """What the reference's cache holds: window 6 with 2 sinks at frame 20; window 12 with 3 sinks in chunks of 3."""
    framewise = Geometry(unit=1, window=4, sinks=2)
    assert frames_of(framewise.visible_frames(20)) == [0, 1, 17, 18, 19, 20]
    chunkwise = Geometry(unit=3, window=9, sinks=3)
    assert frames_of(chunkwise.visible_frames(9)) == [0, 1, 2, *range(21, 30)]


@given(geometries(), st.integers(0, 40))
def test_visible_frames_are_the_rule(g, unit):
    frames = frames_of(g.visible_frames(unit))
    assert frames == [f for f in range((unit + 2) * g.unit) if sees(g, unit, f)]
    assert all(g.visible(unit, f) == sees(g, unit, f) for f in range((unit + 2) * g.unit))
    assert not g.visible(unit, -1)
    assert set(range(unit * g.unit, (unit + 1) * g.unit)) <= set(frames), "a unit sees itself"
    assert len(frames) <= g.sinks + g.window


@given(geometries(), st.integers(0, 40))
def test_slots_are_where_the_visible_frames_live(g, unit):
    slots = frames_of(g.slots(unit))
    assert slots == [g.slot(frame) for frame in frames_of(g.visible_frames(unit))]
    assert len(g.slots(unit)) <= 3
    assert all(0 <= start < stop <= g.capacity for start, stop in g.slots(unit))


@given(geometries(), st.integers(1, 40))
def test_two_units_fit_in_the_ring_at_once(g, unit):
    """A fused pass commits a unit and denoises the next: all they see has a slot of its own."""
    frames = sorted({f for u in (unit - 1, unit) for f in frames_of(g.visible_frames(u))})
    assert len({g.slot(frame) for frame in frames}) == len(frames)


@given(geometries(), st.integers(1, 14))
def test_causal_mask_is_the_rule(g, frames):
    expected = [[sees(g, q // g.unit, k) for k in range(frames)] for q in range(frames)]
    assert np.array_equal(g.causal_mask(frames), expected)


@given(geometries(), st.integers(1, 12))
def test_teacher_forcing_mask_is_the_rule(g, frames):
    """Clean sees clean as in streaming; noisy sees the clean past of its unit, and its own unit's noisy frames."""
    expected = np.zeros((2 * frames, 2 * frames), dtype=bool)
    for q in range(frames):
        for k in range(frames):
            unit = q // g.unit
            expected[q, k] = sees(g, unit, k)
            expected[frames + q, k] = sees(g, unit, k) and k < unit * g.unit
            expected[frames + q, frames + k] = k // g.unit == unit
    mask = g.teacher_forcing_mask(frames)
    assert mask.dtype == bool
    assert np.array_equal(mask, expected)


def test_the_paper_s_mask_when_the_window_covers_the_clip():
    """Units of 1 over 3 frames: rows and columns are clean 0, 1, 2, noisy 0, 1, 2."""
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert Geometry(unit=1, window=3).teacher_forcing_mask(3).astype(int).tolist() == expected


@given(geometries(), st.integers(1, 6), st.integers(1, 3))
def test_flex_masks_are_the_dense_ones(g, frames, tokens):
    """The same functions of token indices, on numpy arrays, torch tensors and plain integers."""
    dense = blocks.to_tokens(g.teacher_forcing_mask(frames), tokens)
    mod = blocks.teacher_forcing_mod(g, frames, tokens)
    index = torch.arange(2 * frames * tokens)
    assert np.array_equal(mod(0, 0, index[:, None], index[None, :]).numpy(), dense)
    assert bool(mod(0, 0, frames * tokens, frames * tokens)) is True
    causal, index = blocks.causal_mod(g, tokens), np.arange(frames * tokens)
    expected = blocks.to_tokens(g.causal_mask(frames), tokens)
    assert np.array_equal(causal(0, 0, index[:, None], index[None, :]), expected)


def test_flex_attention_takes_the_mask():
    from torch.nn.attention.flex_attention import create_mask

    g = Geometry(unit=2, window=4, sinks=1)
    mask = create_mask(blocks.teacher_forcing_mod(g, 6, 3), None, None, 36, 36, device="cpu")
    assert np.array_equal(mask[0, 0].numpy(), blocks.to_tokens(g.teacher_forcing_mask(6), 3))


@pytest.mark.parametrize("wrong", [(0, 4, 0), (1, 0, 0), (3, 2, 0), (1, 4, -1)])
def test_impossible_geometries(wrong):
    with pytest.raises(ConfigError, match="expected"):
        Geometry(unit=wrong[0], window=wrong[1], sinks=wrong[2])
