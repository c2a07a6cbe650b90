"""What steering costs: the tables of docs/control.md, from benchmarks/results/live.json and soak.json.

pytest benchmarks/bench_live.py --benchmark-json build/live.json
python -m benchmarks.soak --minutes 10 --json benchmarks/results/soak.json
python tools/steering.py --bench build/live.json     keep that run, and word both
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from readme import fill

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
from benchmarks.machine import header  # noqa: E402  (the checkout's, wherever this is run)

PAGE = ROOT / "docs" / "control.md"
RESULTS = ROOT / "benchmarks" / "results"
KEPT, SOAK = RESULTS / "live.json", RESULTS / "soak.json"


def keep(bench: Path) -> None:
    """The rows of a run of pytest-benchmark, with the machine and the day."""
    rows = [
        row["extra_info"] | {name: 1000 * row["stats"][name] for name in ("median", "max")}
        for row in json.loads(bench.read_text(encoding="utf-8"))["benchmarks"]
    ]
    KEPT.write_text(json.dumps({**header(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


def costs(kept: dict[str, Any]) -> str:
    """Each measurement in a line."""
    lines = ["| what | median (ms) | and |", "| --- | --- | --- |"]
    for row in kept["rows"]:
        told = {name: value for name, value in row.items() if name not in ("what", "cpu", "median", "max")}
        others = ", ".join(f"{name} {value:.3g}" for name, value in told.items())
        lines.append(f"| {row['what']} | {row['median']:.3g} | {others} |")
    return "\n".join([*lines, "", f"Measured on {where(kept)}: the embedded student, one thread, decoding included."])


def soak(kept: dict[str, Any]) -> str:
    """The long run in a sentence."""
    unit, memory = kept["unit_ms"], kept["memory"]
    return (
        f"{kept['seconds'] / 60:.0f} minutes of {kept['what']}, with a change of prompt every ten seconds, a pause and "
        f"a rewind every minute: the clock drifts by {abs(kept['drift_frames']['largest']):.2f} frames at the most, "
        f"stalls have cost {kept['stalls']['frames_lost']:.1f} frames (their number: {kept['stalls']['count']}), "
        f"{kept['dropped']} frames are dropped; a unit takes {unit['p50']:.1f} ms in the median "
        f"and {unit['p99']:.1f} ms at p99 ({kept['unit_p99_over_p50']:.1f} times), memory grows by "
        f"{memory['growth_mb']:.1f} MB after the first minute ({memory['last_mb']:.0f} MB). Measured on {where(kept)}, "
        f"load average {kept['load']:.1f} on them, niceness {kept['niceness']}."
    )


def where(kept: dict[str, Any]) -> str:
    machine = kept["machine"]
    return f"{kept['date']}, {machine['cpu']}, {machine['cores']} cores"


def page(text: str) -> str:
    """The page as the kept measurements have it."""
    found = {"costs": (costs, KEPT), "soak": (soak, SOAK)}
    for name, (word, path) in found.items():
        text = fill(text, name, word(json.loads(path.read_text(encoding="utf-8"))))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, help="JSON of a run of benchmarks/bench_live.py to keep")
    arguments = parser.parse_args()
    if arguments.bench:
        keep(arguments.bench)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
