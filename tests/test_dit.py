"""The causal DiT: training equals streaming, streaming equals offline, and what gradients, text and time may do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cfrt import weights
from cfrt.config import PRESETS, ModelConfig
from cfrt.errors import ConfigError, WeightsError
from cfrt.nn.dit import CausalDiT
from cfrt.nn.ring import RingCache

pytestmark = pytest.mark.cpu

BATCH, CAPTIONS = 2, 3

GEOMETRIES = {
    # F, W, K, trained frames, frames of the clip
    "framewise, whole clip": (1, 8, 0, 10, 8),
    "framewise, sliding": (1, 3, 0, 10, 8),
    "framewise, sliding with sinks": (1, 3, 2, 10, 9),
    "framewise, sinks beyond the trained length": (1, 3, 2, 4, 9),
    "chunkwise, whole clip": (3, 12, 0, 12, 12),
    "chunkwise, unit alone": (3, 3, 0, 12, 9),
    "chunkwise, sliding by half units": (3, 5, 0, 12, 12),
    "chunkwise, sinks beyond the trained length": (3, 6, 3, 6, 15),
    "chunkwise, sinks across a unit's border": (3, 4, 2, 6, 15),
}


def small(unit: int = 1, window: int = 8, sinks: int = 0, trained_frames: int = 12, **changes) -> ModelConfig:
    sizes = {"width": 24, "heads": 2, "depth": 3, "ffn": 32, "time_width": 16, "rope_theta": 50.0}
    geometry = {"unit": unit, "window": window, "sinks": sinks, "trained_frames": trained_frames}
    return replace(PRESETS["tiny"], **{**sizes, **geometry, **changes})


def network(config: ModelConfig, dtype: torch.dtype = torch.float64) -> CausalDiT:
    """Random everywhere: a fresh network says v = 0, and would pass any test of equality."""
    torch.manual_seed(0)
    model = CausalDiT(config).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


class Clip:
    """A random clip: clean and noisy latents, a time and a caption for every unit."""

    def __init__(self, config: ModelConfig, frames: int, dtype: torch.dtype = torch.float64) -> None:
        self.config, self.units = config, frames // config.unit
        shape = (BATCH, frames, config.latent_channels, *config.latent_grid)
        self.clean, self.noisy = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        self.unit_t = torch.rand(BATCH, self.units, dtype=torch.float64) * 1000
        self.unit_caption = torch.randint(0, CAPTIONS, (BATCH, self.units))
        self.rows = torch.randn(BATCH, CAPTIONS, config.text.length, config.text.width, dtype=dtype)

    @property
    def t(self) -> Tensor:
        return self.unit_t.repeat_interleave(self.config.unit, 1)

    @property
    def caption(self) -> Tensor:
        return self.unit_caption.repeat_interleave(self.config.unit, 1)

    def of_unit(self, x: Tensor, unit: int) -> Tensor:
        return x[:, unit * self.config.unit : (unit + 1) * self.config.unit]

    def text(self, model: CausalDiT, unit: int) -> list:
        """The unit's own caption, as a stream has it."""
        return model.text_kv(self.rows[torch.arange(BATCH), self.unit_caption[:, unit]][:, None])


def streamed(model: CausalDiT, clip: Clip, ring: RingCache, backend: str = "sdpa", full_commit: bool = False) -> Tensor:
    """The noisy clip's v, unit by unit, each given the clean past through the ring."""
    out = []
    for unit in range(clip.units):
        text, clean = clip.text(model, unit), clip.of_unit(clip.clean, unit)
        noisy = clip.of_unit(clip.noisy, unit)
        out.append(model.step(noisy, clip.unit_t[:, unit], text, ring, unit, backend=backend))
        if full_commit:
            model.step(clean, torch.zeros(BATCH), text, ring, unit, commit=True, backend=backend)
        else:
            model.commit(clean, text, ring, unit, backend=backend)
    return torch.cat(out, 1)


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# ---------------------------------------------------------------------- theorems


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("grad", [False, True], ids=["in place", "grad mode"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_teacher_forcing_is_streaming(geometry, grad, backend):
    """Theorem 1, fp64: one forward over [clean | noisy] equals the cached passes; caption and time differ by unit."""
    *shape, frames = geometry
    config = small(*shape)
    model, clip = network(config), Clip(config, frames)
    with torch.no_grad():
        text = model.text_kv(clip.rows)
        whole = model.teacher_forced(clip.clean, clip.noisy, clip.t, text, clip.caption, backend=backend)
    with torch.set_grad_enabled(grad):
        by_unit = streamed(model, clip, RingCache(config, BATCH, torch.float64), backend, full_commit=grad)
    assert whole.std() > 0.1
    assert difference(whole, by_unit) <= 1e-10
    assert by_unit.requires_grad == grad


@torch.no_grad()
@pytest.mark.parametrize("unit", [1, 3])
def test_teacher_forcing_is_streaming_in_fp32(unit):
    config = small(unit, window=12)
    model, clip = network(config, torch.float32), Clip(config, 12, torch.float32)
    whole = model.teacher_forced(clip.clean, clip.noisy, clip.t, model.text_kv(clip.rows), clip.caption)
    by_unit = streamed(model, clip, RingCache(config, BATCH))
    assert difference(whole, by_unit) <= 1e-5 * whole.abs().max().item()


@torch.no_grad()
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_streaming_is_the_causal_forward(geometry):
    """Theorem 3: clean passes by unit equal one forward over the clip under the causal mask."""
    *shape, frames = geometry
    config = small(*shape)
    model, clip = network(config), Clip(config, frames)
    mask = torch.from_numpy(config.geometry.causal_mask(frames))
    zero = torch.zeros_like(clip.t)
    offline = model(clip.clean, zero, model.text_kv(clip.rows), clip.caption, mask=mask)
    ring, out = RingCache(config, BATCH, torch.float64), []
    for unit in range(clip.units):
        clean = clip.of_unit(clip.clean, unit)
        out.append(model.step(clean, zero[:, unit], clip.text(model, unit), ring, unit, commit=True))
    assert difference(offline, torch.cat(out, 1)) <= 1e-10


@torch.no_grad()
def test_the_future_does_not_change_the_past():
    config = small(2, window=4)
    model, clip = network(config), Clip(config, 8)
    mask, text = torch.from_numpy(config.geometry.causal_mask(8)), model.text_kv(clip.rows)
    before = model(clip.noisy, clip.t, text, clip.caption, mask=mask)
    clip.noisy[:, 4:] += 1
    after = model(clip.noisy, clip.t, text, clip.caption, mask=mask)
    assert torch.equal(before[:, :4], after[:, :4])
    assert difference(before[:, 4:], after[:, 4:]) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("sinks", [0, 2])
def test_a_stream_has_no_last_frame(sinks):
    """With equal contents, unit 5,000 is what unit 50 was: positions count by distance, and to sinks only so far."""
    config = small(1, window=3, sinks=sinks, trained_frames=6)
    model, clip = network(config), Clip(config, 6)

    def unit_at(unit: int) -> Tensor:
        ring, text = RingCache(config, BATCH, torch.float64), clip.text(model, 0)
        frames = [*range(sinks), unit - 2, unit - 1]
        for place, frame in enumerate(frames):
            ring.next_frame = frame  # jump: the frames between have left the ring
            model.commit(clip.clean[:, place : place + 1], text, ring, frame)
        return model.step(clip.noisy[:, :1], clip.unit_t[:, 0], text, ring, unit)

    # Without sinks only the window matters; the clean passes of its frames must see the same past, here none.
    assert difference(unit_at(50), unit_at(5_000)) <= 1e-9


@torch.no_grad()
def test_relative_sinks_are_absolute_ones_until_the_trained_length():
    relative = small(1, window=3, sinks=2, trained_frames=5)
    absolute = replace(relative, sink_position="absolute")
    model, other, clip = network(relative), network(absolute), Clip(relative, 9)
    a = streamed(model, clip, RingCache(relative, BATCH, torch.float64))
    b = streamed(other, clip, RingCache(absolute, BATCH, torch.float64))
    assert difference(a[:, :5], b[:, :5]) == 0
    assert difference(a[:, 5:], b[:, 5:]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("unit", [1, 3])
def test_sinks_before_the_window_are_the_same_in_training(unit):
    """Theorem 1 for them; and as long as nothing is between them and the window, they are where they are."""
    config = small(unit, window=2 * unit, sinks=unit, trained_frames=3 * unit, sink_position="window")
    model, clip, absolute = network(config), Clip(config, 6 * unit), replace(config, sink_position="absolute")
    whole = model.teacher_forced(clip.clean, clip.noisy, clip.t, model.text_kv(clip.rows), clip.caption)
    by_unit = streamed(model, clip, RingCache(config, BATCH, torch.float64))
    assert difference(whole, by_unit) <= 1e-10
    true = streamed(network(absolute), clip, RingCache(absolute, BATCH, torch.float64))
    assert difference(by_unit[:, : 3 * unit], true[:, : 3 * unit]) == 0
    assert difference(by_unit[:, 3 * unit :], true[:, 3 * unit :]) > 1e-3


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("window", [8, 2], ids=["whole clip", "rolling window"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_gradients_flow_through_the_own_unit_only(window, checkpointing):
    """A rollout whose units feed each other: the gradient is that of each unit alone, its past held constant.

    The published code leaks gradient through its cache, needs checkpointing to run at all, and fails with a window.
    """
    config = small(1, window=window)
    model, clip = network(config), Clip(config, 5)
    model.checkpointing = checkpointing
    ring, noise, outputs = RingCache(config, BATCH, torch.float64), clip.noisy.requires_grad_(), []
    for unit in range(5):
        text, x = clip.text(model, unit), clip.of_unit(noise, unit)
        x0 = x - model.step(x, clip.unit_t[:, unit], text, ring, unit)
        model.commit(x0, text, ring, unit)
        outputs.append(x0)
    for unit in range(5):
        (grad,) = torch.autograd.grad(outputs[unit].sum(), noise, retain_graph=True)
        others = [other for other in range(5) if other != unit]
        assert grad[:, others].abs().max() == 0
        assert grad[:, unit].abs().max() > 1e-3


def test_the_gradient_of_a_rollout_is_exact():
    """Own-unit gradient against finite differences of the step with the ring as it was."""
    config = small(1, window=2)
    model, clip = network(config), Clip(config, 3)
    ring = RingCache(config, BATCH, torch.float64)
    for unit in range(2):
        model.commit(clip.of_unit(clip.clean, unit), clip.text(model, unit), ring, unit)
    text = [(k.detach(), v.detach()) for k, v in clip.text(model, 2)]
    x = clip.of_unit(clip.noisy, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model.step(x, clip.unit_t[:, 2], text, ring, 2), x, fast_mode=True)


def test_recomputation_changes_no_gradient():
    config = small(2, window=4)
    model, clip = network(config), Clip(config, 6)
    grads = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        text = model.text_kv(clip.rows)
        model.teacher_forced(clip.clean, clip.noisy, clip.t, text, clip.caption).square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert all(grad.abs().max() > 0 for name, grad in grads[0].items() if not name.endswith("k.bias"))


def test_inference_mode_leaves_nothing_behind_that_training_cannot_use():
    """Phases and masks are kept between calls; a preview between two training steps must not spoil them."""
    config = small(depth=1, rope_theta=51.0)
    model, clip = network(config), Clip(config, 3)
    arguments = (clip.clean, clip.noisy, clip.t, model.text_kv(clip.rows), clip.caption)
    with torch.inference_mode():
        preview = model.teacher_forced(*arguments)
    trained = model.teacher_forced(*arguments)
    trained.sum().backward()
    assert difference(preview, trained) <= 1e-12


def test_export_leaves_nothing_behind_either():
    config = small(depth=1, rope_theta=52.0)
    model, clip = network(config), Clip(config, 3)
    text = [(k.detach(), v.detach()) for k, v in model.text_kv(clip.rows[:, :1])]
    exported = torch.export.export(model, (clip.noisy, clip.t, text), strict=False)
    with torch.no_grad():
        expected = model(clip.noisy, clip.t, text)
        assert difference(exported.module()(clip.noisy, clip.t, text), expected) <= 1e-12


# ---------------------------------------------------------------------- text, time, shapes


@torch.no_grad()
def test_each_frame_reads_its_own_caption():
    """A batch of captions equals each caption alone, frame by frame, where frames do not see each other."""
    config = small(1, window=1)
    model, clip = network(config), Clip(config, 4)
    clip.unit_caption = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    alone = torch.eye(4, dtype=torch.bool)
    mixed = model(clip.noisy, clip.t, model.text_kv(clip.rows), clip.caption, mask=alone)
    for c in range(CAPTIONS):
        only = model(clip.noisy, clip.t, model.text_kv(clip.rows[:, c : c + 1]), mask=alone)
        assert difference(mixed[clip.caption == c], only[clip.caption == c]) <= 1e-12
    with pytest.raises(ConfigError, match="which of the 3 captions"):
        model(clip.noisy, clip.t, model.text_kv(clip.rows))


@torch.no_grad()
def test_padding_rows_are_attended_to():
    """As in Wan2.1: zero rows go through the text MLP and take their share of attention."""
    config = small()
    model, clip = network(config), Clip(config, 2)
    rows = clip.rows[:, :1].clone()
    rows[:, :, 4:] = 0
    padded, cut = (model(clip.noisy, clip.t, model.text_kv(r)) for r in (rows, rows[:, :, :4]))
    assert difference(padded, cut) > 1e-3


@torch.no_grad()
def test_positions_can_be_given():
    """Only differences of positions matter; the order of frames does not, once positions go with them."""
    config = small()
    model, clip = network(config), Clip(config, 4)
    text = model.text_kv(clip.rows[:, :1])
    plain = model(clip.noisy, clip.t, text)
    later = model(clip.noisy, clip.t, text, frames=range(70, 74))
    order = [2, 0, 3, 1]
    shuffled = model(clip.noisy[:, order], clip.t[:, order], text, frames=torch.tensor(order))
    assert difference(plain, later) <= 1e-11
    assert difference(plain[:, order], shuffled) <= 1e-11


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_time_is_exact_in_any_precision(dtype):
    """t = 999 and 1000 are one number in bf16; their embeddings are not."""
    model = network(small(), dtype)
    e, modulation = model._time(torch.tensor([[999.0, 1000.0]], dtype=torch.float64))
    assert e.dtype == modulation.dtype == dtype
    assert modulation.shape == (1, 2, 6, 24)
    assert difference(e[:, 0], e[:, 1]) > 0.01


def test_latents_of_another_shape():
    model = network(small())
    clip = Clip(small(), 2)
    with pytest.raises(ConfigError, match=r"\[B, T, 16, 4, 4\], got \[2, 2, 16, 4, 3\]"):
        model(clip.noisy[..., :3], clip.t, model.text_kv(clip.rows[:, :1]))


# ---------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [("wan-1.3b-framewise-2step", 1_418_996_800, 825), ("wan-14b", 14_288_491_584, 1095)],
)
def test_parameter_count(name, parameters, tensors):
    """The published sizes, without a byte of memory."""
    with torch.device("meta"):
        state = CausalDiT(PRESETS[name]).state_dict()
    assert (len(state), sum(p.numel() for p in state.values())) == (tensors, parameters)


def test_names_and_shapes_are_wan_s():
    with torch.device("meta"):
        state = {
            name: tuple(p.shape) for name, p in CausalDiT(PRESETS["wan-1.3b-chunkwise-4step"]).state_dict().items()
        }
    assert state["patch_embedding.weight"] == (1536, 16, 1, 2, 2)
    assert state["text_embedding.0.weight"] == (1536, 4096)
    assert state["time_embedding.0.weight"] == (1536, 256)
    assert state["time_projection.1.weight"] == (9216, 1536)
    assert state["head.head.weight"] == (64, 1536)
    assert state["head.modulation"] == (1, 2, 1536)
    block = {name.removeprefix("blocks.29.") for name in state if name.startswith("blocks.29.")}
    attention = {f"{part}.{kind}" for part in "qkvo" for kind in ("weight", "bias")} | {
        "norm_q.weight",
        "norm_k.weight",
    }
    assert block == {
        *(f"{which}.{name}" for which in ("self_attn", "cross_attn") for name in attention),
        *(f"{part}.{kind}" for part in ("norm3", "ffn.0", "ffn.2") for kind in ("weight", "bias")),
        "modulation",
    }
    assert sum(np.prod(shape) for name, shape in state.items() if name.startswith("blocks.29.")) == 46_440_704


def test_a_new_network_says_nothing_and_hears_no_text():
    config = small()
    torch.manual_seed(0)
    model, clip = CausalDiT(config), Clip(config, 2, torch.float32)
    text = model.text_kv(clip.rows[:, :1])
    assert model(clip.noisy, clip.t, text).abs().max() == 0
    assert all(block.cross_attn.o.weight.abs().max() == 0 for block in model.layers)
    std = model.layers[0].modulation.std().item()
    assert std == pytest.approx(24**-0.5, rel=0.2)
    model(clip.noisy, clip.t, text).sum().backward()
    assert model.head.head.weight.grad.abs().max() > 0


@torch.no_grad()
def test_weights_travel_through_a_file(tmp_path):
    config = small()
    model, clip = network(config, torch.float32), Clip(config, 3, torch.float32)
    tensors = {f"dit.{name}": p.half().float().numpy() for name, p in model.state_dict().items()}
    weights.save_model(tmp_path, config, tensors)
    again, loaded = weights.load_model(tmp_path)
    other = CausalDiT.from_arrays(again, weights.part(loaded, "dit"))
    model.load_state_dict({name: p.half().float() for name, p in model.state_dict().items()})
    text = model.text_kv(clip.rows[:, :1])
    assert torch.equal(model(clip.noisy, clip.t, text), other(clip.noisy, clip.t, other.text_kv(clip.rows[:, :1])))
    with pytest.raises(WeightsError, match="unknown"):
        CausalDiT.from_arrays(again, loaded)
