"""Training's commands on a model of the official kind, at a size of seconds: Wan's autoencoder, umT5's text."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from wan_fixture import FOX, SNOW, save_wan, wan_config

from cfrt.text import encoder
from cfrt.video import write
from cfrt.weights import load_model
from training import prepare, vbench

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFRT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    return lambda **changes: save_wan(tmp_path / "model", wan_config(**changes))


def test_own_videos_become_shards_of_wans_latents(model: Callable[..., Path], tmp_path: Path) -> None:
    """Latents of the footage, and of each caption the rows that a stream's prompt has."""
    folder, videos = model(), tmp_path / "videos"
    videos.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (42, 16, 32, 3), dtype=np.uint8)
    for name, caption in (("a", FOX), ("b", SNOW)):
        write(pixels, videos / f"{name}.mp4", fps=16.0, scale=2)
        (videos / f"{name}.txt").write_text(caption)
    out = tmp_path / "shards"
    prepare.main(["--videos", str(videos), "--model", str(folder), "--out", str(out), "--workers", "1"])
    config, weights = load_model(folder)
    text, clips = encoder(config, weights, folder), samples(out / "00000.tar")
    assert sorted(clip["caption.txt"].decode() for clip in clips) == sorted([FOX, FOX, SNOW, SNOW])
    for clip in clips:
        latents, rows = (np.load(io.BytesIO(clip[part])) for part in ("latents.npy", "text.npy"))
        assert latents.shape == (config.trained_frames, config.latent_channels, *config.latent_grid)
        expected = text.encode(clip["caption.txt"].decode()).rows
        np.testing.assert_allclose(rows, expected[: len(rows)], rtol=0, atol=1e-2)
        assert not expected[len(rows) :].any()


def samples(tar: Path) -> list[dict[str, bytes]]:
    """What webdataset would make of it: the files of each key by their ending."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            key, _, part = member.name.partition(".")
            content = archive.extractfile(member)
            assert content is not None
            found.setdefault(key, {})[part] = content.read()
    return list(found.values())


def test_films_for_vbench(model: Callable[..., Path], tmp_path: Path) -> None:
    """`python -m training evaluate`: five films of each prompt under VBench's names, and the table."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text(f"{FOX}\n{SNOW}\n")
    arguments = ["--model", str(model(unit=3, window=6)), "--prompts", str(prompts), "--seeds", "5", "--out", str(out)]
    vbench.main([*arguments, "--seconds", "0.6"])
    names = {path.name for path in (out / "videos").iterdir()}
    assert names == {f"{prompt}-{index}.mp4" for prompt in (FOX, SNOW) for index in range(5)}
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    assert "10 films of 2 prompts" in (out / "RESULTS.md").read_text()
