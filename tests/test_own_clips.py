"""One's own clips through the recipe of the embedded student: `prepare`, then `tiny --data`.

Runs on the CPU in seconds; the whole chain is slow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import cfrt
from cfrt.video import write
from training import chain, loop, prepare, run

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips of moving noise, prepared with the embedded student."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "clips").mkdir()
    for number in range(3):
        still = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
        write((np.roll(still, frame, 1) for frame in range(40)), folder / "clips" / f"{number}.mp4", fps=16, scale=1)
        (folder / "clips" / f"{number}.txt").write_text("a red circle moving right")
    prepare.main(["--videos", str(folder / "clips"), "--out", str(folder / "shards"), "--workers", "1"])
    return folder / "shards"


def test_the_recipe_trains_on_them(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["tiny", "--smoke", "--data", str(shards), "--out", str(tmp_path), "--until", "bidirectional"])
    assert (tmp_path / "bidirectional" / "preview.png").stat().st_size > 0
    assert not (tmp_path / "data").exists()  # no clip of the world was drawn
    other = {name: value + 1 for name, value in chain.weights(tmp_path, "autoencoder").items()}
    loop.write_tensors(tmp_path / "autoencoder" / "average.safetensors", other)
    with pytest.raises(SystemExit):
        run.main(["tiny", "--smoke", "--data", str(shards), "--out", str(tmp_path), "--until", "teacher"])
    assert "expected the autoencoder that made" in capsys.readouterr().err


@pytest.mark.slow
def test_a_student_of_them_streams(shards: Path, tmp_path: Path) -> None:
    run.main(["tiny", "--smoke", "--data", str(shards), "--out", str(tmp_path)])
    assert not (tmp_path / "student" / "card.md").exists()  # the exact reader knows another world
    with cfrt.Stream("a red circle", model=tmp_path / "student", fps="max") as stream:
        assert len(list(stream.frames(5))) == 5
    assert torch.isfinite(torch.cat([value.flatten() for value in chain.weights(tmp_path, "phases").values()])).all()
