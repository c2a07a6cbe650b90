"""The stream: theorems 3, 5 and 7 of a whole stream, and the manners of its thread."""

import gc
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from sampling_fixture import EULER, sample, sampled
from stream_fixture import pixels, wait_until
from student_fixture import BLUE, RED, random_weights, save_student, small_config

import cfrt
from cfrt import flow, noise
from cfrt.engines.native import NativeEngine
from cfrt.nn.autoencoder import Autoencoder
from cfrt.nn.dit import CausalDiT
from cfrt.text import encoder
from cfrt.weights import part

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture
def open_stream(student: Path) -> Iterator[Callable[..., cfrt.Stream]]:
    """Streams at full speed that are closed when the test ends."""
    streams = []

    def make(prompt: str = RED, **changes: Any) -> cfrt.Stream:
        streams.append(cfrt.Stream(prompt, **{"model": student, "fps": "max", "seed": 7, **changes}))
        return streams[-1]

    yield make
    for stream in streams:
        stream.close()


def workers() -> int:
    return sum(thread.name == "cfrt-stream" for thread in threading.enumerate())


# ---------------------------------------------------------------------- theorem 3: streaming == offline


GEOMETRIES = [
    {"unit": 1, "window": 4},
    {"unit": 3, "window": 6},
    {"unit": 3, "window": 7, "sinks": 2},
    {"unit": 1, "window": 9, "sinks": 1},
    {"unit": 1, "window": 4, **EULER},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("fps", ["max", 10_000.0])
def test_streaming_equals_offline(geometry: dict[str, Any], fps: str | float, tmp_path: Path) -> None:
    """Offline has no ring, no commit, no thread and no decoder state: every pass looks at the whole clean past under a
    mask, and the whole latent is decoded at once. The prompt changes at unit 4."""
    config = small_config(**geometry)
    units, change = 7, 4
    expected = offline(config, random_weights(config), seed=7, texts=[RED] * change + [BLUE] * (units - change))
    count = config.first_frame(units)
    with cfrt.Stream(RED, model=save_student(tmp_path, config), seed=7, fps=fps, precision="fp64") as stream:
        frames = list(stream.frames(config.first_frame(change)))
        assert stream.prompt(BLUE).unit == change
        frames += stream.frames(count - len(frames))
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in frames]), expected)
    assert [frame.index for frame in frames] == list(range(count))
    assert [frame.time for frame in frames] == [index / 16 for index in range(count)]
    assert [config.unit_at(index) for index in range(-1, count)] == [-1, *(frame.unit for frame in frames)]
    assert [frame.unit for frame in frames] == [u for u in range(units) for _ in range(config.unit_frames(u))]
    assert [frame.prompt for frame in frames] == [RED if frame.unit < change else BLUE for frame in frames]


@torch.no_grad()
def offline(config: Any, weights: dict[str, np.ndarray], seed: int, texts: list[str]) -> np.ndarray:
    weights = {name: array.astype(np.float16).astype(np.float64) for name, array in weights.items()}  # as stored
    dit = CausalDiT.from_arrays(config, part(weights, "dit")).double()
    autoencoder = Autoencoder(config.autoencoder).double()
    autoencoder.load_state_dict({name: torch.tensor(array) for name, array in part(weights, "autoencoder").items()})
    text = encoder(config, weights)
    known = sorted(set(texts))
    text_kv = dit.text_kv(torch.tensor(np.stack([text.encode(t).rows for t in known]), dtype=torch.float64)[None])
    captions = torch.tensor([[known.index(t) for t in texts for _ in range(config.unit)]])
    shape = (1, config.unit, config.latent_channels, *config.latent_grid)
    drawn = lambda *key: torch.tensor(noise.normal(seed, *key, noise.Purpose.SAMPLE, shape)).double()  # noqa: E731
    clean = torch.zeros(1, 0, *shape[2:], dtype=torch.float64)
    for unit in range(len(texts)):
        end, past = (unit + 1) * config.unit, clean
        mask = torch.from_numpy(config.geometry.causal_mask(end))

        def denoise(x: torch.Tensor, s: float, end: int = end, past: Any = past, mask: Any = mask) -> torch.Tensor:
            t = torch.cat([torch.zeros(1, end - config.unit), torch.full((1, config.unit), 1000 * s)], 1).double()
            v = dit(torch.cat([past, x], 1), t, text_kv, captions[:, :end], mask=mask)
            return flow.x0_from_v(x, v[:, -config.unit :], s)

        clean = torch.cat([clean, sample(config, unit, drawn, denoise, unit)], 1)
    video, _ = autoencoder.decode(clean)
    return (video[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


# ---------------------------------------------------------------------- same seed, same bytes


def test_same_seed_same_bytes_whatever_the_pace(open_stream: Callable[..., cfrt.Stream]) -> None:
    first = pixels(open_stream().frames(30))
    np.testing.assert_array_equal(first, pixels(open_stream().frames(30)))
    np.testing.assert_array_equal(first, pixels(open_stream(fps=500.0).frames(30)))
    assert (first != pixels(open_stream(seed=8).frames(30))).any()


def test_frames_goes_on_where_it_stopped(open_stream: Callable[..., cfrt.Stream]) -> None:
    whole = list(open_stream().frames(21))
    stream = open_stream()
    parts = [frame for count in (1, 0, 7, 13) for frame in stream.frames(count)]
    assert [frame.index for frame in parts] == list(range(21))
    np.testing.assert_array_equal(pixels(iter(parts)), pixels(iter(whole)))


@pytest.mark.parametrize(
    ("asked", "count"), [({"n": 5}, 5), ({"seconds": 1.0}, 16), ({"seconds": 0.1}, 2), ({"n": 0}, 0)], ids=str
)
def test_exact_counts(asked: dict[str, Any], count: int, open_stream: Callable[..., cfrt.Stream]) -> None:
    assert len(list(open_stream().frames(**asked))) == count


@pytest.mark.parametrize(
    "asked", [{"n": 1, "seconds": 1.0}, {"n": -1}, {"seconds": -1.0}, {"seconds": np.nan}, {"seconds": np.inf}], ids=str
)
def test_counts_that_make_no_sense(asked: dict[str, Any], open_stream: Callable[..., cfrt.Stream]) -> None:
    with pytest.raises(ValueError, match="expected"):
        open_stream().frames(**asked)


def test_a_frame_describes_itself(open_stream: Callable[..., cfrt.Stream]) -> None:
    frame = next(open_stream().frames())
    assert (frame.pixels.shape, frame.pixels.dtype) == ((32, 32, 3), np.uint8)
    assert repr(frame).startswith("Frame(pixels=(32, 32, 3) uint8, index=0, time=0.0000, unit=0, latency=0.")
    assert np.asarray(frame) is not None
    assert (np.asarray(frame) == frame.pixels).all()
    assert frame._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(AttributeError):
        frame.index = 3  # type: ignore[misc]


# ---------------------------------------------------------------------- image


def test_a_stream_can_start_from_a_picture(open_stream: Callable[..., cfrt.Stream]) -> None:
    """The picture is unit 0: frame 0 is its reconstruction, it is committed, unit 1 takes the first unit's steps."""
    config, engine = small_config(), NativeEngine()
    weights = {name: array.astype(np.float16).astype(np.float32) for name, array in random_weights(config).items()}
    engine.prepare(cfrt.engines.Spec(config=config, weights=weights, seed=7))
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    engine.set_text(encoder(config, weights).encode(RED).rows)
    clean = engine.encode(image)
    expected = [engine.decode(clean)]
    engine.commit(clean, 0)
    expected.append(engine.decode(sampled(engine, config, 1, number=0)))
    stream = open_stream(image=image)
    np.testing.assert_array_equal(pixels(stream.frames(5)), np.concatenate(expected))
    assert [frame.index for frame in stream.frames(2)] == [5, 6]


def test_a_picture_that_does_not_fit(open_stream: Callable[..., cfrt.Stream], tmp_path: Path) -> None:
    for wrong in (np.zeros((16, 32, 3), np.uint8), np.zeros((32, 32, 3)), [[1, 2]]):
        with pytest.raises(cfrt.VideoError, match=r"expected a picture \(32, 32, 3\) uint8"):
            open_stream(image=wrong)
    chunkwise = save_student(tmp_path, small_config(unit=3, window=6))
    with pytest.raises(cfrt.EngineError, match="frame-wise"):
        open_stream(model=chunkwise, image=np.zeros((32, 32, 3), np.uint8))


# ---------------------------------------------------------------------- theorem 7: flat


def test_memory_and_time_per_unit_are_flat(open_stream: Callable[..., cfrt.Stream]) -> None:
    """Short form: 300 units. Time is the processor's own and compared with itself: a busy machine is no news."""
    stream = open_stream(journal_bytes=10_000)  # is full before anything is measured
    frames = stream.frames()
    spans: list[float] = []

    def advance(units: int) -> None:
        for _ in range(units):
            begin = time.process_time()
            for _ in range(4):
                next(frames)
            spans.append(time.process_time() - begin)

    advance(60)
    tracemalloc.start()
    try:
        advance(40)
        gc.collect()
        early = tracemalloc.get_traced_memory()[0]
        advance(100)
        gc.collect()
        late = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert late - early < 100_000, f"{late - early} bytes more after 100 units"
    advance(100)
    assert median(spans[-60:]) < 2 * median(spans[:60]), "units take longer and longer"


# ---------------------------------------------------------------------- manners of the thread


def test_at_most_one_unit_ahead(open_stream: Callable[..., cfrt.Stream]) -> None:
    stream = open_stream()
    wait_until(lambda: stream.stats.units == 1)
    time.sleep(0.05)
    assert stream.stats.units == 1
    list(stream.frames(1))
    wait_until(lambda: stream.stats.units == 2)
    list(stream.frames(1))  # one frame of unit 1
    wait_until(lambda: stream.stats.units == 3)
    list(stream.frames(3))  # the rest of it
    time.sleep(0.05)
    assert stream.stats.units == 3


def test_frames_leave_before_the_commit(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    commit = NativeEngine.commit

    def slow(self: NativeEngine, latents: Any, unit: int) -> None:
        assert gate.wait(10)
        commit(self, latents, unit)

    monkeypatch.setattr(NativeEngine, "commit", slow)
    with cfrt.Stream(RED, model=student, fps=1000.0) as stream:
        assert next(stream.frames()).index == 0
        gate.set()


def test_dropping_a_stream_ends_its_thread(student: Path) -> None:
    before = workers()
    for _ in range(3):
        for _frame in cfrt.Stream(RED, model=student, fps="max").frames():
            break
    abandoned = cfrt.Stream(RED, model=student, fps="max")
    generator = abandoned.frames()
    next(generator)
    reference = weakref.ref(abandoned)
    del abandoned, generator, _frame
    gc.collect()
    assert reference() is None
    assert workers() == before


def test_a_with_block_closes(student: Path) -> None:
    before = workers()
    with cfrt.Stream(RED, model=student, fps="max") as stream:
        frames = stream.frames()
        next(frames)
        assert workers() == before + 1
    assert workers() == before
    assert list(frames) == []
    stream.close()
    for use in (stream.frames, stream.snapshot, lambda: stream.prompt(BLUE)):
        with pytest.raises(cfrt.CfrtError, match="closed"):
            use()
    assert "closed" in repr(stream)


def test_closing_wakes_a_waiting_consumer(student: Path) -> None:
    stream = cfrt.Stream(RED, model=student, fps=0.01)
    list(stream.frames(1))
    threading.Timer(0.1, stream.close).start()
    begin = time.perf_counter()
    assert list(stream.frames(1)) == []  # due in 100 s
    assert time.perf_counter() - begin < 10


@pytest.mark.parametrize("pace", ["max", 1000.0])
def test_what_goes_wrong_in_the_thread_reaches_the_consumer(
    pace: str | float, open_stream: Callable[..., cfrt.Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = NativeEngine.decode

    def broken(self: NativeEngine, latents: Any) -> np.ndarray:
        if self._decoded == 3:
            raise MemoryError("no room for unit 3")
        return decode(self, latents)

    monkeypatch.setattr(NativeEngine, "decode", broken)
    stream = open_stream(fps=pace)
    frames = stream.frames()
    assert [next(frames).index for _ in range(9)] == list(range(9))  # what was right is delivered
    with pytest.raises(MemoryError, match="unit 3"):
        next(frames)
    for use in (lambda: next(stream.frames()), stream.snapshot, lambda: stream.prompt(BLUE)):
        with pytest.raises(MemoryError, match="unit 3"):
            use()


def test_errors_of_construction_leave_no_thread(student: Path, tmp_path: Path) -> None:
    before = workers()
    for prompt, changes, error in (
        ("", {}, cfrt.PromptError),
        (RED, {"model": tmp_path}, cfrt.WeightsError),
        (RED, {"engine": "warp"}, cfrt.EngineError),
        (RED, {"seed": -1}, cfrt.EngineError),
        (RED, {"fps": 0}, ValueError),
        (RED, {"fps": "fast"}, ValueError),
        (RED, {"keep": "some"}, ValueError),
        (RED, {"keep": "latest", "fps": "max"}, ValueError),
    ):
        with pytest.raises(error):
            cfrt.Stream(prompt, **{"model": student, **changes})
    assert workers() == before


def test_statistics(open_stream: Callable[..., cfrt.Stream]) -> None:
    stream = open_stream(fps=2000.0)
    assert stream.stats.unit_duration == 0.25
    list(stream.frames(21))
    stats = stream.stats
    assert stats.frames == 21
    assert stats.dropped == 0
    assert stats.time_to_first_frame is not None
    assert 0 < stats.latency.p50 <= stats.latency.p95 <= stats.latency.p99
    assert stats.latency.p50 < stats.unit.p99
    assert stats.decode.count >= 6
    assert stats.commit.count >= 5
    assert stats.ring == (3, 3)
    assert "p50=" in repr(stats.latency)
