"""The ring is the naive concatenated cache cut to [sinks | window], never moves data, and lets gradients be."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cfrt.blocks import Geometry
from cfrt.config import PRESETS, ModelConfig
from cfrt.errors import ConfigError, EngineError
from cfrt.nn.ring import RingCache

pytestmark = pytest.mark.cpu

BATCH, LAYERS = 2, 2


def config_of(g: Geometry) -> ModelConfig:
    """The tiny model's 4 tokens a frame, in small heads."""
    sizes = {"width": 8, "heads": 2, "depth": LAYERS, "trained_frames": 12 * g.unit}
    return replace(PRESETS["tiny"], **sizes, unit=g.unit, window=g.window, sinks=g.sinks)


CONFIG = config_of(Geometry(unit=2, window=4, sinks=1))
LONG = config_of(Geometry(unit=2, window=8))
N, H, D = CONFIG.frame_tokens, CONFIG.heads, CONFIG.head_dim

geometries = st.integers(1, 3).flatmap(
    lambda unit: st.builds(Geometry, unit=st.just(unit), window=st.integers(unit, 9), sinks=st.integers(0, 4))
)


def content(frames: range, layer: int, clean: bool = True) -> Tensor:
    """Keys that say where they are from: [B, frames N, H, D] of frame + layer / 10, negative while noisy."""
    per_frame = torch.tensor([frame + 1 + layer / 10 for frame in frames]) * (1 if clean else -1)
    return per_frame.repeat_interleave(N)[None, :, None, None].expand(BATCH, -1, H, D).clone()


def own_frames(ring: RingCache, unit: int) -> range:
    return range(unit * ring.geometry.unit, (unit + 1) * ring.geometry.unit)


def read_pass(ring: RingCache, unit: int, clean: bool) -> list[list[float]]:
    """One pass over a unit: what each layer reads, one number per frame; values are checked to follow keys."""
    seen = []
    for layer, memory in enumerate(ring.open(unit)[0]):
        own = content(own_frames(ring, unit), layer, clean)
        keys = memory.extend(own, -own)
        spans = [(0, keys.k.shape[1])] if keys.ranges is None else keys.ranges
        k = torch.cat([keys.k[:, a:b] for a, b in spans], dim=1)
        v = torch.cat([keys.v[:, a:b] for a, b in spans], dim=1)
        assert torch.equal(v, -k)
        assert torch.equal(k, content_like(k))
        seen.append(k[0, ::N, 0, 0].tolist())
    return seen


def content_like(k: Tensor) -> Tensor:
    """Every frame's tokens, samples and heads alike: the frame was read whole."""
    return k[:1, ::N, :1, :1].repeat_interleave(N, dim=1).expand_as(k)


def naive(g: Geometry, unit: int, layer: int, clean: bool) -> list[float]:
    """The specification: all frames ever, concatenated, cut to [sinks | window]; the last unit as clean as it is."""
    end = (unit + 1) * g.unit
    frames = [f for f in range(end) if f < g.sinks or f >= end - g.window]
    return [content(range(f, f + 1), layer, clean or f < end - g.unit)[0, 0, 0, 0].item() for f in frames]


@given(geometries, st.integers(1, 14), st.integers(0, 2), st.booleans())
def test_ring_is_the_naive_cache(g, units, noisy_passes, grad):
    """Any geometry, several noisy passes a unit then the clean one, in place and in grad mode."""
    ring = RingCache(config_of(g), BATCH)
    for unit in range(units):
        for clean in [False] * noisy_passes + [True]:
            with torch.set_grad_enabled(grad and not clean):
                seen = read_pass(ring, unit, clean)
            assert seen == [naive(g, unit, layer, clean) for layer in range(LAYERS)]
        ring.commit(unit)
    assert ring.next_frame == units * g.unit


@given(geometries, st.integers(0, 14))
def test_ranges_are_the_ring_plan(g, unit):
    ring = RingCache(config_of(g), BATCH)
    for past in range(unit):
        with torch.no_grad():
            ring.open(past)
        ring.commit(past)
    assert ring.ranges(unit) == [(start * N, stop * N) for start, stop in g.slots(unit)]


@given(geometries, st.integers(0, 9))
def test_sink_tokens_are_the_first_ones_read(g, units):
    ring = RingCache(config_of(g), BATCH)
    for unit in range(units + 1):
        with torch.enable_grad():
            in_copy = ring.open(unit)[1]
        with torch.no_grad():
            in_place = ring.open(unit)[1]
        ring.commit(unit)
    assert in_place == N * min(g.sinks, (units + 1) * g.unit)
    assert in_copy == N * min(g.sinks, units * g.unit)


@torch.no_grad()
def test_nothing_is_moved_or_allocated():
    ring = RingCache(CONFIG, BATCH)
    where = [x.data_ptr() for x in (*ring.k, *ring.v)]
    for unit in range(50):
        read_pass(ring, unit, clean=True)
        ring.commit(unit)
    assert [x.data_ptr() for x in (*ring.k, *ring.v)] == where
    assert ring.k[0].shape == (BATCH, CONFIG.geometry.capacity * N, H, D)


# ---------------------------------------------------------------------- gradients


def test_gradients_flow_through_the_own_unit_only():
    ring = RingCache(CONFIG, BATCH)
    own = content(range(2), 0).requires_grad_()
    keys = ring.open(0)[0][0].extend(own, own)
    (keys.k.sum() + keys.v.sum()).backward()
    assert torch.equal(own.grad, torch.full_like(own, 2))
    with torch.no_grad():
        ring.open(0)
    ring.commit(0)
    past = ring.open(1)[0][0].extend(own, own)
    assert torch.autograd.grad(past.k.sum(), own)[0].sum() == own.numel()
    assert not any(x.requires_grad for x in (*ring.k, *ring.v))


def test_later_units_do_not_disturb_an_earlier_graph():
    """The ring is overwritten before backward runs; what was read is a copy."""
    ring = RingCache(CONFIG, BATCH)
    with torch.no_grad():
        read_pass(ring, 0, clean=True)
    ring.commit(0)
    own = content(range(2, 4), 0).requires_grad_()
    keys = ring.open(1)[0][0].extend(own, own)
    loss = (keys.k**2).sum()
    before = loss.item()
    with torch.no_grad():
        for tensor in (*ring.k, *ring.v):
            tensor.fill_(99.0)
    loss.backward()
    assert (keys.k**2).sum().item() == before
    assert torch.equal(own.grad, 2 * own)


def test_units_share_the_copies_of_their_past():
    """A rollout with gradients keeps each frame of its past once, however many units see it."""
    ring, kept, opened = RingCache(LONG, BATCH), set(), []
    for unit in range(LONG.window // LONG.unit):
        memories, _ = ring.open(unit)
        kept |= {x.untyped_storage().data_ptr() for memory in memories for x in (*memory.past_k, *memory.past_v)}
        opened.append(memories)  # a storage that is freed could come back under the same address
        with torch.no_grad():
            read_pass(ring, unit, clean=True)
        ring.commit(unit)
    assert len(kept) == 2 * LAYERS * (LONG.window - LONG.unit)


@pytest.mark.parametrize("how", ["again", "written", "restored"])
def test_a_copy_does_not_outlive_what_it_copies(how):
    """A unit that is committed again, written or restored is seen as it is now."""
    ring = RingCache(LONG, BATCH)
    for unit in range(2):
        with torch.no_grad():
            read_pass(ring, unit, clean=True)
        ring.commit(unit)
    before = ring.open(2)[0][0].extend(content(range(4, 6), 0), content(range(4, 6), 0)).k.clone()
    other = content(range(2), 0) + 5
    with torch.no_grad():
        if how == "again":
            for memory in ring.open(0)[0]:
                memory.extend(other, other)
            ring.commit(0)
        elif how == "written":
            ring.write(0, 0, other, other)
        else:
            ring.load_state({**ring.state(), "k": [k + 5 for k in ring.k]})
    after = ring.open(2)[0][0].extend(content(range(4, 6), 0), content(range(4, 6), 0)).k
    assert not torch.equal(after, before)
    assert torch.equal(after[:, : 2 * N], before[:, : 2 * N] + 5)


# ---------------------------------------------------------------------- order, rewinding, snapshots


def filled(units: int) -> RingCache:
    ring = RingCache(CONFIG, BATCH)
    for unit in range(units):
        with torch.no_grad():
            read_pass(ring, unit, clean=True)
        ring.commit(unit)
    return ring


def test_units_come_in_order():
    with pytest.raises(EngineError, match=r"unit 2 starts at frame 4.*up to frame 2"):
        filled(1).open(2)
    with pytest.raises(EngineError, match="unit 1 has left the ring"):
        filled(9).open(1)


@torch.no_grad()
def test_a_unit_opened_again_sees_what_is_still_held():
    """Units 5 and 6 again after 7 (window 4, unit 2, one sink): of unit 5's window, frames 8 and 9 are gone."""
    ring = filled(8)
    assert ring.held() == [0, *range(10, 16)]
    assert read_pass(ring, 5, clean=True)[0] == [1, 11, 12]
    ring.commit(5)
    assert read_pass(ring, 6, clean=True)[0] == [1, 11, 12, 13, 14]
    ring.commit(6)
    assert ring.next_frame == 16


@torch.no_grad()
def test_rewind():
    ring = filled(8)
    ring.rewind(7)
    assert (ring.next_frame, ring.held()) == (14, [0, *range(10, 14)])
    assert read_pass(ring, 7, clean=False) == [naive(CONFIG.geometry, 7, layer, False) for layer in range(LAYERS)]
    with pytest.raises(EngineError, match=r"frames \[6, 7\] have left the ring"):
        filled(8).rewind(4)
    with pytest.raises(EngineError, match="lies ahead"):
        ring.rewind(9)


@torch.no_grad()
def test_rewind_after_restoring_frames_from_a_journal():
    ring, journal = filled(4), {}
    for unit in range(4, 8):
        for frame in (f for f in ring.held() if f >= 1):
            journal[frame] = [ring.read(layer, frame) for layer in range(LAYERS)]
        read_pass(ring, unit, clean=True)
        ring.commit(unit)
    for frame in (4, 5, 6, 7):
        for layer in range(LAYERS):
            ring.write(layer, frame, *journal[frame][layer])
        ring.hold(frame)
    ring.rewind(4)
    assert read_pass(ring, 4, clean=True) == [naive(CONFIG.geometry, 4, layer, True) for layer in range(LAYERS)]
    with pytest.raises(EngineError, match="frame 2 is not in the ring"):
        ring.read(0, 2)


@torch.no_grad()
def test_a_restored_ring_goes_on_as_if_nothing_had_happened():
    ring = filled(5)
    state = ring.state()
    expected = read_pass(ring, 5, clean=True)
    other = RingCache(CONFIG, BATCH)
    other.load_state(state)
    assert read_pass(other, 5, clean=True) == expected
    assert all(torch.equal(a, b) for a, b in zip(ring.k + ring.v, other.k + other.v, strict=True))
    with pytest.raises(ConfigError, match="another model"):
        RingCache(CONFIG, BATCH + 1).load_state(state)


def test_repr_shows_shapes():
    assert repr(filled(1)) == "RingCache(layers=2, k=(2, 28, 2, 4), next_frame=2, holds=[0, 1])"
