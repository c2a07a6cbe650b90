"""What a model is asked for: lists of prompts, and the files that VBench looks for.

A list is a text file with one prompt a line, two columns divided by a tab (the prompt, and the longer form that the
model is given), or VBench's own JSON (`VBench_full_info.json`). VBench (arXiv:2311.17982) finds the i-th video of a
prompt under its plain name, `{prompt}-{i}.mp4`, whatever longer form it was made from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from cfrt.errors import ConfigError, PromptError
from cfrt.text import check

LONGEST_NAME = 255  # bytes that file systems allow
SHORTENED = 120  # characters kept of a prompt that cannot be a file name


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    name: str
    """As VBench and the tables know it."""
    text: str
    """As the model is given it."""
    dimensions: tuple[str, ...] = ()
    """VBench's dimensions that it serves; none known for a plain list."""


@dataclass(frozen=True)
class PromptList:
    """The prompts of a file, each once."""

    prompts: tuple[Prompt, ...]
    repeated: int = 0
    """Lines that said again what an earlier one had said: VBench's own list has two."""
    info: tuple[dict[str, Any], ...] = ()
    """The rows of VBench's JSON, as they were; none for a text file."""

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)


def read(path: Path, extended: Path | None = None) -> PromptList:
    """The prompts of a file. extended: a second file whose lines are, in the same order, what the model is given.

    Blank lines and lines that begin with # are left out. ConfigError for a file that cannot be read or holds nothing,
    for columns or lengths that don't fit; PromptError for what is no prompt."""
    info = _info(path) if path.suffix.lower() == ".json" else ()
    if info:
        names = [str(row["prompt_en"]) for row in info]
        texts, dimensions = names, [tuple(row.get("dimension", ())) for row in info]
    else:
        rows = [_columns(line, number, path) for number, line in _lines(path)]
        names, texts = [name for name, _ in rows], [text for _, text in rows]
        dimensions = [()] * len(names)
    if not names:
        raise ConfigError(f"expected prompts in {path}, one a line; it holds none")
    if extended is not None:
        if texts != names:
            raise ConfigError(f"{path} has a second column already; leave out --extended {extended}")
        texts = [line for _, line in _lines(extended)]
        if len(texts) != len(names):
            raise ConfigError(f"expected as many prompts in {extended} as the {len(names)} in {path}, got {len(texts)}")
    return _each_once(names, texts, dimensions, info)


def _each_once(
    names: Sequence[str], texts: Sequence[str], dimensions: Sequence[tuple[str, ...]], info: tuple[dict[str, Any], ...]
) -> PromptList:
    """A name that comes twice keeps its first text and collects its dimensions."""
    found: dict[str, Prompt] = {}
    for name, text, served in zip(names, texts, dimensions, strict=True):
        try:
            check(name), check(text)
        except PromptError as error:
            raise PromptError(f"prompt {len(found) + 1}: {error}") from None
        first = found.get(name, Prompt(name, text))
        found[name] = Prompt(name, first.text, tuple(dict.fromkeys((*first.dimensions, *served))))
    return PromptList(tuple(found.values()), len(names) - len(found), info)


def _lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines that say something."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the prompts in {path}: {error}") from error
    return [
        (number, line.strip())
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]


def _columns(line: str, number: int, path: Path) -> tuple[str, str]:
    columns = [column.strip() for column in line.split("\t")]
    if len(columns) > 2 or not all(columns):
        raise ConfigError(f"{path}, line {number}: expected PROMPT, or PROMPT<tab>EXTENDED PROMPT, got {line!r}")
    return columns[0], columns[-1]


def _info(path: Path) -> tuple[dict[str, Any], ...]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"cannot read the prompts in {path}: {error}") from error
    good = isinstance(rows, list) and rows and all(isinstance(row, dict) and "prompt_en" in row for row in rows)
    if not good:
        raise ConfigError(
            f'expected {path} to be like VBench_full_info.json: [{{"prompt_en": ..., "dimension": [...]}}]'
        )
    return tuple(rows)


# ----------------------------------------------------------------------------------------------------------- file names


def stems(names: Sequence[str], seeds: int, folder: Path) -> dict[str, str]:
    """Name of a prompt -> what its files are called before `-{index}.mp4`; no two alike.

    It is the prompt itself, as VBench looks for it. A prompt that cannot be a file name in `folder` (too long, with a
    slash, or the same as another but for its case where that does not count) gets its beginning and a hash instead."""
    blind = (folder.parent / folder.name.swapcase()).exists()  # a file system that does not tell cases apart
    taken: set[str] = set()
    found = {}
    for name in names:
        stem = name if _possible(name, seeds) else _shortened(name)
        if (stem.casefold() if blind else stem) in taken:
            stem = _shortened(name)
        taken.add(stem.casefold() if blind else stem)
        found[name] = stem
    return found


def video_name(stem: str, index: int) -> str:
    return f"{stem}-{index}.mp4"


def _possible(name: str, seeds: int) -> bool:
    longest = video_name(name, max(0, seeds - 1)).encode()
    return len(longest) <= LONGEST_NAME and "/" not in name and name.isprintable()


def _shortened(name: str) -> str:
    kept = "".join(letter if letter.isalnum() or letter in " ,.-" else "_" for letter in name[:SHORTENED])
    while len(kept.encode()) > SHORTENED:
        kept = kept[:-1]
    return f"{kept}~{sha256(name.encode()).hexdigest()[:16]}"
