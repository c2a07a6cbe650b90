"""The DiT is Wan2.1's: the same random weights in diffusers' WanTransformer3DModel give the same output."""

from dataclasses import replace

import pytest
import torch

from cfrt import weights
from cfrt.config import PRESETS, TextConfig
from cfrt.nn.dit import CausalDiT

diffusers = pytest.importorskip("diffusers", reason="pip install 'cfrt[test]'")

pytestmark = pytest.mark.cpu

CONFIG = replace(
    PRESETS["tiny"],
    width=48,
    heads=2,
    depth=3,
    ffn=80,
    latent_grid=(6, 8),
    time_width=32,
    rope_theta=10000.0,
    text=TextConfig(kind="umt5", width=20, length=7),
)


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=CONFIG.patch,
        num_attention_heads=CONFIG.heads,
        attention_head_dim=CONFIG.head_dim,
        in_channels=CONFIG.latent_channels,
        out_channels=CONFIG.latent_channels,
        text_dim=CONFIG.text.width,
        freq_dim=CONFIG.time_width,
        ffn_dim=CONFIG.ffn,
        num_layers=CONFIG.depth,
        cross_attn_norm=True,
        eps=CONFIG.eps,
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def to_wan(model) -> dict:
    return {weights.from_diffusers(name): tensor.numpy() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def test_bidirectional_forward_equals_diffusers(theirs):
    """Bidirectional, one time per clip (all that diffusers knows), several frames, non-square grid."""
    ours = CausalDiT.from_arrays(CONFIG, to_wan(theirs))
    x, rows, t = torch.randn(2, 5, 16, 6, 8), torch.randn(2, 7, 20), torch.tensor([833.25, 12.0])
    expected = theirs(hidden_states=x.transpose(1, 2), timestep=t, encoder_hidden_states=rows, return_dict=False)[
        0
    ].transpose(1, 2)
    got = ours(x, t[:, None].expand(2, 5), ours.text_kv(rows[:, None]))
    assert expected.std() > 0.1
    assert (got - expected).abs().max() <= 2e-6 * max(1, expected.abs().max().item())


def test_names_map_both_ways(theirs):
    """Nothing missing, nothing extra, and back again."""
    ours = CausalDiT(CONFIG).state_dict()
    assert set(to_wan(theirs)) == set(ours)
    assert {weights.to_diffusers(name) for name in ours} == set(theirs.state_dict())
    assert all(weights.from_diffusers(weights.to_diffusers(name)) == name for name in ours)
