"""Fill docs/serve.md from benchmarks/results/serve.json, which `python -m benchmarks.bench_serve --json` keeps.

Nothing between the markers is written by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results" / "serve.json"
PAGE = ROOT / "docs" / "serve.md"

Row = Mapping[str, Any]


def section(kept: Row) -> str:
    """Both tables and what they must be read with."""
    machine = kept["machine"]
    isa = ", ".join(machine["isa"])
    where = (
        f"Measured {kept['date']} on {machine['cpu']}, {machine['cores']} cores ({isa}), by "
        f"`benchmarks/bench_serve.py`: model {kept['model']}, {kept['engine']} engine, {kept['precision']} precision, "
        f"{kept['steps']} steps, window 8, 64 x 64 at {kept['fps']} fps, decoding included; server, viewers and "
        f"browser on the same machine, whose load average was {kept['load before viewers']:.1f} before the viewers "
        f"came (niceness {kept['niceness']}) and {kept['load before browser']:.1f} before the browser."
    )
    return "\n\n".join((where, viewers(kept), browser(kept)))


def viewers(kept: Row) -> str:
    lines = [
        "| viewers of one stream, by | the server adds to a frame, p50 / p99 (ms) | p99 while they arrive | "
        "cores used by the whole server | least fps of any viewer | viewers per core |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, rows in kept["viewers"].items():
        last = rows[-1]
        cells = (
            f"{last['viewers']:.0f} x {kind}",
            f"{last['overhead_p50_ms']:.2f} / {last['overhead_p99_ms']:.2f}",
            f"{last['arrival_p99_ms']:.1f}",
            f"{last['cores']:.2f}",
            f"{last['least frames per second']:.1f}",
            f"{round_to_two(kept['viewers per core'][kind])}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        "What the server adds: from the moment the stream hands out a frame until it lies in every viewer's buffer, "
        "JPEG and VP8 included. They arrive within a second or two, so the percentile of that time is its worst frame. "
        "Viewers per core: from what each further viewer takes, the stream's own work left out."
    )
    return "\n".join((*lines, "", note))


def round_to_two(value: float) -> int:
    """Two digits: the kernel counts processor time in hundredths of a second."""
    return int(round(value, 1 - math.floor(math.log10(value))))


def browser(kept: Row) -> str:
    ways = list(kept["browser"])
    lines = [
        f"| in headless Chromium, p50 / p95 (ms) | {' | '.join(ways)} |",
        "| --- | " + " | ".join(["---:"] * len(ways)) + " |",
    ]
    for what in kept["browser"][ways[0]]:
        cells = (f"{kept['browser'][way][what]['p50']:.0f} / {kept['browser'][way][what]['p95']:.0f}" for way in ways)
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    from readme import fill  # which imports much that the tables do not need

    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), "serve", section(kept)), encoding="utf-8")


if __name__ == "__main__":
    main()
