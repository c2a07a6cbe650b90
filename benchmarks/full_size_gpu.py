"""The 1.3B model at 480 x 832 as a stream on this machine's GPU, with random weights and without its text encoder.

    python -m benchmarks.full_size_gpu --json benchmarks/results/full_size_gpu.json

By the torch engine in bf16, as `cfrt bench` measures it, for every window and decoder asked for. How long a pass takes
does not depend on the weights; what is seen does, so the pictures are noise. Needs 10 GB on the disk and on the GPU."""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cfrt import bench
from cfrt.config import PRESETS, ModelConfig
from cfrt.nn.taehv import TAEHV
from cfrt.nn.wan_vae import WanVAE
from cfrt.text import Encoded
from cfrt.weights import save_model

from . import machine
from .full_size import random_network
from .full_size_video import randomise
from .gpu import ask_card

MODEL = PRESETS["wan-1.3b-framewise-2step"]
WINDOWS = (9, 21)
"""Latent frames: what `cfrt bench --predict` takes, and the model's own."""


class Noise:
    """Rows of text for any prompt, the same for the same length of it."""

    def __init__(self, config: ModelConfig) -> None:
        self._shape = (config.text.length, config.text.width)

    def encode(self, prompt: str) -> Encoded:
        return Encoded(np.random.default_rng(len(prompt)).standard_normal(self._shape, np.float32), words=())


def smoke(config: ModelConfig) -> ModelConfig:
    """A fraction of the width, depth and picture."""
    return replace(config, width=96, heads=2, depth=2, ffn=128, latent_grid=(8, 12))


def random_model(config: ModelConfig, folder: Path) -> Path:
    """A folder that `cfrt.Stream` loads, with both decoders; once made it is kept."""
    if not (folder / "config.json").exists():
        modules = {
            "dit": random_network(config, torch.float16),
            "autoencoder": randomise(WanVAE(config.autoencoder)),
            "taehv": randomise(TAEHV(replace(config.autoencoder, kind="taehv", widths=()))),
        }
        named = {f"{part}.{name}": x for part, module in modules.items() for name, x in module.state_dict().items()}
        save_model(folder, config, {name: x.half().numpy() for name, x in named.items()})
    return folder


def measured(config: ModelConfig, folder: Path, decoder: str, seconds: float) -> dict[str, Any]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    found = bench.measure(
        str(folder),
        seconds=seconds,
        engine="torch",
        device="cuda",
        decoder="taehv" if decoder == "taehv" else None,
        text=Noise(config),
    )
    return found | {"allocated_peak": torch.cuda.max_memory_allocated()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--windows", type=int, nargs="+", default=list(WINDOWS), help="latent frames that a unit sees")
    parser.add_argument("--decoders", nargs="+", choices=["taehv", "wan"], default=["taehv", "wan"])
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to measure each")
    parser.add_argument("--models", type=Path, help="keep the random models in this folder")
    parser.add_argument("--make-only", action="store_true", help="make the models and measure nothing")
    parser.add_argument("--smoke", action="store_true", help="a fraction of the size, to see that it works")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for window in options.windows:
            config = replace(smoke(MODEL) if options.smoke else MODEL, window=window)
            folder = random_model(config, (options.models or Path(temporary)) / f"{config.name}-{window}")
            for decoder in [] if options.make_only else options.decoders:
                rows.append(measured(config, folder, decoder, options.seconds))
                print(bench.as_text(rows[-1]), flush=True)
    if options.json:
        result = {**machine.header(), "card": ask_card(), "weights": "random", "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
