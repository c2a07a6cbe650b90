"""From ONNX graphs to TensorRT engines, without a GPU: `Builder`.

Engines are built by a child process (`builder_worker`), so that a build that aborts is an error like any other here.
The same graph, targets and tools give the same bytes; so an engine that was built before is taken from a folder, by the
hash of all that it was made from, and an export that was cut off goes on where it stopped.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Self

from onnx import ModelProto
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from cfrt.engines import gpu
from cfrt.errors import ExportError

from . import builder_worker, graph_rules

TARGETS = ("sm80", "sm86", "sm89", "sm120")
"""What TensorRT-RTX compiles for; the RTX 4090 is sm89. There is no sm90: an H100 cannot run its engines."""


@dataclass(frozen=True)
class Backend:
    """A TensorRT, by the names of its module and its distribution."""

    module: str
    distribution: str
    install: str
    needs_gpu: bool


BACKENDS = {
    "rtx": Backend("tensorrt_rtx", "tensorrt-rtx", "pip install 'cfrt[trt]'", needs_gpu=False),
    "tensorrt": Backend(
        "tensorrt", "tensorrt", "pip install tensorrt, which fetches its libraries from NVIDIA's index", needs_gpu=True
    ),
}


def refusal(backend: str, targets: Sequence[str]) -> str | None:
    """Why engines for these targets cannot be built here, or None."""
    unknown = [target for target in targets if target not in TARGETS]
    if unknown or not targets:
        return f"expected targets among {', '.join(TARGETS)}, got {', '.join(unknown) or 'none'}"
    chosen = BACKENDS[backend]
    if find_spec(chosen.module) is None:
        return f"{chosen.module} is not installed: {chosen.install}"
    if not chosen.needs_gpu:
        return None
    absent = gpu.refusal()  # asked first: full TensorRT crashes where there is no driver
    if absent is not None:
        return f"full TensorRT builds on the GPU that it builds for: {absent}; --backend rtx needs none"
    here = gpu.capability()
    if tuple(targets) != (here,):
        return f"full TensorRT builds for the GPU of this machine alone, which is {here}, not {', '.join(targets)}"
    return None


@dataclass(frozen=True, kw_only=True)
class Built:
    """An engine and what it took."""

    path: Path
    sha256: str
    bytes: int
    seconds: float
    peak_bytes: int
    """Memory of the building process, at most, up to then."""
    cached: bool
    """Was it there already? `seconds` and `peak_bytes` are then of when it was built."""


class Builder:
    """Builds engines for named GPUs; use it in a `with` block, which ends its process.

    cache: folder of engines built before; made when it is not there."""

    def __init__(self, backend: str = "rtx", *, targets: Sequence[str] = ("sm89",), cache: Path) -> None:
        reason = refusal(backend, targets)
        if reason is not None:
            raise ExportError(f"no engine can be built: {reason}")
        self.backend, self.targets = BACKENDS[backend], tuple(targets)
        self.version = metadata.version(self.backend.distribution)
        self._cache = cache
        self._child: _Child | None = None
        cache.mkdir(parents=True, exist_ok=True)

    def build(self, onnx: Path, out: Path, *, fresh: bool = False) -> Built:
        """Writes the engine of a graph to `out`; fresh: even if it was built before, and without remembering it.

        ExportError with the first real complaint, which names the layer where TensorRT does."""
        model = graph_rules.load(onnx)
        graph_rules.check(model, onnx.stem)
        key = self._key(onnx, model)
        kept, note = self._cache / f"{key}.engine", self._cache / f"{key}.json"
        if not fresh and (found := _remembered(kept, note)) is not None:
            _place(kept, out)
            return Built(**{**found, "path": out, "cached": True})
        part = self._cache / f"{key}.{os.getpid()}.part"
        try:
            report = self._ask(onnx, part)
            built = Built(path=out, sha256=digest(part), bytes=part.stat().st_size, cached=False, **report)
            if fresh:
                part.replace(out)
                return built
            part.replace(kept)
        finally:
            part.unlink(missing_ok=True)
        note.write_text(json.dumps({**asdict(built), "path": None}), encoding="utf-8")
        _place(kept, out)
        return built

    def _ask(self, onnx: Path, out: Path) -> dict[str, Any]:
        if self._child is None:
            self._child = _Child(self.backend.module)
        try:
            answer = self._child.ask({"onnx": str(onnx), "out": str(out), "targets": self.targets})
        except _ChildDiedError as died:
            self.close()
            raise ExportError(f"the engine of {onnx.stem!r} cannot be built: {died}") from died
        if "error" in answer:
            raise ExportError(f"the engine of {onnx.stem!r} cannot be built: {answer['error']}")
        return answer

    def _key(self, onnx: Path, model: ModelProto) -> str:
        """Hash of everything that the engine's bytes follow from; the recipe is the worker's own source."""
        parts = [self.backend.module, self.version, *self.targets, digest(Path(builder_worker.__file__)), digest(onnx)]
        parts += [digest(onnx.parent / name) for name in external_files(model)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def close(self) -> None:
        """Ends the child process."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---------------------------------------------------------------------- files


def digest(path: Path) -> str:
    """sha256 of a file."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@lru_cache(256)
def _digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def external_files(model: ModelProto) -> list[str]:
    """Files beside a graph that hold its weights."""
    tensors = [tensor for tensor in model.graph.initializer if uses_external_data(tensor)]
    return sorted({ExternalDataInfo(tensor).location for tensor in tensors})


def _remembered(kept: Path, note: Path) -> dict[str, Any] | None:
    """What is known of an engine built before; None when there is none, or it is damaged."""
    try:
        found: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        return found if digest(kept) == found["sha256"] else None
    except (OSError, ValueError, KeyError):
        return None


def _place(kept: Path, out: Path) -> None:
    """The engine under its name in the bundle: the same bytes on the same disk, where that can be."""
    out.unlink(missing_ok=True)
    try:
        os.link(kept, out)
    except OSError:
        shutil.copyfile(kept, out)


# ---------------------------------------------------------------------- the child process


class _ChildDiedError(Exception):
    """How it ended and what it said last."""


class _Child:
    """A worker and the two pipes to it."""

    def __init__(self, module: str) -> None:
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        command = [sys.executable, "-m", builder_worker.__name__, module]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words, text=True, bufsize=1
        )
        self._read()  # its version, once it is ready

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # reading will say how it ended
            print(json.dumps(job), file=self._process.stdin)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise _ChildDiedError(self._last_words(self._process.wait()))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self, code: int) -> str:
        self._words.seek(0)
        words = self._words.read().decode(errors="replace").strip().splitlines()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"the building process ended by {how}; its last words: {words[-1] if words else 'none'}"

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.kill()
        self._process.wait()
        self._words.close()
