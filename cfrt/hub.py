"""Released files: where they are on this machine, and how they come here.

A file is looked for in the folder of hand-placed files, `CFRT_CACHE/files/REPOSITORY/PATH` (CFRT_CACHE is ~/.cache/cfrt
unless set), then in the cache of huggingface_hub, where that is installed. Only `fetch` uses the network, and not where
HF_HUB_OFFLINE is set. Models made from the files live in `CFRT_CACHE/models/PRESET`.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from .errors import WeightsError
from .official import AUTOENCODER, OFFICIAL, TAEHV, TEXT_ENCODER, TOKENIZER, File

BLOCK = 1 << 20
INSTALL = "pip install 'cfrt[wan]'"


class Unreachable(WeightsError):
    """The hub does not answer, so no other file of it needs to be asked for."""


Progress = Callable[[int], None]


def cache() -> Path:
    """The folder for everything that cfrt keeps."""
    return Path(os.environ.get("CFRT_CACHE") or Path.home() / ".cache" / "cfrt").expanduser()


def model_folder(preset: str) -> Path:
    """Where the model of a preset is, once it has been made."""
    return cache() / "models" / preset


def needs(preset: str, *, decoder: str = "wan", text: bool = True) -> tuple[File, ...]:
    """The files that a stream of this preset reads; WeightsError when it was never released."""
    if preset not in OFFICIAL:
        raise WeightsError(f"there is no released file for {preset!r}; expected one of {', '.join(OFFICIAL)}")
    small = (TAEHV,) if decoder == "taehv" else ()
    return (OFFICIAL[preset], AUTOENCODER, *small, *((TEXT_ENCODER, TOKENIZER) if text else ()))


def place(file: File) -> Path:
    """Where one puts the file by hand; of several, their folder."""
    folder = file.repository.removeprefix("https://").removeprefix("http://")
    path = cache() / "files" / folder / file.path
    return path.parent if "*" in file.path else path


def locate(file: File) -> Path | None:
    """The file (of several, their folder) on this machine, or None. Never uses the network."""
    by_hand = place(file)
    if by_hand.is_file() or (by_hand.is_dir() and any(by_hand.iterdir())):
        return by_hand
    if "://" in file.repository:
        return None
    hub = _hub()
    return None if hub is None else _from_hub(hub, file, local_files_only=True)


def missing(files: Iterable[File]) -> list[File]:
    """Those of the files that are not on this machine."""
    return [file for file in files if locate(file) is None]


def instructions(files: Iterable[File]) -> str:
    """Which files to put where: for each its size and address, and on the next line its place."""
    return "\n".join(f"{file.gigabytes:6.2f} GB  {file.address}\n       to  {place(file)}" for file in files)


def offline() -> bool:
    """Has the user forbidden the network?"""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def fetch(file: File, progress: Progress = lambda _: None) -> Path:
    """The file, downloaded if it is not here; a download that was cut off goes on where it stopped.

    WeightsError, with what to put where, when it cannot be had."""
    found = locate(file)
    if found is not None:
        return found
    if offline():
        raise WeightsError(f"HF_HUB_OFFLINE is set and this is not here:\n{instructions([file])}")
    if "://" in file.repository:
        return _download(f"{file.repository}/{file.path}", place(file), file, progress)
    hub = _hub()
    if hub is None:
        raise WeightsError(f"fetching needs huggingface_hub ({INSTALL}), or by hand:\n{instructions([file])}")
    fetched = _from_hub(hub, file, local_files_only=False)
    if fetched is None:
        raise WeightsError(f"the hub does not give {file.path} of {file.repository}; by hand:\n{instructions([file])}")
    return fetched


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        return None
    return huggingface_hub


def _from_hub(hub: Any, file: File, *, local_files_only: bool) -> Path | None:
    """Through huggingface_hub, which shows progress, resumes and checks hashes itself; None when it cannot, Unreachable
    when it gets no answer."""
    try:
        if "*" not in file.path:
            return Path(hub.hf_hub_download(file.repository, file.path, local_files_only=local_files_only))
        folder = Path(
            hub.snapshot_download(file.repository, allow_patterns=[file.path], local_files_only=local_files_only)
        )
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:  # not cached, no such file, no permission
        if isinstance(error, hub.errors.LocalEntryNotFoundError) and not local_files_only:
            raise Unreachable(f"the hub cannot be reached; by hand:\n{instructions([file])}") from error
        return None
    found = sorted(folder.glob(file.path))
    return found[0].parent if found else None


def _download(address: str, target: Path, file: File, progress: Progress) -> Path:
    """Plain HTTP into a `.part` beside the target, from where an earlier attempt stopped."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urlopen(request, timeout=30) as answer:
            _append(answer, part, answer.status == 206, progress)
    except (URLError, OSError) as error:
        raise WeightsError(f"{address} cannot be fetched ({error}); by hand:\n{instructions([file])}") from error
    part.replace(target)
    return target


def _append(answer: Any, part: Path, resumed: bool, progress: Progress) -> None:
    expected = answer.headers.get("Content-Length")
    got = 0
    with part.open("ab" if resumed else "wb") as out:
        source: IO[bytes] = answer
        while block := source.read(BLOCK):
            out.write(block)
            got += len(block)
            progress(len(block))
    if expected is not None and got != int(expected):
        raise OSError(f"expected {expected} bytes, got {got}; run it again to go on")
