"""Fill README.md from runs: what its example prints, a picture the student makes, and tables of measured speed.
docs/cpu-performance.md goes along.

    python tools/readme.py --bench build/bench.json     keep that run of `pytest benchmarks` and word it
    python tools/readme.py                              example and picture anew, speed from the kept run

The student's table is filled by `python -m training.card`. Nothing between the markers is written by hand."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cpu_speed
import roofline

from cfrt.config import ModelConfig

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results" / "stream.json"
STUDENT = ROOT / "cfrt" / "students" / "tiny" / "config.json"
PICTURE = "docs/stream.png"
PROMPTS = ("a large red circle moving left over the ocean", "a small yellow cross moving up at night")
COLUMNS = ("fps", "latency p50 (ms)", "latency p95 (ms)", "unit p50 (ms)", "unit p95 (ms)", "decode p50 (ms)")


def fill(text: str, name: str, body: str) -> str:
    """`text` with `body` between the markers of `name`."""
    begin, end = f"<!-- generated:{name} -->", f"<!-- /generated:{name} -->"
    if begin not in text or end not in text:
        raise SystemExit(f"readme: expected the markers {begin} and {end} in the page")
    before, after = text.split(begin, 1)[0], text.split(end, 1)[1]
    return f"{before}{begin}\n{body}\n{end}{after}"


def example(text: str) -> str:
    """What the README's first block of Python prints when it is run."""
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    if found is None:
        raise SystemExit("readme: expected a block of Python in README.md")
    done = subprocess.run([sys.executable, "-c", found[1]], capture_output=True, text=True, check=True, cwd=ROOT)
    return f"```text\n{done.stdout.rstrip()}\n```"


def picture() -> str:
    """A contact sheet of four seconds with a change of prompt, drawn by the command line."""
    (ROOT / PICTURE).parent.mkdir(exist_ok=True)
    first, then = PROMPTS
    command = ["generate", first, "--then", f"2.0: {then}", "--seconds", "4", "--seed", "7", "-o", PICTURE, "-q"]
    subprocess.run([sys.executable, "-m", "cfrt", *command], check=True, cwd=ROOT)
    return f'![Four seconds: "{first}", then "{then}"]({PICTURE})'


def keep(bench: Path) -> None:
    """The rows and the machine of a run of pytest-benchmark, without its thousands of raw timings."""
    report = json.loads(bench.read_text(encoding="utf-8"))
    rows = [row["extra_info"] | {"median (s)": row["stats"]["median"]} for row in report["benchmarks"]]
    cpu = report["machine_info"]["cpu"]
    machine = {"cpu": cpu.get("brand_raw", platform.machine()), "cores": os.cpu_count()}
    KEPT.parent.mkdir(exist_ok=True)
    date = datetime.date.today().isoformat()
    model = ModelConfig.load(STUDENT)
    steps = {"a unit": len(model.unit_steps(1)), "the first": len(model.unit_steps(0))}
    KEPT.write_text(
        json.dumps({"date": date, "machine": machine, "steps": steps, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )


def speed() -> str:
    """The kept run as a table, with everything a number needs beside it."""
    if not KEPT.exists():
        raise SystemExit(f"readme: no {KEPT}; run `pytest benchmarks --benchmark-json F`, then this with --bench F")
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    lines = ["| | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    lines += [_line(row) for row in kept["rows"] if "fps" in row]
    others = [row for row in kept["rows"] if str(row.get("what", "")).startswith(("first frame", "change"))]
    medians = "; ".join(f"{row['what']} {1000 * row['median (s)']:.0f} ms{_memory(row)}" for row in others)
    flat = "".join(_flat(row) for row in kept["rows"] if "drift (%)" in row)
    where, model = kept["machine"], ModelConfig.load(STUDENT)
    height, width = model.frame_size
    note = (
        f"Measured on {kept['date']}: {where['cpu']}, {where['cores']} cores; {height} x {width} pixels, window "
        f"{model.window}, {kept['steps']['a unit']} steps a unit of {model.unit_frames(1)} frames "
        f"({kept['steps']['the first']} for the first). Medians: {medians}.{flat} `make readme` measures again."
    )
    return "\n".join([*lines, "", note])


def _memory(row: dict[str, Any]) -> str:
    return f" (peak memory {row['peak memory (MB)']:.0f} MB)" if "peak memory (MB)" in row else ""


def _flat(row: dict[str, Any]) -> str:
    return (
        f" {row['what']}: unit time drifts by {row['drift (%)']:+.1f} +- {row['of which noise may be (%)']:.1f} % from "
        f"first to last, memory by {row['growth (MB)']:+.1f} MB."
    )


def _line(row: dict[str, Any]) -> str:
    cells = (f"{row[column]:.1f}" if column in row else "" for column in COLUMNS)
    return f"| {row['what']} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, help="JSON of a run of `pytest benchmarks` to keep")
    arguments = parser.parse_args()
    if arguments.bench:
        keep(arguments.bench)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    sections = {"output": example(text), "picture": picture(), "speed": speed(), "cpu": cpu_speed.write()}
    for name, body in sections.items():
        text = fill(text, name, body)
    readme.write_text(text, encoding="utf-8")
    roofline.write()


if __name__ == "__main__":
    main()
