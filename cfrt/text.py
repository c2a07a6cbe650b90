"""From a prompt to what the model reads: rows of text, [L, width].

The small student knows a closed vocabulary: a table with one row per concept, and phrases that lead to it ("big" and
"large" to the same row). No I/O, no torch. A large model's encoder answers the same protocol.
"""

import difflib
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .config import ModelConfig, TextConfig
from .errors import EngineError, PromptError, WeightsError

LONGEST_PROMPT = 1000
"""Characters. Far beyond what any caption of these models holds; what is longer is a mistake, not a prompt."""

TABLE = "text.table"
"""Key of the table in a model's weights."""


class PromptWarning(UserWarning):
    """Part of a prompt that the model does not read."""


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model sees it. `rows` is float32 [L, width], zero rows after the last word."""

    rows: np.ndarray
    words: tuple[str, ...]
    """Phrases that were understood, in order."""
    unknown: tuple[str, ...] = ()
    """Words that mean nothing to the model."""
    dropped: tuple[str, ...] = ()
    """Phrases that were understood but found no room in the L rows."""
    hint: str = ""
    """What the unknown words may have meant."""

    def warn(self, stacklevel: int = 2) -> None:
        """One PromptWarning that names everything the model will not read; nothing when it reads all."""
        parts = []
        if self.unknown:
            parts.append(f"the model does not know {_listed(self.unknown)}{self.hint}")
        if self.dropped:
            parts.append(f"it reads at most {len(self.rows)} concepts, so {_listed(self.dropped)} found no room")
        if parts:
            warnings.warn("; ".join(parts), PromptWarning, stacklevel=stacklevel + 1)


class Text(Protocol):
    """Whatever turns a prompt into rows."""

    def encode(self, prompt: str) -> Encoded:
        """PromptError when nothing in the prompt can be read."""
        ...


class TableText:
    """The table of the small student: rows in the order of the words, the longest known phrase first."""

    def __init__(self, config: TextConfig, table: np.ndarray) -> None:
        needed = 1 + max(config.vocab.values(), default=0)
        if table.ndim != 2 or table.shape[1] != config.width or len(table) < needed or table[0].any():
            raise WeightsError(
                f"expected a text table of at least {needed} rows of {config.width} whose row 0 is zero, got "
                f"{list(table.shape)} with row 0 {'not ' if table[0].any() else ''}zero; "
                f"the weights belong to another configuration"
            )
        self._config = config
        self._table = np.asarray(table, dtype=np.float32)
        self._phrases = {tuple(split(phrase)): row for phrase, row in config.vocab.items()}
        self._longest = max((len(phrase) for phrase in self._phrases), default=0)
        self._ignored = frozenset(word for phrase in config.ignored for word in split(phrase))

    def encode(self, prompt: str) -> Encoded:
        """Rows for every phrase in the table, each concept once; PromptError when there is none."""
        found, unknown = self._match(check(prompt))
        if not found:
            raise PromptError(f"the model knows no word of {prompt!r}; it knows, for instance: {self._examples()}")
        length = self._config.length
        kept, dropped = list(found)[:length], list(found)[length:]
        rows = np.zeros((length, self._config.width), dtype=np.float32)
        rows[: len(kept)] = self._table[kept]
        return Encoded(
            rows=rows,
            words=tuple(found[row] for row in kept),
            unknown=unknown,
            dropped=tuple(found[row] for row in dropped),
            hint=self._hint(unknown),
        )

    def _match(self, prompt: str) -> tuple[dict[int, str], tuple[str, ...]]:
        """Row -> the phrase that asked for it first, in order; and the words that no phrase covers."""
        words = split(prompt)
        found: dict[int, str] = {}
        unknown: dict[str, None] = {}
        at = 0
        while at < len(words):
            phrase = self._phrase_at(words, at)
            if phrase:
                found.setdefault(self._phrases[phrase], " ".join(phrase))
            elif words[at] not in self._ignored:
                unknown[words[at]] = None
            at += max(1, len(phrase))
        return found, tuple(unknown)

    def _phrase_at(self, words: list[str], at: int) -> tuple[str, ...]:
        """The longest known phrase that starts here, or ()."""
        candidates = (tuple(words[at : at + length]) for length in range(self._longest, 0, -1))
        return next((phrase for phrase in candidates if phrase in self._phrases), ())

    def _hint(self, unknown: Iterable[str]) -> str:
        names = [" ".join(phrase) for phrase in self._phrases]
        near = [match for word in unknown for match in difflib.get_close_matches(word, names, n=1, cutoff=0.75)]
        return f" (did you mean {_listed(dict.fromkeys(near))}?)" if near else ""

    def _examples(self) -> str:
        """A few phrases, one per concept, spread over the table."""
        concepts = {row: phrase for phrase, row in reversed(list(self._config.vocab.items()))}
        ordered = [concepts[row] for row in sorted(concepts)]
        return ", ".join(ordered[:: max(1, len(ordered) // 8)]) or "nothing, its vocabulary is empty"


def check(prompt: str) -> str:
    """The prompt itself; PromptError when it is empty or no prompt at all."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise PromptError(f"expected a prompt in words, got {prompt!r}")
    if len(prompt) > LONGEST_PROMPT:
        raise PromptError(f"expected a prompt of at most {LONGEST_PROMPT} characters, got {len(prompt)}; shorten it")
    return prompt


def split(prompt: str) -> list[str]:
    """Words without case and punctuation; a hyphen separates, an apostrophe does not."""
    plain = unicodedata.normalize("NFKC", prompt).casefold().replace("\u2019", "'")
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", plain)


def encoder(config: ModelConfig, weights: Mapping[str, np.ndarray]) -> Text:
    """The text encoder that belongs to a model. WeightsError when its table is missing."""
    if config.text.kind != "table":
        raise EngineError(f"{config.name!r} reads text through {config.text.kind}, which this build does not have")
    if TABLE not in weights:
        raise WeightsError(f"the weights of {config.name!r} hold no {TABLE}; they are incomplete")
    return TableText(config.text, weights[TABLE])


def _listed(words: Iterable[str]) -> str:
    return ", ".join(repr(word) for word in words)
