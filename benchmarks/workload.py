"""What is timed: one denoising pass of a unit at three sizes, and the embedded student's whole unit.

A pass is frame-wise, batch 1, at s = 1, against a full window: 11 committed frames and the unit itself (the student's
window is 8). Committed frames are noise, so that every engine can make the same ones; weights are random, except the
student's own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from cfrt import flow, students
from cfrt.config import AutoencoderConfig, ModelConfig, TextConfig
from cfrt.nn.autoencoder import Autoencoder
from cfrt.nn.dit import CausalDiT, TextKV
from cfrt.nn.ring import RingCache
from cfrt.noise import Purpose, normal
from cfrt.text import encoder
from cfrt.weights import load_model, part

#        width depth heads  ffn
SIZES = {
    "S": (256, 6, 4, 1024),
    "M": (384, 8, 6, 1536),
    "L": (768, 12, 12, 3072),
}
GRIDS = {64: (16, 16), 256: (32, 32)}  # tokens a frame: latent grid, in patches of 2 x 2
STUDENT = "student"
PROMPT = "a large red circle moving left over the ocean"
PAST = 99
"""The step number of the noise that fills the past: no pass uses it."""


@dataclass(frozen=True)
class Workload:
    """`size` is a key of SIZES or STUDENT. `unit` is the first that sees a full window."""

    size: str
    config: ModelConfig
    weights: Mapping[str, np.ndarray]
    rows: np.ndarray
    """Text, float32 [L, width]."""
    folder: Path
    """Where what is slow to make is kept: the truth, and graphs."""

    @property
    def tokens(self) -> int:
        return self.config.frame_tokens

    @property
    def unit(self) -> int:
        return self.config.window // self.config.unit

    @property
    def levels(self) -> tuple[tuple[float, float], ...]:
        """From which s to which each pass goes: all of a unit's for the student, for the sizes one, from 1 to 0."""
        us = self.config.unit_steps(self.unit)
        return flow.descent(us if self.size == STUDENT else us[:1], self.config.shift)

    @cached_property
    def truth(self) -> "Truth":
        path = self.folder / f"{self.config.name}-truth.pt"
        if not path.exists():
            torch.save(vars(_truth(self)), path)
        return Truth(**torch.load(path))

    def dit(self) -> CausalDiT:
        """The network, fp32."""
        return CausalDiT.from_arrays(self.config, part(self.weights, "dit")).eval().requires_grad_(False)

    def autoencoder(self) -> Autoencoder:
        module = Autoencoder(self.config.autoencoder).eval().requires_grad_(False)
        arrays = part(self.weights, "autoencoder")
        module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        return module


def workload(size: str, tokens: int, folder: Path) -> Workload:
    if size == STUDENT:
        config, weights = load_model(students.find("tiny"))
        return Workload(size, config, weights, encoder(config, weights).encode(PROMPT).rows, folder)
    config = _config(size, tokens)
    rows = np.random.default_rng(0).standard_normal((config.text.length, config.text.width), dtype=np.float32)
    return Workload(size, config, _random_weights(config), rows, folder)


@dataclass(frozen=True)
class Truth:
    """The same by `cfrt.nn` in fp64, what it costs, and the past as keys and values for engines that keep none."""

    x0: Tensor
    """fp64 [1, F, C, h, w]."""
    gop: float
    """Billions of operations, 2 a multiply-add, in products of matrices, convolutions and attention."""
    past: list[tuple[Tensor, Tensor]]
    """k, v fp32 [1, H, P, D] of each layer."""
    text: list[tuple[Tensor, Tensor]]
    """k, v fp32 [1, H, L, D] of each layer."""


@torch.no_grad()
def _truth(work: Workload) -> Truth:
    config, unit = work.config, work.unit
    dit, ring = work.dit().double(), RingCache(config, dtype=torch.float64)
    text = dit.text_kv(torch.from_numpy(work.rows)[None, None])
    for past in range(unit):
        dit.commit(_double(noise(config, past, PAST)), text, ring, past)
    frames = [f for span in config.geometry.visible_frames(unit) for f in range(*span) if f < unit * config.unit]
    past_kv = [_joined(ring.read(layer, frame) for frame in frames) for layer in range(config.depth)]
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        x0 = _run(work, dit, text, ring)
    text_kv = [(_heads_first(k[0]), _heads_first(v[0])) for k, v in text]
    return Truth(x0, counter.get_total_flops() / 1e9, past_kv, text_kv)


def _run(work: Workload, dit: CausalDiT, text: TextKV, ring: RingCache) -> Tensor:
    """x0 of what is timed; for the student decoding and commit are run as well, to be counted."""
    unit, config = work.unit, work.config
    drawn = lambda step: _double(noise(config, unit, step))  # noqa: E731
    x = drawn(0)
    for step, (s, s_next) in enumerate(work.levels, 1):
        t = torch.full((1,), flow.TIME_SCALE * s, dtype=torch.float64)
        x0 = flow.x0_from_v(x, dit.step(x, t, text, ring, unit), s)
        x = flow.onward(config.solver, x, x0, s, s_next, partial(drawn, step))
    if work.size == STUDENT:
        work.autoencoder().double().decode(x, _double(noise(config, unit - 1, PAST))[:, -1])
        dit.commit(x, text, ring, unit)
    return x


def noise(config: ModelConfig, unit: int, step: int) -> np.ndarray:
    """What `Engine.noise` gives at seed 0, float32 [1, F, C, h, w]."""
    shape = (1, config.unit, config.latent_channels, *config.latent_grid)
    return normal(0, unit, step, Purpose.SAMPLE, shape)


def error(work: Workload, x0: np.ndarray) -> float:
    """Relative L2 against fp64: of the student's clean latents, and of v for one pass at s = 1, where x0 = x - v."""
    truth = work.truth.x0.numpy()
    scale = truth if work.size == STUDENT else noise(work.config, work.unit, 0) - truth
    return float(np.linalg.norm(x0 - truth) / np.linalg.norm(scale))


def _config(size: str, tokens: int) -> ModelConfig:
    width, depth, heads, ffn = SIZES[size]
    return ModelConfig(
        name=f"{size}-{tokens}",
        width=width,
        depth=depth,
        heads=heads,
        ffn=ffn,
        latent_channels=16,
        latent_grid=GRIDS[tokens],
        text=TextConfig(kind="table", width=64, length=16),
        autoencoder=AutoencoderConfig(kind="tiny", latent_channels=16, spatial=16, widths=(16, 16, 16, 16, 16, 16)),
        unit=1,
        window=12,
        trained_frames=21,
        steps=(1.0, 0.5),
        shift=3.0,
    )


def _random_weights(config: ModelConfig) -> dict[str, np.ndarray]:
    """PyTorch's own initialisation, with numbers where it has zeros, and gates near one half: every layer matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = {"dit": CausalDiT(config), "autoencoder": Autoencoder(config.autoencoder)}
    return {
        f"{prefix}.{name}": _awake(name, x, torch.randn(x.shape, generator=generator)).numpy()
        for prefix, module in modules.items()
        for name, x in module.state_dict().items()
    }


def _awake(name: str, x: Tensor, numbers: Tensor) -> Tensor:
    return 0.5 * numbers if name.endswith("modulation") else torch.where(x == 0, 0.05 * numbers, x)


def _double(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x).double()


def _joined(frames: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    keys, values = zip(*frames, strict=True)
    return _heads_first(torch.cat(keys, 1)), _heads_first(torch.cat(values, 1))


def _heads_first(x: Tensor) -> Tensor:
    """fp32 [1, H, P, D] of [1, P, H, D]."""
    return x.transpose(1, 2).float().contiguous()


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""PyTorch's counter knows the fused attentions of GPUs only."""
