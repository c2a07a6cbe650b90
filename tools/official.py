"""Fills the tables of docs/official-checkpoints.md from `cfrt.official`, the presets and the memory planner.

python tools/official.py      after a preset, a released file or the planner has changed"""

from __future__ import annotations

from pathlib import Path

from readme import fill

from cfrt import memory
from cfrt.config import PRESETS
from cfrt.official import OFFICIAL

PAGE = Path(__file__).parents[1] / "docs" / "official-checkpoints.md"


def files() -> str:
    """A line for each released transformer."""
    lines = [
        "| preset | file | dict | F | passes (unit 0) | window + sinks | frames of the trained clip |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, file in OFFICIAL.items():
        c = PRESETS[name]
        passes = f"{len(c.steps)} ({len(c.unit_steps(0))})"
        pixels = c.first_frame(c.trained_frames // c.unit)
        lines.append(
            f"| `{name}` | [{file.path}]({file.address}) | {file.branch or '-'} | {c.unit} | {passes} "
            f"| {c.window} + {c.sinks} | {pixels} |"
        )
    return "\n".join(lines)


def needs() -> str:
    """GB on the device, text encoder on the CPU, bf16."""
    names = ("wan-1.3b-framewise-2step", "wan-1.3b-chunkwise-4step", "wan-1.3b-longvideo")
    lines = ["| preset | decoder | window | GB, bf16 |", "| --- | --- | ---: | ---: |"]
    for name in names:
        for decoder in ("wan", "taehv"):
            account = memory.stream(memory.Setup(config=PRESETS[name], decoder=decoder))
            lines.append(f"| `{name}` | {decoder} | {PRESETS[name].window} | {account.total / 1e9:.1f} |")
    return "\n".join(lines)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, table in (("files", files()), ("needs", needs())):
        page = fill(page, name, table)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
