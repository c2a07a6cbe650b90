"""The tables of `python -m training evaluate`: rows of numbers, one a film, become RESULTS.md.

A mean over films comes with the 95 % interval of a bootstrap over prompts, each with all its seeds: films of one prompt
are alike, prompts are what is drawn. Where there is one prompt, its films are."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch

from training import leaderboard, measures, metrics
from training.metrics import NOTHING, Estimate

Row = dict[str, Any]


class Line(NamedTuple):
    """One line of a table: the number's key, its title and unit, the digits that are shown, what it is."""

    key: str
    title: str
    unit: str
    digits: int
    meaning: str


LINES = (
    Line(
        "flicker",
        "flicker",
        "levels",
        2,
        "mean change of a pixel between neighbouring frames where nothing moves; VBench's temporal flickering takes "
        "the whole picture of still films",
    ),
    Line(
        "still", "picture at rest", "%", 1, "blocks that neither move nor have just been passed: flicker is read there"
    ),
    Line(
        "motion",
        "motion",
        "% of the side/s",
        1,
        "speed of the fastest 5 % of the blocks, by block matching of frames 1/8 s apart; what moves less than a "
        "matched pixel in that time reads low",
    ),
    Line(
        "dynamic",
        "dynamic",
        "% of films",
        1,
        "films in which that speed passes 18.75 % of the side a second in a quarter of the moments: the rule of "
        "VBench's dynamic degree, on matched blocks instead of RAFT's flow",
    ),
    Line(
        "sharpness",
        "sharpness",
        "levels²",
        0,
        "variance of the Laplacian of luma: falls with blur, rises with noise and detail, depends on the resolution",
    ),
    Line("sharpness_drift", "sharpness, change to the end", "%", 1, "last quarter of the films against the first"),
    Line(
        "colourfulness",
        "colourfulness",
        "levels",
        1,
        "spread and mean of the opponent colours (Hasler and Süsstrunk, 2003)",
    ),
    Line(
        "colourfulness_drift",
        "colourfulness, change to the end",
        "%",
        1,
        "last quarter against the first: long streams that oversaturate rise here",
    ),
    Line(
        "motion_drift",
        "motion, change to the end",
        "%",
        1,
        "last quarter against the first: streams that die down fall here",
    ),
    Line("frozen", "frozen", "% of neighbours", 1, "neighbouring frames in which no block changes by half a level"),
    Line(
        "cuts",
        "cuts",
        "a film",
        2,
        "neighbours that differ by 12 levels or more and 4 times as much as the median pair",
    ),
    Line(
        "seam",
        "seam",
        "ratio",
        3,
        "change between neighbours across a unit's boundary over that inside units; 1: the boundaries cannot be seen",
    ),
    Line(
        "diversity",
        "diversity",
        "levels",
        1,
        "root mean square difference of two seeds' films, as four thumbnails of 16 x 16, over all pairs of seeds of a "
        "prompt",
    ),
)
SPEED = (
    Line(
        "fps",
        "frames a second",
        "fps",
        1,
        "frames of a unit over the median time that all its work takes: decoding included, coding the file not",
    ),
    Line(
        "latency_ms", "latency, median", "ms", 1, "start of a unit's first pass to its first pixels, decoding included"
    ),
    Line(
        "real_time",
        "real time",
        "% of films",
        1,
        "films whose 95th percentile of the unit time is below the unit's own duration",
    ),
    Line("first_frame_s", "first frame", "s", 2, "from the construction of the stream, loading included"),
)
PERCENT = ("still", "dynamic", "frozen", "real_time")  # shares in the rows
DRIFTS = ("sharpness", "colourfulness", "motion")
PARTS = ("quality", "semantic", "total")


# ------------------------------------------------------------------------------------------------------------ estimates


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Every line of both tables as {value, low, high, n}."""
    drifts = {f"{name}_drift": drift(rows, name) for name in DRIFTS}
    given = drifts | {"diversity": _estimate(_diversities(rows))}
    timed = [row for row in rows if row["speed"]]
    return {
        "films": len(rows),
        "engine": sorted({row["engine"] for row in rows}),
        "measures": {line.key: plain(given.get(line.key) or _mean(rows, "measures", line.key)) for line in LINES},
        "speed": {line.key: plain(_mean(timed, "speed", line.key)) for line in SPEED},
    }


def _mean(rows: Sequence[Row], part: str, key: str) -> Estimate:
    factor = 100 if key in PERCENT else 1
    return _estimate([factor * value for value in _draws(rows, lambda row: row[part][key])])


def _draws(rows: Sequence[Row], value: Callable[[Row], float | None]) -> list[float]:
    """What is independent: the mean over the films of each prompt, or, of one prompt alone, its films. What a film
    could not tell is left out."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        found = value(row)
        if found is not None:
            groups.setdefault(row["prompt"], []).append(found)
    if len(groups) == 1:
        return next(iter(groups.values()))
    return [sum(group) / len(group) for group in groups.values()]


def _estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval; a single draw has no interval."""
    if not values:
        return NOTHING
    if len(values) == 1:
        return Estimate(values[0], math.nan, math.nan, 1)
    return metrics.mean(torch.tensor(values, dtype=torch.float64))


def drift(rows: Sequence[Row], name: str) -> Estimate:
    """The mean over the films' last quarters over that over their first, less one, in percent."""
    told = [row for row in rows if None not in (row["measures"][f"{name}_first"], row["measures"][f"{name}_last"])]
    first, last = (
        torch.tensor(_draws(told, lambda row, end=end: row["measures"][f"{name}_{end}"]), dtype=torch.float64)  # type: ignore[misc]
        for end in ("first", "last")
    )
    if not len(first) or first.sum() <= 0:
        return NOTHING
    if len(first) == 1:
        return Estimate(100 * (last / first - 1).item(), math.nan, math.nan, 1)
    found = metrics.ratio(last, first)
    value, low, high = (100 * (ratio - 1) for ratio in (found.value, found.low, found.high))
    return Estimate(value, low, high, found.n)


def _diversities(rows: Sequence[Row]) -> list[float]:
    """Of each prompt that has two films or more."""
    groups: dict[str, list[np.ndarray]] = {}
    for row in rows:
        groups.setdefault(row["prompt"], []).append(unpacked(row["thumbnails"]))
    return [measures.diversity(group) for group in groups.values() if len(group) > 1]


def packed(thumbnails: np.ndarray) -> str:
    """Thumbnails as text of a row."""
    return base64.b64encode(thumbnails.tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    side = measures.THUMBNAIL_SIDE
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, side, side, 3)


def plain(estimate: Estimate) -> dict[str, float | None]:
    """As JSON: what is not a number is null."""
    return {key: None if math.isnan(x) else round(x, 6) for key, x in asdict(estimate).items()}


# ------------------------------------------------------------------------------------------------------------- Markdown


def as_markdown(report: Mapping[str, Any]) -> str:
    """RESULTS.md of results.json."""
    s = report["settings"]
    height, width = s["size"]
    count = f"{_counted(report['films'], 'film')} of {_counted(report['prompts'], 'prompt')}"
    if report["repeated_prompts"]:
        count += f" ({_counted(report['repeated_prompts'], 'repeated line')} left out)"
    timed = report["speed"]["fps"]["n"]
    parts = [
        f"# {s['model']}: {count}",
        "Written by `python -m training evaluate` from rows.jsonl. Each film: "
        f"{s['frames']} frames of {width} x {height} at {s['fps']:g} a second, engine {', '.join(report['engine'])}, "
        f"{s['device']}, {s['precision']}; weights {s['weights']}. Brackets: 95 % interval over prompts, each with all "
        "its seeds (over films where there is one prompt).",
        "## Without a network",
        "Measured on the stream's own pixels. **None of these is VBench's number**, even where one follows its idea.",
        _table(LINES, report["measures"]),
        "## Speed",
        _table(SPEED, report["speed"]) if timed else "not measured: films too long to be held back until the end",
        "## VBench",
        _vbench(report["vbench"]),
    ]
    return "\n\n".join(parts) + "\n"


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _table(lines: Sequence[Line], numbers: Mapping[str, Any]) -> str:
    body = [
        f"| {line.title} ({line.unit}) | {_figure(numbers[line.key], line.digits)} | {numbers[line.key]['n']} "
        f"| {line.meaning} |"
        for line in lines
    ]
    return "\n".join(["|  | mean | n | what it is |", "| --- | ---: | ---: | --- |", *body])


def _figure(number: Mapping[str, float | None], digits: int, factor: float = 1.0) -> str:
    value, low, high = (number[key] for key in ("value", "low", "high"))
    if value is None:
        return "–"
    interval = "" if low is None or high is None else f" [{factor * low:.{digits}f}, {factor * high:.{digits}f}]"
    return f"{factor * value:.{digits}f}{interval}"


def _vbench(said: Mapping[str, Any]) -> str:
    """VBench's table, in percent, or why there is none."""
    if "scores" not in said:
        return str(said["state"])
    scores = said["scores"]
    body = [
        f"| {name.replace('_', ' ')} | {_figure(scores[name], 2, 100)} |"
        for name in (*leaderboard.DIMENSIONS, *PARTS)
        if name in scores
    ]
    body += [f"| {name.replace('_', ' ')} | {reason} |" for name, reason in said["failed"].items()]
    notes = [f"VBench's own program, {said['state']}; scores in percent."]
    if lacking := [part for part in PARTS if part not in scores]:
        notes.append(f"No {', '.join(lacking)}: a dimension is missing, and missing is not 0.")
    else:
        notes.append(
            "Total = (4 Quality + Semantic) / 5 of the normalised, weighted dimensions, as its leaderboard has it."
        )
    if leaderboard.FLICKER in scores and not said["flicker_filtered"]:
        notes.append("Temporal flickering without VBench's filter for still films (--flicker-seeds 25).")
    return "\n\n".join([" ".join(notes), "\n".join(["| dimension | score |", "| --- | ---: |", *body])])
