"""What the embedded student loses when it remembers less than it was trained with: the card's measures, pair by pair.

    python -m benchmarks.windows --prompts 256 --json benchmarks/results/windows.json

The same prompts and seeds in its own window and in shorter ones, by the native engine in fp32. It says what a short
window costs this student, not what it costs another one. It changes nothing that other work runs beside it.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cfrt import students
from cfrt.weights import load_model, save_model
from training import sources, worlds
from training.evaluate import Config
from training.quality import BATCH, digest, lines, measure

from .machine import header

MODEL = "tiny"


def measured(windows: list[int], prompts: int, frames: int) -> dict[str, Any]:
    """Numbers by window in latent frames, the student's own first."""
    folder = students.find(MODEL)
    config, weights = load_model(folder)
    tasks = replace(Config(), prompts=prompts, units=1 + (frames - 1) // worlds.UNIT_FRAMES, batch=BATCH)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        players = {str(config.window): sources.streamed(folder, "native", "fp32", 1)}
        for window in windows:
            save_model(Path(scratch) / str(window), replace(config, window=window), weights)
            players[str(window)] = sources.streamed(Path(scratch) / str(window), "native", "fp32", 1)
        found = measure(tasks, players)
    return {
        "model": MODEL,
        "model_sha256": digest(folder),
        "engine": "native, fp32",
        "prompts": prompts,
        "frames": frames,
        "trained_frames": config.trained_frames,
        "seconds": round(time.perf_counter() - begin),
        "windows": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 2], help="latent frames, this unit included")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--frames", type=int, default=201, help="of each clip: 1 + 4 n")
    parser.add_argument("--json", type=Path, help="where to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = header() | measured(options.windows, options.prompts, options.frames)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for window, numbers in found["windows"].items():
        print("\n".join([f"W = {window}", *lines(numbers)]))


if __name__ == "__main__":
    main()
