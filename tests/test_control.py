"""Steering a stream: random sequences of calls against a plain model, and exactness bit for bit on `native`."""

import asyncio
import random
import shutil
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from control_fixture import Oracle, Score
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from stream_fixture import CONFIGS, pixels
from student_fixture import BLUE, RED, save_student

import cfrt

pytestmark = pytest.mark.cpu

TEXTS = (RED, BLUE, "a square at night", "a crimson circle moving left over the night sky")


class Control(RuleBasedStateMachine):
    """The stream beside a model of a dozen lines: what is shown, what holds it back, and the score.

    `seen` are the frames 0 ... shown as they were last handed out; at the end they must be the score, played from its
    start without any interruption. The model is told the units that calls take effect at, and checks them."""

    @initialize(config=st.sampled_from(range(len(CONFIGS))), pace=st.sampled_from(["max", 4000.0]))
    def start(self, config: int, pace: str | float) -> None:
        self.config, self.folder = CONFIGS[config], Path(mkdtemp())
        self.oracle = oracle(config)
        save_student(self.folder, self.config)
        self.stream = cfrt.Stream(RED, model=self.folder, seed=7, fps=pace, precision="fp32")
        self.opened = [self.stream]
        self.score = Score(self.oracle.rows_of, 7)
        self.seen: list[cfrt.Frame] = []
        self.gate: int | None = None
        self.oldest = 0  # the first unit that the journal holds
        self.calls = 0  # since the playhead last went to another unit
        self.kept: list[tuple[cfrt.Snapshot, Score, list[cfrt.Frame]]] = []

    @property
    def unit(self) -> int:
        return self.config.unit_at(len(self.seen) - 1)

    def check_unit(self, unit: int, flush: bool) -> None:
        after = self.unit + 1
        exact = flush and self.calls < 4
        self.calls += 1
        assert after <= unit <= after + (0 if exact else 1)

    @rule(count=st.integers(1, 30))
    def watch(self, count: int) -> None:
        free = count if self.gate is None else min(count, self.gate - len(self.seen))
        before = self.unit
        for frame in self.stream.frames(free):
            assert frame.index == len(self.seen)
            assert (frame.unit, frame.prompt) == (self.config.unit_at(frame.index), self.score.text(frame.unit))
            self.seen.append(frame)
        if self.unit != before:
            self.calls = 0
        assert self.stream.unit == self.unit
        if free < count:
            with pytest.raises(TimeoutError):
                asyncio.run(asyncio.wait_for(anext(self.stream.aframes()), 0.005))

    @rule(
        text=st.sampled_from(TEXTS),
        blend_units=st.sampled_from([0, 0, 1, 4]),
        recache=st.booleans(),
        flush=st.booleans(),
    )
    def prompt(self, text: str, blend_units: int, recache: bool, flush: bool) -> None:
        change = self.stream.prompt(text, blend_units=blend_units, recache=recache, flush=flush)
        self.check_unit(change.unit, flush or recache)
        assert (change.recache_ms is not None) == recache
        self.score.prompt(change.unit, text, blend_units, recache)

    @rule(seed=st.integers(0, 3))
    def reseed(self, seed: int) -> None:
        change = self.stream.reseed(seed)
        self.check_unit(change.unit, flush=True)
        self.score.reseed(change.unit, seed)

    @rule()
    def pause(self) -> None:
        self.stream.pause()
        self.gate = len(self.seen)
        assert self.stream.paused

    @rule()
    def resume(self) -> None:
        self.stream.resume()
        self.gate = None
        assert not self.stream.paused

    @rule(units=st.integers(1, 3))
    def step(self, units: int) -> None:
        if self.gate is None:
            with pytest.raises(cfrt.CfrtError, match="pause"):
                self.stream.step(units)
            return
        last = self.stream.step(units)
        assert last == self.config.unit_at(self.gate) + units - 1
        self.gate = self.config.first_frame(last + 1)

    @rule(units=st.integers(1, 9))
    def rewind(self, units: int) -> None:
        reach = self.stream.reach
        assert reach == self.unit + 1 - self.oldest
        if units > reach:
            with pytest.raises(cfrt.CfrtError, match=f"to go back, got {units}:"):
                self.stream.rewind(units)
            return
        unit = self.unit + 1 - units
        assert self.stream.rewind(units) == unit
        del self.seen[self.config.first_frame(unit) :]
        self.calls = 0
        self.hold_here()

    @precondition(lambda self: len(self.kept) < 3)
    @rule(portable=st.booleans())
    def snapshot(self, portable: bool) -> None:
        snapshot = self.stream.snapshot(portable=portable)
        assert (snapshot.portable, snapshot.unit) == (portable, self.unit)
        if portable:
            snapshot.save(self.folder / "snapshot")
            snapshot = cfrt.Snapshot.load(self.folder / "snapshot")
        self.kept.append((snapshot, self.score.copy(), list(self.seen)))

    @precondition(lambda self: self.kept)
    @rule(which=st.integers(0, 2))
    def restore(self, which: int) -> None:
        snapshot, score, seen = self.kept[which % len(self.kept)]
        self.stream.restore(snapshot)
        self.score, self.seen, self.calls = score.copy(), list(seen), 0
        self.oldest = self.unit + 1
        assert self.stream.reach == 0
        self.hold_here()

    @precondition(lambda self: len(self.opened) < 4)
    @rule(ahead=st.integers(0, 9))
    def branch(self, ahead: int) -> None:
        """The old stream is checked and left; the branch goes on."""
        twin = self.stream.branch()
        assert (twin.unit, twin.reach, twin.changes[-1]) == (self.unit, self.stream.reach, self.stream.changes[-1])
        seen = list(self.seen)
        self.resume()
        self.watch(ahead)
        self.check()
        self.stream, self.seen, self.gate, self.calls = twin, seen, None, 0
        self.opened.append(twin)
        assert not twin.paused

    def hold_here(self) -> None:
        if self.gate is not None:
            self.gate = len(self.seen)

    def check(self) -> None:
        expected = self.oracle.play(self.score, self.unit + 1)
        if self.seen:
            np.testing.assert_array_equal(pixels(self.seen), expected[: len(self.seen)])

    def teardown(self) -> None:
        if not hasattr(self, "stream"):
            return
        try:
            self.resume()
            self.watch(5)
            self.check()
        finally:
            for stream in self.opened:
                stream.close()
            shutil.rmtree(self.folder)


@cache
def oracle(config: int) -> Oracle:
    return Oracle(CONFIGS[config])


TestControl = Control.TestCase
TestControl.settings = settings(max_examples=25, stateful_step_count=25)


@pytest.mark.parametrize(("pace", "seed"), [("max", 1), ("max", 2), (3000.0, 3)])
def test_control_from_another_thread(pace: str | float, seed: int, open_stream: Callable[..., cfrt.Stream]) -> None:
    """One thread steers while another watches. Whatever the timing, the frames are in order but for the jumps that the
    steering thread has been told of, and what is seen last of every unit is the score, played without interruption."""
    stream, score, draw = open_stream(fps=pace), Score(oracle(0).rows_of, 7), random.Random(seed)
    config, stop, jumps = stream.config, threading.Event(), set()

    def steer() -> None:
        for _ in range(60):
            match draw.randrange(5):
                case 0:
                    units = draw.randrange(1, 6)
                    if units <= stream.reach:  # which only grows while nobody else steers
                        jumps.add(config.first_frame(stream.rewind(units)))
                case 1:
                    new = draw.randrange(4)
                    score.reseed(stream.reseed(new).unit, new)
                case 2:
                    stream.pause()
                    stream.step(2)
                    time.sleep(0.002)
                    stream.resume()
                case _:
                    text, blend, recache = draw.choice(TEXTS), draw.randrange(3), draw.random() < 0.3
                    score.prompt(stream.prompt(text, blend_units=blend, recache=recache).unit, text, blend, recache)
            time.sleep(0.001)
        stop.set()

    thread = threading.Thread(target=steer)
    thread.start()
    last, seen, ends = -1, {}, None
    for frame in stream.frames():
        assert frame.index == last + 1 or frame.index in jumps or not stop.is_set()
        last, seen[frame.index] = frame.index, frame
        if stop.is_set() and ends is None:
            ends = max(seen) + 5
        if ends is not None and frame.index >= ends:
            break
    thread.join()
    frames = [seen[index] for index in range(last + 1)]
    assert [frame.prompt for frame in frames] == [score.text(frame.unit) for frame in frames]
    expected = oracle(0).play(score, config.unit_at(last) + 1)
    np.testing.assert_array_equal(pixels(frames), expected[: len(frames)])


@pytest.mark.parametrize("seed", range(4))
def test_control_of_a_live_stream(seed: int, open_stream: Callable[..., cfrt.Stream]) -> None:
    """One that drops what its viewer misses: what is seen is in order, and the score, played without interruption."""
    draw, which = random.Random(seed), seed % len(CONFIGS)
    stream = open_stream(config=which, fps=draw.choice([200.0, 1000.0]), keep="latest")
    score, config, frames = Score(oracle(which).rows_of, 7), stream.config, stream.frames()
    seen: dict[int, cfrt.Frame] = {}

    def watch() -> None:
        frame = next(frames)
        assert frame.index > max(seen, default=-1)
        seen[frame.index] = frame

    for _ in range(40):
        match draw.choice(["watch", "watch", "prompt", "reseed", "pause", "resume", "rewind"]):
            case "watch" if not stream.paused:
                for _ in range(draw.randrange(1, 6)):
                    watch()
            case "prompt":
                text, blend, recache = draw.choice(TEXTS), draw.randrange(3), draw.random() < 0.3
                change = stream.prompt(text, blend_units=blend, recache=recache, flush=draw.random() < 0.7)
                score.prompt(change.unit, text, blend, recache)
            case "reseed":
                new = draw.randrange(4)
                score.reseed(stream.reseed(new).unit, new)
            case "pause":
                stream.pause()
                if draw.random() < 0.3:
                    stream.step()
                    watch()
            case "resume":
                stream.resume()
                time.sleep(0.02 * draw.random())
            case "rewind" if stream.reach:
                unit = stream.rewind(draw.randrange(1, min(6, stream.reach + 1)))
                seen = {index: frame for index, frame in seen.items() if index < config.first_frame(unit)}
    stream.resume()
    for _ in range(5):
        watch()
    expected = oracle(which).play(score, config.unit_at(max(seen)) + 1)
    for index, frame in seen.items():
        assert frame.prompt == score.text(frame.unit)
        np.testing.assert_array_equal(frame.pixels, expected[index])


def test_calls_that_make_no_sense(open_stream: Callable[..., cfrt.Stream]) -> None:
    stream = open_stream()
    for call, words in (
        (lambda: stream.step(0), "units >= 1"),
        (lambda: stream.reseed(-1), "seed from 0"),
        (lambda: stream.prompt(BLUE, blend="morph"), "blend 'lerp' or 'slerp'"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match=r"expected a Snapshot.* got int"):
        stream.restore(3)  # type: ignore[arg-type]
    stream.close()
    for use in (
        stream.pause,
        stream.resume,
        stream.step,
        stream.branch,
        lambda: stream.rewind(1),
        lambda: stream.reseed(1),
    ):
        with pytest.raises(cfrt.CfrtError, match="closed"):
            use()
