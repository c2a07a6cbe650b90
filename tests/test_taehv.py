"""TAEHV's decoder: a naive twin in fp64 that has no state and no batches of frames, and theorem 3 however it is cut."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cfrt.config import AutoencoderConfig
from cfrt.errors import ConfigError
from cfrt.nn.taehv import TAEHV

pytestmark = pytest.mark.cpu

CONFIG = AutoencoderConfig(kind="taehv", latent_channels=4, spatial=8, widths=(4, 6, 8, 10))
RELEASED = AutoencoderConfig(kind="taehv", latent_channels=16, spatial=8)


@pytest.fixture(scope="module")
def model() -> TAEHV:
    torch.manual_seed(0)
    return TAEHV(CONFIG).double().eval().requires_grad_(False)


def noise(frames: int, batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return 2 * torch.randn(batch, frames, 4, 3, 5, dtype=torch.float64)


def offline(weights: dict[str, Tensor], latents: Tensor) -> Tensor:
    """The whole clip, layer by layer and frame by frame, from the released file's names alone."""

    def conv(layer: str, x: Tensor) -> Tensor:
        weight = weights[f"decoder.{layer}.weight"]
        return F.conv2d(x, weight, weights.get(f"decoder.{layer}.bias"), padding=weight.shape[-1] // 2)

    def blocks(frames: list[Tensor], layers: tuple[int, ...]) -> list[Tensor]:
        for layer in layers:
            made = []
            for i, x in enumerate(frames):
                before = frames[i - 1] if i else torch.zeros_like(x)
                y = conv(f"{layer}.conv.0", torch.cat([x, before], 1)).clamp(min=0)
                y = conv(f"{layer}.conv.2", y).clamp(min=0)
                made.append((conv(f"{layer}.conv.4", y) + x).clamp(min=0))
            frames = made
        return frames

    def enlarge(frames: list[Tensor], grow: int, after: int, times: int) -> list[Tensor]:
        made = []
        for x in frames:
            big = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            made += list(conv(f"{grow}.conv", big).chunk(times, dim=1))
        return [conv(str(after), x) for x in made]

    frames = [conv("1", 3 * (x / 3).tanh()).clamp(min=0) for x in latents.unbind(1)]
    frames = enlarge(blocks(frames, (3, 4, 5)), 7, 8, times=1)
    frames = enlarge(blocks(frames, (9, 10, 11)), 13, 14, times=2)
    frames = enlarge(blocks(frames, (15, 16, 17)), 19, 20, times=2)
    return torch.stack([conv("22", x.clamp(min=0)) for x in frames][3:], dim=1)


@pytest.mark.parametrize("cuts", [(5,), (1, 1, 1, 1, 1), (3, 2), (1, 4)], ids=str)
def test_streaming_equals_the_naive_twin(model: TAEHV, cuts: tuple[int, ...]) -> None:
    """Units of any number of latent frames; the first gives 1 + 4 (F - 1) pixel frames, the others 4 F."""
    latents, state, parts = noise(5), None, []
    expected = offline(model.state_dict(), latents)
    for piece in latents.split(cuts, dim=1):
        video, state = model.decode(piece, state)
        parts.append(video)
    got = torch.cat(parts, dim=1)
    assert got.shape == expected.shape == (2, 17, 3, 24, 40)
    assert expected.std() > 1e-3
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    assert state is not None
    assert len(state) == 9


def test_every_frame_depends_on_the_latents_before_it_and_on_none_after(model: TAEHV) -> None:
    latents = noise(4).requires_grad_()
    model.decode(latents)[0][:, 5].sum().backward()
    assert latents.grad is not None
    assert [bool(g.any()) for g in latents.grad.unbind(1)] == [True, True, True, False]


def test_the_names_and_sizes_are_the_released_files() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(x.shape) for name, x in TAEHV(RELEASED).state_dict().items()}
    assert len(shapes) == 64
    assert shapes["decoder.1.weight"] == (256, 16, 3, 3)
    assert shapes["decoder.3.conv.0.weight"] == (256, 512, 3, 3)
    assert shapes["decoder.7.conv.weight"] == (256, 256, 1, 1)
    assert shapes["decoder.13.conv.weight"] == (256, 128, 1, 1)
    assert shapes["decoder.20.weight"] == (64, 64, 3, 3)
    assert shapes["decoder.22.bias"] == (3,)


def test_the_decoder_can_be_exported_with_its_state(model: TAEHV) -> None:
    latents = noise(2, batch=1)
    _, state = model.decode(latents[:, :1])
    graph = torch.export.export(model, (latents[:, 1:], state)).module()
    (got, left), (expected, kept) = graph(latents[:, 1:], state), model(latents[:, 1:], state)
    for a, b in zip((got, *left), (expected, *kept), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("changes", [{"spatial": 16}, {"temporal": 2}, {"widths": (8, 16)}, {"kind": "wan"}], ids=str)
def test_other_latents_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="kind 'taehv'"):
        TAEHV(replace(CONFIG, **changes))
