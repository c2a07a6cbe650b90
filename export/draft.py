"""A bundle while it grows: a hidden folder beside its place, renamed when it is whole.

Every file is written under another name and moved in, and the journal says from what it was made, by hash. So an
export that was killed, or that ran out of disk, leaves no bundle, and the next one goes on with the files that are
there and still what the journal says. Two exports to one place do not meet: the draft is locked.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cfrt.bundle import MANIFEST, Entry, Manifest, entries, sha256
from cfrt.errors import ExportError

JOURNAL, LOCK = "journal.json", ".lock"


class Draft:
    """The folder of a bundle in the making. Use `draft(out)`."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out = folder, out
        self._journal: dict[str, str] = _read(folder / JOURNAL)
        self._made: set[str] = set()

    def make(self, name: str, key: str, write: Callable[[Path], None]) -> bool:
        """Sees to it that the file `name`, made from what `key` stands for, is there. `write` is asked to make it, at
        the path that it is given, only when it is not there yet. False when it was."""
        path, written = self.folder / name, self._journal.get(name, "").split()
        self._made.add(name)
        if written[:1] == [key] and path.is_file() and written[1:] == [sha256(path)]:
            return False
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            self._journal[name] = f"{key} {sha256(part)}"
            part.replace(path)
            self._save(JOURNAL, json.dumps(self._journal, indent=1))
        except OSError as error:
            raise ExportError(self._why(error, name)) from error
        finally:
            part.unlink(missing_ok=True)
        return True

    def entries(self) -> dict[str, Entry]:
        """The files made so far, as a manifest lists them."""
        return entries(self.folder, self._made)

    def finish(self, manifest: Manifest) -> None:
        """Writes the manifest and moves the bundle to its place; what this export has not made is thrown away."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            name = path.relative_to(self.folder).as_posix()
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
            elif path.is_file() and name not in self._made and name != LOCK:
                path.unlink()
        try:
            self._save(MANIFEST, manifest.to_json())
            (self.folder / LOCK).unlink()
            self.folder.rename(self.out)
        except OSError as error:
            raise ExportError(self._why(error, MANIFEST)) from error

    def _save(self, name: str, text: str) -> None:
        part = self.folder / f".{name}.part"
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.folder / name)

    def _why(self, error: OSError, name: str) -> str:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else error.strerror or str(error)
        return (
            f"{name} cannot be written in {self.folder} ({what}); nothing is at {self.out}. "
            f"{'Free some space' if full else 'Mend that'} and run the same command: it goes on where it stopped"
        )


@contextmanager
def draft(out: Path) -> Iterator[Draft]:
    """The draft of the bundle `out`, for one export at a time. ExportError when there is something at `out`, or the
    draft is in use. It stays where it is unless it was finished."""
    if out.exists():
        raise ExportError(f"{out} exists; name a new folder, or remove it first")
    folder = out.with_name(f".{out.name}.draft")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise ExportError(f"{folder} cannot be made ({error.strerror}); choose another --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ExportError(f"another export writes to {out}; wait for it, or name another folder") from error
        yield Draft(folder, out)


def check_space(out: Path, needed: int) -> None:
    """ExportError unless the disk that `out` is on has so many bytes left."""
    place = next(path for path in out.absolute().parents if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ExportError(
            f"expected {needed / 1e9:.2f} GB of free disk at {place}, found {free / 1e9:.2f} GB; free some"
        )


def key(*parts: str | bytes) -> str:
    """A name for what these make up."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def write_bytes(data: bytes, path: Path) -> None:
    """What `Draft.make` is given for a file that is in memory."""
    path.write_bytes(data)


def source_of(modules: Iterable[str]) -> str:
    """A name for the code in these files of this package, so that what older code has made is made again."""
    folder = Path(__file__).parent
    return key(*((folder / f"{module}.py").read_bytes() for module in modules))


def _read(path: Path) -> dict[str, str]:
    """A journal that cannot be read says nothing: all is made again."""
    try:
        journal = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return journal if isinstance(journal, dict) else {}
