"""Going back over units, and the journal that remembers what they overwrote."""

from collections.abc import Callable

import numpy as np
import pytest
from stream_fixture import pixels
from student_fixture import BLUE, RED

import cfrt
from cfrt.journal import Entry, Journal

pytestmark = pytest.mark.cpu

TEXTS = (RED, BLUE, "a square at night", "a crimson circle moving left over the night sky")


def test_the_journal_keeps_to_its_cap_and_says_how_far_it_reaches(open_stream: Callable[..., cfrt.Stream]) -> None:
    stream = open_stream(journal_bytes=4000)
    list(stream.frames(101))
    assert 0 < stream.stats.journal_bytes <= 4000
    reach = stream.reach
    assert 0 < reach < 26
    with pytest.raises(cfrt.CfrtError, match=f"at most {reach} units to go back, got {reach + 1}: the journal"):
        stream.rewind(reach + 1)
    assert next(stream.frames()).index == 101  # unharmed
    with pytest.raises(ValueError, match="units >= 1"):
        stream.rewind(0)


@pytest.mark.parametrize(
    ("cap", "why"), [(0, "it has no journal; make"), (100, r"the journal has 100 bytes and one unit needs \d+; make")]
)
def test_without_a_journal_there_is_no_way_back(cap: int, why: str, open_stream: Callable[..., cfrt.Stream]) -> None:
    stream = open_stream(journal_bytes=cap)
    list(stream.frames(41))
    assert (stream.reach, stream.stats.journal_bytes) == (0, 0)
    with pytest.raises(cfrt.CfrtError, match=why):
        stream.rewind(1)
    np.testing.assert_array_equal(pixels(stream.frames(8)), pixels(open_stream().frames(49))[41:])
    with pytest.raises(ValueError, match="journal_bytes"):
        open_stream(journal_bytes=-1)


def test_a_large_entry_empties_the_journal_and_no_more() -> None:
    """A recache may need more than everything else; the units after it are remembered again."""

    def entry(unit: int, size: int) -> Entry:
        memory = cfrt.engines.Memory(unit=unit, keys={unit: np.zeros(size, np.uint8)}, decoder=())
        return Entry(memory, ())

    journal = Journal(100)
    for unit in range(6):
        journal.add(entry(unit, 30))
    assert (journal.oldest, journal.nbytes) == (3, 90)
    journal.overwrites(5, {3: np.ones(90, np.uint8)})
    assert (journal.oldest, journal.nbytes, journal.off) == (None, 0, False)
    journal.add(entry(6, 30))
    with pytest.raises(ValueError, match="entry of unit 7"):
        journal.add(entry(9, 30))
    assert journal.holds(6)
    journal.add(entry(7, 101))
    assert journal.off


def test_rewind_starts_from_the_picture_again(open_stream: Callable[..., cfrt.Stream]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    stream = open_stream(image=image)
    first = pixels(stream.frames(30))
    assert stream.rewind(stream.reach) == 0
    np.testing.assert_array_equal(pixels(stream.frames(30)), first)


@pytest.mark.parametrize(("precision", "config"), [("bf16", 1), ("int8", 1), ("fp32", 3)])
def test_rewind_is_exact_in_every_precision(
    precision: str, config: int, open_stream: Callable[..., cfrt.Stream]
) -> None:
    """And with either solver: the last of these configs has Euler steps."""
    stream = open_stream(config=config, precision=precision)
    first = pixels(stream.frames(90))
    for units in (1, 2, 5, 7):
        cut = stream.config.first_frame(stream.rewind(units))
        np.testing.assert_array_equal(pixels(stream.frames(90 - cut)), first[cut:])


@pytest.mark.parametrize("cap", [0, 4000])
def test_a_blended_change_reads_what_was_before_it_however_far_back(
    cap: int, open_stream: Callable[..., cfrt.Stream]
) -> None:
    """What a timeline may forget: nothing that a change could still be blended with."""
    stream = open_stream(journal_bytes=cap)
    for _ in range(30):
        list(stream.frames(5))
        assert stream.prompt(BLUE, flush=False).unit > stream.prompt(RED, blend_units=2).unit - 1
        stream.prompt("a square at night", blend_units=1)
    if cap:
        oldest = stream.rewind(stream.reach)
        assert stream.prompt(BLUE, blend_units=3).unit == oldest
        assert {frame.prompt for frame in stream.frames(8)} == {BLUE}
    assert len(stream.changes) < 60
