"""What becomes of captions: rows of a large encoder, of a table, of a vocabulary made from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from footage_fixture import BLUE, RED, film, table
from student_fixture import save_student, small_config

from cfrt.config import ModelConfig, TextConfig
from cfrt.errors import ConfigError, PromptError
from cfrt.text import Encoded, TableText
from training import (
    encoding,
    footage,
    selection,
    shards,
    wording,
)
from training.shards import Shards

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 32 x 32 pixels, whose clips are 6 latent frames = 21 frames."""
    return save_student(tmp_path_factory.mktemp("student"))


class Spoken:
    """A stand-in for a large model's text encoder: a row a word, none for what is not there."""

    def __init__(self, length: int = 6, width: int = 3) -> None:
        self.length, self.width, self.said = length, width, list[str]()

    def encode(self, prompt: str) -> Encoded:
        self.said.append(prompt)
        if "unspeakable" in prompt:
            raise PromptError("no words for it")
        rows = np.zeros((self.length, self.width), np.float32)
        words = prompt.split()[: self.length]
        for row, word in enumerate(words):
            rows[row] = [len(word), row + 1, 70000 if word == "loud" else 1 / 3]
        return Encoded(rows=rows, words=tuple(words))


@dataclass
class SpokenTools:
    """The student's autoencoder behind that encoder."""

    folder: Path
    spoken: Spoken
    device: str = "cpu"

    @property
    def codec(self) -> encoding.Codec:
        return encoding.ModelTools(self.folder, small_config().text).codec

    @property
    def wording(self) -> wording.Wording:
        return wording.Embeddings(self.spoken, speaking().text)


def speaking() -> ModelConfig:
    return replace(small_config(), text=TextConfig(kind="umt5", width=3, length=6))


def test_embeddings_of_a_large_encoder(student: Path, tmp_path: Path) -> None:
    """Kept without the zeros behind the last word, with the unconditional prompt beside them; an encoder is asked once
    a video, and what it cannot say is reported."""
    for name, caption in (("x", "one two three"), ("y", "unspeakable"), ("z", "loud"), ("w", "a b c d e f g h")):
        film(tmp_path / f"clips/{name}.mp4", 45, caption=caption)
    spoken, out = Spoken(), tmp_path / "out"
    chosen = selection.select(*footage.listed(tmp_path / "clips"), speaking(), selection.Settings())
    fresh = encoding.describe(chosen, encoding.ModelTools(student, speaking().text), negative="ugly still")
    encoding.run(chosen, SpokenTools(student, spoken), out, fresh)
    assert spoken.said == ["ugly still", "a b c d e f g h", "one two three", *["unspeakable"] * 2, *["loud"] * 2]
    assert set(table(out / "rejected.csv").values()) == {
        "the clip from 1.3125 s: no words for it",
        "the clip from 1.3125 s: its embedding holds values that are not finite or beyond fp16",
    }
    found = Shards(out, 0, speaking())
    assert len(found) == 4
    sizes = [found._array(clip, shards.TEXT).shape for clip in range(4)]
    assert sizes == [(6, 3), (6, 3), (3, 3), (3, 3)]
    batch = found.batch(0, 4)
    assert (batch.captions.shape, batch.captions.dtype) == ((4, 2, 6, 3), torch.float32)
    expected = torch.from_numpy(Spoken().encode("ugly still").rows)
    assert batch.null is not None
    torch.testing.assert_close(batch.null, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(batch.to_null().captions, expected.expand(4, 2, 6, 3), atol=1e-3, rtol=0)
    with pytest.raises(ConfigError, match="reads any words, through umt5"):
        selection.select([], [], speaking(), selection.Settings(vocabulary="captions"))
    with pytest.raises(ConfigError, match="whose unconditional prompt is empty: drop --negative"):
        encoding.describe(
            replace(chosen, model=small_config()), encoding.ModelTools(student, speaking().text), negative="x"
        )


def test_rows_are_those_of_the_prompts_that_people_type() -> None:
    """The same words as the runtime's tokenizer, in its order, each once."""
    text = small_config().text
    embeddings = np.arange(8 * 16, dtype=np.float32).reshape(8, 16)
    embeddings[0] = 0
    for prompt in (RED, BLUE, "night sky, NIGHT sky; crimson red", "left right red blue circle square"):
        rows = wording.Rows(text).encode(prompt)
        np.testing.assert_array_equal(embeddings[rows], TableText(text, embeddings).encode(prompt).rows)
    assert wording.Rows(text).unread("a red dog and a circle square left right cat") == ("dog", "and", "cat", "right")


def test_a_vocabulary_of_your_captions() -> None:
    captions = ["A dog runs on the beach", "the dog sleeps; a Dog!", "dog on a beach at night"]
    made = wording.vocabulary(captions, small_config().text)
    assert list(made.vocab.items()) == [("dog", 1), ("beach", 2), ("night", 3), ("runs", 4), ("sleeps", 5)]
    assert (made.length, made.width, made.kind) == (3, 16, "table")
    for caption in captions:
        assert wording.Rows(made).unread(caption) == ()
    many = [" ".join(f"w{k}x{j}" for j in range(40)) for k in range(200)]
    made = wording.vocabulary(many, small_config().text)
    assert (len(made.vocab), made.length) == (wording.LARGEST_TABLE, wording.LONGEST_CAPTION)


def test_an_encoder_is_asked_once_a_prompt(tmp_path: Path) -> None:
    spoken = Spoken()
    direct = wording.Embeddings(spoken, speaking().text)
    kept = wording.Kept(direct, tmp_path / "kept")
    said = kept.encode("one two")
    assert np.array_equal(wording.Kept(direct, tmp_path / "kept").encode("one two"), said)
    assert spoken.said == ["one two"]
    np.testing.assert_allclose(said, direct.encode("one two"), atol=1e-3)
    rows = wording.Kept(wording.Rows(small_config().text), tmp_path / "rows")
    assert rows.encode("red").tolist() == rows.encode("red").tolist() == [1, 0, 0, 0]
