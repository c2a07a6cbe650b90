"""Captions as a network reads them: rows of the small student's text table, or embeddings of a large model's encoder.

The table's rows are learnt with the network, so a data set keeps their numbers; an encoder is finished and large, so a
data set keeps what it said, without the zeros after the last word.

Shapes: L rows of a caption, D the width of an embedding."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from cfrt import text
from cfrt.config import ModelConfig, TextConfig
from cfrt.errors import PromptError

_FILLERS = "a an and are as at by for from in into is it its of on or that the their this to which with"
FILLERS = tuple(_FILLERS.split())
"""Words that a table made from captions leaves out."""
LARGEST_TABLE, LONGEST_CAPTION = 4096, 32  # rows of a table made from captions, and of one caption


class Wording(Protocol):
    """Whatever turns captions into what a network reads."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(L,) for rows of the table, (L, D) for embeddings."""

    def encode(self, caption: str) -> np.ndarray:
        """int64 rows [L], 0 after the last; or float32 embeddings [L, D], zeros after the last. PromptError when
        nothing in the caption can be read."""


class Rows:
    """The small table's rows, by the tokenizer that people's prompts go through."""

    def __init__(self, config: TextConfig) -> None:
        self.shape = (config.length,)
        self._text = text.TableText(config, np.zeros((1 + max(config.vocab.values(), default=0), config.width)))
        self._row = {" ".join(text.split(phrase)): row for phrase, row in config.vocab.items()}

    def encode(self, caption: str) -> np.ndarray:
        rows = [self._row[word] for word in self._text.encode(caption).words]
        return np.pad(np.array(rows, dtype=np.int64), (0, self.shape[0] - len(rows)))

    def unread(self, caption: str) -> tuple[str, ...]:
        """What in the caption the table does not know, or has no room for."""
        encoded = self._text.encode(caption)
        return encoded.unknown + encoded.dropped


class Embeddings:
    """What an encoder of `cfrt.text` says."""

    def __init__(self, encoder: text.Text, config: TextConfig) -> None:
        self.shape, self._encoder = (config.length, config.width), encoder

    def encode(self, caption: str) -> np.ndarray:
        return self._encoder.encode(caption).rows


class Kept:
    """A wording that remembers on disk what an encoder has said: one file a caption, named by its SHA-256."""

    def __init__(self, wording: Wording, folder: Path) -> None:
        self.shape, self._wording, self._folder = wording.shape, wording, folder
        folder.mkdir(parents=True, exist_ok=True)

    def encode(self, caption: str) -> np.ndarray:
        path = self._folder / f"{hashlib.sha256(caption.encode()).hexdigest()}.npy"
        if path.exists():
            return whole(np.load(path), self.shape)
        said = self._wording.encode(caption)
        draft = path.with_suffix(f".{os.getpid()}")
        with draft.open("wb") as file:
            np.save(file, stored(said))
        draft.replace(path)
        return whole(stored(said), self.shape)  # the same numbers now as next time


def wording(config: ModelConfig, weights: Mapping[str, np.ndarray], folder: Path | None = None) -> Wording:
    """How a model reads, whose folder may hold its text encoder."""
    if config.text.kind == "table":
        return Rows(config.text)
    return Embeddings(text.encoder(config, weights, folder), config.text)


def stored(said: np.ndarray) -> np.ndarray:
    """What a file keeps of a caption: rows [L] as int32, embeddings as fp16 [l, D] up to the last that is not zero.

    PromptError when an embedding is not finite or beyond fp16."""
    if said.ndim == 1:
        return said.astype(np.int32)
    if not np.isfinite(said).all() or np.abs(said).max(initial=0) > np.finfo(np.float16).max:
        raise PromptError("its embedding holds values that are not finite or beyond fp16")
    used = np.flatnonzero(said.any(1))
    return said[: used[-1] + 1 if len(used) else 0].astype(np.float16)


def whole(kept: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `stored`, but for rounding: int64 [L] or float32 [L, D]."""
    said = np.zeros(shape, dtype=np.int64 if len(shape) == 1 else np.float32)
    said[: len(kept)] = kept
    return said


def vocabulary(captions: Iterable[str], config: TextConfig) -> TextConfig:
    """A table made for these captions: one row a word, the most frequent first, as long as the longest caption."""
    found = [[word for word in text.split(caption) if word not in FILLERS] for caption in captions]
    counts = Counter(word for words in found for word in set(words))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[:LARGEST_TABLE]
    longest = max((len(set(words)) for words in found), default=1)
    return replace(
        config,
        kind="table",
        length=max(1, min(longest, LONGEST_CAPTION)),
        vocab={word: row for row, word in enumerate(ranked, 1)},
        ignored=FILLERS,
    )
