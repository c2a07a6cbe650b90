"""From a prompt to what the model reads: rows of text, [L, width].

The small student knows a closed vocabulary: a table with one row per concept, and phrases that lead to it ("big" and
"large" to the same row). A large model has an encoder of its own, umT5, which answers the same protocol: it is loaded
when a prompt comes that is not among the embeddings kept on disk, and PyTorch with it.
"""

import difflib
import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np

from . import embeddings, hub
from .bundle import Bundle, is_bundle
from .config import ModelConfig, TextConfig
from .errors import EngineError, PromptError, WeightsError
from .official import TEXT_ENCODER, TOKENIZER, WAN, WAN_DIFFUSERS

Reader = Callable[[str], tuple[np.ndarray, str]]
"""float32 rows [n, width] of a prompt, and the end of it for which there was no room."""

LONGEST_PROMPT, LONGEST_STORY = 1000, 10_000
"""Characters, for a table and for umT5. Far beyond what any caption of these models holds; what is longer is a mistake,
not a prompt."""

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
    pieces: str = "concepts"
    """What a row is."""

    @property
    def notes(self) -> list[str]:
        """Everything that the model will not read, in words; nothing when it reads all."""
        notes = []
        if self.unknown:
            notes.append(f"the model does not know {_listed(self.unknown)}{self.hint}")
        if self.dropped:
            notes.append(f"it reads at most {len(self.rows)} {self.pieces}, so {_listed(self.dropped)} found no room")
        return notes

    def warn(self, stacklevel: int = 2) -> None:
        """One PromptWarning that names all `notes`."""
        if self.notes:
            warnings.warn("; ".join(self.notes), PromptWarning, stacklevel=stacklevel + 1)


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
            raise PromptError(
                f"expected words that the model knows, got none: the model knows no word of {prompt!r}; "
                f"it knows, for instance: {self._examples()}"
            )
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


# ---------------------------------------------------------------------- umT5

OFFICIAL_WEIGHTS = "models_t5_umt5-xxl-enc-bf16.pth"
WEIGHTS_PLACES = ("text_encoder/config.json", OFFICIAL_WEIGHTS)
TOKENIZER_PLACES = ("tokenizer/tokenizer.json", "google/umt5-xxl/tokenizer.json")
TEXT_PRECISIONS = ("bf16", "int8", "fp32")
RELEASES = (WAN_DIFFUSERS, WAN)
"""Hub repositories that hold both, each in one of these places."""


class UMT5Text:
    """Wan2.1's text encoder: umT5's rows, zeros after the last. The network looks at the zeros too, as Wan has it.

    folders: where its files may be, in the layout of either release; the first folder that has any is taken.
    device: "cpu" or "cuda". precision: "bf16" (as released, 11.4 GB), "int8" (weights only: 5.7 GB, slower and not
        as exact) or "fp32". It stays in memory once it was needed.
    kept: folder of the embeddings on disk, None for `cfrt.embeddings.home()`."""

    def __init__(
        self,
        config: TextConfig,
        folders: Sequence[Path],
        *,
        device: str = "cpu",
        precision: str = "bf16",
        kept: Path | None = None,
    ) -> None:
        if precision not in TEXT_PRECISIONS:
            raise EngineError(f"expected {', '.join(TEXT_PRECISIONS)} for the text encoder, got {precision!r}")
        self._config, self._folders, self._device, self._precision = config, list(folders), device, precision
        files = self._files()
        found = "*" if files is None else embeddings.fingerprint(_all_files(*files))
        name = f"umt5-{config.width}x{config.length}-{found}-{precision}-{device.split(':')[0]}"
        self._kept = embeddings.Embeddings(name, folder=kept)

    def encode(self, prompt: str) -> Encoded:
        """PromptError when there is no prompt; WeightsError, which says what to put where, when umT5 is needed and its
        files are not here."""
        said = self._kept.get(check(prompt, LONGEST_STORY))
        if said is None:
            said = self._umt5(prompt)
            self._kept.put(prompt, *said)
        found, dropped = said
        rows = np.zeros((self._config.length, self._config.width), dtype=np.float32)
        rows[: len(found)] = found
        return Encoded(rows=rows, words=(), dropped=(dropped,) if dropped else (), pieces="tokens")

    @cached_property
    def _umt5(self) -> Reader:
        files = self._files()
        if files is None:
            raise WeightsError(self._what_to_put_where())
        missing = [name for name in ("torch", "transformers", "tokenizers", "ftfy") if find_spec(name) is None]
        if missing:
            raise EngineError(f"reading prompts needs {', '.join(missing)}: pip install 'cfrt[wan]'")
        from .nn.umt5 import UMT5

        length, width = self._config.length, self._config.width
        umt5 = UMT5.load(*files, length, device=self._device, precision=self._precision)
        if umt5.width != width:
            raise WeightsError(f"expected a text encoder of width {width}, got {umt5.width} in {files[0]}")
        return umt5

    def _files(self) -> tuple[Path, Path] | None:
        """The weights (a folder, or the official file) and tokenizer.json; None when either is nowhere."""
        weights, tokenizer = (self._first(places) for places in (WEIGHTS_PLACES, TOKENIZER_PLACES))
        if weights is None or tokenizer is None:
            return None
        return weights if weights.name == OFFICIAL_WEIGHTS else weights.parent, tokenizer

    def _first(self, places: Sequence[str]) -> Path | None:
        return next((f / place for f in self._folders for place in places if (f / place).is_file()), None)

    def _what_to_put_where(self) -> str:
        absent = [places for places in (WEIGHTS_PLACES, TOKENIZER_PLACES) if self._first(places) is None]
        what = " and ".join(" or ".join(place.removesuffix("config.json") for place in places) for places in absent)
        return (
            f"the text encoder is not here: expected {what} (of {' or '.join(RELEASES)} on the Hugging Face Hub) in "
            f"one of {', '.join(map(str, self._folders))}; `cfrt pull` fetches it with any released model"
        )


class ExportedText(UMT5Text):
    """umT5 as a bundle holds it: with int8 weights, in ONNX Runtime."""

    def __init__(self, config: TextConfig, bundle: Bundle, *, kept: Path | None = None) -> None:
        self._config, self._bundle = config, bundle
        graph = bundle.manifest.files[f"{bundle.manifest.text_encoder}/encoder.data"]
        name = f"umt5-{config.width}x{config.length}-{graph.sha256[:16]}-int8-cpu"
        self._kept = embeddings.Embeddings(name, folder=kept)

    @cached_property
    def _umt5(self) -> Reader:
        missing = [name for name in ("onnxruntime", "tokenizers", "ftfy") if find_spec(name) is None]
        if missing:
            raise EngineError(f"reading prompts needs {', '.join(missing)}: pip install 'cfrt[wan,export]'")
        from .exported_text import ExportedUMT5

        folder = self._bundle.manifest.text_encoder
        self._bundle.file(f"{folder}/encoder.data")
        graph, tokenizer = (self._bundle.file(f"{folder}/{name}") for name in ("encoder.onnx", "tokenizer.json"))
        return ExportedUMT5(graph, tokenizer, self._config.length)


def umt5_folders(model: Path | None = None) -> list[Path]:
    """Where umT5's files are looked for: CFRT_TEXT_ENCODER, the model's own folder, where files are put by hand, and
    where `cfrt pull` has left them."""
    named = os.environ.get("CFRT_TEXT_ENCODER")
    files = hub.cache() / "files"
    fetched = [found.parent for file in (TEXT_ENCODER, TOKENIZER) if (found := hub.locate(file)) is not None]
    own = [Path(named).expanduser()] if named else []
    return [*own, *([model] if model else []), *(files / release for release in RELEASES), *fetched]


def _all_files(weights: Path, tokenizer: Path) -> list[Path]:
    parts = [weights] if weights.is_file() else sorted(weights.glob("*.safetensors"))
    return [*parts, tokenizer]


# ---------------------------------------------------------------------- prompts


def check(prompt: str, longest: int = LONGEST_PROMPT) -> str:
    """The prompt itself; PromptError when it is empty or no prompt at all."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise PromptError(f"expected a prompt in words, got {prompt!r}")
    if len(prompt) > longest:
        raise PromptError(f"expected a prompt of at most {longest} characters, got {len(prompt)}; shorten it")
    return prompt


def split(prompt: str) -> list[str]:
    """Words without case and punctuation; a hyphen separates, an apostrophe does not."""
    plain = unicodedata.normalize("NFKC", prompt).casefold().replace("\u2019", "'")
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", plain)


def encoder(
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    folder: Path | None = None,
    *,
    device: str = "cpu",
    precision: str = "bf16",
) -> Text:
    """The text encoder that belongs to a model, whose folder may hold umT5; device and precision are umT5's.
    WeightsError when its table is missing."""
    if config.text.kind == "umt5":
        bundle = Bundle.open(folder) if folder is not None and is_bundle(folder) else None
        if bundle is not None and bundle.manifest.text_encoder is not None:
            return ExportedText(config.text, bundle)
        return UMT5Text(config.text, umt5_folders(folder), device=device, precision=precision)
    if TABLE not in weights:
        raise WeightsError(f"the weights of {config.name!r} hold no {TABLE}; they are incomplete")
    return TableText(config.text, weights[TABLE])


def _listed(words: Iterable[str]) -> str:
    return ", ".join(repr(word) for word in words)
