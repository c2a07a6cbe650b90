"""The trained network of every stage: the causal DiT and its text table, spoken to in sigma and caption rows.

Shapes: x [B, n, C, h, w] latents, s [B, n] sigma in [0, 1], captions [B, 2, L] rows, caption [B, n] which caption
rules a frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from cfrt import flow
from cfrt.config import ModelConfig
from cfrt.nn.constants import kept
from cfrt.nn.dit import CausalDiT
from cfrt.nn.text import TextTable
from training import captions
from training.data import Batch, Prompts

EARLY = 4
"""Units at the start of a clip that weigh more: in them a caption decides where the object heads."""

Velocity = Callable[[Tensor, Tensor, Batch], Tensor]  # (x, s, batch) -> v


class Network(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dit = CausalDiT(config)
        rows = 1 + max(config.text.vocab.values(), default=captions.ROWS - 1)  # the world's, where none is named
        self.text = TextTable(config.text, rows) if config.text.kind == "table" else nn.Identity()

    @property
    def device(self) -> torch.device:
        return self.dit.patch_embedding.weight.device

    def text_kv(self, captions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cross-attention keys and values of captions (rows [B, C, L] or embeddings [B, C, L, D]), one pair a layer."""
        return self.dit.text_kv(self.text(captions))

    def bidirectional(self, x: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """v where every frame sees every frame."""
        return self.dit(x, flow.TIME_SCALE * s, self.text_kv(batch.captions), batch.caption)

    def teacher_forced(self, x: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """v of noisy units that see the clean past of the data (arXiv:2602.02214, section 3.2)."""
        kv = self.text_kv(batch.captions)
        return self.dit.teacher_forced(batch.latents, x, flow.TIME_SCALE * s, kv, batch.caption)

    def noisy_prefix(self, x: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """v of units that see a past as noisy as it is: diffusion forcing's layout, and that of Self Forcing's ODE
        regression (block-causal mask, no clean half)."""
        mask = torch.from_numpy(self.dit.config.geometry.causal_mask(x.shape[1]))
        kv, layout = self.text_kv(batch.captions), "flex" if x.is_cuda else "mask"
        return self.dit(x, flow.TIME_SCALE * s, kv, batch.caption, mask=mask, layout=layout)


def clone(network: Network, config: ModelConfig, weights: Mapping[str, Tensor] | None = None) -> Network:
    """A copy with its own weights, optionally others', on the same device."""
    with network.device:
        copy = Network(config)
    copy.load_state_dict(dict(weights) if weights is not None else network.state_dict())
    return copy


def load(config: ModelConfig, weights: Mapping[str, Tensor]) -> Network:
    network = Network(config)
    network.load_state_dict({name: value.float() for name, value in weights.items()})
    return network


def frozen(network: Network) -> Network:
    return network.eval().requires_grad_(False)


@torch.no_grad()
def guided(velocity: Velocity, x: Tensor, s: Tensor, batch: Batch, scale: float | Tensor) -> Tensor:
    """v under classifier-free guidance: both branches in one doubled batch; scale 1 costs nothing extra. A tensor
    [B, n, 1, 1, 1] guides each frame by its own scale."""
    if not isinstance(scale, Tensor) and scale == 1:
        return velocity(x, s, batch)
    v_cond, v_null = velocity(torch.cat([x, x]), torch.cat([s, s]), batch.and_null()).chunk(2)
    return flow.guide(v_cond, v_null, scale)


def by_age(batch: Prompts, fresh: float, later: float, unit: int) -> Tensor:
    """A scale for each frame, [B, n, 1, 1, 1]: `fresh` in the first units after its caption began, where the caption
    decides what is to be seen, and `later` in the others."""
    frames = batch.caption.shape[1]
    index = torch.arange(frames, device=batch.caption.device)
    began = (frames - batch.caption.sum(1, keepdim=True)) * batch.caption  # a second caption rules to the end
    return broadcast(torch.where(index - began < EARLY * unit, fresh, later))


def guidance_of(batch: Prompts, fresh: float, later: float | None, unit: int) -> float | Tensor:
    """The same where `later` may be None, which is as `fresh`: then one number, and 1 costs nothing (`guided`)."""
    return fresh if later is None else by_age(batch, fresh, later, unit)


@torch.no_grad()
def resampled(
    network: Network, batch: Batch, share: float, top: float, shift: float, generator: torch.Generator, jumps: int = 1
) -> Batch:
    """The batch as a context: in the first `share` of its clips, every frame is what the network guesses of it from a
    noisy copy and the clean past, at one level a clip of at most `top`. A stream goes on from guesses, and a network
    that only ever saw the data's past repeats their errors (self-resampling, arXiv:2512.15702).

    `jumps`: how often, each time from half the noise and on the past that was guessed before."""
    count = round(share * len(batch))
    if count == 0:
        return batch
    past = batch.first(count)
    u = flow.unwarp(top, shift) * torch.rand(count, 1, generator=generator, device=generator.device)
    for jump in range(jumps):
        x0 = past.latents
        s = flow.warp(u / 2**jump, shift).to(x0.device).expand(x0.shape[:2])
        x = flow.add_noise(x0, noise_like(x0, generator), broadcast(s))
        guess = flow.x0_from_v(x, network.teacher_forced(x, s, past), broadcast(s))
        past = replace(past, latents=guess)
    return replace(batch, latents=torch.cat([past.latents, batch.latents[count:]]))


def noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of x's shape, on its device. They are drawn where the generator lives: on the CPU they are the
    same wherever a stage is trained, and a captured stage (`training.capture`) cannot wait for them."""
    return torch.randn(x.shape, generator=generator, device=generator.device).to(x.device)


def broadcast(s: Tensor) -> Tensor:
    """[B, n] -> [B, n, 1, 1, 1], to meet latents."""
    return s[:, :, None, None, None]


@kept(16)
def unit_weights(frames: int, unit: int, first: float, early: float, device: torch.device) -> Tensor:
    """[T] loss weights of mean 1: a frame of the first unit counts `first` times, of the next three `early` times."""
    weights = torch.ones(frames)
    weights[: EARLY * unit] = early
    weights[:unit] = first
    return (weights / weights.mean()).to(device)
