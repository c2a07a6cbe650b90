"""Fill docs/training-speed.md from runs of the training benchmarks.

    pytest benchmarks/bench_training.py --benchmark-json build/training.json
    python tools/training_speed.py build/training.json --note "what else was running"    keep that run and word it
    python tools/training_speed.py                                                       word the kept runs again
    python -m benchmarks.gpu_teacher_forcing --json benchmarks/results/gpu_teacher_forcing_h200.json    on a GPU
    python -m benchmarks.capture --json benchmarks/results/capture_h200.json                            on a GPU

Nothing in the page's tables is written by hand."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))
from benchmarks.gpu_teacher_forcing import tflops
from benchmarks.gpu_timing import peak
from cfrt import predict
from cfrt.config import PRESETS
from training.recipes import tiny_gpu

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KEPT = RESULTS / "training.json"
PAGE = ROOT / "docs" / "training-speed.md"

Row = Mapping[str, Any]

INTRODUCTION = """# How fast training is

Written by `tools/training_speed.py` from the runs that `benchmarks/results` keeps: of two CPU cores first, then of a
GPU.

## On a CPU

`pytest benchmarks/bench_training.py` measures again, and its docstring says how. The network is the embedded student's
(width 192, 4 layers, 3 heads), fp32, at several picture sizes: 4 tokens a latent frame is the shipped one, 64 x 64
pixels. F = 1; windows cover the clip."""


def keep(benches: Sequence[Path], note: str) -> None:
    """The rows and the machine of a run (in one file or several), without its raw timings."""
    reports = [json.loads(bench.read_text(encoding="utf-8")) for bench in benches]
    cpu = reports[0]["machine_info"]["cpu"]
    machine = {"cpu": cpu.get("brand_raw", platform.machine()), "cores": os.cpu_count()}
    kept = {
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "note": note,
        "rows": [row["extra_info"] for report in reports for row in report["benchmarks"]],
    }
    KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def page() -> str:
    runs = (load(f"{name}_h200") for name in ("gpu_teacher_forcing", "capture", "tiny_gpu"))
    parts = [*on_cpu(load("training")), *on_gpu(*runs)]
    return "\n\n".join(parts) + "\n"


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def on_cpu(kept: Mapping[str, Any]) -> list[str]:
    rows, machine = kept["rows"], kept["machine"]
    first = rows[0]
    clock = "processor time" if first["clock"] == "process_time" else "time on the wall"
    where = f"Measured {kept['date']} on {machine['cpu']}, {machine['cores']} cores, of which {first['threads']} used; "
    where += f"{clock}, the fastest of the rounds. {kept['note']}".rstrip()
    return [
        INTRODUCTION,
        where,
        "### Stages of the tiny recipe",
        "Whole steps, optimiser included, 10 latent frames of 4 tokens. A step of DMD is one update of the student and "
        "five of the critic, on one rollout.",
        stages(chosen(rows, "stage")),
        "### Teacher forcing: under the mask, or by ranges",
        "Forward and backward of [clean | noisy]. *Mask* computes every pair of tokens and hides what may not be seen, "
        "*ranges* computes what is seen, one call of attention a unit (`layout=` of `CausalDiT.teacher_forced`). *Of "
        "peak*: the products of matrices that a layout computes, by formula (`step_flops` in the benchmark), over its "
        "time, against the fastest 1024 x 1024 fp32 product of the same run. The mask's useful part leaves out the "
        "pairs that it hides.",
        steps(chosen(rows, "teacher-forced step")),
        "#### How the cost grows with the clip",
        "The exponent a of time ~ frames^a, by least squares over all lengths, and between the two longest. Linear "
        "layers grow with 1, attention with 2.",
        growth(chosen(rows, "teacher-forced step")),
        "### Attention alone",
        "One layer, forward, under the teacher-forcing mask; FlexAttention compiled with the mask of `cfrt.blocks` "
        "(without a GPU it has no backward, so training cannot use it there).",
        attention(chosen(rows, "attention")),
        "### Making ODE pairs: against a ring, or all at once",
        "Guided trajectories of the AR teacher. *Ring* goes unit by unit against cached keys of the real past "
        "(`causal_pairs`); the others give all units the past in every step (`forced_pairs`). The reference "
        "implementation says that caching makes it about 3 times faster.",
        pairs(chosen(rows, "pairs")),
        predicted(),
    ]


def on_gpu(attention: Mapping[str, Any], capture: Mapping[str, Any], chain: Mapping[str, Any]) -> list[str]:
    model, recipe = PRESETS[attention["model"]], tiny_gpu()
    frames, ways = attention["frames"], {row["name"]: row for row in attention["rows"]}
    slower, larger = (ways["ranges"][name] / ways["flex"][name] for name in ("both", "allocated_peak"))
    seen = model.geometry.teacher_forcing_mask(frames).mean()
    return [
        "## On a GPU",
        f"One {attention['card']['name']}, PyTorch {attention['versions']['torch']}, {attention['date']}.",
        "### Teacher forcing at full size",
        f"Attention of one layer of Wan 1.3B over [clean | noisy] of {frames} latent frames, "
        f"{2 * frames * model.frame_tokens:,} tokens, bf16: `python -m benchmarks.gpu_teacher_forcing`. TFLOP/s are "
        f"those of the pairs seen, {100 * seen:.0f} % of all; *of peak*, with backward, is against what dense "
        'bf16 products do at the card\'s highest clock. Training takes FlexAttention (`layout="auto"`): beside it, '
        f"ranges take {100 * slower:.0f} % of the time and {larger:.1f} times the memory. {attention['note']}",
        full_size(attention, peak_of(capture["card"])),
        "### A captured step",
        "`python -m training tiny-gpu` launches a step as one CUDA graph ([training/capture.py]"
        "(../training/capture.py)): its network is so small that a step's kernels take longer to launch than to run. "
        f"Clips of {capture['units']} latent frames of {recipe.model.frame_tokens} tokens, bf16 and TF32, optimiser "
        "and average included: `python -m benchmarks.capture`. The *graph alone* is replayed without either. DMD's "
        f"rollouts are not captured; its step is one update of the student and five of the critic. {capture['note']}",
        captured(capture["rows"]),
        "### The end of the recipe tiny-gpu",
        "From the released AR teacher, which was trained on, to the student, in one run of "
        f"{sum(row['seconds'] for row in (*chain['stages'], *chain['made'])) / 60:.1f} minutes: clips and trajectories "
        f"kept on the GPU, every step one CUDA graph. {chain['note']} The stages before have not been timed on a GPU. "
        "`python -m training tiny-gpu --dry-run` prints what each stage will do and need.",
        made(chain["made"]),
        whole(chain["stages"]),
    ]


def chosen(rows: Sequence[Row], what: str) -> list[Row]:
    return [row for row in rows if row["what"] == what]


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in body])


def stages(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        seconds = row["seconds"][row["note"]]
        body.append([row["note"], f"{row['clips']}", f"{1000 * seconds:.0f}", f"{row['clips'] / seconds:.1f}"])
    return table(["stage", "batch", "ms a step", "clips/s"], body)


def steps(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        mask, ranges = (row["seconds"][name] for name in ("mask", "ranges"))
        peak, work = row["peak_gflops"], row["gflop"]
        shares = (work["mask"] / mask / peak, work["ranges"] / mask / peak, work["ranges"] / ranges / peak)
        body.append(
            [
                f"{row['tokens']} x {row['frames']}",
                *(f"{row['clips'] / seconds:.3g}" for seconds in (mask, ranges)),
                f"{mask / ranges:.2f}",
                *(f"{100 * share:.0f} %" for share in shares),
            ]
        )
    head = ["tokens x frames", "mask, clips/s", "ranges, clips/s", "ranges faster by", "mask, of peak"]
    return table([*head, "useful part", "ranges, of peak"], body)


def growth(rows: Sequence[Row]) -> str:
    body = []
    for tokens in sorted({row["tokens"] for row in rows}):
        own = sorted((row for row in rows if row["tokens"] == tokens), key=lambda row: row["frames"])
        frames = [row["frames"] for row in own]
        cells = [f"{tokens}", f"{frames[0]}–{frames[-1]}"]
        for layout in ("mask", "ranges"):
            seconds = [row["seconds"][layout] for row in own]
            cells += [f"{exponent(frames, seconds):.2f}", f"{exponent(frames[-2:], seconds[-2:]):.2f}"]
        body.append(cells)
    return table(["tokens a frame", "frames", "mask", "at the end", "ranges", "at the end"], body)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of log y over log x by least squares."""
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    above = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True))
    return above / sum((a - mean_u) ** 2 for a in u)


def attention(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    body = [
        [
            f"{row['tokens']} x {row['frames']}, {row['clips']}",
            *(f"{1000 * row['seconds'][name]:.2f}" if name in row["seconds"] else "–" for name in names),
        ]
        for row in rows
    ]
    return table(["tokens x frames, clips", *(f"{name}, ms" for name in names)], body)


def pairs(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        ring = row["seconds"]["ring"]
        rates = [f"{row['clips'] / seconds:.3g}" for seconds in row["seconds"].values()]
        ratios = [f"{row['seconds'][name] / ring:.2f}" for name in ("mask", "ranges")]
        body.append([f"{row['tokens']} x {row['frames']}", row["note"], *rates, *ratios])
    names = [f"{name}, clips/s" for name in rows[0]["seconds"]]
    return table(["tokens x frames", "", *names, "ring over mask", "ring over ranges"], body)


def full_size(run: Mapping[str, Any], peak: float) -> str:
    model, body = PRESETS[run["model"]], []
    for row in run["rows"]:
        times = [(row["forward"], False), (row["both"], True)]
        rates = [tflops(model, run["frames"], seconds, backward=both) for seconds, both in times]
        cells = [f"{1e3 * row['forward']:.1f}", f"{1e3 * row['both']:.1f}", *(f"{rate:.0f}" for rate in rates)]
        body.append([row["name"], *cells, f"{100 * rates[1] / peak:.0f} %", f"{row['allocated_peak'] / 1e9:.1f}"])
    head = ["", "forward, ms", "with backward, ms", "TFLOP/s, forward", "with backward", "of peak", "GB at most"]
    return table(head, body)


def peak_of(card: Mapping[str, str]) -> float:
    """TFLOP/s of an H200's dense bf16 products at its highest clock."""
    found = peak(90, predict.CARDS["h100"].processors, float(card["clocks.max.sm"]) / 1000, "bf16", "fp32")
    assert found is not None
    return found


def captured(rows: Sequence[Row]) -> str:
    eager = {(row["stage"], row["batch"]): row["step"] for row in rows if not row["captured"]}
    body = []
    for row in rows:
        key = (row["stage"], row["batch"])
        way = "captured" if row["captured"] else "launched one by one"
        faster = f"{eager[key] / row['step']:.1f}" if row["captured"] and key in eager else "–"
        alone = f"{1e3 * row['graph']:.1f}" if "graph" in row else "–"
        cells = [f"{row['batch']}", f"{1e3 * row['step']:.1f}", alone, faster, f"{row['batch'] / row['step']:,.0f}"]
        body.append([f"{row['stage']}, {way}", *cells, f"{row['allocated_peak'] / 1e9:.1f}"])
    return table(["stage", "batch", "ms a step", "graph alone", "faster by", "clips/s", "GB at most"], body)


def whole(rows: Sequence[Row]) -> str:
    body = [
        [
            row["stage"],
            *(f"{row[name]:,}" for name in ("batch", "steps", "clips")),
            f"{row['seconds']:.0f}",
            f"{row['clips'] / row['seconds']:,.0f}",
        ]
        for row in rows
    ]
    return table(["stage", "batch", "steps", "clips", "seconds", "clips/s"], body)


def made(rows: Sequence[Row]) -> str:
    body = [
        [row["what"], f"{row['count']:,}", f"{row['seconds']:.0f}", f"{row['count'] / row['seconds']:,.0f}"]
        for row in rows
    ]
    return table(["made", "count", "seconds", "a second"], body)


def predicted() -> str:
    """What counting products says of the 1.3B model, where calls cost nothing beside them."""
    model = PRESETS["wan-1.3b-framewise-ar"]
    n, d, frames = model.frame_tokens, model.width, model.trained_frames
    linear = frames * n * (12 * d * d + 4 * d * model.ffn)  # of one half
    seen = int(model.geometry.causal_mask(frames).sum()) * n * n
    ring = linear + 4 * d * seen
    ranges, mask = 2 * linear + 8 * d * seen, 2 * linear + 16 * d * (frames * n) ** 2
    return (
        f"*Predicted* for the 1.3B model by counting products ({frames} frames of {n} tokens, F = {model.unit}): "
        f"the ring costs 1/{ranges / ring:.1f} of the ranges (or of a FlexAttention that hides for nothing) and "
        f"1/{mask / ring:.1f} of the dense mask. At the sizes measured above a unit of the ring is a handful of "
        "tokens, and what a call costs whatever its size eats most of that."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", nargs="*", type=Path, help="a run of pytest-benchmark to keep, or its pieces")
    parser.add_argument("--note", default="", help="what else was running")
    arguments = parser.parse_args()
    if arguments.bench:
        keep(arguments.bench, arguments.note)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
