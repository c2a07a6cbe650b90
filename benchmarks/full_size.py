"""The 1.3B model at 480 x 832 on this machine's CPU: one frame-wise unit with random weights, once.

    python -m benchmarks.full_size --json benchmarks/results/full_size.json

For each precision, in a process of its own: seconds of every pass, peak memory, and the agreement of one forward with
diffusers' WanTransformer3DModel, which is given the very same tensors. Decoding is not included. fp32 takes about 13 GB
of memory, bf16 half of that; a quarter of an hour on two cores."""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfrt.config import PRESETS, ModelConfig
from cfrt.flow import TIME_SCALE, descent, onward, x0_from_v
from cfrt.nn.dit import CausalDiT
from cfrt.nn.ring import RingCache
from cfrt.weights import to_diffusers

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
WINDOW = 3
"""Latent frames of the ring: the first unit sees itself alone, and a whole ring would be 6 to 13 GB."""


def model_config(smoke: bool) -> ModelConfig:
    """The 1.3B preset; for a smoke test a fraction of its width, depth and picture."""
    full = replace(PRESETS["wan-1.3b-framewise-2step"], window=WINDOW)
    return replace(full, width=96, heads=2, depth=2, ffn=128, latent_grid=(8, 12)) if smoke else full


def random_network(config: ModelConfig, dtype: torch.dtype) -> CausalDiT:
    """Normal(0.02) weights, norms of one: drawn in fp32, a tensor at a time."""
    with torch.device("meta"):
        network = CausalDiT(config)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, empty in network.state_dict().items():
        drawn = torch.randn(empty.shape, generator=generator).mul_(0.02)
        state[name] = (drawn + 1 if "norm" in name and name.endswith("weight") else drawn).to(dtype)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def one_unit(config: ModelConfig, precision: str) -> dict[str, Any]:
    """One unit, start to commit, and one forward against diffusers."""
    dtype = PRECISIONS[precision]
    network = random_network(config, dtype)
    ring = RingCache(config, 1, dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(1, 1, config.text.length, config.text.width, generator=generator).to(dtype)
    x = torch.randn(1, config.unit, config.latent_channels, *config.latent_grid, generator=generator).to(dtype)
    began = time.perf_counter()
    text = network.text_kv(rows)
    seconds: dict[str, Any] = {"text": time.perf_counter() - began, "passes": []}
    drawn = lambda: torch.randn(x.shape, generator=generator).to(dtype)  # noqa: E731
    first, latents = None, x
    for s, s_next in descent(config.unit_steps(0), config.shift):
        began = time.perf_counter()
        v = network.step(latents, torch.full((1,), TIME_SCALE * s), text, ring, 0)
        seconds["passes"].append(time.perf_counter() - began)
        print(f"{precision}: pass at t = {TIME_SCALE * s:.1f}, {seconds['passes'][-1]:.1f} s", file=sys.stderr)
        first = v if first is None else first
        latents = onward(config.solver, latents, x0_from_v(latents, v, s), s, s_next, drawn)
    began = time.perf_counter()
    network.commit(latents, text, ring, 0)
    seconds["commit"] = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert first is not None
    error, theirs = against_diffusers(config, network, x, rows, first)
    return {
        "precision": precision,
        "seconds": seconds | {"unit": sum(seconds["passes"]) + seconds["commit"], "diffusers_forward": theirs},
        "peak_bytes": peak,
        "diffusers": error,
        "finite": bool(torch.isfinite(latents).all()),
    }


def against_diffusers(
    config: ModelConfig, network: CausalDiT, x: Tensor, rows: Tensor, ours: Tensor
) -> tuple[dict[str, float], float]:
    """Largest difference from diffusers' output for the first pass, as a share of its largest number; seconds."""
    from diffusers import WanTransformer3DModel

    from cfrt.convert import diffusers_config

    with torch.device("meta"):
        theirs = WanTransformer3DModel.from_config(diffusers_config(config))
    state = {to_diffusers(name): tensor for name, tensor in network.state_dict().items()}
    theirs.rope = type(theirs.rope)(config.head_dim, config.patch, 1024)  # its tables are no parameters
    theirs.load_state_dict(state, strict=True, assign=True)
    began = time.perf_counter()
    out = theirs(
        hidden_states=x.transpose(1, 2),
        timestep=torch.full((1,), TIME_SCALE),
        encoder_hidden_states=rows[:, 0],
        return_dict=False,
    )[0].transpose(1, 2)
    seconds = time.perf_counter() - began
    difference, scale = (ours.double() - out.double()).abs(), out.double().abs().max()
    return {"max": float(difference.max() / scale), "mean": float(difference.mean() / scale)}, seconds


def in_its_own_process(precision: str, smoke: bool) -> dict[str, Any]:
    """So that peak memory is this precision's alone."""
    command = [sys.executable, "-m", "benchmarks.full_size", "--one", precision, *(["--smoke"] if smoke else [])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--note", default="", help="what else the machine did meanwhile; kept in the result")
    parser.add_argument("--smoke", action="store_true", help="a fraction of the size, to see that it works")
    parser.add_argument("--one", choices=list(PRECISIONS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one_unit(model_config(arguments.smoke), arguments.one)))
        return
    config = model_config(arguments.smoke)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "note": arguments.note,
        "model": config.name + (", smoke test" if arguments.smoke else ""),
        "resolution": list(config.frame_size),
        "unit": config.unit,
        "passes": len(config.unit_steps(0)),
        "window": config.window,
        "decode_included": False,
        "rows": [in_its_own_process(precision, arguments.smoke) for precision in arguments.precision],
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if arguments.json:
        arguments.json.write_text(text)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
