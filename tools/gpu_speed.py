"""Fill docs/bench.md from the runs on a GPU that benchmarks/results keeps:

    python -m benchmarks.gpu --json benchmarks/results/gpu_h200.json
    python -m benchmarks.full_size_gpu --decoders taehv --seconds 4 --json benchmarks/results/full_size_gpu_h200.json
    python -m benchmarks.gpu_unit --json benchmarks/results/gpu_unit_h200.json

Nothing between the markers is written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import readme

from cfrt import predict
from cfrt.config import PRESETS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "bench.md"
OURS, FUSED = "cfrt bf16", "PyTorch SDPA bf16"
PREDICTED = "h100"
"""Of `cfrt/predict.py`: the chip of an H200, with less memory and a slower one."""

Run = Mapping[str, Any]


def load(name: str) -> Run:
    found: Run = json.loads((RESULTS / f"{name}_h200.json").read_text(encoding="utf-8"))
    return found


def section(kernels: Run, stream: Run, unit: Run) -> str:
    card = kernels["card"]
    where = (
        f"Measured {kernels['date']} on one {card['name']} (sm_90, {card['power.limit'].split('.')[0]} W, driver "
        f"{card['driver_version']}), PyTorch {kernels['versions']['torch']}, kernels of CUDA "
        f"{kernels['build']['version']}."
    )
    return "\n\n".join((where, right(kernels), attention(kernels), streams(stream), taken_apart(unit, stream)))


def right(kernels: Run) -> str:
    rows = ["| kernel, against fp64 or its twin on the CPU | error | limit |", "| --- | ---: | ---: |"]
    for check in kernels["checks"]:
        assert check["passed"], check
        rows.append(f"| {check['kernel']} | {check['error']:.3g} | {check['limit']:g} |")
    return "\n".join(rows)


def attention(kernels: Run) -> str:
    ours, fused = ({(r["queries"], r["keys"]): r for r in kernels["timings"] if r["name"] == n} for n in (OURS, FUSED))
    eight = {(r["queries"], r["keys"]): r for r in kernels["timings"] if r["name"] == "cfrt int8, fp32 sums"}
    card = predict.CARDS[PREDICTED]
    expected = card.attention * card.tensor["bf16"]
    lines = [
        "| queries x keys, 12 heads of 128 | ours, bf16 (ms) | TFLOP/s | of peak | ours, 8 bits (ms) | PyTorch SDPA "
        "(ms) | TFLOP/s | SDPA over ours |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for shape, row in ours.items():
        peer = fused[shape]
        cells = (
            f"{shape[0]:,} x {shape[1]:,}",
            f"{row['milliseconds']:.3f}",
            f"{row['tflops']:.0f}",
            f"{100 * row['share_of_peak']:.0f} %",
            f"{eight[shape]['milliseconds']:.3f}",
            f"{peer['milliseconds']:.3f}",
            f"{peer['tflops']:.0f}",
            f"{peer['milliseconds'] / row['milliseconds']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        f"Attention over a ring, medians, keys from memory (`python -m benchmarks.gpu`). Our kernels are for Ada and "
        f"use `mma.sync`, which on Hopper does only about half of what `wgmma` does, and the peak is `wgmma`'s. "
        f"`cfrt/predict.py` takes {expected:.0f} TFLOP/s for attention on an H100, as published for kernels of "
        f"Hopper's own (FlashAttention-3): PyTorch's stays below it here, and ours reaches about half of it. 8 bits "
        f"are no gain on this chip. None of it says what an RTX 4090 does: its interval stays predicted."
    )
    return "\n".join((*lines, "", note))


def streams(stream: Run) -> str:
    lines = [
        "| 480 x 832, 2 steps, TAEHV, bf16 | fps | unit p50 / p95 (ms) | latency p50 / p95 (ms) | decode p50 (ms) | "
        "change to pixel p50 (ms) | first frame (s) | most allocated (GB) | predicted (GB) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in stream["rows"]:
        config = replace(PRESETS[row["model"]], window=row["window"])
        both = lambda name, row=row: f"{1e3 * row[name]['p50']:.0f} / {1e3 * row[name]['p95']:.0f}"  # noqa: E731
        cells = (
            f"W = {row['window']}",
            f"{row['fps']:.1f}",
            both("unit"),
            both("latency"),
            f"{1e3 * row['decode']['p50']:.1f}",
            f"{1e3 * row['change_to_pixel']['p50']:.0f}",
            f"{row['time_to_first_frame']:.1f}",
            f"{row['allocated_peak'] / 1e9:.1f}",
            f"{predict.memory_of(config, row['precision'], row['decoder']) / 1e9:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    row = stream["rows"][0]
    note = (
        f"`{row['model']}` with random weights through `cfrt.Stream`, {row['engine']} engine, eager PyTorch and our "
        f"attention, {row['seconds']:.0f} s each, loading included in the first frame (`python -m "
        f"benchmarks.full_size_gpu`). Real time at 16 fps: a unit is {1e3 * row['unit_duration']:.0f} ms of video."
    )
    return "\n".join((*lines, "", note))


def taken_apart(unit: Run, stream: Run) -> str:
    stages, seen = unit["stages"], unit["profile"]
    measured = next(row for row in stream["rows"] if row["window"] == unit["window"])["unit"]["p50"]
    ms = lambda seconds: f"{1e3 * seconds:.0f} ms"  # noqa: E731
    of_gpu = lambda word: sum(k["seconds"] for k in seen["kernels"] if word in k["name"]) / seen["gpu"]  # noqa: E731
    config = replace(PRESETS[unit["model"]], window=unit["window"])
    shape = predict.Shape(config, config.window)
    terms = predict.pass_terms(shape, predict.CARDS[PREDICTED], unit["precision"], predict.calibrate())
    passes = len(config.unit_steps(1)) + 1
    low, high = (sum(getattr(term, end) for term in terms.values()) for end in ("fast", "slow"))
    return (
        f"**Where a unit's time goes** (W = {unit['window']}; `python -m benchmarks.gpu_unit`): the torch engine is "
        f"bound by the host. A pass returns after {1e3 * stages['pass']['host']:.1f} ms and is done after "
        f"{1e3 * stages['pass']['done']:.1f}: the GPU keeps up with whatever it is asked. Under the profiler "
        f"{seen['units']} units cost the host {ms(seen['host'])} and the GPU {ms(seen['gpu'])}, "
        f"{ms(seen['gpu'] / seen['units'])} each, where the stream takes {ms(measured)} a unit; of the GPU's time "
        f"{100 * of_gpu('cfrt::attention'):.0f} % is our attention and {100 * of_gpu('nvjet'):.0f} % dense products. "
        f"Decoding takes {ms(stages['decode']['done'])}. With passes in CUDA graphs up to half of a unit would go "
        f"(predicted); the account of `cfrt bench --predict`, which is for such an engine, gives an H100 "
        f"{1e3 * passes * low:.0f} to {1e3 * passes * high:.0f} ms for the {passes} passes in bf16."
    )


def page(text: str) -> str:
    return readme.fill(text, "gpu", section(load("gpu"), load("full_size_gpu"), load("gpu_unit")))


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
