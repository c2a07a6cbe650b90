"""When frames are handed out: the beat, pauses, consumers that are slow or in asyncio."""

import asyncio
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from student_fixture import BLUE, RED

import cfrt
from cfrt.clock import Clock

pytestmark = pytest.mark.cpu

TEXTS = (RED, BLUE, "a square at night", "a crimson circle moving left over the night sky")


def test_the_beat() -> None:
    clock = Clock(10.0)
    assert clock.delay(0, 5.0) == 0
    clock.tick(0, 5.0)
    assert clock.delay(1, 5.0) == pytest.approx(0.1)
    clock.tick(1, 5.14)  # jitter: the beat stays
    assert clock.delay(2, 5.14) == pytest.approx(0.06)
    clock.tick(2, 8.0)  # a stall: the beat moves, nothing is made up for
    assert clock.delay(3, 8.0) == pytest.approx(0.1)
    assert (clock.stalls, clock.moved) == (1, pytest.approx(2.8))
    clock.tick(3, 8.14)  # two frames, each a little later than the one before: together they are a stall
    clock.tick(4, 8.28)
    assert (clock.stalls, clock.moved) == (2, pytest.approx(2.88))
    clock.reset()
    assert clock.delay(3, 9.0) == 0


def test_a_live_beat_waits_for_no_consumer() -> None:
    clock = Clock(10.0, live=True)
    assert clock.newest(1.0) == -1
    clock.tick(0, 5.0)
    assert clock.newest(5.95) == 9
    clock.tick(9, 5.99)  # fetched late, but it is the newest: the beat stays
    assert clock.newest(6.05) == 10
    clock.tick(10, 6.3)  # the newest itself came late: the beat moves
    assert clock.newest(6.35) == 10


def test_frames_are_paced(open_stream: Callable[..., cfrt.Stream]) -> None:
    """Never early: a lower bound, which no slow machine can break."""
    begin = time.perf_counter()
    list(open_stream(fps=100.0).frames(21))
    assert time.perf_counter() - begin >= 0.19


def test_a_stall_of_the_consumer_is_not_made_up_for(open_stream: Callable[..., cfrt.Stream]) -> None:
    stream = open_stream(fps=50.0)
    list(stream.frames(3))
    time.sleep(0.3)
    times = []
    for _ in stream.frames(4):
        times.append(time.perf_counter())
    assert min(np.diff(times)) >= 0.009  # half a period, and a little for the clock


def test_latest_skips_what_a_slow_consumer_missed(open_stream: Callable[..., cfrt.Stream]) -> None:
    stream = open_stream(fps=100.0, keep="latest")
    frames = stream.frames()
    seen = [next(frames)]
    for _ in range(5):
        time.sleep(0.1)
        seen.append(next(frames))
    gaps = np.diff([frame.index for frame in seen])
    assert max(gaps) > 2
    assert stream.stats.dropped == seen[-1].index + 1 - len(seen)
    assert stream.stats.frames == len(seen)
    assert stream.prompt(BLUE).unit > seen[-1].unit
    while (frame := next(frames)).prompt == RED:
        assert frame.unit < seen[-1].unit + 50
    assert frame.prompt == BLUE


def test_two_consumers_share_one_stream(open_stream: Callable[..., cfrt.Stream]) -> None:
    stream = open_stream()
    seen: list[int] = []
    threads = [
        threading.Thread(target=lambda: seen.extend(frame.index for frame in stream.frames(20))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == list(range(40))


def test_prompts_from_another_thread(open_stream: Callable[..., cfrt.Stream]) -> None:
    """However fast they come, frames keep coming, none lost or doubled, and every unit is made from one text."""
    stream = open_stream()
    stop = threading.Event()

    def fidget() -> None:
        texts = [RED, BLUE]
        while not stop.is_set():
            stream.prompt(texts[0], recache=len(texts[0]) % 2 == 0)
            texts.reverse()

    thread = threading.Thread(target=fidget)
    thread.start()
    frames = list(stream.frames(41))
    stop.set()
    thread.join()
    assert [frame.index for frame in frames] == list(range(41))
    by_unit: dict[int, set[str]] = {}
    for frame in frames:
        by_unit.setdefault(frame.unit, set()).add(frame.prompt)
    assert all(len(texts) == 1 for texts in by_unit.values())


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
