"""What a large text encoder has said, kept on disk: an encoder of 11 GB is loaded only for what is new.

A file for each text, named by its SHA-256, in a folder for each encoder, precision and kind of device, below
`CFRT_CACHE/embeddings` (CFRT_CACHE is ~/.cache/cfrt unless set). Only rows that mean something are kept, as fp32. The
least recently read files go first when the folders outgrow their cap; a damaged file counts as absent. numpy only.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .hub import cache

CAP = 1 << 30
"""Bytes of all texts of all encoders: more than a thousand prompts of 512 rows at 4096 numbers each, long ones."""
EDGE = 1 << 20
"""Bytes at either end of a file that stand for it: reading all of an encoder would take longer than running it."""


def home() -> Path:
    """The folder of all embeddings."""
    return cache() / "embeddings"


def fingerprint(files: Sequence[Path]) -> str:
    """Of an encoder, by the names, sizes and both ends of its files."""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(EDGE))
            file.seek(max(0, size - EDGE))
            digest.update(file.read(EDGE))
    return digest.hexdigest()[:16]


class Embeddings:
    """The texts of one encoder. `name` may hold wildcards: then texts are only read, from any encoder that fits."""

    def __init__(self, name: str, *, folder: Path | None = None, cap: int = CAP) -> None:
        self._folder, self._name, self._cap = folder or home(), name, cap

    def get(self, text: str) -> tuple[np.ndarray, str] | None:
        """float32 rows [n, width] of a text, and what of it found no room in them; None when it is not here."""
        for path in self._folder.glob(f"{self._name}/{_file(text)}"):
            with suppress(SafetensorError, OSError, KeyError, ValueError):
                with safe_open(path, framework="numpy") as file:
                    rows, about = np.array(file.get_tensor("rows")), file.metadata() or {}
                os.utime(path)
                if rows.ndim == 2 and rows.dtype == np.float32 and np.isfinite(rows).all():
                    return rows, about.get("dropped", "")
        return None

    def put(self, text: str, rows: np.ndarray, dropped: str = "") -> None:
        """Keeps them, whole or not at all; then makes room. A cache that cannot be written is no cache, and no error:
        what it would have saved is time."""
        path = self._folder / self._name / _file(text)
        draft = path.with_suffix(f".{os.getpid()}")
        with suppress(OSError, SafetensorError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file({"rows": np.ascontiguousarray(rows, np.float32)}, draft, {"text": text, "dropped": dropped})
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
            self._make_room(path)

    def _make_room(self, newest: Path) -> None:
        files = [(path.stat(), path) for path in self._folder.glob("*/*.safetensors")]
        total = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda entry: (entry[1] == newest, entry[0].st_mtime_ns)):
            if total <= self._cap:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size


def _file(text: str) -> str:
    return f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
