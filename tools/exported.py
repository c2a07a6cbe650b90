"""What 8 bits lose: the table of docs/export.md, from benchmarks/results/quality_bundles.json.

python -m training quality int8/ fp8/ --json benchmarks/results/quality_bundles.json
python tools/exported.py      word that run: a row for each bundle, by the name of its folder

Nothing between the markers is written by hand."""

import json
from pathlib import Path
from typing import Any

from readme import fill

from training.quality import ALLOWED, lost

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "export.md"
KEPT = ROOT / "benchmarks" / "results" / "quality_bundles.json"
MEASURES = ("instruction", "dynamic", "valid")


def section(kept: dict[str, Any]) -> str:
    """A row for each bundle, and which of them lose too much."""
    lines = [f"| | prompts | {' | '.join(MEASURES)} | measured |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, found in kept.items():
        differences = [found["measures"][measure]["difference"] for measure in MEASURES]
        cells = [f"{difference['mean']:+.1f} ± {difference['margin']:.1f}" for difference in differences]
        lines.append(f"| {name} | {found['prompts']:,} | {' | '.join(cells)} | {found['measured_on']} |")
    worse = [name for name, found in kept.items() if lost(found["measures"]) > ALLOWED]
    return "\n".join([*lines, "", f"More than a point is lost for certain by {' and '.join(worse) or 'none'}."])


def page(text: str) -> str:
    """The page as the kept measurements have it."""
    return fill(text, "quality", section(json.loads(KEPT.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
