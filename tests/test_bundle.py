"""A bundle on disk: what is written is read, and whatever was done to it since is noticed."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from student_fixture import small_config

from cfrt import students
from cfrt.bundle import MANIFEST, Bundle, Entry, Manifest, Plan, Port, Segment, Verification, entries, is_bundle
from cfrt.errors import BundleError, WeightsError

pytestmark = pytest.mark.cpu

FILES = {
    "segments/head.onnx": b"graph" * 100,
    "engines/head.sm89.engine": b"engine" * 50,
    "tensors.safetensors": b"t" * 9,
}


def manifest(files: dict[str, Entry], **changes: object) -> Manifest:
    x = Port(name="x", shape=(4, 8), dtype="bf16")
    head = Segment(name="head", inputs=(replace(x, name="text_k", row=3),), outputs=(x,), onnx="segments/head.onnx")
    verification = Verification(level="full", units=16, errors={"v": 1.25e-6}, limits={"v": 1e-4}, seconds=0.5)
    plan = Plan(
        segment="head", target="sm89", builder="x 1", file="engines/head.sm89.engine", summary={"layers": ["a"]}
    )
    said: dict[str, object] = {
        "config": small_config(),
        "precision": "bf16",
        "decoder": "tiny",
        "segments": (head,),
        "tools": {"cfrt": "0.1.0"},
        "verification": verification,
        "plans": (plan,),
        "notes": {"why": None},
    }
    return Manifest(files=files, **{**said, **changes})  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / MANIFEST).write_text(manifest(entries(tmp_path, FILES)).to_json())
    return tmp_path


def test_what_is_written_is_read(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.manifest == manifest(entries(folder, FILES))
    assert bundle.manifest.segment("head").inputs[0].row == 3
    assert bundle.file("segments/head.onnx").read_bytes() == FILES["segments/head.onnx"]
    bundle.check()
    assert is_bundle(folder)
    assert students.find(folder) == folder


@given(
    shape=st.lists(st.integers(1, 10**6), max_size=6).map(tuple),
    error=st.floats(0, 1e3),
    note=st.recursive(st.none() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists, max_leaves=5),
)
def test_any_manifest_comes_back(shape: tuple[int, ...], error: float, note: object) -> None:
    port = Port(name="a", shape=shape, dtype="fp32")
    segment = Segment(name="mid_10", inputs=(port,), outputs=(), onnx="g.onnx")
    verification = Verification(level="segments", units=1, errors={"video": error}, limits={}, seconds=1.5)
    made = manifest(
        {"g.onnx": Entry(sha256="0", bytes=1)},
        segments=(segment,),
        verification=verification,
        notes={"n": note},
        plans=(),
    )
    assert Manifest.from_json(made.to_json(), "m") == made
    assert segment.kind == "mid"


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def lengthened(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (flipped, "was changed after it was written: expected sha256"),
        (truncated, "is truncated: expected"),
        (lengthened, "is longer than it was written: expected"),
        (Path.unlink, "is missing from the bundle"),
    ],
)
def test_a_harmed_file_is_noticed(folder: Path, name: str, harm: Callable[[Path], None], words: str) -> None:
    """And an engine that was opened before the harm is not given the file either."""
    before = Bundle.open(folder)
    harm(folder / name)
    for open_it in (lambda: Bundle.open(folder).file(name), lambda: before.file(name)):
        with pytest.raises(BundleError, match=words) as raised:
            open_it()
        assert "export the bundle again" in str(raised.value)
        assert name.rpartition("/")[2] in str(raised.value)


def test_a_file_that_the_manifest_does_not_list_is_not_given(folder: Path) -> None:
    (folder / "segments" / "extra.onnx").write_bytes(b"x")
    bundle = Bundle.open(folder)
    with pytest.raises(BundleError, match=r"'segments/extra.onnx' is no file of the bundle"):
        bundle.file("segments/extra.onnx")
    with pytest.raises(BundleError, match=r"holds segments/extra.onnx, which is no file of this bundle"):
        bundle.check()


def rewritten(folder: Path, change: Callable[[dict], None]) -> None:
    body = json.loads((folder / MANIFEST).read_text())
    change(body)
    (folder / MANIFEST).write_text(json.dumps(body))


def test_a_manifest_changed_by_hand_is_noticed(folder: Path) -> None:
    rewritten(folder, lambda body: body["verification"]["errors"].update(v=0.0))
    with pytest.raises(BundleError, match="was changed after it was written"):
        Bundle.open(folder)


@pytest.mark.parametrize("length", [0, 1, 500, -2])
def test_half_a_manifest_is_no_manifest(folder: Path, length: int) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[:length])
    with pytest.raises(BundleError, match="truncated or damaged"):
        Bundle.open(folder)


@pytest.mark.parametrize("format", [0, 2, "1", None])
def test_another_version_is_refused(folder: Path, format: object) -> None:
    rewritten(folder, lambda body: body.update(format=format))
    with pytest.raises(BundleError, match=r"expected .* of format 1, got"):
        Bundle.open(folder)


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"expected a bundle in .*manifest.json cannot be read"):
        Bundle.open(tmp_path)
    with pytest.raises(WeightsError, match=r"expected config.json or manifest.json in it"):
        students.find(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "manifest.json", "a//b", ""])
def test_a_manifest_names_files_inside_its_folder_only(name: str) -> None:
    with pytest.raises(BundleError, match="does not list as a file of it"):
        manifest({name: Entry(sha256="0", bytes=0)}, segments=(), plans=())


def test_a_manifest_that_makes_no_sense(folder: Path) -> None:
    files = entries(folder, FILES)
    verification = Verification(level="none", units=0, errors={}, limits={}, seconds=0)
    for changes, words in (({"precision": "int4"}, "a precision among"), ({"verification": verification}, "full")):
        with pytest.raises(BundleError, match=words):
            manifest(files, **changes)
    with pytest.raises(BundleError, match=r"no segment 'tail'; it has head"):
        manifest(files).segment("tail")


def test_unknown_and_missing_keys_are_named(folder: Path) -> None:
    made = manifest(entries(folder, FILES))
    body = json.loads(made.to_json())
    del body["sha256"], body["decoder"]
    body["colour"] = "red"
    from cfrt.bundle import _digest

    text = json.dumps(body | {"sha256": _digest(body)})
    with pytest.raises(BundleError, match=r"unknown keys \['colour'\], missing keys \['decoder'\]"):
        Manifest.from_json(text, "m")


def test_reading_a_bundle_needs_no_framework() -> None:
    code = "import sys, cfrt.bundle; assert not {'torch', 'onnx'} & sys.modules.keys(), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_note_is_written_whole_or_not_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(folder)
    bundle.annotate("quality", {"valid": 1})
    bundle.annotate("quality", {"valid": 2})
    assert bundle.manifest.notes == Bundle.open(folder).manifest.notes == {"why": None, "quality": {"valid": 2}}
    before = (folder / MANIFEST).read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(BundleError, match=r"cannot be written .*No space left.* it is as it was"):
        bundle.annotate("quality", {"valid": 3})
    assert (folder / MANIFEST).read_bytes() == before
    assert bundle.manifest.notes["quality"] == {"valid": 2}
    assert not list(folder.parent.glob(f".{folder.name}*")), "nothing is left beside it"
    bundle.check()
