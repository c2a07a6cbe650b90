"""A plan (`training.plan`) as --dry-run prints it, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from training.plan import KINDS, Speed, Stage

UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(x: float, unit: str = "") -> str:
    """1 234 567 -> 1.2 M."""
    for size, prefix in UNITS:
        if abs(x) >= size:
            return f"{x / size:.{0 if x >= 100 * size else 1}f} {prefix}{unit}"
    return f"{x:.0f}{' ' if unit else ''}{unit}"


def page(title: str, stages: Sequence[Stage], speed: Speed, recipe: Mapping[str, Any]) -> str:
    """What --dry-run prints."""
    networks = sorted({(label, count) for s in stages for label, count in s.parameters.items()})
    runs = [["stage", "steps", "clips a step", "clips", "FLOP a step", "a step", "in all"]]
    held = [["bytes of a process", *(s.name for s in stages)]]
    for s in stages:
        of = f"{s.batch} x {s.micros} = {s.batch * s.micros}"
        runs.append(
            [s.name, f"{s.steps}", of, short(s.clips), short(s.flops), _time(s.step_seconds), _time(s.hours * 3600)]
        )
    for kind in KINDS:
        held.append([kind.replace("_", ", "), *(short(s.memory[kind], "B") if s.memory[kind] else "-" for s in stages)])
    held.append(["total as configured", *(short(s.total, "B") for s in stages)])
    hours = sum(s.hours for s in stages)
    processes = stages[0].processes
    return "\n".join(
        [
            f"{title}: {processes} process{'es' if processes > 1 else ''}, "
            f"{_time(hours * 3600)} *predicted* at {short(speed.flops)}FLOP/s each ({speed.source})",
            "",
            *_aligned(runs),
            "",
            *_aligned(held),
            "",
            "parameters: " + ", ".join(f"{label} {short(count)}" for label, count in networks),
        ]
    )


def as_json(title: str, stages: Sequence[Stage], speed: Speed, recipe: Mapping[str, Any]) -> str:
    """The same for programs, with every field of the recipe."""
    content = {"name": title, "speed": asdict(speed), "stages": [asdict(s) for s in stages], "recipe": recipe}
    return json.dumps(content, indent=2)


def _time(seconds: float) -> str:
    for size, unit in ((86400 * 2, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{seconds / (86400 if unit == 'days' else size):.1f} {unit}"
    return f"{1000 * seconds:.0f} ms"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of one width each, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
