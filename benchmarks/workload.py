"""What is timed: one denoising pass of a unit at three sizes, and the embedded student's whole unit.

A pass is frame-wise, batch 1, at s = 1, against a full window: 11 committed frames and the unit itself (the student's
window is 8). Committed frames are noise, so that every engine can make the same ones; weights are random, except the
student's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
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

    @property
    def tokens(self) -> int:
        return self.config.frame_tokens

    @property
    def unit(self) -> int:
        return self.config.window // self.config.unit

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of the passes: all of a unit's for the student, the first for the sizes."""
        us = self.config.unit_steps(self.unit)
        return flow.sigmas(us if self.size == STUDENT else us[:1], self.config.shift)

    @cached_property
    def truth(self) -> "Truth":
        return Truth(self)


def workload(size: str, tokens: int) -> Workload:
    if size == STUDENT:
        config, weights = load_model(students.find("tiny"))
        return Workload(size, config, weights, encoder(config, weights).encode(PROMPT).rows)
    config = _config(size, tokens)
    rows = np.random.default_rng(0).standard_normal((config.text.length, config.text.width), dtype=np.float32)
    return Workload(size, config, _random_weights(config), rows)


class Truth:
    """The same by `cfrt.nn` in fp64, with what it costs; and the past as keys and values, for engines that keep none."""

    def __init__(self, work: Workload) -> None:
        config, unit = work.config, work.unit
        self.dit = CausalDiT.from_arrays(config, part(work.weights, "dit")).eval().requires_grad_(False).double()
        self.autoencoder = _autoencoder(work).double()
        ring = RingCache(config, dtype=torch.float64)
        text = self.dit.text_kv(torch.from_numpy(work.rows)[None, None])
        for past in range(unit):
            self.dit.commit(_double(noise(config, past, PAST)), text, ring, past)
        frames = [f for span in config.geometry.visible_frames(unit) for f in range(*span) if f < unit * config.unit]
        self.past = [_joined(ring.read(layer, frame) for frame in frames) for layer in range(config.depth)]
        """k, v [1, H, P, D] of each layer."""
        self.text = [(k[0].transpose(1, 2), v[0].transpose(1, 2)) for k, v in text]
        """k, v [1, H, L, D] of each layer."""
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            self.x0 = self._run(work, text, ring)
        self.gop = counter.get_total_flops() / 1e9
        """Billions of operations, 2 a multiply-add, in products of matrices, convolutions and attention."""

    @torch.no_grad()
    def _run(self, work: Workload, text: TextKV, ring: RingCache) -> np.ndarray:
        unit, config = work.unit, work.config
        x = _double(noise(config, unit, 0))
        for step, s in enumerate(work.sigmas):
            x = flow.renoise(x, _double(noise(config, unit, step)), s) if step else x
            t = torch.full((1,), flow.TIME_SCALE * s, dtype=torch.float64)
            x = flow.x0_from_v(x, self.dit.step(x, t, text, ring, unit), s)
        if work.size == STUDENT:
            self.autoencoder.decode(x, _double(noise(config, unit - 1, PAST))[:, -1])
            self.dit.commit(x, text, ring, unit)
        return x.numpy()


def noise(config: ModelConfig, unit: int, step: int) -> np.ndarray:
    """What `Engine.noise` gives at seed 0, float32 [1, F, C, h, w]."""
    shape = (1, config.unit, config.latent_channels, *config.latent_grid)
    return normal(0, unit, step, Purpose.SAMPLE, shape)


def error(work: Workload, x0: np.ndarray) -> float:
    """Relative L2 against fp64: of the student's clean latents, and of v for one pass at s = 1, where x0 = x - v."""
    truth = work.truth.x0
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


def _awake(name: str, x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    return 0.5 * numbers if name.endswith("modulation") else torch.where(x == 0, 0.05 * numbers, x)


def _autoencoder(work: Workload) -> Autoencoder:
    module = Autoencoder(work.config.autoencoder).eval().requires_grad_(False)
    arrays = part(work.weights, "autoencoder")
    module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return module


def _double(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).double()


def _joined(frames: Any) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = zip(*frames, strict=True)
    return torch.cat(keys, 1).transpose(1, 2), torch.cat(values, 1).transpose(1, 2)


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""PyTorch's counter knows the fused attentions of GPUs only."""
