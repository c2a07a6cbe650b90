"""Changes of prompt: from which unit they hold, what they leave behind, blending, the recache."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sampling_fixture import sampled
from stream_fixture import pixels, wait_until
from student_fixture import BLUE, RED, random_weights, small_config

import cfrt
from cfrt.engines.native import NativeEngine
from cfrt.text import TableText
from cfrt.timeline import Timeline

pytestmark = pytest.mark.cpu

TEXTS = (RED, BLUE, "a square at night", "a crimson circle moving left over the night sky")


def test_a_change_applies_to_the_first_unit_not_yet_shown(open_stream: Callable[..., cfrt.Stream]) -> None:
    """With flush: the unit made ahead is made again, and nothing of the old prompt is left in the queue."""
    stream = open_stream()
    frames = list(stream.frames(6))  # one frame into unit 2
    change = stream.prompt(BLUE)
    frames += stream.frames(15)
    assert change == cfrt.Change(unit=3, recache_ms=None)
    assert [frame.prompt for frame in frames] == [BLUE if frame.unit >= 3 else RED for frame in frames]
    assert [frame.index for frame in frames] == list(range(21))
    assert stream.stats.change_to_pixel.count == 1


def test_without_flush_what_is_made_is_shown(open_stream: Callable[..., cfrt.Stream]) -> None:
    stream = open_stream()
    frames = list(stream.frames(6))
    wait_until(lambda: stream.stats.units == 4)  # unit 3 waits in the queue
    assert stream.prompt(BLUE, flush=False).unit == 4
    frames += stream.frames(15)
    assert [frame.prompt for frame in frames] == [BLUE if frame.unit >= 4 else RED for frame in frames]


def test_the_latest_change_wins(open_stream: Callable[..., cfrt.Stream]) -> None:
    expected, stream = open_stream(), open_stream()
    list(expected.frames(6)), list(stream.frames(6))
    expected.prompt(BLUE)
    for text in ("a red square", "a circle at night", BLUE):
        assert stream.prompt(text).unit == 3
    np.testing.assert_array_equal(pixels(stream.frames(15)), pixels(expected.frames(15)))


def test_a_change_before_the_first_frame_replaces_the_prompt(open_stream: Callable[..., cfrt.Stream]) -> None:
    stream = open_stream(RED)
    assert stream.prompt(BLUE, blend_units=3).unit == 0
    np.testing.assert_array_equal(pixels(stream.frames(13)), pixels(open_stream(BLUE).frames(13)))


def test_changing_back_and_forth_leaves_no_trace(open_stream: Callable[..., cfrt.Stream]) -> None:
    stream, plain = open_stream(), open_stream()
    got = []
    for _ in range(6):
        got += [frame.pixels for frame in stream.frames(5)]
        stream.prompt(BLUE)
        stream.prompt(RED)
    np.testing.assert_array_equal(got, pixels(plain.frames(30)))


def test_blend_units_cross_fade_the_rows(open_stream: Callable[..., cfrt.Stream]) -> None:
    a, b = np.zeros((4, 16), np.float32), np.ones((4, 16), np.float32)
    timeline = Timeline("a", a)
    timeline.change(5, "b", b, blend_units=3)
    assert [float(timeline.at(unit).rows[0, 0]) for unit in range(3, 11)] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert timeline.at(8).rows is timeline.at(9).rows
    timeline.change(7, "a", a, blend_units=1)  # from the middle of the cross-fade
    assert [float(timeline.at(unit).rows[0, 0]) for unit in range(5, 10)] == [0.25, 0.5, 0.25, 0, 0]

    plain, blended = open_stream(), open_stream()
    list(plain.frames(5)), list(blended.frames(5))
    plain.prompt(BLUE), blended.prompt(BLUE, blend_units=2)
    assert (pixels(plain.frames(4)) != pixels(blended.frames(4))).any()


def test_recache_commits_the_window_again(open_stream: Callable[..., cfrt.Stream]) -> None:
    """What follows depends on it, and does not depend on what was made ahead or on the pace."""
    results = {}
    for name, pace, recache in (("plain", "max", False), ("fast", "max", True), ("paced", 200.0, True)):
        stream = open_stream(fps=pace)
        list(stream.frames(25))
        if name == "paced":
            wait_until(lambda stream=stream: stream.stats.units == 8)
        change = stream.prompt(BLUE, recache=recache)
        assert change.unit == 7
        assert (change.recache_ms is not None) == recache
        results[name] = pixels(stream.frames(8))
    np.testing.assert_array_equal(results["fast"], results["paced"])
    assert (results["fast"] != results["plain"]).any()


def test_recache_is_the_stated_recommit(
    folders: Callable[[int], Path], open_stream: Callable[..., cfrt.Stream]
) -> None:
    """The same by hand: the units that the next one sees are committed again, oldest first, under the new text."""
    config, weights = small_config(), random_weights(small_config())
    weights = {name: array.astype(np.float16).astype(np.float32) for name, array in weights.items()}
    engine = NativeEngine()
    engine.prepare(cfrt.engines.Spec(config=config, weights=weights, seed=7, precision="fp32"))
    text = TableText(config.text, weights["text.table"])
    engine.set_text(text.encode(RED).rows)
    past = []
    for unit in range(8):
        if unit == 7:
            engine.set_text(text.encode(BLUE).rows)
            for old in (4, 5, 6):  # a window of four: three units of the past
                engine.commit(past[old], old)
        x = sampled(engine, config, unit)
        shown = engine.decode(x)
        engine.commit(x, unit)
        past.append(x)
    stream = open_stream()
    list(stream.frames(25))
    stream.prompt(BLUE, recache=True)
    np.testing.assert_array_equal(pixels(stream.frames(4)), shown)


def test_a_prompt_that_cannot_be_read_changes_nothing(open_stream: Callable[..., cfrt.Stream]) -> None:
    stream = open_stream()
    first = pixels(stream.frames(5))
    for wrong in ("", "zebra", "x" * 2000):
        with pytest.raises(cfrt.PromptError):
            stream.prompt(wrong)
    with pytest.raises(ValueError, match="blend_units"):
        stream.prompt(BLUE, blend_units=-1)
    np.testing.assert_array_equal(np.concatenate([first, pixels(stream.frames(8))]), pixels(open_stream().frames(13)))


def test_unknown_words_are_warned_about_where_they_were_written(open_stream: Callable[..., cfrt.Stream]) -> None:
    with pytest.warns(cfrt.PromptWarning, match="'zebra'"):
        stream = open_stream("a red zebra")
    with pytest.warns(cfrt.PromptWarning, match="'giraffe'") as caught:
        stream.prompt("a blue giraffe")
    assert caught[0].filename == __file__
