"""The whole recipe in miniature, as a user would type it: `python -m training tiny --smoke`, and its student streams.

Runs on the CPU, under a minute. The student shows noise; that every stage and file fits the next is the point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import cfrt
from training import chain

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smoke") / "run"
    command = [sys.executable, "-m", "training", "tiny", "--smoke", "--out", str(out)]
    subprocess.run(command, check=True, timeout=600)
    return out


def test_every_stage_leaves_weights_statistics_and_a_preview(run: Path) -> None:
    for stage in chain.STAGES:
        assert chain.finished(run / stage)
        assert (run / stage / "preview.png").read_bytes().startswith(b"\x89PNG")
        rows = [json.loads(row) for row in (run / stage / "stats.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == json.loads((run / stage / "config.json").read_text())["steps"]


def test_running_again_does_nothing_over(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.glob("*/average.safetensors")}
    command = [sys.executable, "-m", "training", "tiny", "--smoke", "--out", str(run), "--until", "dmd"]
    subprocess.run(command, check=True, timeout=120)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_student_of_the_run_streams(run: Path) -> None:
    with cfrt.Stream("a small blue square moving up", model=run / "student", fps="max") as stream:
        frames = list(stream.frames(9))
    assert [frame.index for frame in frames] == list(range(9))
    assert frames[0].pixels.shape == (64, 64, 3)
    assert (run / "student" / "card.md").read_text().startswith("---\n")
