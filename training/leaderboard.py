"""VBench (arXiv:2311.17982) from outside: its command is run on a folder of videos, its files read, its total added.

VBench needs CUDA and downloads a network per dimension; it is not installed with us. Facts as of vbench 0.1.5: the
command takes one dimension, runs in a shell (so no path here has a space), ends with code 0 even when it failed, and
leaves `*_eval_results.json` = {dimension: [score, [{video_path, video_results}, ...]]} in its output folder."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from training import metrics
from training.metrics import NOTHING, Estimate

INSTALL = "pip install vbench"


class Scale(NamedTuple):
    """How a dimension enters the total: its score is mapped from [low, high] to [0, 1], then weighted."""

    low: float
    high: float
    weight: float = 1.0


# The leaderboard's constants (Vchitect/VBench, scripts/constant.py).
QUALITY = {
    "subject_consistency": Scale(0.1462, 1.0),
    "background_consistency": Scale(0.2615, 1.0),
    "temporal_flickering": Scale(0.6293, 1.0),
    "motion_smoothness": Scale(0.706, 0.9975),
    "aesthetic_quality": Scale(0.0, 1.0),
    "imaging_quality": Scale(0.0, 1.0),
    "dynamic_degree": Scale(0.0, 1.0, weight=0.5),
}
SEMANTIC = {
    "object_class": Scale(0.0, 1.0),
    "multiple_objects": Scale(0.0, 1.0),
    "human_action": Scale(0.0, 1.0),
    "color": Scale(0.0, 1.0),
    "spatial_relationship": Scale(0.0, 1.0),
    "scene": Scale(0.0, 0.8222),
    "appearance_style": Scale(0.0009, 0.2855),
    "temporal_style": Scale(0.0, 0.364),
    "overall_consistency": Scale(0.0, 0.364),
}
DIMENSIONS = QUALITY | SEMANTIC
CUSTOM = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
"""What VBench measures of prompts that are not its own."""
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1
FLICKER = "temporal_flickering"
ROUNDING = 0.02  # two ways to average videos of equal length agree to this


@dataclass(frozen=True)
class Result:
    """What VBench said of one dimension, or why it said nothing."""

    score: float | None
    by_prompt: Mapping[str, float]
    """Mean over the videos of a prompt, on the score's scale; empty where they don't add up to the score."""
    reason: str = ""


# ---------------------------------------------------------------------------------------------------------- running it


def installed() -> bool:
    return shutil.which("vbench") is not None


def own_prompts() -> frozenset[str]:
    """The prompts of VBench's own list, when the package is installed; empty otherwise."""
    spec = find_spec("vbench")
    path = Path(spec.origin).parent / "VBench_full_info.json" if spec and spec.origin else None
    if path is None or not path.is_file():
        return frozenset()
    return frozenset(row["prompt_en"] for row in json.loads(path.read_text(encoding="utf-8")))


def run(
    folder: Path,
    dimensions: Sequence[str],
    prompts: Mapping[str, str],
    *,
    standard: bool,
    static: bool = False,
    said: Callable[[str], None] = print,
) -> dict[str, Result]:
    """VBench on `folder/videos`, dimension by dimension; what is there already from the same videos is not redone.

    prompts: file name -> prompt. standard: VBench's own prompts (those of `folder/prompts_info.json`, where that is);
    otherwise its custom-input mode. static: let VBench's filter choose still videos for its flicker first."""
    newest = max(path.stat().st_mtime for path in (folder / "videos").iterdir())
    (folder / "vbench").mkdir(exist_ok=True)
    results = {}
    for dimension in dimensions:
        output = folder / "vbench" / dimension
        if _found(output, newest) is None:
            said(f"vbench: {dimension}")
            videos = _static(folder) if static and dimension == FLICKER else "videos"
            _call(folder, dimension, ["evaluate", "--dimension", dimension, *_arguments(folder, videos, standard)])
        results[dimension] = read(_found(output, newest), dimension, prompts)
    return results


def _arguments(folder: Path, videos: str, standard: bool) -> list[str]:
    arguments = ["--videos_path", videos]
    if not standard:
        return [*arguments, "--mode", "custom_input", "--prompt_file", "prompts.json"]
    return arguments + (["--full_json_dir", "prompts_info.json"] if (folder / "prompts_info.json").exists() else [])


def _static(folder: Path) -> str:
    """VBench's own way to flicker: of 25 videos a prompt its filter keeps the first five that stand still."""
    result = "vbench/static"
    shutil.rmtree(folder / result, ignore_errors=True)
    _call(folder, "static", ["static_filter", "--videos_path", "videos", "--result_path", result])
    return f"{result}/filtered_videos"


def _call(folder: Path, name: str, arguments: list[str]) -> None:
    """Runs `vbench` in `folder`; what it prints goes to `vbench/{name}.log`."""
    if arguments[0] == "evaluate":
        arguments = [*arguments, "--output_path", f"vbench/{name}"]
    with (folder / "vbench" / f"{name}.log").open("w") as log:
        subprocess.run(["vbench", *arguments], cwd=folder, stdout=log, stderr=subprocess.STDOUT, check=False)


def _found(output: Path, newest: float) -> Path | None:
    """The last result in a folder that is not older than the videos."""
    files = [path for path in output.glob("*_eval_results.json") if path.stat().st_mtime >= newest]
    return max(files, key=lambda path: path.stat().st_mtime, default=None)


# ---------------------------------------------------------------------------------------------------- reading its files


def read(path: Path | None, dimension: str, prompts: Mapping[str, str]) -> Result:
    """The score of a dimension in VBench's result file."""
    if path is None:
        return Result(None, {}, f"failed (vbench/{dimension}.log)")
    try:
        score, videos = json.loads(path.read_text())[dimension]
        score = float(score)
        values = [(Path(video["video_path"]).name, float(video["video_results"])) for video in videos]
    except (ValueError, KeyError, TypeError) as error:
        return Result(None, {}, f"no result in {path.name}: {error!r}")
    return Result(score, _by_prompt(score, values, prompts))


def _by_prompt(score: float, values: Sequence[tuple[str, float]], prompts: Mapping[str, str]) -> dict[str, float]:
    """Means per prompt. Imaging quality lists videos in percent; one that averages otherwise has no interval."""
    groups: dict[str, list[float]] = {}
    for name, value in values:
        if name in prompts:
            groups.setdefault(prompts[name], []).append(value)
    means = {prompt: sum(group) / len(group) for prompt, group in groups.items()}
    middle = sum(means.values()) / len(means) if means else 0.0
    for scale in (1.0, 0.01):
        if middle and abs(scale * middle - score) <= ROUNDING * abs(score):
            return {prompt: scale * mean for prompt, mean in means.items()}
    return {}


# ------------------------------------------------------------------------------------------------------------ its total


def summary(results: Mapping[str, Result]) -> dict[str, Estimate]:
    """Every dimension's score, then `quality`, `semantic` and `total`, each with its interval over prompts.

    A part of which a dimension is missing is missing as well: the leaderboard's script would count it as 0. The
    interval is NaN where videos don't add up to a score."""
    names = [name for name in DIMENSIONS if name in results and results[name].score is not None]
    prompts = sorted({prompt for name in names for prompt in results[name].by_prompt})
    row = {prompt: index for index, prompt in enumerate(prompts)}
    table = torch.full((len(prompts), len(names)), torch.nan, dtype=torch.float64)
    for column, name in enumerate(names):
        for prompt, value in results[name].by_prompt.items():
            table[row[prompt], column] = value
    scores = torch.tensor([results[name].score for name in names], dtype=torch.float64)
    estimates = {}
    for name in (*names, "quality", "semantic", "total"):
        score = _part(name, names, scores[None])
        if score is not None:
            estimates[name] = _interval(score.item(), name, names, table)
    return estimates


def _interval(value: float, name: str, names: Sequence[str], table: Tensor) -> Estimate:
    """`value` with the bootstrap's interval, moved so that it holds VBench's own number."""
    used = [names.index(other) for other in _members(name)]
    seen = ~table[:, used].isnan()
    rows = table[seen.any(1)]
    if len(rows) < 2 or not seen.any(0).all():
        return Estimate(value, NOTHING.low, NOTHING.high, len(rows))

    def statistic(weights: Tensor) -> Tensor:
        known = (~rows.isnan()).double()
        part = _part(name, names, (weights @ rows.nan_to_num()) / (weights @ known))
        assert part is not None
        return part

    found = metrics.bootstrap(len(rows), statistic)
    return Estimate(value, found.low + value - found.value, found.high + value - found.value, found.n)


def _members(name: str) -> Sequence[str]:
    """The dimensions of a part."""
    parts = {"quality": tuple(QUALITY), "semantic": tuple(SEMANTIC), "total": tuple(DIMENSIONS)}
    return parts.get(name, (name,))


def _part(name: str, names: Sequence[str], scores: Tensor) -> Tensor | None:
    """[R] of scores [R, names]; None where a dimension is missing."""
    if not set(_members(name)) <= set(names):
        return None
    if name in names:
        return scores[:, names.index(name)]
    if name == "total":
        quality, semantic = _part("quality", names, scores), _part("semantic", names, scores)
        assert quality is not None
        assert semantic is not None
        return (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    weighted = [
        DIMENSIONS[m].weight
        * (scores[:, names.index(m)] - DIMENSIONS[m].low)
        / (DIMENSIONS[m].high - DIMENSIONS[m].low)
        for m in _members(name)
    ]
    return torch.stack(weighted).sum(0) / sum(DIMENSIONS[m].weight for m in _members(name))
