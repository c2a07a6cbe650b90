"""Where the time of a unit goes on a GPU: the torch engine's stages one at a time, then units under PyTorch's profiler.

    python -m benchmarks.gpu_unit --json benchmarks/results/gpu_unit.json

The 1.3B model at 480 x 832 with random weights, W = 9, TAEHV's decoder, as in benchmarks/full_size_gpu.py. *Host* is
when a call returns, *done* when the GPU has finished what the call put there, from an idle GPU on: where they are
equal, the GPU waits for the host."""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cfrt.engines import Spec
from cfrt.engines.torch import TorchEngine
from cfrt.flow import TIME_SCALE, descent, onward
from cfrt.weights import load_model

from . import machine
from .full_size_gpu import MODEL, random_model, smoke
from .gpu import ask_card

WINDOW, TIMED, PROFILED, KERNELS = 9, 5, 2, 8
"""Latent frames in sight; units timed, then units profiled; kernels that are listed."""
Stage = Callable[[str, Callable[[], Any]], Any]


def engine_on(folder: Path, device: str) -> TorchEngine:
    """Ready for a first unit, with TAEHV's decoder."""
    config, weights = load_model(folder)
    engine = TorchEngine()
    engine.prepare(Spec(config=config, weights=weights, device=device, decoder="taehv"))
    rows = np.random.default_rng(0).standard_normal((config.text.length, config.text.width), np.float32)
    engine.set_text(rows)
    return engine


def run(engine: TorchEngine, folder: Path) -> dict[str, Any]:
    """Seconds of the stages, medians, once the window is full; then where profiled units spent theirs."""
    config = load_model(folder)[0]
    took: dict[str, list[tuple[float, float]]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        _wait()
        began = time.perf_counter()
        result = call()
        host = time.perf_counter() - began
        _wait()
        took.setdefault(name, []).append((host, time.perf_counter() - began))
        return result

    def unit(number: int, stage: Stage) -> None:
        drawn = lambda step: stage("noise", partial(engine.noise, number, step))  # noqa: E731
        x = drawn(0)
        for step, (s, s_next) in enumerate(descent(config.unit_steps(number), config.shift), 1):
            x0 = stage("pass", partial(engine.denoise, x, TIME_SCALE * s, number))
            x = onward(config.solver, x, x0, s, s_next, partial(drawn, step))
        stage("decode", lambda: engine.decode(x))
        stage("commit", lambda: engine.commit(x, number))

    full = config.window // config.unit + 2
    for number in range(full + TIMED):
        if number == full:
            took.clear()
        unit(number, timed)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    with profile(activities=activities, acc_events=True) as seen:
        for number in range(full + TIMED, full + TIMED + PROFILED):
            unit(number, lambda name, call: call())
        _wait()
    pairs = {name: (statistics.median(column) for column in zip(*times, strict=True)) for name, times in took.items()}
    return {
        "attention": engine._attention,
        "precision": engine.precision,
        "stages": {name: dict(zip(("host", "done"), pair, strict=True)) for name, pair in pairs.items()},
        "profile": profiled(seen),
    }


def profiled(seen: profile) -> dict[str, Any]:
    """Seconds of the host and of the GPU, and the kernels that took the most."""
    averages = list(seen.key_averages())
    kernels = [e for e in averages if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    return {
        "units": PROFILED,
        "host": sum(e.self_cpu_time_total for e in averages) / 1e6,
        "gpu": sum(e.self_device_time_total for e in kernels) / 1e6,
        "kernels": [
            {"name": e.key[:70], "seconds": e.self_device_time_total / 1e6, "calls": e.count} for e in kernels[:KERNELS]
        ],
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--models", type=Path, help="keep the random model in this folder")
    parser.add_argument("--smoke", action="store_true", help="a fraction of the size, to see that it works")
    options = parser.parse_args()
    config = replace(smoke(MODEL) if options.smoke else MODEL, window=WINDOW)
    with tempfile.TemporaryDirectory() as temporary:
        folder = random_model(config, (options.models or Path(temporary)) / f"{config.name}-{WINDOW}")
        found = run(engine_on(folder, "cuda"), folder)
    result = {**machine.header(), "card": ask_card(), "model": config.name, "window": WINDOW, **found}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
