"""The student without a ring, for runtimes that have no state: past keys and values go in, the unit's own come out.

The weights and layers are those of `cfrt.nn`; only the rotation is written in real numbers (ONNX has no complex ones)
and linear layers as a product with a transposed weight (ONNX Runtime's quantiser knows MatMul and no Gemm).

Shapes: N tokens of the unit, P past tokens, H heads, D numbers a head, L text rows. Everything is batch 1.
"""

import logging
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfrt.config import ModelConfig
from cfrt.flow import TIME_SCALE, time_embedding
from cfrt.nn.autoencoder import Autoencoder
from cfrt.nn.dit import CausalDiT
from cfrt.nn.rope import phases

from .workload import STUDENT, Workload

OPSET = 20
"""The first with Gelu. Attention and RMS norms are one node from 23 on, which helps neither runtime: measured."""


class Step(nn.Module):
    """One pass over one unit."""

    def __init__(self, dit: CausalDiT) -> None:
        super().__init__()
        self.dit, self.config = dit, dit.config

    def forward(self, x: Tensor, time: Tensor, turn: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        """v [1, F, C, h, w], then k and v [1, H, N, D] of every layer.

        x [1, F, C, h, w]; time [1, time width], the features of t; turn [2, N, D], cosines and signed sines; cache: for
        every layer past k, past v [1, H, P, D], text k, text v [1, H, L, D]."""
        dit, tokens = self.dit, self.config.unit * self.config.frame_tokens
        h = dit._embed(x).reshape(1, tokens, -1)
        e = _linear(dit.time_embedding[2], F.silu(_linear(dit.time_embedding[0], time)))
        m = _linear(dit.time_projection[1], F.silu(e)).view(1, 6, -1)
        own: list[Tensor] = []
        for i, block in enumerate(dit.layers):
            past_k, past_v, text_k, text_v = cache[4 * i : 4 * i + 4]
            shift, scale, gate, shift2, scale2, gate2 = (m + block.modulation).unbind(1)
            a = _norm(h, block.eps) * (1 + scale) + shift
            q = _rotate(self._heads(block.self_attn.norm_q(_linear(block.self_attn.q, a))), turn)
            k = _rotate(self._heads(block.self_attn.norm_k(_linear(block.self_attn.k, a))), turn)
            v = self._heads(_linear(block.self_attn.v, a))
            own += [k, v]
            y = F.scaled_dot_product_attention(q, torch.cat([past_k, k], 2), torch.cat([past_v, v], 2))
            h = h + gate * _linear(block.self_attn.o, _join(y))
            cross = block.cross_attn
            q = self._heads(cross.norm_q(_linear(cross.q, block.norm3(h))))
            h = h + _linear(cross.o, _join(F.scaled_dot_product_attention(q, text_k, text_v)))
            a = _norm(h, block.eps) * (1 + scale2) + shift2
            h = h + gate2 * _linear(block.ffn[2], F.gelu(_linear(block.ffn[0], a), approximate="tanh"))
        shift, scale = (e[:, None] + dit.head.modulation).unbind(1)
        y = _linear(dit.head.head, _norm(h, dit.head.eps) * (1 + scale) + shift)
        return (dit._unpatch(y.view(1, self.config.unit, self.config.frame_tokens, -1)), *own)

    def _heads(self, x: Tensor) -> Tensor:
        """[1, N, d] -> [1, H, N, D]."""
        return x.view(1, -1, self.config.heads, self.config.head_dim).transpose(1, 2)


class Decode(nn.Module):
    """Pixels [f, 3, H, W] in 0..255 of a later unit: latents [1, F, C, h, w] and the frame before them [1, C, h, w]."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor, before: Tensor) -> Tensor:
        video, _ = self.autoencoder.decode(latents, before)
        return (video[0].clamp(0, 1) * 255).round()


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    return x @ layer.weight.t() + layer.bias


def _norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def _join(y: Tensor) -> Tensor:
    """[1, H, N, D] -> [1, N, d]."""
    return y.transpose(1, 2).reshape(1, y.shape[2], -1)


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    """(a, b) -> (a cos - b sin, a sin + b cos) for every pair: x cos + (b, a) (-sin, sin)."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x * turn[0] + swapped * turn[1]


def time_features(config: ModelConfig, s: float) -> np.ndarray:
    """float64 [1, time width]."""
    return time_embedding(np.array([TIME_SCALE * s]), config.time_width)


def turns(config: ModelConfig, unit: int) -> np.ndarray:
    """float64 [2, N, D]: cosines and signed sines of a unit's tokens."""
    frames = tuple(range(unit * config.unit, (unit + 1) * config.unit))
    z = phases(frames, config.token_grid, config.rope_pairs, config.rope_theta, torch.float64, torch.device("cpu"))
    c, s = z[:, 0].real.numpy(), z[:, 0].imag.numpy()
    return np.stack([np.repeat(c, 2, 1), np.stack([-s, s], -1).reshape(len(s), -1)])


def past(work: Workload) -> list[np.ndarray]:
    """For every layer past k, past v [1, H, P, D], text k, text v [1, H, L, D], float32 made in fp64."""
    pairs = zip(work.truth.past, work.truth.text, strict=True)
    return [x.numpy().copy() for past, text in pairs for x in (*past, *text)]  # a host may overwrite its own


class Graphs(NamedTuple):
    """ONNX files; the decoder is the student's only."""

    step: Path
    decode: Path | None


def export(work: Workload) -> Graphs:
    """Writes the graphs into the workload's folder, unless they are there already."""
    config, folder = work.config, work.folder
    step, decode = folder / f"{config.name}.onnx", folder / f"{config.name}-decode.onnx"
    x = torch.zeros(1, config.unit, config.latent_channels, *config.latent_grid)
    if not step.exists():
        fresh = time_features(config, 1.0), turns(config, work.unit)
        inputs = x, *(torch.from_numpy(array).float() for array in (*fresh, *past(work)))
        _write(Step(work.dit()), inputs, step)
    if work.size != STUDENT:
        return Graphs(step, None)
    if not decode.exists():
        _write(Decode(work.autoencoder()), (x, x[:, -1]), decode)
    return Graphs(step, decode)


def _write(module: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # torchvision is not missed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch about itself
        torch.onnx.export(module.eval(), inputs, path, dynamo=True, opset_version=OPSET, verbose=False)
