"""Sources, and PTX, changed in passing: inside `with edited(Edit(...))`, all that `build` compiles has the edit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Edit:
    """In the file whose path ends in `file`, or in the PTX of source x where that is x.ptx: `old` becomes `new`, once.

    `nth`: which of several occurrences (from 0); None where there must be one only.
    """

    file: str
    old: str
    new: str
    nth: int | None = None

    def is_of(self, path: Path) -> bool:
        return path.as_posix().endswith(f"/{self.file}")

    def apply(self, text: str) -> str:
        parts = text.split(self.old)
        expected = "one occurrence" if self.nth is None else f"more than {self.nth} occurrences"
        if len(parts) != 2 if self.nth is None else len(parts) < self.nth + 2:
            raise ValueError(f"{self.file}: expected {expected} of {self.old!r}, got {len(parts) - 1}")
        at = self.nth or 0
        return self.old.join(parts[: at + 1]) + self.new + self.old.join(parts[at + 1 :])


_active: list[Edit] = []


@contextmanager
def edited(*edits: Edit) -> Iterator[None]:
    _active.extend(edits)
    try:
        yield
    finally:
        del _active[-len(edits) :]


def read(path: Path) -> str:
    """The file's text with the active edits."""
    text = path.read_text()
    for edit in _active:
        if edit.is_of(path):
            text = edit.apply(text)
    return text


def active(files: list[Path]) -> bool:
    """Whether one of these files has an edit."""
    return any(edit.is_of(file) for edit in _active for file in files)
