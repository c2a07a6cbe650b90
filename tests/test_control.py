"""Steering a stream: random sequences of calls against a plain model, and exactness bit for bit on `native`."""

import asyncio
import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from control_fixture import Oracle, Score
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from student_fixture import BLUE, RED, save_student, small_config

import cfrt
from cfrt.engines.native import NativeEngine
from cfrt.journal import Entry, Journal

pytestmark = pytest.mark.cpu

TEXTS = (RED, BLUE, "a square at night", "a crimson circle moving left over the night sky")
CONFIGS = (
    small_config(),
    small_config(unit=3, window=7, sinks=2),
    small_config(window=3, sinks=1),
)


@pytest.fixture(scope="module")
def folders() -> Iterator[Callable[[int], Path]]:
    """The folder of each of CONFIGS."""
    root = Path(mkdtemp())
    made = cache(lambda index: save_student(root / str(index), CONFIGS[index]))
    yield made
    shutil.rmtree(root)


@pytest.fixture
def open_stream(folders: Callable[[int], Path]) -> Iterator[Callable[..., cfrt.Stream]]:
    streams = []

    def make(prompt: str = RED, config: int = 0, **changes: Any) -> cfrt.Stream:
        options = {"model": folders(config), "fps": "max", "seed": 7, "precision": "fp32", **changes}
        streams.append(cfrt.Stream(prompt, **options))
        return streams[-1]

    yield make
    for stream in streams:
        stream.close()


def pixels(frames: Iterator[cfrt.Frame] | list[cfrt.Frame]) -> np.ndarray:
    return np.stack([frame.pixels for frame in frames])


# ---------------------------------------------------------------------- any sequence of calls


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
            with pytest.raises(cfrt.CfrtError, match=f"cannot go back {units} units"):
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


# ---------------------------------------------------------------------- rewind and its journal


def test_the_journal_keeps_to_its_cap_and_says_how_far_it_reaches(open_stream: Callable[..., cfrt.Stream]) -> None:
    stream = open_stream(journal_bytes=4000)
    list(stream.frames(101))
    assert 0 < stream.stats.journal_bytes <= 4000
    reach = stream.reach
    assert 0 < reach < 26
    with pytest.raises(cfrt.CfrtError, match=f"cannot go back {reach + 1} units: the journal reaches {reach} back"):
        stream.rewind(reach + 1)
    assert next(stream.frames()).index == 101  # unharmed
    with pytest.raises(ValueError, match="units >= 1"):
        stream.rewind(0)


@pytest.mark.parametrize(
    ("cap", "why"), [(0, r"journal_bytes=0"), (100, r"the journal has 100 bytes and one unit needs \d+; make")]
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


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_rewind_is_exact_in_every_precision(precision: str, open_stream: Callable[..., cfrt.Stream]) -> None:
    stream = open_stream(config=1, precision=precision)
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


# ---------------------------------------------------------------------- snapshots and branches


@pytest.mark.parametrize("portable", [False, True])
def test_the_futures_of_a_branch_are_those_of_a_restored_stream(
    portable: bool, open_stream: Callable[..., cfrt.Stream]
) -> None:
    stream, restored = open_stream(config=1), open_stream(BLUE, config=1, seed=3)
    list(stream.frames(40))
    stream.prompt(BLUE, blend_units=2, recache=True)
    list(stream.frames(7))
    restored.restore(stream.snapshot(portable=portable))
    with stream.branch() as twin:
        assert (twin.reach, twin.unit, twin.seed) == (stream.reach, stream.unit, 7)
        futures = []
        for one in (restored, twin):
            one.prompt("a square at night")
            one.reseed(5)
            futures.append(pixels(one.frames(40)))
        np.testing.assert_array_equal(*futures)
        assert (pixels(stream.frames(40)) != futures[0]).any()  # the past is one, the futures are two
        cut = twin.config.first_frame(twin.rewind(twin.reach))
        assert cut == 0
        np.testing.assert_array_equal(pixels(twin.frames(40)), pixels(open_stream(config=1).frames(40)))


@pytest.mark.parametrize("config", range(len(CONFIGS)))
def test_a_portable_snapshot_goes_from_engine_to_engine(
    config: int, open_stream: Callable[..., cfrt.Stream], tmp_path: Path
) -> None:
    """From native to torch and back: to tolerance there, bit for bit where nothing is lost on the way."""
    native, torch = open_stream(config=config), open_stream(config=config, engine="torch")
    list(native.frames(42))
    native.prompt(BLUE, blend_units=5, blend="slerp")
    list(native.frames(6))
    native.snapshot(portable=True).save(tmp_path / "there")
    torch.restore(cfrt.Snapshot.load(tmp_path / "there"))
    expected, there = pixels(native.branch().frames(50)).astype(int), pixels(torch.branch().frames(50)).astype(int)
    assert np.abs(expected - there).max() <= 1
    torch.snapshot(portable=True).save(tmp_path / "back")
    native.restore(cfrt.Snapshot.load(tmp_path / "back"))
    np.testing.assert_array_equal(pixels(native.frames(50)), expected)


def test_a_damaged_file_is_refused(open_stream: Callable[..., cfrt.Stream], tmp_path: Path) -> None:
    stream, path = open_stream(), tmp_path / "snapshot"
    list(stream.frames(30))
    with pytest.raises(cfrt.SnapshotError, match="portable=True"):
        stream.snapshot().save(path)
    assert not path.exists()
    stream.snapshot(portable=True).save(path)
    whole = path.read_bytes()
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    assert set(metadata) == {"format", "version", "header", "sha256"}
    for place in (len(whole) - 1, len(whole) // 2, len(whole) - 3000):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(cfrt.SnapshotError, match=r"damaged|no snapshot"):
            cfrt.Snapshot.load(path)
    for content in (b"", whole[:1000], b"\x80\x04pickle"):
        path.write_bytes(content)
        with pytest.raises(cfrt.SnapshotError, match="no snapshot, or a damaged one"):
            cfrt.Snapshot.load(path)
    with pytest.raises(cfrt.SnapshotError, match="no such file"):
        cfrt.Snapshot.load(tmp_path / "nothing")


@pytest.mark.parametrize("wrong", ["unit", "frames", "queue", "seeds", "version"])
def test_a_file_that_was_made_up_is_refused(
    wrong: str, open_stream: Callable[..., cfrt.Stream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a right checksum, but of no stream that there could be."""
    stream, path = open_stream(), tmp_path / "snapshot"
    list(stream.frames(30))
    stream.snapshot(portable=True).save(path)
    tensors = load_file(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    header = json.loads(metadata["header"])
    changes = {"unit": 3, "frames": [1], "queue": [], "seeds": None}
    if wrong == "seeds":
        header["timeline"]["seeds"] = None
    elif wrong == "version":
        metadata["version"] = "2"
    else:
        header[wrong] = changes[wrong]
    from cfrt.snapshot import _digest

    text = json.dumps(header)
    save_file(tensors, path, {**metadata, "header": text, "sha256": _digest(text, tensors)})
    with pytest.raises(cfrt.SnapshotError, match="version 1" if wrong == "version" else "does not describe a stream"):
        cfrt.Snapshot.load(path)


def test_where_there_is_no_room_for_a_branch_the_stream_goes_on(
    open_stream: Callable[..., cfrt.Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: NativeEngine) -> NativeEngine:
        raise MemoryError("no room")

    stream = open_stream()
    list(stream.frames(6))
    monkeypatch.setattr(NativeEngine, "twin", full)
    with pytest.raises(MemoryError, match="no room"):
        stream.branch()
    np.testing.assert_array_equal(pixels(stream.frames(15)), pixels(open_stream().frames(21))[6:])


# ---------------------------------------------------------------------- pause, asyncio, live


def test_a_pause_holds_a_consumer_in_another_thread(open_stream: Callable[..., cfrt.Stream]) -> None:
    stream, seen = open_stream(fps=500.0), []
    thread = threading.Thread(target=lambda: seen.extend(stream.frames(60)))
    thread.start()
    while len(seen) < 5 and thread.is_alive():
        time.sleep(0.001)
        if stream.unit >= 2:
            break
    stream.pause()
    shown = stream.stats.frames
    time.sleep(0.05)
    assert stream.stats.frames == shown
    stream.resume()
    thread.join(60)
    assert [frame.index for frame in seen] == list(range(60))


def test_no_sequence_of_calls_is_faster_than_the_beat(open_stream: Callable[..., cfrt.Stream]) -> None:
    """Pauses, jumps and restores start the beat anew, and never sooner than one period after the last frame."""
    stream, times = open_stream(fps=100.0), []
    frames = stream.frames()
    snapshot = stream.snapshot()
    for call in (stream.pause, lambda: stream.rewind(1), lambda: stream.restore(snapshot), stream.pause) * 3:
        for _ in range(2):
            next(frames)
            times.append(time.perf_counter())
        call()
        stream.resume()
    assert min(np.diff(times)) >= 0.0049  # half a period


def test_a_live_stream_stands_still_while_paused(open_stream: Callable[..., cfrt.Stream]) -> None:
    stream = open_stream(fps=200.0, keep="latest")
    frames = stream.frames()
    next(frames)
    deadline = time.monotonic() + 60
    while stream.unit <= 5 and time.monotonic() < deadline:  # nobody watches, the show goes on
        time.sleep(0.005)
    stream.pause()
    unit, dropped = stream.unit, stream.stats.dropped
    assert unit > 5
    time.sleep(0.1)
    assert (stream.unit, stream.stats.dropped) == (unit, dropped)
    assert stream.prompt(BLUE).unit == unit + 1
    assert stream.rewind(3) == unit - 2
    last = stream.step()
    assert last == unit - 2
    shown = next(frames)
    assert shown.unit == unit - 2
    stream.resume()
    while (frame := next(frames)).prompt == RED:
        assert frame.unit <= unit
    assert frame.unit == unit + 1


def test_async_iteration(open_stream: Callable[..., cfrt.Stream]) -> None:
    """Two consumers on one loop, one of which is cancelled again and again, share the frames and lose none."""
    stream = open_stream(fps=1000.0)

    async def watch(count: int) -> list[int]:
        return [frame.index async for frame in stream.aframes(count)]

    async def impatient(count: int) -> list[int]:
        seen: list[int] = []
        while len(seen) < count:
            source = stream.aframes()
            try:
                seen.append((await asyncio.wait_for(anext(source), 0.0005)).index)
            except TimeoutError:
                pass
            finally:
                await source.aclose()  # type: ignore[attr-defined]
        return seen

    async def both() -> list[int]:
        first, second = await asyncio.gather(watch(40), impatient(20))
        return sorted(first + second)

    assert asyncio.run(both()) == list(range(60))

    async def until_closed() -> int:
        async with stream:
            asyncio.get_running_loop().call_later(0.05, stream.close)
            return len([frame async for frame in stream])

    assert asyncio.run(until_closed()) > 0
    with pytest.raises(cfrt.CfrtError, match="closed"):
        stream.aframes()


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
