"""The official autoencoders at 480 x 832 on this machine's CPU, with random weights, once.

    python -m benchmarks.full_size_video --json benchmarks/results/full_size_video.json

Each row in a process of its own: Wan's encoder and decoder over the first latent frame (one picture) and the second
(four), TAEHV's decoder over the same; seconds of each, peak memory, and for Wan's the agreement with diffusers'
AutoencoderKLWan, which is given the very same tensors at the same size. A quarter of an hour on one core, 12 GB."""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cfrt.config import PRESETS, AutoencoderConfig
from cfrt.nn.taehv import TAEHV
from cfrt.nn.wan_vae import WanVAE
from cfrt.weights import vae_from_diffusers

from . import machine

MODEL = PRESETS["wan-1.3b-framewise-2step"]
SMOKE = (4, 6)
"""Latent cells of a smoke test."""
FRAMES = 2
"""Latent frames: the first is one picture, the second four, as every later one."""


def randomise(module: nn.Module) -> nn.Module:
    """Weights that keep the size of what goes through: normal / sqrt(fan in), biases of 0.1, norms about one."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        many = parameter.dim() > 1 and parameter.numel() > len(parameter)
        scale = parameter[0].numel() ** -0.5 if many else 0.1
        parameter.data = drawn * scale + (1.0 if "norm" in name or "gamma" in name else 0.0)
    return module.eval().requires_grad_(False)


def timed(make: Callable[[], Tensor]) -> tuple[Tensor, float]:
    began = time.perf_counter()
    made = make()
    return made, time.perf_counter() - began


@torch.no_grad()
def encode_wan(config: AutoencoderConfig, grid: tuple[int, int]) -> dict[str, Any]:
    """A picture, then four."""
    vae = WanVAE(config)
    randomise(vae)
    video = _noise(1, 1 + config.temporal, 3, *(config.spatial * side for side in grid)).sigmoid()
    state: Any = None
    parts, seconds = [], []
    for piece in (video[:, :1], video[:, 1:]):
        began = time.perf_counter()
        latents, state = vae.encode_on(piece, state)
        seconds.append(time.perf_counter() - began)
        parts.append(latents)
    peak = _peak()
    other = _diffusers(vae)
    theirs, their_seconds = timed(lambda: other.encode(2 * video.transpose(1, 2) - 1).latent_dist.mode())
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in config.normalisation)
    agreement = _agreement(torch.cat(parts, dim=1), ((theirs - mean) / std).transpose(1, 2))
    return {"seconds": seconds, "peak_bytes": peak, "diffusers": agreement, "diffusers_seconds": their_seconds}


@torch.no_grad()
def decode_wan(config: AutoencoderConfig, grid: tuple[int, int]) -> dict[str, Any]:
    """A latent frame that makes a picture, then one that makes four, the state between them handed over."""
    vae = WanVAE(config)
    randomise(vae)
    latents = _noise(1, FRAMES, config.latent_channels, *grid)
    video, seconds, state = _decoded(vae, latents)
    peak = _peak()
    del state
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in config.normalisation)
    scaled = latents.transpose(1, 2) * std + mean
    other = _diffusers(vae)
    theirs, their_seconds = timed(lambda: other.decode(scaled).sample)
    agreement = _agreement((2 * video - 1).clamp(-1, 1), theirs.transpose(1, 2))
    return {"seconds": seconds, "peak_bytes": peak, "diffusers": agreement, "diffusers_seconds": their_seconds}


@torch.no_grad()
def decode_taehv(config: AutoencoderConfig, grid: tuple[int, int]) -> dict[str, Any]:
    """The same latents by the small decoder; diffusers has none to compare with."""
    decoder = TAEHV(replace(config, kind="taehv", widths=()))
    randomise(decoder)
    _, seconds, _ = _decoded(decoder, _noise(1, FRAMES, config.latent_channels, *grid))
    return {"seconds": seconds, "peak_bytes": _peak()}


ROWS = {"Wan, encode": encode_wan, "Wan, decode": decode_wan, "TAEHV, decode": decode_taehv}


def _decoded(decoder: WanVAE | TAEHV, latents: Tensor) -> tuple[Tensor, list[float], Any]:
    """Pixels, seconds of each latent frame, and the state after them."""
    state: Any = None
    parts, seconds = [], []
    for frame in latents.split(1, dim=1):
        began = time.perf_counter()
        video, state = decoder.decode(frame, state)
        seconds.append(time.perf_counter() - began)
        parts.append(video)
    return torch.cat(parts, dim=1), seconds, state


def _diffusers(vae: WanVAE) -> Any:
    """Their module with our tensors, under their names."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        theirs = AutoencoderKLWan(base_dim=len(vae.state_dict()["decoder.head.0.gamma"]))
    ours = vae.state_dict()
    theirs.load_state_dict({name: ours[vae_from_diffusers(name)] for name in theirs.state_dict()}, assign=True)
    return theirs.eval().requires_grad_(False)


def _agreement(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Differences as a share of the largest number."""
    difference, scale = (ours.double() - theirs.double()).abs(), theirs.double().abs().max()
    return {"max": float(difference.max() / scale), "mean": float(difference.mean() / scale)}


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_its_own_process(row: str, smoke: bool) -> dict[str, Any]:
    """So that peak memory is this row's alone."""
    command = [sys.executable, "-m", "benchmarks.full_size_video", "--one", row, *(["--smoke"] if smoke else [])]
    print(row, file=sys.stderr)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return {"what": row, **json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--note", default="", help="what else the machine did meanwhile; kept in the result")
    parser.add_argument("--smoke", action="store_true", help="a small picture, to see that it works")
    parser.add_argument("--one", choices=list(ROWS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    grid = SMOKE if arguments.smoke else MODEL.latent_grid
    if arguments.one:
        print(json.dumps(ROWS[arguments.one](MODEL.autoencoder, grid)))
        return
    result = {
        **machine.header(),
        "threads": torch.get_num_threads(),
        "note": arguments.note,
        "precision": "fp32",
        "resolution": [MODEL.autoencoder.spatial * side for side in grid],
        "pictures": [1, MODEL.autoencoder.temporal],
        "rows": [in_its_own_process(row, arguments.smoke) for row in ROWS],
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if arguments.json:
        arguments.json.write_text(text)


if __name__ == "__main__":
    main()
