"""Theorem 5 of a whole stream: what is restored goes on as if nothing had happened. Files of snapshots; branches."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from stream_fixture import CONFIGS, pixels
from student_fixture import BLUE, RED, save_student

import cfrt
from cfrt.engines.native import NativeEngine

pytestmark = pytest.mark.cpu

TEXTS = (RED, BLUE, "a square at night", "a crimson circle moving left over the night sky")


@pytest.mark.parametrize("pace", ["max", 1000.0])
def test_restore_continues_as_if_nothing_had_happened(
    pace: str | float, open_stream: Callable[..., cfrt.Stream]
) -> None:
    stream = open_stream(fps=pace)
    list(stream.frames(19))
    stream.prompt(BLUE, blend_units=2)
    list(stream.frames(4))
    snapshot = stream.snapshot()
    expected = list(stream.frames(25))
    stream.prompt("a square at night")
    list(stream.frames(9))
    stream.restore(snapshot)
    again = list(stream.frames(25))
    other = open_stream(BLUE, fps=pace)
    other.restore(snapshot)
    for got in (again, list(other.frames(25))):
        assert [(f.index, f.unit, f.prompt) for f in got] == [(f.index, f.unit, f.prompt) for f in expected]
        np.testing.assert_array_equal(pixels(iter(got)), pixels(iter(expected)))
    assert repr(snapshot) == "Snapshot(model='small', engine='native', unit=6)"


def test_a_snapshot_of_another_stream_is_refused(open_stream: Callable[..., cfrt.Stream], tmp_path: Path) -> None:
    stream = open_stream()
    list(stream.frames(9))
    snapshot = stream.snapshot()
    with pytest.raises(cfrt.SnapshotError, match=r"engine 'torch', precision 'fp64', got .*portable=True"):
        open_stream(engine="torch", precision="fp64").restore(snapshot)
    other = open_stream(model=save_student(tmp_path, seed=1))
    with pytest.raises(cfrt.SnapshotError, match="weights"):
        other.restore(snapshot)
    assert next(other.frames()).index == 0  # unharmed


@pytest.mark.parametrize("portable", [False, True])
def test_the_futures_of_a_branch_are_those_of_a_restored_stream(
    portable: bool, open_stream: Callable[..., cfrt.Stream]
) -> None:
    stream, restored = open_stream(config=1), open_stream(BLUE, config=1, seed=3)
    list(stream.frames(40))
    stream.prompt(BLUE, blend_units=2, recache=True)
    list(stream.frames(7))
    restored.restore(stream.snapshot(portable=portable))
    with stream.branch() as twin:
        assert (twin.reach, twin.unit, twin.seed) == (stream.reach, stream.unit, 7)
        futures = []
        for one in (restored, twin):
            one.prompt("a square at night")
            one.reseed(5)
            futures.append(pixels(one.frames(40)))
        np.testing.assert_array_equal(*futures)
        assert (pixels(stream.frames(40)) != futures[0]).any()  # the past is one, the futures are two
        cut = twin.config.first_frame(twin.rewind(twin.reach))
        assert cut == 0
        np.testing.assert_array_equal(pixels(twin.frames(40)), pixels(open_stream(config=1).frames(40)))


@pytest.mark.parametrize("config", range(len(CONFIGS)))
def test_a_portable_snapshot_goes_from_engine_to_engine(
    config: int, open_stream: Callable[..., cfrt.Stream], tmp_path: Path
) -> None:
    """From native to torch and back: to tolerance there, bit for bit where nothing is lost on the way."""
    native, torch = open_stream(config=config), open_stream(config=config, engine="torch")
    list(native.frames(42))
    native.prompt(BLUE, blend_units=5, blend="slerp")
    list(native.frames(6))
    native.snapshot(portable=True).save(tmp_path / "there")
    torch.restore(cfrt.Snapshot.load(tmp_path / "there"))
    expected, there = pixels(native.branch().frames(50)).astype(int), pixels(torch.branch().frames(50)).astype(int)
    assert np.abs(expected - there).max() <= 1
    torch.snapshot(portable=True).save(tmp_path / "back")
    native.restore(cfrt.Snapshot.load(tmp_path / "back"))
    np.testing.assert_array_equal(pixels(native.frames(50)), expected)


def test_a_damaged_file_is_refused(open_stream: Callable[..., cfrt.Stream], tmp_path: Path) -> None:
    stream, path = open_stream(), tmp_path / "snapshot"
    list(stream.frames(30))
    with pytest.raises(cfrt.SnapshotError, match="portable=True"):
        stream.snapshot().save(path)
    assert not path.exists()
    stream.snapshot(portable=True).save(path)
    whole = path.read_bytes()
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    assert set(metadata) == {"format", "version", "header", "sha256"}
    for place in (len(whole) - 1, len(whole) // 2, len(whole) - 3000):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(cfrt.SnapshotError, match=r"damaged|no snapshot"):
            cfrt.Snapshot.load(path)
    for content in (b"", whole[:1000], b"\x80\x04pickle"):
        path.write_bytes(content)
        with pytest.raises(cfrt.SnapshotError, match="no snapshot, or a damaged one"):
            cfrt.Snapshot.load(path)
    with pytest.raises(cfrt.SnapshotError, match="no such file"):
        cfrt.Snapshot.load(tmp_path / "nothing")


@pytest.mark.parametrize("wrong", ["unit", "frames", "queue", "seeds", "version"])
def test_a_file_that_was_made_up_is_refused(
    wrong: str, open_stream: Callable[..., cfrt.Stream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a right checksum, but of no stream that there could be."""
    stream, path = open_stream(), tmp_path / "snapshot"
    list(stream.frames(30))
    stream.snapshot(portable=True).save(path)
    tensors = load_file(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    header = json.loads(metadata["header"])
    changes = {"unit": 3, "frames": [1], "queue": [], "seeds": None}
    if wrong == "seeds":
        header["timeline"]["seeds"] = None
    elif wrong == "version":
        metadata["version"] = "2"
    else:
        header[wrong] = changes[wrong]
    from cfrt.snapshot import _digest

    text = json.dumps(header)
    save_file(tensors, path, {**metadata, "header": text, "sha256": _digest(text, tensors)})
    with pytest.raises(cfrt.SnapshotError, match="version 1" if wrong == "version" else "does not describe a stream"):
        cfrt.Snapshot.load(path)


def test_where_there_is_no_room_for_a_branch_the_stream_goes_on(
    open_stream: Callable[..., cfrt.Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: NativeEngine) -> NativeEngine:
        raise MemoryError("no room")

    stream = open_stream()
    list(stream.frames(6))
    monkeypatch.setattr(NativeEngine, "twin", full)
    with pytest.raises(MemoryError, match="no room"):
        stream.branch()
    np.testing.assert_array_equal(pixels(stream.frames(15)), pixels(open_stream().frames(21))[6:])
