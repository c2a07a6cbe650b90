"""Teacher forcing by ranges: who sees whom, and every number and gradient, as under the dense mask."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_dit import BATCH, GEOMETRIES, Clip, difference, network, small

from cfrt.blocks import Geometry, to_tokens
from cfrt.nn import dit
from cfrt.nn.attention.parts import Part, attention_by_parts

pytestmark = pytest.mark.cpu


@given(
    unit=st.integers(1, 4),
    wider=st.integers(0, 6),
    sinks=st.integers(0, 9),
    frames=st.integers(1, 14),
    frame_tokens=st.integers(1, 3),
)
def test_parts_are_the_mask(unit: int, wider: int, sinks: int, frames: int, frame_tokens: int) -> None:
    """Any geometry, clips that end within a unit and sinks beyond the clip included."""
    geometry = Geometry(unit=unit, window=unit + wider, sinks=sinks)
    drawn = np.zeros((2 * frames * frame_tokens,) * 2, bool)
    answered = 0
    for part in dit.teacher_forcing_parts(geometry, frames, frame_tokens):
        assert part.queries[0] == answered, "queries come in order, each once"
        answered = part.queries[1]
        for start, stop in part.keys:
            assert not drawn[slice(*part.queries), start:stop].any(), "each key once"
            drawn[slice(*part.queries), start:stop] = True
        read = np.concatenate([np.arange(*span) for span in part.keys])
        far = read < min(sinks, frames) * frame_tokens
        assert far[: part.sink_tokens].all(), "sinks are read first"
        assert far.sum() == part.sink_tokens
    np.testing.assert_array_equal(drawn, to_tokens(geometry.teacher_forcing_mask(frames), frame_tokens))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])  # those that take masks and have gradients
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_ranges_are_the_mask(geometry: tuple[int, ...], backend: str) -> None:
    """fp64: the same v and the same gradients, with respect to both halves and to every weight."""
    *shape, frames = geometry
    config = small(*shape)
    model, clip = network(config), Clip(config, frames)
    clip.clean.requires_grad_()
    clip.noisy.requires_grad_()
    found = []
    for layout in ("mask", "ranges"):
        text = model.text_kv(clip.rows)
        v = model.teacher_forced(clip.clean, clip.noisy, clip.t, text, clip.caption, layout=layout, backend=backend)
        inputs = [clip.clean, clip.noisy, *model.parameters()]
        found.append((v, torch.autograd.grad(v.square().mean(), inputs)))
    (dense, dense_grads), (ranges, ranges_grads) = found
    assert dense.std() > 0.1
    assert difference(dense, ranges) <= 1e-10
    for a, b in zip(dense_grads, ranges_grads, strict=True):
        assert difference(a, b) <= 1e-9 * max(1.0, a.abs().max().item())


@torch.no_grad()
def test_auto_takes_ranges_for_large_units(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small()
    model, clip = network(config, torch.float32), Clip(config, 6, torch.float32)
    text, made = model.text_kv(clip.rows), []
    monkeypatch.setattr(dit, "teacher_forcing_parts", lambda *shape: made.append(shape) or real(*shape))
    for tokens in (config.frame_tokens + 1, config.frame_tokens):
        monkeypatch.setattr(dit, "RANGE_TOKENS", tokens)
        model.teacher_forced(clip.clean, clip.noisy, clip.t, text, clip.caption)
    assert made == [(config.geometry, 6, config.frame_tokens)], "small units under the mask, large ones by ranges"


real = dit.teacher_forcing_parts


def test_parts_answer_in_order() -> None:
    q, k, v = torch.randn(3, BATCH, 4, 2, 8).unbind(0)
    parts = [Part((0, 1), ((2, 3),)), Part((1, 4), ((0, 1), (3, 4)))]
    answers = attention_by_parts(q, k, v, parts)
    torch.testing.assert_close(answers[:, 0], v[:, 2])
    assert answers.shape == q.shape
