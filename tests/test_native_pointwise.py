"""The native kernels between the products: cfrt.nn and cfrt.flow in fp64, and a row is a row."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import _cfrt
from cfrt import flow
from cfrt.config import PRESETS
from cfrt.nn import layers
from cfrt.nn.autoencoder import CONTRAST, FOLD, GRAY
from cfrt.nn.dit import CausalDiT
from cfrt.nn.norms import RMSNorm
from cfrt.nn.rope import phases, rotate

pytestmark = pytest.mark.cpu

kernels = _cfrt.kernels
ISAS = kernels.isas()

every_isa = pytest.mark.parametrize("isa", ISAS)
isas = st.sampled_from(ISAS)
seeds = st.integers(0, 1000)

EPS = 1e-6


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def wide(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x).double()


def bf16(x: np.ndarray) -> Tensor:
    """uint16 as the numbers they stand for."""
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).double()


def error(got: np.ndarray | Tensor, exact: Tensor) -> float:
    return (torch.as_tensor(got).double() - exact).abs().max().item()


def check(got: np.ndarray | Tensor, eager: Tensor, exact: Tensor) -> None:
    """At most twice the error of PyTorch in the same dtype, or two of the last bits of the largest number."""
    step = 2.0**-8 if eager.dtype == torch.bfloat16 else 2.0**-23
    assert error(got, exact) <= 2 * max(error(eager, exact), step * exact.abs().max().item())


# ---------------------------------------------------------------------- layer norm


@given(
    seed=seeds,
    rows=st.integers(1, 7),
    width=st.integers(1, 150),
    group=st.integers(1, 4),
    precision=st.sampled_from(["fp32", "bf16", "int8"]),
    isa=isas,
)
def test_layer_norm(seed: int, rows: int, width: int, group: int, precision: str, isa: str) -> None:
    """LN(x) gain + shift with a gain and a shift for each group of rows, zeros behind them, in every format."""
    groups = -(-rows // group)
    x = normal(seed, rows, width, scale=3.0) + 1
    gain, shift = 1 + normal(seed + 1, groups, width), normal(seed + 2, groups, width)
    depth = width + width % 2 + 2
    got = kernels.layer_norm(x, gain, shift, EPS, precision=precision, group_rows=group, depth=depth, isa=isa)
    spread = [torch.from_numpy(part).repeat_interleave(group, 0)[:rows] for part in (gain, shift)]
    exact = F.layer_norm(wide(x), (width,), eps=EPS) * spread[0] + spread[1]
    eager = torch.addcmul(spread[1], F.layer_norm(torch.from_numpy(x), (width,), eps=EPS), spread[0])
    if precision == "int8":
        whole, scale = got
        assert np.array_equal(whole, np.rint(whole))
        assert (np.abs(whole).max(1) == 127).all() or np.abs(exact).max() < 1e-6
        half_a_step = torch.from_numpy(scale)[:, None] * 0.501
        assert ((wide(whole * scale[:, None])[:, :width] - exact).abs() <= half_a_step + 1e-5).all()
        got = whole
    elif precision == "bf16":
        check(bf16(got)[:, :width], eager.bfloat16(), exact)
        got = bf16(got).numpy()
    else:
        check(got[:, :width], eager, exact)
    assert (got[:, width:] == 0).all()


@every_isa
def test_layer_norm_is_the_modulated_norm_of_the_model(isa: str) -> None:
    """`modulate` of cfrt.nn, with shift and scale of each frame as `modulation` makes them."""
    frames, tokens, width = 3, 5, 48
    x, time, table = normal(0, frames * tokens, width), normal(1, frames, 6, width), normal(2, 6, width)
    parts = kernels.modulation(time, table, 0b010010, isa=isa)
    shift, scale = (torch.from_numpy(time[:, i] + table[i])[None, :, None] for i in (0, 1))
    got = kernels.layer_norm(x, parts[:, 1].copy(), parts[:, 0].copy(), EPS, group_rows=tokens, isa=isa)
    shaped = torch.from_numpy(x).view(1, frames, tokens, width)
    exact = layers.modulate(shaped.double(), shift.double(), scale.double(), EPS)
    check(got, layers.modulate(shaped, shift, scale, EPS).view(-1, width), exact.view(-1, width))


@every_isa
@pytest.mark.parametrize("shared", [False, True])
def test_modulation(shared: bool, isa: str) -> None:
    """time + table, and one where it says so: to the last bit, as PyTorch has it."""
    time = normal(0, 2, 50) if shared else normal(0, 2, 3, 50)
    table = normal(1, 3, 50)
    expected = (time[:, None] if shared else time) + table
    expected[:, 1] = 1 + expected[:, 1]
    np.testing.assert_array_equal(kernels.modulation(time, table, 0b010, isa=isa), expected)


# ---------------------------------------------------------------------- positions, queries, keys


@given(
    positions=st.lists(st.integers(0, 2**31), min_size=1, max_size=3),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    pairs=st.tuples(*[st.integers(0, 6)] * 3).filter(any),
    theta=st.sampled_from([50.0, 10000.0]),
)
def test_turns_are_the_phases(positions: list[int], grid: tuple[int, int], pairs: tuple, theta: float) -> None:
    """To a rounding, from the first frame to a year later."""
    got = kernels.turns(positions, grid, pairs, theta)
    exact = phases(tuple(positions), grid, pairs, theta, torch.float64, torch.device("cpu"))[:, 0].numpy()
    cosine, sine = (part.repeat(2, axis=-1) for part in (exact.real, exact.imag))
    sine[:, ::2] *= -1
    assert np.abs(got[:, 0] - cosine).max() <= 2.0**-24
    assert np.abs(got[:, 1] - sine).max() <= 2.0**-24


@given(
    seed=seeds,
    rows=st.integers(1, 6),
    heads=st.integers(1, 3),
    dim=st.sampled_from([16, 48, 64, 128]),
    normed=st.booleans(),
    turned=st.booleans(),
    isa=isas,
)
def test_queries(seed: int, rows: int, heads: int, dim: int, normed: bool, turned: bool, isa: str) -> None:
    """RMS norm over the full width, then both rotations: what SelfAttention of cfrt.nn does to q."""
    width, pairs = heads * dim, (dim // 2 - 2, 1, 1)
    x, weight = normal(seed, rows, width, scale=2.0), normal(seed + 1, width)
    frames = tuple(range(40, 40 + rows)), tuple(range(7, 7 + rows))
    options = {"weight": weight, "eps": EPS} if normed else {}
    if turned:
        turn, sink_turn = (kernels.turns(f, (1, 1), pairs, 100.0) for f in frames)
        options |= {"turn": turn, "sink_turn": sink_turn}
    got = kernels.queries(x, heads, **options, isa=isa)
    for out, f in zip(got, frames, strict=True):
        if out is None:
            assert not turned
            continue
        exact, eager = (
            _split(torch.from_numpy(x).to(dtype), weight if normed else None, heads, f if turned else None, pairs)
            for dtype in (torch.float64, torch.float32)
        )
        check(out, eager, exact)


@torch.no_grad()
def _split(x: Tensor, weight: np.ndarray | None, heads: int, frames: tuple | None, pairs: tuple) -> Tensor:
    """cfrt.nn's own way from rows [T, width] to normed and turned rows."""
    if weight is not None:
        norm = RMSNorm(x.shape[1], EPS)
        norm.weight.copy_(torch.from_numpy(weight))
        x = norm.to(x.dtype)(x)
    if frames is not None:
        turn = phases(frames, (1, 1), pairs, 100.0, x.dtype, x.device)
        x = rotate(x.view(1, len(x), heads, -1), turn).view(x.shape)
    return x


def ring_of(tokens: int, heads: int, dim: int, precision: str):
    return kernels.Ring(
        _cfrt.Geometry(unit=1, window=3), frame_tokens=tokens, layers=1, heads=heads, dim=dim, precision=precision
    )


@every_isa
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 4, 7])
def test_append(tokens: int, precision: str, isa: str) -> None:
    """k as `queries` would leave it, v as it is, each rounded once, in the rows named; threads change no bit."""
    heads, dim = 2, 48
    width, pairs = heads * dim, (20, 2, 2)
    weight = normal(9, width)
    rings = [ring_of(tokens, heads, dim, precision) for _ in range(3)]
    for unit in range(6):
        k, v = normal(unit, tokens, width), normal(unit + 50, tokens, width)
        turn = kernels.turns([unit], (1, tokens), pairs, 100.0)
        for threads, ring in enumerate(rings, 1):
            place = ring.open(unit)[2]
            kernels.append(
                ring.layer(0), place, k, v, weight=weight, eps=EPS, turn=turn, isa=isa, threads=kernels.Threads(threads)
            )
            ring.commit(unit)
        expected = kernels.queries(k, heads, weight=weight, eps=EPS, turn=turn, isa=isa)[0], v
        for got, rows in zip(rings[0].read(0, unit), expected, strict=True):
            shaped = torch.from_numpy(rows).view(tokens, heads, dim)
            assert torch.equal(torch.from_numpy(got), shaped.bfloat16().float() if precision == "bf16" else shaped)
    assert rings[0].state() == rings[1].state() == rings[2].state()


@every_isa
def test_append_in_any_order(isa: str) -> None:
    """Rows of values share words: written one by one, backwards, or at once, the bytes are the same."""
    k, v = normal(0, 6, 32), normal(1, 6, 32)
    places = [[2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2]]
    empty = np.zeros((9, 2, 16), np.float32)
    stores = [kernels.KeyValues(empty, empty, "bf16") for _ in places]
    seen = []
    for store, place in zip(stores, places, strict=True):
        order = np.argsort(place)
        kernels.append(store, place, k[order].copy(), v[order].copy(), isa=isa)
        out = np.zeros((1, 2, 16), np.float32)
        kernels.attention(normal(2, 1, 2, 16), store, out, ranges=[(2, 8)], isa=isa)
        seen.append(out)
    np.testing.assert_array_equal(*seen)


@every_isa
def test_rows_do_not_depend_on_each_other_or_on_threads(isa: str) -> None:
    x, weight = normal(0, 23, 96), normal(1, 96)
    gain, shift = normal(2, 5, 96), normal(3, 5, 96)
    turn = kernels.turns(range(23), (1, 1), (22, 1, 1), 100.0)
    norm = {"precision": "bf16", "isa": isa}
    whole = kernels.layer_norm(x, gain, shift, EPS, group_rows=5, **norm)
    rows = kernels.queries(x, 2, weight=weight, eps=EPS, turn=turn, isa=isa)[0]
    for row in (0, 7, 22):
        one = slice(row, row + 1)
        alone = kernels.layer_norm(x[one], gain[row // 5][None], shift[row // 5][None], EPS, group_rows=1, **norm)
        np.testing.assert_array_equal(alone, whole[one])
        alone = kernels.queries(x[one], 2, weight=weight, eps=EPS, turn=turn[one], isa=isa)[0]
        np.testing.assert_array_equal(alone, rows[one])
    for threads in (2, 3):
        pool = kernels.Threads(threads)
        again = kernels.layer_norm(x, gain, shift, EPS, group_rows=5, **norm, threads=pool)
        np.testing.assert_array_equal(again, whole)
        again = kernels.queries(x, 2, weight=weight, eps=EPS, turn=turn, isa=isa, threads=pool)[0]
        np.testing.assert_array_equal(again, rows)


# ---------------------------------------------------------------------- maps


@every_isa
@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_activations(name: str, isa: str) -> None:
    """Over the whole line, far tails included; NaN stays NaN."""
    x = np.concatenate([np.linspace(-30, 30, 4001, dtype=np.float32), np.float32([-1e30, -90, 0, 90, 1e30])])
    function = {"silu": F.silu, "gelu": lambda y: F.gelu(y, approximate="tanh")}[name]
    got = getattr(kernels, name)(x, isa=isa)
    check(got, function(torch.from_numpy(x)), function(wide(x)))
    near = np.abs(x) < 5
    assert np.abs(got[near] - function(wide(x[near])).numpy()).max() <= 1e-6
    assert np.isnan(getattr(kernels, name)(np.float32([np.nan, 1.0]), isa=isa)).tolist() == [True, False]


@given(t=st.floats(0, 1000), width=st.sampled_from([2, 16, 256]))
def test_time_features(t: float, width: int) -> None:
    assert np.abs(kernels.time_features(t, width) - flow.time_embedding(t, width)).max() <= 2.0**-24


# ---------------------------------------------------------------------- latents and pixels


@pytest.mark.parametrize(
    ("patch", "grid", "channels"), [((2, 2), (4, 6), 3), ((1, 2), (3, 4), 5), ((1, 1), (2, 2), 16)]
)
@torch.no_grad()
def test_patches_are_those_of_the_model(patch: tuple[int, int], grid: tuple[int, int], channels: int) -> None:
    """`_embed` and `_unpatch` of CausalDiT, bit for bit."""
    sizes = {"width": 96, "heads": 3, "depth": 1, "ffn": 8}
    config = replace(
        PRESETS["tiny"], **sizes, patch=(1, *patch), latent_grid=grid, latent_channels=channels,
        autoencoder=replace(PRESETS["tiny"].autoencoder, latent_channels=channels),
    )  # fmt: skip
    model = CausalDiT(config)
    latents = normal(0, 2, channels, *grid)
    rows = kernels.patchify(latents, patch)
    weight, bias = model.patch_embedding.weight.flatten(1), model.patch_embedding.bias
    expected = model._embed(torch.from_numpy(latents)[None])[0].flatten(0, 1)
    torch.testing.assert_close(F.linear(torch.from_numpy(rows), weight, bias), expected, rtol=0, atol=1e-5)
    v = normal(1, *rows.shape)
    back = model._unpatch(torch.from_numpy(v).view(1, 2, -1, rows.shape[1]))[0].numpy()
    np.testing.assert_array_equal(kernels.unpatchify(v, channels, grid, patch), back)
    s = np.float32(0.37)
    x0 = kernels.estimate_x0(latents, v, s, patch)
    np.testing.assert_array_equal(x0, flow.x0_from_v(latents, back, s))


@every_isa
@pytest.mark.parametrize("first_frame", [0, 3])
@pytest.mark.parametrize("grid", [(2, 3), (5, 1)])
def test_pixels_are_the_tail_of_the_decoder(grid: tuple[int, int], first_frame: int, isa: str) -> None:
    """Pixel shuffle, contrast, clamp and 255 levels: the bytes that the torch engine makes; threads change none."""
    rows, columns = grid
    x = normal(0, rows, columns, 4 * 3 * FOLD**2, scale=0.7)
    shuffled = F.pixel_shuffle(torch.from_numpy(x).permute(2, 0, 1)[None], FOLD) / CONTRAST + GRAY
    levels = shuffled.unflatten(1, (4, 3))[0].clamp(0, 1).mul(255).round().to(torch.uint8)
    options = {"frames": 4, "fold": FOLD, "gain": 1 / CONTRAST, "offset": GRAY, "first_frame": first_frame, "isa": isa}
    got = kernels.pixels(x, **options)
    np.testing.assert_array_equal(got, levels.permute(0, 2, 3, 1)[first_frame:].numpy())
    np.testing.assert_array_equal(kernels.pixels(x, **options, threads=kernels.Threads(2)), got)


# ---------------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused() -> None:
    x = np.zeros((4, 32), np.float32)
    one = np.ones((1, 32), np.float32)
    with pytest.raises(ValueError, match=r"expected gain \[2, 32\], got \[1, 32\]"):
        kernels.layer_norm(x, one, one, EPS, group_rows=2)
    with pytest.raises(ValueError, match="expected heads of a multiple of 16 numbers, got 32 for 3 heads"):
        kernels.queries(x, 3)
    with pytest.raises(ValueError, match=r"expected turn \[4, 2, 16\], got \[1, 2, 16\]"):
        kernels.queries(x, 2, turn=kernels.turns([0], (1, 1), (4, 2, 2), 10.0))
    store = kernels.KeyValues(np.zeros((4, 2, 16), np.float32), np.zeros((4, 2, 16), np.float32), "fp32")
    with pytest.raises(ValueError, match="expected places of 0 to 3, got 4"):
        kernels.append(store, [0, 1, 2, 4], x, x)
    with pytest.raises(ValueError, match="expected a grid of whole patches 2 x 2, got 3 x 4"):
        kernels.patchify(np.zeros((1, 2, 3, 4), np.float32), (2, 2))
    with pytest.raises(ValueError, match="expected at most 1024 channels"):
        kernels.pixels(np.zeros((1, 1, 2000), np.float32), frames=4, fold=16, gain=1.0, offset=0.0)
    with pytest.raises(ValueError, match="expected an even width, got 3"):
        kernels.time_features(0.0, 3)
