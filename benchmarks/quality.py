"""What a precision of the native engine costs in quality: the embedded student's own card metrics, pair by pair.

    python -m benchmarks.quality --prompts 1024 --json benchmarks/results/quality.json

Every prompt is streamed with the same seed in every precision; how clips are judged is training/quality.py, which does
the same for exported bundles (`python -m training quality`). It changes nothing about speed that other work runs beside
it.
"""

import json
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import tyro

from _cfrt import kernels
from cfrt import students
from training import sources
from training.card import machine
from training.evaluate import Config
from training.quality import digest, lines, measure

PRECISIONS = ("fp32", "bf16", "int8")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure the quality of each precision."""

    prompts: int = 1024
    """Clips of each precision, as long as the card's."""
    json: Path | None = None
    """Where to write the numbers."""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.quality")
    players = {precision: sources.streamed("tiny", "native", precision) for precision in PRECISIONS}
    found = measure(replace(Config(), prompts=arguments.prompts), players)
    measured = {
        "measured_on": date.today().isoformat(),
        "model": "tiny",
        "sha256": digest(students.find("tiny")),
        "engine": "native",
        "prompts": arguments.prompts,
        "isa": kernels.isa(),
        "cpu": machine()["cpu"],
        "precisions": found,
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")
    for precision, measures in found.items():
        print("\n".join([precision, *lines(measures)]))


if __name__ == "__main__":
    main()
