"""From a prompt to rows: the protocol of the small student's text."""

import numpy as np
import pytest

from cfrt.config import TextConfig
from cfrt.errors import PromptError, WeightsError
from cfrt.text import LONGEST_PROMPT, PromptWarning, TableText, check, split

pytestmark = pytest.mark.cpu

VOCAB = {"red": 1, "crimson": 1, "circle": 2, "left": 3, "to the left": 3, "night": 4, "night sky": 5, "very large": 6}
TABLE = np.arange(7 * 4, dtype=np.float32).reshape(7, 4)
TABLE[0] = 0


def table_text(length: int = 4) -> TableText:
    return TableText(TextConfig(kind="table", width=4, length=length, vocab=VOCAB, ignored=("a", "moving")), TABLE)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a red circle", ("red", "circle")),
        ("circle, RED!", ("circle", "red")),
        ("A Crimson-Circle moving left.", ("crimson", "circle", "left")),
        ("moving to the left", ("to the left",)),
        ("a very large circle in the Night  Sky", ("very large", "circle", "night sky")),
        ("night; red", ("night", "red")),
        ("very red", ("red",)),
    ],
)
def test_longest_phrase_in_the_order_of_the_words(prompt: str, words: tuple[str, ...]) -> None:
    encoded = table_text().encode(prompt)
    assert encoded.words == words
    assert encoded.rows.shape == (4, 4)
    assert encoded.rows.dtype == np.float32
    np.testing.assert_array_equal(encoded.rows[: len(words)], TABLE[[VOCAB[word] for word in words]])
    assert not encoded.rows[len(words) :].any()


def test_a_concept_counts_once() -> None:
    assert table_text().encode("red crimson red circle").words == ("red", "circle")


def test_unknown_words_are_named_once_with_a_hint() -> None:
    encoded = table_text().encode("a red zebra, a Zebra and a cirlce")
    assert encoded.words == ("red",)
    assert encoded.unknown == ("zebra", "and", "cirlce")
    with pytest.warns(PromptWarning, match=r"'zebra', 'and', 'cirlce' \(did you mean 'circle'\?\)"):
        encoded.warn()


def test_more_concepts_than_rows_keep_the_first_and_say_so() -> None:
    encoded = table_text(length=2).encode("red circle left night")
    assert encoded.words == ("red", "circle")
    assert encoded.dropped == ("left", "night")
    with pytest.warns(PromptWarning, match="at most 2 concepts, so 'left', 'night'"):
        encoded.warn()


def test_a_prompt_that_is_read_whole_warns_of_nothing() -> None:
    table_text().encode("a red circle moving left").warn()  # warnings are errors here


def test_nothing_readable_is_an_error_with_examples() -> None:
    with pytest.raises(PromptError, match=r"knows no word of 'a zebra'.*red, circle, left, night"):
        table_text().encode("a zebra")


@pytest.mark.parametrize("prompt", ["", "  \n", None, 3, "x" * (LONGEST_PROMPT + 1)])
def test_what_is_no_prompt(prompt: object) -> None:
    with pytest.raises(PromptError, match="expected a prompt"):
        check(prompt)  # type: ignore[arg-type]


def test_split_knows_unicode() -> None:
    assert split("Ｒed–blue l’été_x") == ["red", "blue", "l'été", "x"]


def test_a_table_that_does_not_fit_is_refused() -> None:
    config = TextConfig(kind="table", width=4, length=4, vocab=VOCAB)
    for table in (TABLE[:6], TABLE[:, :3], TABLE + 1, TABLE[0]):
        with pytest.raises(WeightsError, match="at least 7 rows of 4 whose row 0 is zero"):
            TableText(config, table)
