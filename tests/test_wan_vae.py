"""Wan's autoencoder: diffusers' AutoencoderKLWan with the same random weights, and theorem 3 however a clip is cut."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cfrt import weights
from cfrt.config import PRESETS, WAN_MEAN, WAN_STD, AutoencoderConfig
from cfrt.errors import ConfigError, WeightsError
from cfrt.nn.tiles import Tiling
from cfrt.nn.wan_vae import WanVAE

diffusers = pytest.importorskip("diffusers", reason="pip install 'cfrt[test]'")

pytestmark = pytest.mark.cpu

CONFIG = AutoencoderConfig(kind="wan", latent_channels=16, spatial=8, widths=(4, 8, 16, 16), mean=WAN_MEAN, std=WAN_STD)
GRID = (3, 5)
"""Latent cells of the tests' pictures, odd and not square."""


@pytest.fixture(scope="module")
def theirs() -> Any:
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.numel() > parameter.shape[0]:
            fan = parameter[0].numel()
            torch.nn.init.normal_(parameter, std=fan**-0.5)
        else:
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() > 1), std=0.1)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def ours(theirs: Any) -> WanVAE:
    model = WanVAE(CONFIG)
    model.load_state_dict({weights.vae_from_diffusers(name): x for name, x in theirs.state_dict().items()})
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def theirs64(theirs: Any) -> Any:
    """diffusers in fp64, also where it would enlarge pictures in fp32."""
    model = copy.deepcopy(theirs).double()
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Upsample):
                setattr(module, name, torch.nn.Upsample(scale_factor=2, mode="nearest-exact"))
    return model


@pytest.fixture(scope="module")
def ours64(ours: WanVAE) -> WanVAE:
    return copy.deepcopy(ours).double()


def clip(frames: int) -> Tensor:
    """[1, frames, 3, H, W] in [0, 1], fp64."""
    torch.manual_seed(1)
    return torch.rand(1, frames, 3, 8 * GRID[0], 8 * GRID[1]).double()


def noise(frames: int, grid: tuple[int, int] = GRID) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(1, frames, 16, *grid).double()


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert got.shape == expected.shape
    assert expected.std() > 0.05
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def no_worse(got: Tensor, reference: Tensor, exact: Tensor) -> None:
    """The 2x rule, or 2e-6 of the largest value."""
    largest = exact.abs().max()
    assert (got - exact).abs().max() <= max(2 * (reference - exact).abs().max(), 2e-6 * largest)


def normalised(raw: Tensor) -> Tensor:
    """diffusers leaves the latents' mean and deviation to its pipelines."""
    mean, std = (torch.tensor(x, dtype=raw.dtype).view(1, -1, 1, 1, 1) for x in (WAN_MEAN, WAN_STD))
    return ((raw - mean) / std).transpose(1, 2)


def raw(latents: Tensor) -> Tensor:
    mean, std = (torch.tensor(x, dtype=latents.dtype).view(1, -1, 1, 1, 1) for x in (WAN_MEAN, WAN_STD))
    return latents.transpose(1, 2) * std + mean


# ---------------------------------------------------------------------- diffusers


def their_encoding(model: Any, video: Tensor) -> Tensor:
    return normalised(model.encode(2 * video.transpose(1, 2) - 1).latent_dist.mode())


def their_decoding(model: Any, latents: Tensor) -> Tensor:
    return (model.decode(raw(latents)).sample.transpose(1, 2) + 1) / 2


@pytest.mark.parametrize("frames", [1, 9])
def test_encode_equals_diffusers(ours: WanVAE, ours64: WanVAE, theirs: Any, theirs64: Any, frames: int) -> None:
    video = clip(frames)
    exact = their_encoding(theirs64, video)
    close(ours64.encode(video), exact)
    no_worse(ours.encode(video.float()), their_encoding(theirs, video.float()), exact)


@pytest.mark.parametrize("frames", [1, 3])
def test_decode_equals_diffusers(ours: WanVAE, ours64: WanVAE, theirs: Any, theirs64: Any, frames: int) -> None:
    latents = noise(frames)
    exact, got = their_decoding(theirs64, latents), ours64.decode(latents)[0]
    assert got.shape[1] == 1 + 4 * (frames - 1)
    close(got.clamp(0, 1), exact)
    no_worse(ours.decode(latents.float())[0].clamp(0, 1), their_decoding(theirs, latents.float()), exact)


def test_half_precision_errs_no_more_than_diffusers_does(ours: WanVAE, theirs: Any, theirs64: Any) -> None:
    """The 2x rule in bf16."""
    latents = noise(2).bfloat16()
    got = copy.deepcopy(ours).bfloat16().decode(latents)[0].clamp(0, 1)
    no_worse(got, their_decoding(copy.deepcopy(theirs).bfloat16(), latents), their_decoding(theirs64, noise(2)))


def test_every_tensor_has_a_name_in_the_official_file(ours: WanVAE) -> None:
    """194 tensors at every width; the module's own state dict has none that the file lacks."""
    names = set(ours.state_dict())
    assert len(names) == 194
    assert {"conv1.weight", "conv2.bias", "encoder.conv1.weight", "encoder.downsamples.5.time_conv.weight"} <= names
    assert {"decoder.middle.1.to_qkv.weight", "decoder.upsamples.4.shortcut.weight", "decoder.head.0.gamma"} <= names
    assert {"decoder.upsamples.11.resample.1.bias", "encoder.downsamples.3.residual.6.weight"} <= names
    with pytest.raises(WeightsError, match="Wan's autoencoder"):
        weights.vae_from_diffusers("decoder.up_blocks.0.nothing.weight")


def test_the_preset_is_the_official_size() -> None:
    with torch.device("meta"):
        model, theirs = WanVAE(PRESETS["wan-1.3b-chunkwise-4step"].autoencoder), diffusers.AutoencoderKLWan()
    shapes = {weights.vae_from_diffusers(name): x.shape for name, x in theirs.state_dict().items()}
    assert {name: x.shape for name, x in model.state_dict().items()} == shapes
    assert sum(x.numel() for x in model.parameters()) == 126_892_531


@pytest.mark.slow
def test_the_official_size_equals_diffusers() -> None:
    """Widths 96 to 384, in fp32: encode a clip of five frames, decode two latent frames."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan().eval().requires_grad_(False)
    with torch.device("meta"):
        ours = WanVAE(PRESETS["wan-1.3b-framewise-2step"].autoencoder)
    state = {weights.vae_from_diffusers(name): x for name, x in theirs.state_dict().items()}
    ours.load_state_dict(state, assign=True)
    video = clip(5).float()
    close(ours.encode(video), their_encoding(theirs, video), 2e-5)
    latents = noise(2).float()
    close(ours.decode(latents)[0].clamp(0, 1), their_decoding(theirs, latents), 2e-5)


def test_the_streaming_state_is_what_the_decoder_of_the_paper_keeps() -> None:
    """At 480 x 832: 944.3 million numbers, two frames before each of 32 causal convolutions and 2 at half rate."""
    config = PRESETS["wan-1.3b-framewise-2step"]
    with torch.device("meta"):
        model = WanVAE(config.autoencoder)
        video, state = model.decode(torch.empty(1, 1, config.latent_channels, *config.latent_grid))
        further, again = model.decode(torch.empty(1, 1, config.latent_channels, *config.latent_grid), state)
    assert video.shape == (1, 1, 3, 480, 832)
    assert further.shape == (1, 4, 3, 480, 832)
    assert [x.shape for x in again] == [x.shape for x in state]
    assert len(state) == 32
    assert round(sum(x.numel() for x in state) / 1e6, 1) == 944.3


# ---------------------------------------------------------------------- theorem 3: streaming == offline


@pytest.mark.parametrize("cuts", [(1, 1, 1), (2, 1), (1, 2)], ids=str)
def test_decoding_in_pieces_equals_decoding_at_once(ours64: WanVAE, cuts: tuple[int, ...]) -> None:
    latents, state, parts = noise(3), None, []
    expected, left = ours64.decode(latents)
    for piece in latents.split(cuts, dim=1):
        video, state = ours64.decode(piece, state)
        parts.append(video)
    close(torch.cat(parts, dim=1), expected)
    assert state is not None
    assert [x.shape for x in state] == [x.shape for x in left]
    for got, wanted in zip(state, left, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("cuts", [(1, 4, 4), (5, 4)], ids=str)
def test_encoding_in_pieces_equals_encoding_at_once(ours64: WanVAE, cuts: tuple[int, ...]) -> None:
    video, state, parts = clip(9), None, []
    for piece in video.split(cuts, dim=1):
        latents, state = ours64.encode_on(piece, state)
        parts.append(latents)
    whole, _ = ours64.encode_on(video)
    close(torch.cat(parts, dim=1), whole)
    close(ours64.encode(video), whole)


def test_the_past_is_never_changed_by_the_future(ours64: WanVAE) -> None:
    """Causality: other latents later, the same frames before them; and a state may be used twice."""
    latents = noise(3)
    other = torch.cat([latents[:, :2], -latents[:, 2:]], dim=1)
    one, two = ours64.decode(latents)[0], ours64.decode(other)[0]
    assert (one[:, :5] == two[:, :5]).all()
    assert (one[:, 5:] != two[:, 5:]).any()
    _, state = ours64.decode(latents[:, :2])
    first, second = (ours64.decode(latents[:, 2:], state)[0] for _ in range(2))
    assert (first == second).all()


def test_the_decoder_can_be_exported_with_its_state(ours: WanVAE) -> None:
    """A plain function of latents and state: torch.export traces it, and the graph goes on where the module stopped."""
    latents = noise(2).float()
    _, state = ours.decode(latents[:, :1])
    z = ours.conv2(raw(latents[:, 1:]))
    graph = torch.export.export(ours.decoder, (z, state)).module()
    for got, expected in zip(_flat(graph(z, state)), _flat(ours.decoder(z, state)), strict=True):
        torch.testing.assert_close(got, expected)


def _flat(result: tuple[Tensor, tuple[Tensor, ...]]) -> list[Tensor]:
    return [result[0], *result[1]]


# ---------------------------------------------------------------------- tiles


@pytest.mark.parametrize("grid", [(8, 3), (3, 5)], ids=str)
def test_tiles_equal_diffusers_tiles(ours64: WanVAE, theirs64: Any, grid: tuple[int, int]) -> None:
    """Tiles of 4 cells, 1 of them shared, the last one cut short. Along one axis: where four tiles meet, diffusers
    blends one of them twice."""
    model = copy.deepcopy(theirs64)
    model.enable_tiling(32, 32, 24, 24)
    latents = noise(2, grid)
    tiles, states, parts = Tiling(side=4, overlap=1), None, []
    for piece in latents.split(1, dim=1):
        video, states = tiles.decode(ours64.decode, piece, states)
        parts.append(video.clamp(0, 1))
    close(torch.cat(parts, dim=1), their_decoding(model, latents), 1e-7)  # its blending weights are the same, in fp32


def test_one_tile_is_the_whole_picture(ours64: WanVAE) -> None:
    latents = noise(2)
    assert (Tiling(side=8, overlap=2).decode(ours64.decode, latents)[0] == ours64.decode(latents)[0]).all()


@pytest.mark.parametrize("side", [1, 2, 5, 8])
@pytest.mark.parametrize("size", [1, 4, 9, 17])
def test_weights_of_tiles_add_up_to_one(side: int, size: int) -> None:
    tiles = Tiling(side=side, overlap=side // 2)
    ones = torch.ones(1, 1, 1, size, size, dtype=torch.float64)
    blended, _ = tiles.decode(lambda x, _: (x.repeat_interleave(2, -1).repeat_interleave(2, -2), ()), ones)
    torch.testing.assert_close(blended, torch.ones_like(blended), rtol=0, atol=1e-6)
    assert max(stop - start for start, stop in tiles.spans(size)) <= side


def test_tiles_that_are_mostly_overlap_are_refused() -> None:
    with pytest.raises(ConfigError, match="twice as long"):
        Tiling(side=4, overlap=3)


# ---------------------------------------------------------------------- manners


@pytest.mark.parametrize("frames", [0, 2, 4])
def test_clips_keep_the_time_law(ours64: WanVAE, frames: int) -> None:
    with pytest.raises(ConfigError, match=r"1 \+ 4 k frames"):
        ours64.encode(clip(frames))


def test_a_clip_goes_on_by_fours(ours64: WanVAE) -> None:
    _, state = ours64.encode_on(clip(1))
    with pytest.raises(ConfigError, match="goes on by 4 k"):
        ours64.encode_on(clip(5), state)


@pytest.mark.parametrize("changes", [{"spatial": 4}, {"temporal": 2}, {"widths": (8, 16)}, {"kind": "tiny"}], ids=str)
def test_other_autoencoders_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="kind 'wan'"):
        WanVAE(replace(CONFIG, **changes))
