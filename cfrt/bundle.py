"""An engine bundle: a model that was exported, as a folder of files that run without PyTorch.

`manifest.json` says what the bundle holds: the model's configuration, the segments that its graph was cut into with
their inputs and outputs, engines built from them, what made it, how it was verified, and the sha256 of every file. It
is written last, so a folder without one is no bundle. A file is checked when it is first asked for (`Bundle.file`): an
engine reads nothing that the manifest does not vouch for. No torch, no ONNX, no numpy.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, Self, TypeVar

from .config import ModelConfig
from .errors import BundleError, ConfigError

MANIFEST = "manifest.json"
FORMAT = 1
"""Version of the manifest; a reader knows one."""
PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "int8")
DTYPES = ("fp32", "bf16", "fp16", "uint8")
LEVELS = ("full", "segments")
TENSORS = "tensors.safetensors"
"""What is outside all graphs: `norm_q`, `norm_k` [layers, d] for the kernel between them, `v_scale` [layers, d] for a
ring of 8 bits, and `text.table`."""
OUT = "out."
"""Before the name of an output inside a graph, where no output may be called as an input is."""
STATE = "state."
"""How the names of what a decoder remembers begin; zeros where a clip starts. A number follows."""

AGAIN = "export the bundle again, or copy it again from where it came from"


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or an output of a segment, connected to the buffer of its name. Inside the graph an output is called by
    OUT and its name."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    row: int | None = None
    """Only this row of the buffer, whose shape has one dimension more in front."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One graph of the chain. A name that is both an input and an output is a buffer that the segment replaces."""

    name: str
    """`mid_3`; the kind is what comes before the last underscore and number."""
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    onnx: str
    """The graph's file."""

    @property
    def kind(self) -> str:
        stem, _, number = self.name.rpartition("_")
        return stem if number.isdigit() else self.name


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An engine built ahead of time from a segment."""

    segment: str
    target: str
    """The GPU architecture that it is for, such as sm89."""
    builder: str
    """What built it, with its version."""
    file: str
    summary: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What was read in the engine: memory, fused layers, formats."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How far the graphs were compared with PyTorch before the manifest was written."""

    level: str
    """"full": a stream through the ring's wrap and its sinks; "segments": one segment of each kind, at full width."""
    units: int
    errors: Mapping[str, float] = field(hash=False)
    """The largest relative error (L2) that was found, by quantity."""
    limits: Mapping[str, float] = field(hash=False)
    """The largest that passes, of the same quantities."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file as it was written."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    config: ModelConfig
    precision: str
    """Of the linear layers; the graphs say what each tensor is."""
    decoder: str
    """"tiny", "wan" or "taehv"."""
    segments: tuple[Segment, ...]
    files: Mapping[str, Entry] = field(hash=False)
    """By path relative to the bundle, with forward slashes."""
    tools: Mapping[str, str] = field(hash=False)
    """What made it -> its version."""
    verification: Verification
    plans: tuple[Plan, ...] = ()
    text_encoder: str | None = None
    """Folder of the text encoder inside the bundle, or None: then it is found as for any model."""
    notes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Whatever else was measured."""

    def __post_init__(self) -> None:
        for what, value, known in (
            ("a precision", self.precision, PRECISIONS),
            ("a verification", self.verification.level, LEVELS),
            *(("a dtype", port.dtype, DTYPES) for s in self.segments for port in (*s.inputs, *s.outputs)),
        ):
            if value not in known:
                raise BundleError(f"expected {what} among {', '.join(known)}, got {value!r}; {AGAIN}")
        named = [s.onnx for s in self.segments] + [plan.file for plan in self.plans]
        strangers = sorted({name for name in (*named, *self.files) if not _inside(name) or name not in self.files})
        if strangers:
            raise BundleError(f"the manifest names {strangers[0]!r}, which it does not list as a file of it; {AGAIN}")

    def segment(self, name: str) -> Segment:
        """BundleError when the bundle has none of that name."""
        found = next((segment for segment in self.segments if segment.name == name), None)
        if found is None:
            raise BundleError(f"the bundle has no segment {name!r}; it has {', '.join(s.name for s in self.segments)}")
        return found

    def has(self, name: str) -> bool:
        return any(segment.name == name for segment in self.segments)

    def to_json(self) -> str:
        """The text of manifest.json, its own sha256 included."""
        body = {"format": FORMAT, **asdict(self), "config": self.config.to_dict()}
        return json.dumps(body | {"sha256": _digest(body)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Self:
        """BundleError when it is no manifest, of another version, or changed since it was written."""
        try:
            body = json.loads(text)
        except ValueError as error:
            raise BundleError(f"{where} is truncated or damaged ({error}); {AGAIN}") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            got = body.get("format") if isinstance(body, dict) else type(body).__name__
            raise BundleError(f"expected {where} to be a manifest of format {FORMAT}, got {got!r}; {AGAIN}")
        said = body.pop("sha256", None)
        if said != _digest(body):
            raise BundleError(f"{where} was changed after it was written; {AGAIN}")
        del body["format"]
        try:
            return _manifest(cls, body)
        except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"{where} does not fit this version of cfrt ({error}); {AGAIN}") from error


class Bundle:
    """A bundle on disk, its manifest read. Files are checked against it one by one, when they are asked for."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._checked: set[str] = set()

    def __repr__(self) -> str:
        return f"Bundle({str(self.folder)!r}, {self.manifest.config.name}, {self.manifest.precision})"

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """BundleError when the manifest is missing or damaged, or a file is missing or of another size."""
        folder = Path(folder)
        try:
            text = (folder / MANIFEST).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"expected a bundle in {folder}: {MANIFEST} cannot be read ({error})") from error
        bundle = cls(folder, Manifest.from_json(text, str(folder / MANIFEST)))
        for name, entry in bundle.manifest.files.items():
            bundle._check_size(name, entry)
        return bundle

    def file(self, name: str) -> Path:
        """The path of one of its files, whose bytes are the ones that were written. BundleError otherwise."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{name!r} is no file of the bundle {self.folder}; its manifest does not list it")
        path = self.folder / name
        if name not in self._checked:
            self._check_size(name, entry)
            if (got := sha256(path)) != entry.sha256:
                raise BundleError(
                    f"{path} was changed after it was written: expected sha256 {entry.sha256}, got {got}; {AGAIN}"
                )
            self._checked.add(name)
        return path

    def check(self) -> None:
        """Every file, and that there are no others. BundleError names the first that is wrong."""
        for name in self.manifest.files:
            self.file(name)
        present = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}
        foreign = sorted(present - self.manifest.files.keys() - {MANIFEST})
        if foreign:
            raise BundleError(f"{self.folder} holds {foreign[0]}, which is no file of this bundle; remove it")

    def annotate(self, name: str, note: Any) -> None:
        """Writes a note into the manifest, in place of one of that name: the old manifest or the new one is there,
        whatever happens. BundleError when it cannot be written."""
        manifest = replace(self.manifest, notes={**self.manifest.notes, name: note})
        part = self.folder.with_name(f".{self.folder.name}.{MANIFEST}.part")  # beside: a bundle has no other files
        try:
            with part.open("w", encoding="utf-8") as file:
                file.write(manifest.to_json())
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.folder / MANIFEST)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise BundleError(f"{self.folder / MANIFEST} cannot be written ({error}); it is as it was") from error
        self.manifest = manifest

    def _check_size(self, name: str, entry: Entry) -> None:
        path = self.folder / name
        if not path.is_file():
            raise BundleError(f"{name} is missing from the bundle {self.folder}; {AGAIN}")
        if (size := path.stat().st_size) != entry.bytes:
            what = "truncated" if size < entry.bytes else "longer than it was written"
            raise BundleError(f"{path} is {what}: expected {entry.bytes} bytes, got {size}; {AGAIN}")


def is_bundle(folder: str | Path) -> bool:
    return (Path(folder) / MANIFEST).is_file()


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entries(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    """The files of a folder as a manifest lists them."""
    return {name: Entry(sha256=sha256(folder / name), bytes=(folder / name).stat().st_size) for name in sorted(names)}


# ---------------------------------------------------------------------- JSON

T = TypeVar("T")


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return name == str(path) and not path.is_absolute() and ".." not in path.parts and name != MANIFEST


def _made(cls: type[T], data: Mapping[str, Any], **values: Any) -> T:
    """A dataclass of the dict that `asdict` made of it, some of its fields already decoded; strict about keys."""
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls)}  # type: ignore[arg-type]
    unknown, missing = sorted(set(data) - set(known)), sorted(n for n, must in known.items() if must and n not in data)
    if unknown or missing:
        raise BundleError(f"{cls.__name__.lower()}: unknown keys {unknown}, missing keys {missing}; {AGAIN}")
    return cls(**{**data, **values})


def _manifest(cls: type[Any], body: Mapping[str, Any]) -> Any:
    return _made(
        cls,
        body,
        config=ModelConfig.from_dict(body["config"]),
        segments=tuple(_segment(segment) for segment in body["segments"]),
        files={name: _made(Entry, entry) for name, entry in body["files"].items()},
        verification=_made(Verification, body["verification"]),
        plans=tuple(_made(Plan, plan) for plan in body["plans"]),
    )


def _segment(data: Mapping[str, Any]) -> Segment:
    return _made(Segment, data, inputs=_ports(data["inputs"]), outputs=_ports(data["outputs"]))


def _ports(data: Iterable[Mapping[str, Any]]) -> tuple[Port, ...]:
    return tuple(_made(Port, port, shape=tuple(port["shape"])) for port in data)
