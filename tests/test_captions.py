"""What people may write reaches the rows that training used: the grammar through the runtime's own tokenizer."""

import itertools
import random

import numpy as np
import pytest
import torch

from cfrt.config import TextConfig
from cfrt.text import TableText, split
from training import captions, worlds
from training.captions import FILLERS, SYNONYMS, VOCABULARY
from training.sources import Tokenizer

pytestmark = pytest.mark.cpu

CONFIG = TextConfig(kind="table", width=1, length=captions.LENGTH, vocab=VOCABULARY, ignored=FILLERS)
TEXT = TableText(CONFIG, np.arange(captions.ROWS, dtype=np.float32)[:, None])


def read(prompt: str) -> tuple[list[int], tuple[str, ...]]:
    """Sorted rows of the table that a prompt leads to, padding included, and the unknown words."""
    encoded = TEXT.encode(prompt)
    return sorted(encoded.rows[:, 0].astype(int).tolist()), encoded.unknown


def rows(factors: torch.Tensor) -> list[int]:
    return sorted(captions.rows(factors).tolist())


def test_every_wording_of_every_scene_reads_as_its_rows() -> None:
    """1536 scenes, three random wordings each."""
    chooser = random.Random(0)
    for scene in worlds.all_factors():
        for _ in range(3):
            prompt = captions.caption(scene, chooser)
            assert read(prompt) == (rows(scene), ()), prompt


def test_every_template_takes_every_synonym() -> None:
    """Each phrase in each template, whatever stands beside it: longer phrases must not swallow their neighbours."""
    chooser = random.Random(1)
    plain = {factor: next(iter(values)) for factor, values in worlds.FACTORS.items()}
    first = dict.fromkeys(worlds.FACTORS, 0)
    for template, (factor, values) in itertools.product(captions._TEMPLATES, SYNONYMS.items()):
        for index, (_, phrases) in enumerate(values.items()):
            for phrase in phrases:
                others = {f: chooser.choice(SYNONYMS[f][plain[f]]) for f in plain}
                scene = torch.tensor(list((first | {factor: index}).values()))
                prompt = template.format(**(others | {factor: phrase}))
                assert read(prompt) == (rows(scene), ()), prompt


def test_neighbouring_phrases_do_not_merge() -> None:
    """Any direction before any background, and any shape before any direction, as the templates put them."""
    for direction, background in itertools.product(_phrases("direction"), _phrases("background")):
        together, unknown = read(f"{direction[0]} {background[0]}")
        assert (together, unknown) == (sorted([direction[1], background[1], *[0] * 6]), ()), (direction, background)
    for shape, direction in itertools.product(_phrases("shape"), _phrases("direction")):
        together, unknown = read(f"{shape[0]} {direction[0]}")
        assert (together, unknown) == (sorted([shape[1], direction[1], *[0] * 6]), ()), (shape, direction)


def _phrases(factor: str) -> list[tuple[str, int]]:
    return [(phrase, VOCABULARY[phrase]) for phrases in SYNONYMS[factor].values() for phrase in phrases]


def test_no_phrase_has_two_meanings() -> None:
    every = [phrase for values in SYNONYMS.values() for phrases in values.values() for phrase in phrases]
    assert len(every) == len(set(every)) == len(VOCABULARY)
    assert not set(FILLERS) & set(every), "a filler is never read"
    assert all(" ".join(split(phrase)) == phrase for phrase in every)


def test_rows_name_their_factors() -> None:
    scene = torch.tensor([1, 3, 2, 0, 1, 3])
    named = {"size": "large", "colour": "yellow", "shape": "triangle", "direction": "right", "speed": "fast"}
    assert captions.factors_of(captions.rows(scene)) == named | {"background": "dusk"}
    mentioned = torch.tensor([True, True, True, True, True, False])
    assert captions.factors_of(captions.rows(scene, mentioned)) == named


def test_case_order_and_punctuation_do_not_matter() -> None:
    expected, _ = read("a small red circle moving left slowly over the ocean")
    assert read("OCEAN! Slowly, left... the RED circle; (small)") == (expected, ())


def test_the_evaluation_asks_the_same_tokenizer() -> None:
    scene = worlds.all_factors()[777]
    ids = Tokenizer(CONFIG)(captions.caption(scene, random.Random(2)))
    assert sorted(ids.tolist()) == rows(scene)
