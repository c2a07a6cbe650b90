"""The small autoencoder keeps Wan's time law and decodes a stream exactly as it decodes a clip. Runs on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfrt.config import AutoencoderConfig
from cfrt.errors import ConfigError
from cfrt.nn.autoencoder import Autoencoder

pytestmark = pytest.mark.cpu

CONFIG = AutoencoderConfig(kind="tiny", latent_channels=4, spatial=16, widths=(8, 8, 8, 8, 8, 8))


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    network = Autoencoder(CONFIG).double().eval().requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.latent_mean.normal_()
    network.latent_std.uniform_(0.5, 2.0)
    return network


def _video(frames: int) -> torch.Tensor:
    return torch.rand(2, frames, 3, 32, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(frames))


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_decoding_does_not_depend_on_where_a_stream_is_cut(autoencoder: Autoencoder, cuts: list[int]) -> None:
    latents = torch.randn(2, sum(cuts), 4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    offline, last = autoencoder.decode(latents)
    parts, state = [], None
    for chunk in latents.split(cuts, dim=1):
        part, state = autoencoder.decode(chunk, state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), offline, atol=1e-12, rtol=0)
    assert torch.equal(state, last)
    assert offline.shape[1] == 1 + 4 * (sum(cuts) - 1)


def test_encoding_is_causal(autoencoder: Autoencoder) -> None:
    """A longer clip does not change the latents of its beginning; a picture is a clip of one frame."""
    video = _video(13)
    whole = autoencoder.encode(video)
    assert whole.shape == (2, 4, 4, 2, 3)
    for units in (1, 2, 3):
        part = autoencoder.encode(video[:, : 1 + 4 * (units - 1)])
        torch.testing.assert_close(part, whole[:, :units], atol=1e-12, rtol=0)


def test_a_length_against_the_time_law_is_refused(autoencoder: Autoencoder) -> None:
    with pytest.raises(ConfigError, match=r"1 \+ 4 k frames.*got 6"):
        autoencoder.encode(_video(6))


def test_an_unfitting_configuration_is_refused() -> None:
    with pytest.raises(ConfigError, match="kind 'tiny'"):
        Autoencoder(AutoencoderConfig(kind="wan", latent_channels=16, spatial=8, widths=(96,)))


def test_latents_are_standardised_by_the_stored_statistics(autoencoder: Autoencoder) -> None:
    video = _video(5)
    raw = autoencoder.encode_raw(video)
    expected = (raw - autoencoder.latent_mean) / autoencoder.latent_std
    torch.testing.assert_close(autoencoder.encode(video), expected)
