"""How far the native engine and the best other runtime are from what the cores can do: docs/cpu-performance.md's table
and docs/roofline.svg, from benchmarks/results/cpu.json.

    python tools/roofline.py

The ceiling is multiply-adds that never leave the registers, measured in the same run. An int8 pass keeps its attention
in bf16, so its ceiling is that of the mixture. A target is a multiple of another runtime's speed; what it would take is
given as a share of the ceiling, which says whether it can be reached at all."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from cpu_speed import NAMES, ROOT, STYLE, Case, Row, cases, load, pick

sys.path.append(str(ROOT))
from benchmarks.workload import SIZES

PAGE = ROOT / "docs" / "cpu-performance.md"
CHART = "roofline.svg"
PRECISIONS = ("fp32", "bf16", "int8")
WINDOW, TEXT = 12, 16
"""Frames that a pass of the sizes looks at, tokens of its text."""

SECOND_THREAD = 1.85


@dataclass(frozen=True)
class Line:
    """Speeds in GOP/s; `times` is what is wanted over the peer."""

    case: Case
    precision: str
    ours: float
    ceiling: float
    peer: Row
    times: float

    @property
    def share(self) -> float:
        return self.ours / self.ceiling

    @property
    def peers_share(self) -> float:
        return float(self.peer["gops"]) / self.ceiling

    @property
    def ratio(self) -> float:
        return self.ours / float(self.peer["gops"])

    @property
    def needed(self) -> float:
        """Share of the ceiling at which the target would be met."""
        return self.times * self.peers_share

    @property
    def name(self) -> str:
        size, tokens, threads = self.case
        return f"{size}/{tokens}, {threads} thread{'s' if threads > 1 else ''}, {self.precision}"

    @property
    def verdict(self) -> str:
        if self.ratio >= self.times:
            return "met"
        return "beyond the ceiling" if self.needed >= 1 else "missed"


def lines(kept: Mapping[str, Any]) -> Iterator[Line]:
    """What has a target: every size and precision; the student in the precisions that a user gets or may choose for
    speed; attention in bf16."""
    rows = kept["rows"]
    for case in cases(rows):
        kind = case[0].partition("-")[0]
        for precision in {"student": PRECISIONS[1:], "attention": ("bf16",)}.get(kind, PRECISIONS):
            ours, peer = _pair(rows, case, precision)
            if ours is None or peer is None:
                continue
            top = case[2] * ceiling(kept["ceiling"], case, precision, float(ours["ms"]) * float(ours["gops"]) / 1000)
            yield Line(case, precision, float(ours["gops"]), top, peer, _times(case, precision))


def _pair(rows: Sequence[Row], case: Case, precision: str) -> tuple[Row | None, Row | None]:
    """Ours and what its target is a multiple of: for the student the fastest of all, whatever its precision."""
    ours, peer = pick(rows, case, precision)
    if case[0] == "student":
        others = [other for p in PRECISIONS if (other := pick(rows, case, p)[1]) is not None]
        peer = min(others, key=lambda row: float(row["ms"]), default=None)
    return ours, peer


def _times(case: Case, precision: str) -> float:
    if case[0] == "student" or case[0].startswith("attention"):
        return 3.0
    return 2.5 if precision == "int8" else 2.0


def ceiling(rates: Mapping[str, float], case: Case, precision: str, gop: float) -> float:
    """GOP/s of one core for a pass of `gop` billion operations."""
    if precision != "int8" or case[0] not in SIZES:
        return rates[precision]
    (width, depth, *_), tokens = SIZES[case[0]], case[1]
    attention = 4e-9 * tokens * (WINDOW * tokens + TEXT) * width * depth
    return gop / ((gop - attention) / rates["int8"] + attention / rates["bf16"])


# ------------------------------------------------------------------------------------------------------------ words


def section(kept: Mapping[str, Any]) -> str:
    """What stands between the markers of the page."""
    found, machine = list(lines(kept)), kept["machine"]
    head = "| | cfrt, GOP/s | of the ceiling | fastest other | of the ceiling | ratio | target | takes | |"
    table = [head, "| --- |" + " ---: |" * 7 + " --- |", *map(_row, found)]
    rates = ", ".join(f"{precision} {rate:.0f}" for precision, rate in kept["ceiling"].items())
    note = (
        f"Measured on {kept['date']}: {machine['cpu']}, {machine['cores']} cores; ceiling of a core {rates} GOP/s. "
        "Sizes: one denoising pass of one latent frame, window 12, no decoding; student: a whole unit, decoding "
        "included; attention: one layer. Targets: twice the fastest other at equal precision, int8 2.5 times ONNX "
        "Runtime's, the student three times the fastest of all, attention three times PyTorch's fused attention."
    )
    picture = f"![Shares of the ceiling on one thread, and what the targets take]({CHART})"
    return "\n".join([picture, "", *_summary(found), "", *table, "", note, "", _threads(kept)])


def _summary(found: Sequence[Line]) -> list[str]:
    """How many targets are met, and why the others are not."""
    by = {v: [line for line in found if line.verdict == v] for v in ("met", "missed", "beyond the ceiling")}
    text = [f"{len(by['met'])} of {len(found)} targets of speed are met."]
    if beyond := by["beyond the ceiling"]:
        highest = max(line.needed for line in beyond)
        text.append(
            f"{len(beyond)} are out of reach: the other runtime is so fast that the target lies beyond the ceiling (up "
            f"to {highest:.0%} of it)."
        )
    if missed := by["missed"]:
        low, high = (f(line.needed for line in missed) for f in (min, max))
        text.append(
            f"{len(missed)} are missed, and take {low:.0%} to {high:.0%} of the ceiling: "
            + "; ".join(f"{line.name} ({line.ratio:.2f} of {line.times:g})" for line in missed)
            + "."
        )
    return [" ".join(text)]


def _row(line: Line) -> str:
    peer = f"{NAMES[line.peer['engine']]} {line.peer['precision']}, {line.peer['gops']:.0f}"
    return (
        f"| {line.name} | {line.ours:.0f} | {line.share:.0%} | {peer} | {line.peers_share:.0%} | "
        f"**{line.ratio:.2f}x** | {line.times:g}x | {line.needed:.0%} | {line.verdict} |"
    )


def _threads(kept: Mapping[str, Any]) -> str:
    """What the second thread brings, size by size."""
    ms = {
        (row["size"], row["tokens"], row["precision"], row["threads"]): float(row["ms"])
        for row in kept["rows"]
        if row["engine"] == "native" and row["ms"] is not None
    }
    gain = {key[:3]: ms[*key[:3], 1] / ms[*key[:3], 2] for key in ms if key[3] == 1 and (*key[:3], 2) in ms}
    if not gain:
        return "The second thread was not measured."
    short = {key: value for key, value in gain.items() if value < SECOND_THREAD}
    text = f"A second thread makes it {min(gain.values()):.2f} to {max(gain.values()):.2f} times as fast"
    if not short:
        return f"{text}: at least {SECOND_THREAD} everywhere."
    listed = "; ".join(f"{size}/{tokens} {precision} {value:.2f}" for (size, tokens, precision), value in short.items())
    return f"{text}; below the target of {SECOND_THREAD} are {listed}."


# ------------------------------------------------------------------------------------------------------------ picture

WIDTH, LEFT, TOP, STEP, BAR = 760, 150, 44, 24, 8
OURS, OTHER, TARGET = "#ea580c", "#60a5fa", "#dc2626"


def chart(kept: Mapping[str, Any]) -> str:
    """Two bars for each case on one thread, a mark where its target lies, and a line at the ceiling."""
    found = [line for line in lines(kept) if line.case[2] == 1]
    scale = (WIDTH - LEFT - 40) / max(1.0, *(line.needed for line in found))
    bottom = TOP + STEP * len(found)
    parts = [*_legend(), *(part for i, line in enumerate(found) for part in _bars(line, TOP + i * STEP, scale))]
    for percent in range(0, 101, 20):
        x = LEFT + percent / 100 * scale
        heavy = ' style="stroke-width:1.5"' if percent == 100 else ""
        parts.append(f'<line x1="{x:.1f}" y1="{TOP - 4}" x2="{x:.1f}" y2="{bottom}"{heavy}/>')
        parts.append(f'<text class="small" x="{x:.1f}" y="{bottom + 12}" text-anchor="middle">{percent} %</text>')
    title = f"Share of one core's ceiling: {kept['machine']['cpu']}, {kept['date']}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 20}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style>\n<text x="0" y="14">{escape(title)}</text>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _bars(line: Line, y: int, scale: float) -> list[str]:
    size, tokens, _ = line.case
    x = LEFT + line.needed * scale
    label = f'<text class="small" x="{LEFT - 8}" y="{y + BAR + 3}" text-anchor="end">{size}/{tokens} {line.precision}'
    return [
        f"{label}</text>",
        f'<rect x="{LEFT}" y="{y}" width="{line.share * scale:.1f}" height="{BAR}" fill="{OURS}"/>',
        f'<rect x="{LEFT}" y="{y + BAR + 1}" width="{line.peers_share * scale:.1f}" height="{BAR}" fill="{OTHER}"/>',
        f'<rect x="{x - 1:.1f}" y="{y - 1}" width="2.5" height="{2 * BAR + 3}" fill="{TARGET}"/>',
    ]


def _legend() -> list[str]:
    entries = (("cfrt", OURS), ("fastest other runtime", OTHER), ("target", TARGET))
    parts = []
    for index, (name, colour) in enumerate(entries):
        x = index * 150
        parts.append(f'<rect x="{x}" y="22" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text class="small" x="{x + 14}" y="31">{name}</text>')
    return parts


def write() -> None:
    """Draws the chart and fills the page."""
    from readme import fill  # which imports this

    kept = load()
    (ROOT / "docs" / CHART).write_text(chart(kept), encoding="utf-8")
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), "roofline", section(kept)), encoding="utf-8")


if __name__ == "__main__":
    write()
