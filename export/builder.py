"""From ONNX graphs to TensorRT engines, without a GPU: `Builder`.

Engines are built by a child process (`builder_worker`), so that a build that aborts is an error like any other here.
The same graph, targets and tools give the same bytes, so `Builder.key` says whether an engine that is there is the one
that would be built.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Self

from cfrt.bundle import sha256
from cfrt.engines import gpu
from cfrt.errors import ExportError

from . import builder_worker, graph_rules
from .draft import key

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
    return unknown(targets) or lacking(backend, targets)


def unknown(targets: Sequence[str]) -> str | None:
    """Why engines for these targets can be built nowhere, or None."""
    others = [target for target in targets if target not in TARGETS]
    if others or not targets:
        return f"expected targets among {', '.join(TARGETS)}, got {', '.join(others) or 'none'}"
    return None


def lacking(backend: str, targets: Sequence[str]) -> str | None:
    """What this machine lacks for them, or None."""
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


class Builder:
    """Builds engines for named GPUs; use it in a `with` block, which ends its process."""

    def __init__(self, backend: str = "rtx", *, targets: Sequence[str] = ("sm89",)) -> None:
        reason = refusal(backend, targets)
        if reason is not None:
            raise ExportError(f"no engine can be built: {reason}")
        self.backend, self.targets = BACKENDS[backend], tuple(targets)
        self.version = metadata.version(self.backend.distribution)
        self.peak_bytes = 0
        """The most memory that the building process has held."""
        self._child: _Child | None = None

    @property
    def name(self) -> str:
        """Module and version: "tensorrt_rtx 1.7.1.116"."""
        return f"{self.backend.module} {self.version}"

    def key(self, onnx: Path) -> str:
        """Names everything that the engine's bytes follow from; the recipe is the worker's own source."""
        recipe = Path(builder_worker.__file__)
        return key(self.name, *self.targets, sha256(recipe), sha256(onnx))

    def build(self, onnx: Path, out: Path) -> float:
        """Writes the engine of a graph, for all targets at once; gives the seconds that it took.

        ExportError with the first real complaint, which names the layer where TensorRT does; there is no `out` then."""
        graph_rules.check(graph_rules.load(onnx), onnx.stem)
        if self._child is None:
            self._child = _Child(self.backend.module, self.targets)
        try:
            answer = self._child.build(onnx, out)
        except _ChildDiedError as died:
            self.close()
            raise ExportError(f"the engine of {onnx.stem!r} cannot be built: {died}") from died
        if "error" in answer:
            raise ExportError(f"the engine of {onnx.stem!r} cannot be built: {answer['error']}")
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
        seconds: float = answer["seconds"]
        return seconds

    def close(self) -> None:
        """Ends the child process."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---------------------------------------------------------------------- the child process


class _ChildDiedError(Exception):
    """How it ended and what it said last."""


class _Child:
    """A worker in a folder of its own, and the two pipes to it."""

    def __init__(self, module: str, targets: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cfrt-")
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", builder_worker.__name__, module, *targets],
            cwd=self._folder.name,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(path), "PYTHONHASHSEED": "0"},  # the order of addresses, again
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            bufsize=1,
        )

    def build(self, onnx: Path, out: Path) -> dict[str, Any]:
        """The worker sees the same names for every job; links say what they stand for."""
        assert self._process.stdin is not None
        for name, path in ((builder_worker.GRAPH, onnx), (builder_worker.ENGINE, out)):
            link = Path(self._folder.name, name)
            link.unlink(missing_ok=True)
            link.symlink_to(path.absolute())
        with suppress(BrokenPipeError):  # reading will say how it ended
            print(file=self._process.stdin)
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
        how = builder_worker.ending(code)
        return f"the process that builds ended by {how}; its last words: {words[-1] if words else 'none'}"

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what was not sent
                pipe.close()
        self._process.kill()
        self._process.wait()
        self._words.close()
        self._folder.cleanup()
