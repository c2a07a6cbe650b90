"""Fills docs/theory.md: draws what a student of bidirectional pairs loses (exact), words what trained ones lost.

python tools/theory.py      after training/results/proof.json has changed"""

from __future__ import annotations

import json
from pathlib import Path

from readme import fill

from cfrt import flow
from training import gaussian, proof

ROOT = Path(__file__).parents[1]
PAGE, FIGURE = ROOT / "docs" / "theory.md", ROOT / "docs" / "lost_variance.svg"
RESULTS = ROOT / "training" / "results" / "proof.json"
RHO, FRAMES, TOP = 0.9, 4, 0.4
COLOURS = ("#b3261e", "#d9822b", "#2f6fb0", "#2e7d4f")
WIDTH, HEIGHT, LEFT, BASE, BETWEEN = 300, 200, 60, 245, 70
"""Of one panel, and where the first one stands; pixels."""


def curves(noisy_past: bool, points: int = 80) -> list[list[tuple[float, float]]]:
    """For each frame the line of (s, lost variance)."""
    covariance = gaussian.covariance(RHO, FRAMES)
    levels = [(i + 1) / points for i in range(points)]
    lost = [gaussian.regress_bidirectional(covariance, s, past=s if noisy_past else 0.0).lost.tolist() for s in levels]
    return [[(0.0, 0.0), *zip(levels, frame, strict=True)] for frame in zip(*lost, strict=True)]


def place(s: float, lost: float, left: float) -> str:
    return f"{left + WIDTH * s:.1f},{BASE - HEIGHT * lost / TOP:.1f}"


def text(x: float, y: float, words: str, anchor: str = "middle", colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{words}</text>'


def panel(title: str, noisy_past: bool, left: float) -> list[str]:
    parts = [text(left + WIDTH / 2, BASE - HEIGHT - 15, title)]
    for lost in (0.0, 0.1, 0.2, 0.3, 0.4):
        y = BASE - HEIGHT * lost / TOP
        parts.append(f'<path d="M{left},{y:.1f}h{WIDTH}" stroke="#ddd"/>')
        parts.append(text(left - 8, y + 4, f"{lost:g}", "end"))
    for s in (0.0, *flow.sigmas((0.25, 0.5, 0.75, 1.0), 5.0)):
        x = left + WIDTH * s
        parts.append(f'<path d="M{x:.1f},{BASE}v-{HEIGHT}" stroke="#ddd" stroke-dasharray="2 3"/>')
        if s != 0.9375:  # no room between its neighbours
            parts.append(text(x, BASE + 17, f"{s:.3g}"))
    parts.append(text(left + WIDTH / 2, BASE + 36, "noise level s (dashed: the four-step list)"))
    for frame, line in enumerate(curves(noisy_past)):
        points = " ".join(place(s, lost, left) for s, lost in line)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[frame]}" stroke-width="2"/>')
        parts.append(text(left + 12, BASE - HEIGHT + 22 + 17 * frame, f"frame {frame + 1}", "start", COLOURS[frame]))
    return parts


def figure() -> str:
    """The SVG's text."""
    width, height = LEFT + 2 * WIDTH + BETWEEN + 20, BASE + 50
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
    parts = [f'{head} font-size="12">', f'<rect width="{width}" height="{height}" fill="white"/>']
    parts += panel("lost variance, noisy past seen", True, LEFT)
    parts += panel("lost variance, clean past seen", False, LEFT + WIDTH + BETWEEN)
    return "\n".join([*parts, "</svg>"]) + "\n"


def table() -> str:
    """The proof's rows at the second level of the four-step list."""
    return proof.table([row for row in json.loads(RESULTS.read_text()) if row["level"] == 0.9375])


if __name__ == "__main__":
    FIGURE.write_text(figure(), encoding="utf-8")
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), "proof", table()), encoding="utf-8")
