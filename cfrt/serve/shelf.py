"""Where streams are kept while they run, so that a server that was killed goes on with them: a file for each, a
portable snapshot (docs/control.md) under the stream's id, and beside it a mark when the stream is paused.

The ids are what lets visitors steer a stream, and prompts are people's own: the folder is its owner's alone. One server
at a time has it.
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from re import fullmatch
from typing import Self

from ..config import ModelConfig
from ..errors import CfrtError, SnapshotError
from ..snapshot import Snapshot

log = logging.getLogger(__name__)

EVERY = 2.0
"""Seconds of a stream that are lost at most."""

LARGEST = 64 << 20
"""Bytes of a snapshot: more than that is not written every other second."""

NAME, SUFFIX, PAUSED = r"[0-9a-f]{32}", ".cfrt", ".paused"


def default(port: int) -> Path:
    """The folder of the server at a port."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "cfrt" / f"serve-{port}"


def unfit(config: ModelConfig) -> str | None:
    """Why streams of a model cannot be kept, if they cannot."""
    if config.schedule == "rolling":
        return "a rolling schedule has no portable snapshots"
    geometry = config.geometry
    tokens = (geometry.sinks + geometry.window) * config.frame_tokens * (2 if config.guided else 1)
    size = tokens * config.depth * 2 * config.width * 4
    return f"a snapshot of {config.name!r} has {size >> 20} MiB of keys and values" if size > LARGEST else None


class Shelf:
    """The streams of one server."""

    def __init__(self, folder: Path) -> None:
        """Takes the folder, which is made if need be. CfrtError when another server has it; OSError when it cannot."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder = folder
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            do = "give each server its own --state"
            raise CfrtError(f"expected {folder} to be this server's alone, got one that another uses; {do}") from error

    def keep(self, name: str, snapshot: Snapshot, *, paused: bool) -> None:
        """In place of what was kept of that stream."""
        snapshot.save(self.folder / f"{name}{SUFFIX}")
        mark = self.folder / f"{name}{PAUSED}"
        mark.touch() if paused else mark.unlink(missing_ok=True)

    def drop(self, name: str) -> None:
        """The stream has ended."""
        for suffix in (SUFFIX, PAUSED):
            (self.folder / f"{name}{suffix}").unlink(missing_ok=True)

    def kept(self) -> Iterator[tuple[str, Snapshot, bool]]:
        """Name, snapshot and whether it was paused, of each stream, the last one kept first. What is damaged goes."""
        files = [file for file in self.folder.glob(f"*{SUFFIX}") if fullmatch(NAME, file.stem)]
        for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
            try:
                yield file.stem, Snapshot.load(file), file.with_suffix(PAUSED).exists()
            except SnapshotError as error:
                log.warning("a stream is lost: %s", error)
                self.drop(file.stem)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Another server may have the folder."""
        self._lock.close()
