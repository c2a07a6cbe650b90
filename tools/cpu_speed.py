"""The native engine beside other runtimes: README's table and docs/cpu.svg, from benchmarks/results/cpu.json.

    python -m benchmarks.bench_cpu --json benchmarks/results/cpu.json     measure
    python tools/cpu_speed.py                                             word and draw it

Nothing between the markers in README.md, and nothing in the chart, is written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results" / "cpu.json"
CHART = "docs/cpu.svg"
PRECISIONS = ("fp32", "bf16", "int8")
NAMES = {"native": "cfrt", "torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}

Row = Mapping[str, Any]
Case = tuple[str, int, int]
"""Size, tokens a frame, threads."""


def load() -> dict[str, Any]:
    if not KEPT.exists():
        raise SystemExit(f"cpu_speed: no {KEPT}; python -m benchmarks.bench_cpu --json makes it")
    kept: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8"))
    return kept


def cases(rows: Sequence[Row]) -> list[Case]:
    """In the order in which they were measured, attention alone after whole passes."""
    found = dict.fromkeys((row["size"], row["tokens"], row["threads"]) for row in rows if row["ms"] is not None)
    return sorted(found, key=lambda case: case[0].startswith("attention"))


def pick(rows: Sequence[Row], case: Case, precision: str) -> tuple[Row | None, Row | None]:
    """Ours and the fastest other at that precision."""
    found = [
        row
        for row in rows
        if (row["size"], row["tokens"], row["threads"]) == case and row["precision"] == precision and row["ms"]
    ]
    ours = next((row for row in found if row["engine"] == "native"), None)
    others = sorted((row for row in found if row["engine"] != "native"), key=lambda row: float(row["ms"]))
    return ours, others[0] if others else None


# ------------------------------------------------------------------------------------------------------------ words


def section(kept: Mapping[str, Any]) -> str:
    """What stands between the markers."""
    rows, machine, versions = kept["rows"], kept["machine"], kept["versions"]
    head = ["", *(f"{precision}: cfrt, next best, ratio" for precision in PRECISIONS)]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * len(PRECISIONS)]
    lines += [_line(rows, case) for case in cases(rows)]
    top = ", ".join(f"{precision} {rate:.0f}" for precision, rate in kept["ceiling"].items())
    others = ", ".join(f"{NAMES[name]} {versions[name]}" for name in ("torch", "onnxruntime", "openvino"))
    note = (
        f"Milliseconds{_clock(kept)}, medians in turns, measured on {kept['date']}: {machine['cpu']}, "
        f"{machine['cores']} cores, {', '.join(machine['isa'])}; {others}. Sizes: one denoising pass of one latent "
        "frame of that many tokens, window 12 frames, no decoding; student: a whole unit of 4 frames, "
        f"{kept['steps']} steps, window 8, commit and decoding included; attention: one layer. One core's ceiling, in "
        f"multiply-adds within registers: {top} GOP/s. Others without a state get keys and values as inputs, cfrt and "
        "PyTorch read their ring. Every output was checked against fp64; errors, all rows: "
        "[cpu.json](benchmarks/results/cpu.json)."
    )
    picture = f"![Billions of operations a second on one thread, by size and runtime]({CHART})"
    return "\n".join([picture, "", *lines, "", note])


def _clock(kept: Mapping[str, Any]) -> str:
    return "" if kept["clock"] == "wall" else " of processor time"


def _line(rows: Sequence[Row], case: Case) -> str:
    size, tokens, threads = case
    where = f"{size}/{tokens}, {threads} thread{'s' if threads > 1 else ''}"
    return f"| {where} | {' | '.join(_cell(*pick(rows, case, precision)) for precision in PRECISIONS)} |"


def _cell(ours: Row | None, other: Row | None) -> str:
    if ours is None or other is None:
        return "" if ours is None else f"{_ms(ours)}"
    ratio = other["ms"] / ours["ms"]
    return f"{_ms(ours)}, {_ms(other)} ({NAMES[other['engine']]}), **{ratio:.1f}x**"


def _ms(row: Row) -> str:
    """Three digits."""
    ms = row["ms"]
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


# ------------------------------------------------------------------------------------------------------------ picture

BARS = (  # engine, precision, colour: dark enough for white paper, light enough for a dark page
    ("native", "int8", "#c2410c"),
    ("native", "bf16", "#ea580c"),
    ("native", "fp32", "#f59e0b"),
    ("openvino", "bf16", "#2563eb"),
    ("openvino", "fp32", "#60a5fa"),
    ("onnxruntime", "int8", "#0d9488"),
    ("onnxruntime", "fp32", "#5eb3a8"),
    ("torch", "bf16", "#7c7c8a"),
    ("torch", "fp32", "#a3a3b0"),
)
WIDTH, LEFT, BAR, GAP, TOP = 760, 90, 9, 14, 64
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.small{font-size:10px}line{stroke:#8888;stroke-width:.5}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}}"
)


def chart(kept: Mapping[str, Any]) -> str:
    """Bars of GOP/s on one thread, a group for each size. Transparent, so that it stands on any page."""
    rows = [row for row in kept["rows"] if row["threads"] == 1 and row["ms"] is not None]
    groups = [(size, tokens) for size, tokens, _ in cases(rows) if not size.startswith("attention")]
    rate = {(r["size"], r["tokens"], r["engine"], r["precision"]): float(r["gops"]) for r in rows}
    most = max(rate[key] for key in rate if not key[0].startswith("attention"))
    scale = (WIDTH - LEFT - 60) / most
    step = len(BARS) * BAR + GAP
    bottom = TOP + len(groups) * step
    parts = [*_legend(), *_grid(most, scale, bottom)]
    for index, (size, tokens) in enumerate(groups):
        top = TOP + index * step
        parts.append(f'<text x="{LEFT - 8}" y="{top + step / 2 - 2:.0f}" text-anchor="end">{size}/{tokens}</text>')
        for bar, (engine, precision, colour) in enumerate(BARS):
            if (value := rate.get((size, tokens, engine, precision))) is not None:
                parts += _bar(top + bar * BAR, value, value * scale, colour)
    title = "Billions of operations a second on one thread"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 24}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style>\n<text x="0" y="14">{escape(title)}: '
        f"{escape(kept['machine']['cpu'])}, {kept['date']}</text>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _bar(y: float, value: float, length: float, colour: str) -> list[str]:
    return [
        f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 1}" fill="{colour}"/>',
        f'<text class="small" x="{LEFT + length + 4:.1f}" y="{y + BAR - 1}">{value:.0f}</text>',
    ]


def _legend() -> list[str]:
    parts = []
    for index, (engine, precision, colour) in enumerate(BARS):
        x, y = index % 5 * 150, 24 + index // 5 * 16
        parts.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text class="small" x="{x + 14}" y="{y + 9}">{NAMES[engine]} {precision}</text>')
    return parts


def _grid(most: float, scale: float, bottom: int) -> list[str]:
    every = next(step for step in (10, 20, 50, 100, 200, 500, 1000) if most / step <= 8)
    parts = []
    for value in range(0, int(most) + 1, every):
        x = LEFT + value * scale
        parts.append(f'<line x1="{x:.1f}" y1="{TOP - 4}" x2="{x:.1f}" y2="{bottom - GAP + 4}"/>')
        parts.append(f'<text class="small" x="{x:.1f}" y="{bottom + 8}" text-anchor="middle">{value}</text>')
    return parts


def write() -> str:
    """Draws the chart; gives the section for README.md."""
    kept = load()
    (ROOT / CHART).write_text(chart(kept), encoding="utf-8")
    return section(kept)


if __name__ == "__main__":
    from readme import fill

    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8"), "cpu", write()), encoding="utf-8")
