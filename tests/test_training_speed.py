"""What docs/training-speed.md says, and the benchmarks of a GPU behind it as far as a CPU can run them."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import capture, gpu_teacher_forcing
from cfrt.config import PRESETS
from training import loop

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def test_the_page_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python tools/training_speed.py` would change nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    speed = importlib.import_module("training_speed")
    assert speed.page() == speed.PAGE.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_three_ways_are_one_attention() -> None:
    model = replace(PRESETS["tiny"], width=64, heads=2, latent_grid=(4, 6), window=3, trained_frames=5)
    q, k, v = torch.randn(3, 1, 2 * 5 * model.frame_tokens, 2, 32)
    flex, *others = (way(q, k, v) for way in gpu_teacher_forcing.ways(model, 5, CPU).values())
    for other in others:
        torch.testing.assert_close(other, flex, atol=1e-5, rtol=1e-4)


def test_only_the_pairs_seen_are_counted() -> None:
    """65,520 tokens, 12 heads of 128, of which a query sees 26 %: 6.9 TFLOP forward, 3.5 times that with backward."""
    model, frames = gpu_teacher_forcing.MODEL, 21
    share = model.geometry.teacher_forcing_mask(frames).mean()
    work = 4e-12 * share * 65520**2 * 1536
    assert gpu_teacher_forcing.tflops(model, frames, 1.0, backward=False) == pytest.approx(work)
    assert gpu_teacher_forcing.tflops(model, frames, 2.0, backward=True) == pytest.approx(3.5 * work / 2)


@pytest.mark.parametrize("name", ["teacher_long", "cd", "dmd"])
def test_a_timed_step_is_one_of_the_recipe(name: str, tmp_path: Path) -> None:
    """On a CPU nothing is captured, asked for or not, and the row says so."""
    clips = capture.noise(tmp_path, 8, CPU)
    row = capture.measured(name, 2, True, clips, loop.Config(device="cpu"), steps=1)
    assert (row["stage"], row["batch"], row["captured"]) == (name, 2, False)
    assert "graph" not in row
    assert min(row["first"], row["step"]) > 0
