"""The student's card, generated: measure, keep the numbers as JSON, and word them as Markdown.

`write` measures a finished run and leaves OUT/results.json and the card beside the student. From that file alone come
the card that ships, the committed results and the README's table; no number is typed in by hand.

    python -m training.card runs/tiny --student cfrt/students/tiny --readme README.md"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import tyro

from training import evaluate, sources
from training.table import LINES, drift_table, main_table

if TYPE_CHECKING:
    from training.recipes import Recipe

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- generated:student -->", "<!-- /generated:student -->"
COLUMNS = {
    "real": "real clips",
    "reconstruction": "through the autoencoder",
    "teacher": "AR teacher, {teacher_steps} guided steps",
    "phases": "before its weights were rounded, {steps} steps",
    "rounded": "before DMD, {steps} steps",
    "dmd": "after DMD, {steps} steps",
    "student": "**student, {steps} steps**",
}
USE = """```python
import cfrt

for frame in cfrt.Stream("a large red circle moving left over the ocean", seed=7).frames(seconds=4):
    show(frame.pixels)  # (H, W, 3) uint8
```"""

Results = dict[str, Any]  # what results.json holds


BETWEEN = ("phases", "rounded")
"""Columns of the card alone: what the student was on its way."""
README_LINES = ("colour", "shape", "direction", "all", "dynamic", "residual", "diversity", "switch")


# ----------------------------------------------------------------------------------------------------------- measuring


def write(recipe: Recipe, out: Path, folder: Path) -> None:
    """Measure the run in `out`; write OUT/results.json, OUT/rows (numbers and sheets of each column, which are not
    measured twice) and FOLDER/card.md."""
    results = collect(recipe, out)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "card.md").write_text(card(results), encoding="utf-8")


def collect(recipe: Recipe, out: Path) -> Results:
    """Everything that the card says: rows of numbers, what each stage took, the machine, the whole recipe."""
    from training import chain  # it imports the recipes, and they this package's evaluation

    autoencoder, model = chain.shown(recipe, out), recipe.model
    teacher = chain.trained_network(recipe, out, "teacher_long").eval().requires_grad_(False)
    columns = {"real": sources.real, "reconstruction": sources.reconstruction(autoencoder)}
    sampler = sources.teacher(teacher, model, chain.TEACHER_STEPS, chain.GUIDANCE)
    columns["teacher"] = sources.generated(autoencoder, sampler)
    for stage in (name for name in ("phases", "rounded", "dmd") if chain.finished(out / name)):
        student = chain.trained_network(recipe, out, stage).eval().requires_grad_(False)
        column = sources.generated(autoencoder, sources.student(student, model))
        columns["student" if stage == recipe.ships else stage] = column
    rows = {name: _measured(recipe, out, name, column) for name, column in columns.items()}
    return {
        "recipe": recipe.name,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "parameters": {
            "transformer and text": sum(p.numel() for p in teacher.parameters()),
            "autoencoder": sum(p.numel() for p in autoencoder.parameters()),
        },
        "teacher": {"steps": chain.TEACHER_STEPS, "guidance": chain.GUIDANCE},
        "stages": {name: spent(out / name / "stats.jsonl") for name in chain.STAGES if (out / name).exists()},
        "notes": _notes(out / "notes.md"),
        "evaluation_seconds": round(sum(row["seconds"] for row in rows.values())),
        "config": json.loads(json.dumps(asdict(recipe))),
        "rows": {name: row["numbers"] for name, row in rows.items()},
    }


def _measured(recipe: Recipe, out: Path, name: str, source: sources.Source) -> dict[str, Any]:
    """One column, {of, seconds, numbers}; read from OUT/rows where the same weights were measured the same way."""
    stage = {"teacher": "teacher_long", "student": recipe.ships}.get(name, name)
    files = [out / used / "average.safetensors" for used in ("autoencoder", "decoder", stage) if name != "real"]
    of = _digest(repr((recipe.model, recipe.evaluate)), [path for path in files if path.exists()])
    path = out / "rows" / f"{name}.json"
    if path.exists() and (kept := json.loads(path.read_text(encoding="utf-8")))["of"] == of:
        return kept
    began, tasks = time.monotonic(), recipe.evaluate.tasks(recipe.model.text)
    numbers = evaluate.plain(evaluate.measure({name: source}, tasks, recipe.evaluate, path.with_suffix(""))[name])
    row = {"of": of, "seconds": round(time.monotonic() - began), "numbers": numbers}
    path.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return row


def _digest(settings: str, files: Sequence[Path]) -> str:
    digest = hashlib.sha256(settings.encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _notes(path: Path) -> list[str]:
    """What the run did otherwise than its recipe says, in the words of whoever ran it; a paragraph each."""
    return path.read_text(encoding="utf-8").strip().split("\n\n") if path.exists() else []


def machine() -> dict[str, str | int]:
    """Where this runs: every time on the card belongs to it."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "torch": torch.__version__,
        "precision": "fp32 (convolutions of the autoencoder's training in bf16)",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def spent(stats: Path) -> dict[str, Any]:
    """Steps and seconds of a stage, by the last line of its statistics, and where it ran if that was elsewhere: the
    file where.txt beside them says so."""
    last = json.loads(stats.read_text(encoding="utf-8").splitlines()[-1])
    where = stats.with_name("where.txt")
    elsewhere = {"where": where.read_text(encoding="utf-8").strip()} if where.exists() else {}
    return {"steps": last["step"], "seconds": last["seconds"], **elsewhere}


def titles_of(results: Results) -> dict[str, str]:
    model = results["config"]["model"]
    facts = {"teacher_steps": results["teacher"]["steps"], "steps": len(model["steps"])}
    return {name: title.format(**facts) for name, title in COLUMNS.items() if name in results["rows"]}


# ---------------------------------------------------------------------------------------------------------------- card


def card(results: Results) -> str:
    """The model card, Markdown with the front matter that model hubs read."""
    model, rows = results["config"]["model"], results["rows"]
    titles = {name: titles_of(results)[name] for name in rows}
    units = results["config"]["long"]["units"]
    trained_seconds = (1 + 4 * (units - 1)) / model["fps"]
    sections = [
        front_matter(results),
        f"# cfrt {model['name']}\n\n" + _opening(model),
        USE,
        "## Measured\n\n" + _preface(results) + "\n\n" + main_table(rows, titles, [line.key for line in LINES]),
        "What each line means:\n\n" + "\n".join(f"* *{line.title}*: {line.meaning}." for line in LINES),
        f"## Drift\n\nThe same read on stretches of clips of {rows['real']['drift'][-1]['seconds'][1]} seconds "
        f"(n = {results['config']['evaluate']['long']} each; trained on {units} latent frames, "
        f"{trained_seconds:.1f} s).\n\n" + drift_table(rows, titles),
        "## Training\n\n" + training(results),
        "## Data\n\n" + _data(results),
        "## Limits\n\n" + _limits(results),
        "## Recipe\n\n```json\n"
        + json.dumps({k: v for k, v in results["config"].items() if k != "model"}, indent=1)
        + "\n```",
    ]
    return "\n\n".join(sections) + "\n"


def front_matter(results: Results) -> str:
    """YAML: licence, kind, and the headline numbers as a model index."""
    student = results["rows"]["student"]
    metrics = [line for line in LINES if student.get(line.key, {}).get("value") is not None]
    index = "\n".join(
        f"          - type: {line.key}\n"
        f"            name: {json.dumps(line.title)}\n"
        f"            value: {student[line.key]['value']}"
        for line in metrics
    )
    return f"""---
license: apache-2.0
library_name: cfrt
pipeline_tag: text-to-video
language: en
tags: [video-generation, autoregressive, diffusion-distillation, streaming, causal-forcing]
model-index:
  - name: cfrt-{results["config"]["model"]["name"]}
    results:
      - task:
          type: text-to-video
        dataset:
          name: procedural world (training.worlds), held-out scenes
          type: procedural
        metrics:
{index}
---"""


def _opening(model: Mapping[str, Any]) -> str:
    height, width = (side * model["autoencoder"]["spatial"] for side in model["latent_grid"])
    first = len(model["first_steps"] or model["steps"])
    return (
        f"A causal video diffusion student that streams {width} x {height} pixels at {model['fps']:g} frames a second "
        f"on a CPU: {len(model['steps'])} denoising passes a unit ({first} for the first one), one latent frame a "
        f"unit, a window of {model['window']} latent frames. Trained from nothing by Causal Forcing (arXiv:2602.02214, "
        "arXiv:2605.15141) on a procedural world whose factors are known exactly. It exists to show and test the whole "
        "path, training to stream, without a GPU or a download. This file is generated from measurements."
    )


def _preface(results: Results) -> str:
    settings = results["config"]["evaluate"]
    return (
        f"Read from pixels by an exact reader on scenes that training never showed (one in six of all combinations): "
        f"{settings['prompts']} prompts in varied wordings through the tokenizer, {settings['switches']} prompt "
        f"switches, {settings['futures']} continuations of each of {settings['pasts']} real pasts. In brackets: 95 % "
        "confidence interval (Wilson for shares of clips, else bootstrap). "
        f"Evaluation seed {settings['seed']}, {results['date']}."
    )


def training(results: Results) -> str:
    """What the stages took, and where."""
    where, stages = results["machine"], results["stages"]
    head = "| stage | steps | wall time | on |\n| --- | ---: | ---: | --- |"
    here = f"{where['cores']} cores"
    body = "\n".join(
        f"| {name} | {stage['steps']} | {clock(stage['seconds'])} | {stage.get('where', here)} |"
        for name, stage in stages.items()
    )
    total = clock(sum(stage["seconds"] for stage in stages.values()))
    weights = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in results["parameters"].items())
    return (
        f"{head}\n{body}\n| **total** (data and evaluation not counted) | | **{total}** | |\n"
        f"| evaluation | | {clock(results['evaluation_seconds'])} | {here} |\n\n"
        f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}, {where['precision']}, {where['system']}. "
        f"Parameters: {weights}. Seed {results['config']['seed']}. "
        f"`python -m training {results['recipe']}` trains it again."
    ) + "".join(f"\n\n{note}" for note in results.get("notes", ()))


def clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min"
        if minutes >= 60
        else f"{minutes} min"
        if minutes
        else f"{seconds:.0f} s"
    )


def _data(results: Results) -> str:
    settings, long = results["config"]["data"], results["config"]["long"]
    return (
        f"{settings['clips']:,} clips of {settings['units']} latent frames, and {long['clips']:,} of {long['units']}, "
        "from a procedural world: one object (size, colour, shape) over a moving background, starting in a direction "
        "at a speed, turning at random times and bouncing off the walls; in "
        f"{100 * settings['switched']:.0f} % of them the caption changes and the object follows within half a second. "
        "No person, no scraped picture and no text from anybody is in it."
    )


def _limits(results: Results) -> str:
    words = len(results["config"]["model"]["text"]["vocab"])
    return (
        f"It knows this world and nothing else: one object, {words} words and phrases; others are named in a warning "
        "and not read. A prompt sets the direction of the start only, since objects turn of their own accord. Scenes "
        "that training never showed come out as well as the table says, not better. It is no model of real video."
    )


# -------------------------------------------------------------------------------------------------------------- README


def readme_section(results: Results) -> str:
    rows = {name: row for name, row in results["rows"].items() if name not in BETWEEN}
    where, settings = results["machine"], results["config"]["evaluate"]
    spent = dict[str, float]()
    for stage in results["stages"].values():
        on = stage.get("where", f"{where['cores']} cores ({where['cpu']})")
        spent[on] = spent.get(on, 0.0) + stage["seconds"]
    *parts, last = (f"{clock(seconds)} on {on}" for on, seconds in spent.items())
    took = " and ".join([", ".join(parts), last] if parts else [last])
    note = (
        f"Measured {results['date']} on {settings['prompts']} held-out prompts by the exact reader, 95 % intervals in "
        f"brackets; trained in {took}. "
        "All numbers and what they mean: [the card](cfrt/students/tiny/card.md)."
    )
    return main_table(rows, titles_of(results), README_LINES) + "\n\n" + note


def update_readme(path: Path, results: Results) -> None:
    """Replace what stands between the markers in `path`. ValueError where they are missing."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the lines {BEGIN} and {END} in {path}; put them where the table belongs")
    path.write_text(f"{before}{begin}\n{readme_section(results)}\n{end}{after}", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Word the results of a run: its card, the committed numbers and the README's table."""

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of a measured run, or a results.json (such as the committed one)."""
    student: Path | None = None
    """Folder of the student that gets the card."""
    readme: Path | None = None
    """README with the two marker lines."""
    keep: bool = False
    """Also copy the numbers to training/results/NAME.json."""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m training.card")
    source = arguments.source / "results.json" if arguments.source.is_dir() else arguments.source
    if not source.is_file():
        print(f"training.card: no {source}; `python -m training tiny` writes it at its end", file=sys.stderr)
        raise SystemExit(1)
    results = json.loads(source.read_text(encoding="utf-8"))
    if arguments.keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{results['config']['model']['name']}.json").write_text(
            json.dumps(results, indent=1) + "\n", encoding="utf-8"
        )
    if arguments.student is not None:
        (arguments.student / "card.md").write_text(card(results), encoding="utf-8")
    if arguments.readme is not None:
        update_readme(arguments.readme, results)
    if arguments.student is None and arguments.readme is None and not arguments.keep:
        print(card(results))


if __name__ == "__main__":
    main()
