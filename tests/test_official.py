"""The official LMDB rows: small ones, written here in the official layout, read back as data sets and as ODE pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from student_fixture import small_config

from cfrt.config import PRESETS
from training import loop, ode, official
from training.data import Batch
from training.network import Network
from training.official import Clips, Rows, Trajectories
from training.shards import DataError
from training.wording import Rows as TableRows

pytestmark = pytest.mark.cpu

MODEL = replace(small_config(), steps=(1.0, 0.75, 0.5, 0.25))
WORDS = TableRows(MODEL.text)
CLIP = (6, 4, 2, 2)  # n, C, h, w
PROMPTS = ("a red circle moving left", "blue square", "night sky", "crimson", "a circle at night")


def write(path: Path, rows: np.ndarray, prompts: tuple[str, ...]) -> None:
    """One environment: the keys that the official tools write."""
    path.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=2**24) as environment, environment.begin(write=True) as writing:
        writing.put(b"latents_shape", " ".join(map(str, rows.shape)).encode())
        writing.put(b"prompts_shape", str(len(prompts)).encode())
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            writing.put(f"latents_{number}_data".encode(), row.tobytes())
            writing.put(f"prompts_{number}_data".encode(), prompt.encode())


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float16)


@pytest.fixture
def sharded(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Five ODE rows in two environments, beside a file that is none."""
    rows = noise(5, 6, *CLIP)
    for name, part in (("shard_0", slice(0, 3)), ("shard_1", slice(3, 5))):
        write(tmp_path / name, rows[part], PROMPTS[part])
    (tmp_path / "README.md").touch()
    return tmp_path, rows


def test_rows_are_read_as_they_were_written(sharded: tuple[Path, np.ndarray]) -> None:
    folder, expected = sharded
    rows = Rows(folder, MODEL)
    assert (len(rows), rows.entries) == (5, 6)
    for number in (4, 0, 3, 2, 1):
        np.testing.assert_array_equal(rows.latents(number), expected[number])
        assert rows.prompt(number) == PROMPTS[number]


@pytest.mark.parametrize("shape", [(5, *CLIP), (5, 1, *CLIP), (5, 6, *CLIP)], ids=["bare", "one entry", "trajectory"])
def test_the_last_entry_is_the_clip(shape: tuple[int, ...], tmp_path: Path) -> None:
    rows = noise(*shape)
    write(tmp_path, rows, PROMPTS)
    clips = Clips(tmp_path, MODEL, WORDS, seed=2)
    batch = clips.batch(1, 5)  # one epoch
    assert isinstance(batch, Batch)
    assert torch.equal(batch.latents, Clips(tmp_path, MODEL, WORDS, seed=2).batch(1, 5).latents)
    last = torch.from_numpy(rows if len(shape) == 5 else rows[:, -1]).float()
    order = [int((last == clip).flatten(1).all(1).nonzero()) for clip in batch.latents]
    assert sorted(order) == list(range(5))
    assert batch.captions[:, 0].tolist() == batch.captions[:, 1].tolist()
    assert batch.captions[:, 0].tolist() == [WORDS.encode(PROMPTS[number]).tolist() for number in order]
    assert batch.caption.tolist() == [[0] * 6] * 5
    prompts = clips.prompts(7, torch.Generator().manual_seed(0))
    assert (prompts.captions.shape, prompts.caption.shape) == ((7, 2, 4), (7, 6))


@pytest.mark.parametrize("entries", [6, 5], ids=["causal forcing", "self forcing"])
def test_trajectories_are_pairs(entries: int, tmp_path: Path) -> None:
    """S states, the end point, and the real clip where there was one; the regression learns from them as they are."""
    rows = noise(5, entries, *CLIP)
    write(tmp_path, rows, PROMPTS)
    found = Trajectories(tmp_path, MODEL, WORDS, seed=0)
    pairs = found[torch.tensor([3, 0])]
    expected = torch.from_numpy(rows[[3, 0]]).float()
    assert isinstance(pairs, ode.Pairs)
    assert torch.equal(pairs.states, expected[:, :4])
    assert torch.equal(pairs.end, expected[:, 4])
    assert torch.equal(pairs.clean, expected[:, -1])
    assert pairs.captions[:, 0].tolist() == [WORDS.encode(PROMPTS[number]).tolist() for number in (3, 0)]
    torch.manual_seed(0)
    config = ode.Config(steps=2, batch=2, past="clean" if entries == 6 else "noisy")
    stage = ode.Stage(config, MODEL, found, Network(MODEL))  # type: ignore[arg-type]
    assert np.isfinite(loop.take(stage, stage.optimisers(), 0, seed=0)["loss"])


def test_rows_of_another_shape_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "ode", noise(5, 3, *CLIP), PROMPTS)
    with pytest.raises(DataError, match=r"expected ODE rows of 4 states and an end, .* found 3 entries"):
        Trajectories(tmp_path / "ode", MODEL, WORDS, seed=0)
    with pytest.raises(DataError, match=r"expected rows of \[21, 16, 60, 104\] or \[E, .* found \[3, 6, 4, 2, 2\]"):
        Rows(tmp_path / "ode", PRESETS["wan-1.3b-framewise-ode"])
    assert Rows(tmp_path / "ode", replace(MODEL, trained_frames=9), frames=6).entries == 3
    write(tmp_path / "mixed/a", noise(5, 3, *CLIP), PROMPTS)
    write(tmp_path / "mixed/b", noise(5, 6, *CLIP), PROMPTS)
    with pytest.raises(DataError, match=r"the same number of entries in all rows of .*, found \[3, 6\]"):
        Rows(tmp_path / "mixed", MODEL)


def test_what_is_no_data_set_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected LMDB environments in .*: data.mdb, or folders"):
        Rows(tmp_path, MODEL)
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / official.FILE).write_bytes(b"no environment" * 1000)
    with pytest.raises(DataError, match="is no LMDB environment, or damaged"):
        Rows(tmp_path / "junk", MODEL)
    with lmdb.open(str(tmp_path / "foreign"), map_size=2**20) as environment, environment.begin(write=True) as writing:
        writing.put(b"images_shape", b"3 3 32 32")
    with pytest.raises(DataError, match=r"expected the shape of its rows under latents_shape in .*, found None"):
        Rows(tmp_path / "foreign", MODEL)
    path = tmp_path / "cut"
    with lmdb.open(str(path), map_size=2**20) as environment, environment.begin(write=True) as writing:
        writing.put(b"latents_shape", b"2 6 4 2 2")
        writing.put(b"latents_0_data", b"\0" * 100)
    rows = Rows(path, MODEL)
    with pytest.raises(DataError, match=r"row 0 of .* is damaged: 100 bytes of latents do not make \[1, 6, 4, 2, 2\]"):
        rows.latents(0)
    with pytest.raises(DataError, match=r"expected latents_1_data in shard 0 of .*, found no such key"):
        rows.latents(1)


def test_official_geometry_fits_the_presets(tmp_path: Path) -> None:
    """One row of the released size, [6, 21, 16, 60, 104], 25 MB, for the preset that learns from it."""
    model = PRESETS["wan-1.3b-framewise-ode"]
    row = np.zeros((1, 6, 21, 16, 60, 104), np.float16)
    row[0, :, 0, 0, 0, 0] = np.arange(6)
    with lmdb.open(str(tmp_path), map_size=2**26) as environment, environment.begin(write=True) as writing:
        writing.put(b"latents_shape", " ".join(map(str, row.shape)).encode())
        writing.put(b"latents_0_data", row.tobytes())
        writing.put(b"prompts_0_data", "一只猫 in the snow".encode())
    rows = Rows(tmp_path, model)
    assert rows.latents(0)[:, 0, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert rows.prompt(0) == "一只猫 in the snow"
