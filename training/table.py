"""The tables of numbers, as Markdown: which lines there are, how they are printed, what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Numbers = Mapping[str, Any]  # one Estimate as JSON


class Line(NamedTuple):
    """One line of the table: which number, its title, how it is printed, what it means."""

    key: str
    title: str
    percent: bool
    meaning: str


LINES = (
    Line("colour", "colour right", True, "the object reads the prompted colour over the whole clip"),
    Line("shape", "shape right", True, "the same for its shape"),
    Line("size", "size right", True, "the same for its size"),
    Line("background", "background right", True, "the same for the background"),
    Line(
        "direction",
        "starting direction right",
        True,
        "the displacement over the first two latent frames is nearest to the prompted direction",
    ),
    Line("speed", "speed right", True, "the median step a frame is nearest to the prompted speed"),
    Line("all", "all six right", True, "a clip that gets everything right"),
    Line(
        "dynamic",
        "dynamic",
        True,
        "clips whose valid object moves at half the prompted speed or faster in 80 % of the frames",
    ),
    Line("valid", "valid frames", True, "the object overlaps a drawing of what was read by more than 0.7 (IoU)"),
    Line("residual", "render residual (1e-3)", False, "mean squared error to that drawing; lower is sharper"),
    Line("turns", "turns a second", False, "changes of heading; more than real is jitter, none is a freeze"),
    Line(
        "distance",
        "distance to real",
        False,
        "squared energy distance of starts, travel and what is shown; real clips are 0 apart up to chance",
    ),
    Line(
        "diversity",
        "diversity",
        False,
        "variance of the object's place over continuations of one real past, over the true variance; 1 is right, "
        "0 a collapse",
    ),
    Line("diversity_valid", "continuations valid", True, "those that end with a valid object; only they count above"),
    Line(
        "switch",
        "prompt switch seen within 1 s",
        True,
        "all that the new prompt changes of colour, shape, size and background reads new on frames 16 to 23 after it",
    ),
    Line(
        "switch_direction",
        "new direction after a switch",
        True,
        "motion of the third and fourth latent frame after it, where the direction changed and no wall was near",
    ),
    Line(
        "switch_frames",
        "frames until a switch shows",
        False,
        "median index of the first frame after it that reads the new colour and shape; 24 = never",
    ),
)
DRIFT = (
    ("valid", "valid frames"),
    ("colour", "colour right"),
    ("shape", "shape right"),
    ("size", "size right"),
    ("background", "background right"),
    ("speed", "speed right"),
    ("dynamic", "dynamic"),
)


def figure(number: Numbers | None, percent: bool) -> str:
    """`97.3 [95.5, 98.4]`, in percent or as it is."""
    if number is None or number["value"] is None:
        return "–"
    value, low, high = (100 * number[key] if percent else number[key] for key in ("value", "low", "high"))
    digits = 1 if percent else 2
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def tables(rows: Mapping[str, Numbers], titles: Mapping[str, str] | None = None) -> str:
    """Markdown of everything measured: the main table and, where there are long clips, drift against time."""
    titles = titles or {name: name for name in rows}
    parts = [main_table(rows, titles, [line.key for line in LINES])]
    if all("drift" in row for row in rows.values()):
        parts.append(drift_table(rows, titles))
    return "\n\n".join(parts)


def main_table(rows: Mapping[str, Numbers], titles: Mapping[str, str], keys: Sequence[str]) -> str:
    lines = [line for line in LINES if line.key in keys and any(line.key in row for row in rows.values())]
    head = ["|  | " + " | ".join(titles[name] for name in rows) + " | n |", "| --- |" + " ---: |" * (len(rows) + 1)]
    body = []
    for line in lines:
        cells = [figure(row.get(line.key), line.percent) for row in rows.values()]
        counts = {row[line.key]["n"] for row in rows.values() if line.key in row}
        count = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)}–{max(counts)}"
        body.append(f"| {line.title}{' (%)' if line.percent else ''} | " + " | ".join(cells) + f" | {count} |")
    return "\n".join(head + body)


def drift_table(rows: Mapping[str, Numbers], titles: Mapping[str, str]) -> str:
    """Stretches of time down, sources across, for each number of DRIFT that was read."""
    blocks = []
    for key, title in DRIFT:
        head = [
            f"| {title} (%) | " + " | ".join(titles[name] for name in rows) + " |",
            "| --- |" + " ---: |" * len(rows),
        ]
        stretches = zip(*(row["drift"] for row in rows.values()), strict=True)
        body = [
            "| {}–{} s | ".format(*line[0]["seconds"])
            + " | ".join(figure(stretch[key], True) for stretch in line)
            + " |"
            for line in stretches
        ]
        blocks.append("\n".join(head + body))
    return "\n\n".join(blocks)
