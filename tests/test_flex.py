"""FlexAttention under the project's masks: the blocks that it skips, and the same forward as by mask and by ranges.

Runs on the CPU in seconds, but for the backward, which needs a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from cfrt.blocks import Geometry, causal_mod, teacher_forcing_mod
from cfrt.config import PRESETS, ModelConfig
from cfrt.nn.attention import block_mask
from cfrt.nn.dit import CausalDiT

cpu = pytest.mark.cpu
unfused = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
CPU = torch.device("cpu")


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    unit = draw(st.integers(1, 3))
    return Geometry(unit=unit, window=draw(st.integers(unit, 7)), sinks=draw(st.integers(0, 3)))


@cpu
@given(geometries(), st.integers(1, 5), st.integers(1, 9), st.sampled_from([2, 4, 8]))
def test_blocks_made_from_frames_are_those_made_from_tokens(
    geometry: Geometry, units: int, frame_tokens: int, size: int
) -> None:
    """Which blocks are looked at, and which of them whole, as torch finds by looking at every pair of tokens."""
    frames = units * geometry.unit
    for mask, mod in (
        (geometry.causal_mask(frames), causal_mod(geometry, frame_tokens)),
        (geometry.teacher_forcing_mask(frames), teacher_forcing_mod(geometry, frames, frame_tokens)),
    ):
        length = len(mask) * frame_tokens
        expected = create_block_mask(mod, None, None, length, length, device="cpu", BLOCK_SIZE=size)
        found = block_mask(mask, frame_tokens, mod, CPU, size)
        assert torch.equal(found.to_dense(), expected.to_dense())
        assert found.full_kv_num_blocks is not None
        assert expected.full_kv_num_blocks is not None
        assert torch.equal(found.full_kv_num_blocks, expected.full_kv_num_blocks)
        assert torch.equal(found.kv_num_blocks, expected.kv_num_blocks)
        assert found.seq_lengths == expected.seq_lengths


@cpu
def test_the_papers_mask_is_made_without_its_pairs() -> None:
    """65,520 tokens: 4.3e9 pairs, of which 26 % are looked at."""
    model = PRESETS["wan-1.3b-framewise-ar"]
    mod = teacher_forcing_mod(model.geometry, 21, model.frame_tokens)
    blocks = block_mask(model.geometry.teacher_forcing_mask(21), model.frame_tokens, mod, CPU)
    assert blocks.seq_lengths == (65520, 65520)
    assert 100 - blocks.sparsity() == pytest.approx(100 * model.geometry.teacher_forcing_mask(21).mean(), rel=0.1)


def _model(unit: int, device: torch.device = CPU, heads: int = 1) -> tuple[ModelConfig, CausalDiT]:
    config = replace(
        PRESETS["tiny"], width=32 * heads, depth=2, heads=heads, ffn=32, latent_grid=(4, 4), unit=unit, window=6,
        trained_frames=6,
    )  # fmt: skip
    torch.manual_seed(0)
    dit = CausalDiT(config)
    for silent in (dit.head.head, *(block.cross_attn.o for block in dit.layers)):
        nn.init.normal_(silent.weight, std=0.05)
    return config, dit.to(device)


def _clip(config: ModelConfig, device: torch.device = CPU) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    clean, noisy = torch.randn(2, 2, 6, config.latent_channels, *config.latent_grid, generator=generator)
    rows = torch.randn(2, 1, config.text.length, config.text.width, generator=generator)
    t = 1000 * torch.rand(2, 6 // config.unit, generator=generator).repeat_interleave(config.unit, 1)
    return clean.to(device), noisy.to(device), t.to(device), rows.to(device)


@cpu
@unfused
@pytest.mark.parametrize("unit", [1, 3])
@torch.no_grad()
def test_flex_is_the_mask_and_the_ranges(unit: int) -> None:
    config, dit = _model(unit)
    clean, noisy, t, rows = _clip(config)
    text = dit.text_kv(rows)
    found = {layout: dit.teacher_forced(clean, noisy, t, text, layout=layout) for layout in ("mask", "ranges", "flex")}
    torch.testing.assert_close(found["flex"], found["mask"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["flex"], found["ranges"], atol=1e-5, rtol=1e-4)
    mask = torch.from_numpy(config.geometry.causal_mask(6))
    causal = [dit(noisy, t, text, mask=mask, layout=layout) for layout in ("mask", "flex")]
    torch.testing.assert_close(causal[0], causal[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(causal[0], dit(noisy, t, text), atol=1e-3)


# torch.compile asks each tensor for its .grad and keeps PyTorch 2.11's warning of that from being printed only.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.gpu
@pytest.mark.parametrize("unit", [1, 3])
def test_flex_has_the_gradients_of_the_mask(unit: int) -> None:
    device, gradients = torch.device("cuda"), []
    for layout in ("mask", "flex"):
        config, dit = _model(unit, device, heads=2)
        clean, noisy, t, rows = _clip(config, device)
        dit.teacher_forced(clean, noisy, t, dit.text_kv(rows), layout=layout).square().mean().backward()
        gradients.append([p.grad for p in dit.parameters()])
    for mask, flex in zip(*gradients, strict=True):
        torch.testing.assert_close(flex, mask, atol=1e-4, rtol=1e-2)
