"""`_cfrt.cuda`: calls whose arguments never change, as in a CUDA graph, stream right while a record does."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from cuda_fixture import Array, formula, from_bf16, normal, to_bf16
from ptxsim import EVERY_SCHEDULE, Memory, Options
from simulated_cuda import Simulated, simulated

import _cfrt
from cfrt import noise

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("nvcc")]

PAIRS, THETA, EPS = (12, 10, 10), 1e4, 1e-6
HEADS, DIM = 2, 64
WIDTH = HEADS * DIM


@dataclass
class Captured:
    """One layer that only appends and attends, as calls that a CUDA graph would have captured."""

    storage: str = "bf16"
    accumulate: str = "fp32"
    unit: int = 1
    window: int = 3
    sinks: int = 1
    grid: tuple[int, int] = (7, 10)
    splits: int = 4
    seed: int = 2**63 + 5
    sink_view: int | None = None
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        self.tokens = self.grid[0] * self.grid[1]
        self.rows, int8 = self.unit * self.tokens, self.storage == "int8"
        self.geometry = _cfrt.Geometry(unit=self.unit, window=self.window, sinks=self.sinks)
        self.memory = Memory()
        kind = np.int8 if int8 else np.uint16
        shape = (self.rows, HEADS, DIM)
        names = {"q_out": kind, "q_sink_out": kind} if self.sink_view else {"q_out": kind}
        self.made = {name: self.memory.empty(shape, kind) for name, kind in names.items()}
        self.inputs = {name: self.memory.put(np.zeros((self.rows, WIDTH), np.uint16)) for name in "qkv"}
        self.scales = {
            name: self.memory.empty((self.rows, HEADS), np.float32)
            for name in (("q_scale", "q_sink_scale") if self.sink_view else ("q_scale",)) if int8
        }  # fmt: skip
        self.out = self.memory.empty(shape, np.uint16)
        self.ones = self.memory.put(to_bf16(np.ones(WIDTH)))
        self.latents = self.memory.put(np.zeros(self.rows, np.float32))
        self.v_scale = self.memory.put(np.zeros(WIDTH, np.float32)) if int8 else None
        self.parts = self.memory.empty(self.splits * self.rows * HEADS * (DIM + 1), np.float32)
        self.rounded = self.memory.empty((self.rows, WIDTH), np.uint16)

    def start(self, cuda: Simulated) -> None:
        shape = {"frame_tokens": self.tokens, "layers": 1, "heads": HEADS, "dim": DIM}
        self.ring = _cfrt.cuda.Ring(self.geometry, **shape, int8=self.storage == "int8")
        self.store = self.memory.put(np.zeros(self.ring.bytes, np.uint8))
        self.record = self.memory.put(np.zeros(_cfrt.cuda.record_bytes, np.uint8))
        k, v, k_scale = (self.store.address + offset for offset in self.ring.layer(0))
        address = lambda buffers: {name: buffer.address for name, buffer in buffers.items()}  # noqa: E731
        more = address(self.scales)
        if self.v_scale is not None:
            more |= {"k_scale": k_scale, "v_scale": self.v_scale.address}
        common = {"storage": self.storage, "heads": HEADS, "dim": DIM, "record": self.record.address, "stream": 0}
        self.append: dict[str, Any] = common | more | address(self.inputs) | address(self.made) | {
            "stride": WIDTH, "q_weight": self.ones.address, "k_weight": self.ones.address, "k_out": k, "v_out": v,
            "scratch": self.rounded.address, "frames": self.unit, "rows": self.grid[0], "columns": self.grid[1],
            "last_sink_view": self.sink_view or 0, "pairs": PAIRS, "theta": THETA, "eps": EPS,
        }  # fmt: skip
        self.attention: dict[str, Any] = common | more | {
            "q": self.made["q_out"].address, "k": k, "v": v, "out": self.out.address, "scratch": self.parts.address,
            "q_sink": self.made["q_sink_out"].address if self.sink_view else 0, "q_stride": WIDTH,
            "out_stride": WIDTH, "queries": self.rows, "splits": self.splits, "scale": DIM**-0.5,
            "accumulate": self.accumulate,
        }  # fmt: skip

    def numbers(self, unit: int) -> list[Array]:
        return [normal(100 * unit + i, self.rows, WIDTH) for i in range(3)]

    def step(self, cuda: Simulated, unit: int, **changes: Any) -> Array:
        """One pass, committed: [F N, H, D]. `changes` replace arguments of the attention."""
        opened = self.ring.open(unit, self.seed)
        self.record.array[...] = np.frombuffer(opened.record, np.uint8)
        for name, x in zip("qkv", self.numbers(unit), strict=True):
            self.inputs[name].array[...] = to_bf16(x)
        self.opened = opened
        cuda.append(**self.append)
        cuda.attention(**self.attention | changes)
        self.ring.commit(unit)
        return from_bf16(self.out.array)

    def listed(self) -> dict[str, Any]:
        """The same arguments as a list on the host, with as many parts as there are keys for."""
        return {"record": 0, "pieces": self.opened.pieces, "sink_pieces": self.opened.sink_pieces}


def calibrated(stream: Captured, cuda: Simulated, units: int) -> None:
    """Scales of V over what `units` will write."""
    if stream.v_scale is None:
        return
    limit = 448 if stream.accumulate == "fp32" else _cfrt.cuda.fp16_limit
    for unit in range(units):
        v = stream.memory.put(to_bf16(stream.numbers(unit)[2]))
        cuda.value_scales(scale=stream.v_scale.address, v=v.address, rows=stream.rows, width=WIDTH, stride=WIDTH,
                          limit=limit, stream=0)  # fmt: skip


STREAMS = {
    "bf16, F = 1": Captured(),
    "bf16, F = 3, view of sinks": Captured(unit=3, window=6, sinks=2, grid=(3, 11), sink_view=4),
    "int8": Captured("int8", sink_view=2),
    "int8, fp16 sums": Captured("int8", "fp16", unit=2, window=4, sinks=0, grid=(5, 9)),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_of_captured_calls_is_the_formula(name: str) -> None:
    """Seven units: while the window fills some parts are empty, then it wraps; nothing but the record changes."""
    stream, units = Captured(**{k: v for k, v in vars(STREAMS[name]).items() if k in Captured.__annotations__}), 7
    written: dict[int, tuple[Array, Array]] = {}
    with simulated(stream.memory, stream.options) as cuda:
        stream.start(cuda)
        calibrated(stream, cuda, units)
        for unit in range(units):
            out = stream.step(cuda, unit)
            exact_k = rotated(stream, stream.numbers(unit)[1], unit)
            v = stream.numbers(unit)[2].reshape(-1, HEADS, DIM)
            for i in range(stream.unit):
                own = slice(i * stream.tokens, (i + 1) * stream.tokens)
                written[unit * stream.unit + i] = exact_k[own], v[own]
            frames = [f for span in stream.geometry.visible_frames(unit) for f in range(*span)]
            k, v = (np.concatenate([written[f][side] for f in frames]) for side in (0, 1))
            q = rotated(stream, stream.numbers(unit)[0], unit)
            q_sink = rotated(stream, stream.numbers(unit)[0], unit, stream.sink_view)
            sinks = sum(f < stream.sinks for f in frames) * stream.tokens
            exact = formula(q, k, v, q_sink, sinks)
            error = np.linalg.norm(out - exact) / np.linalg.norm(exact)
            assert error <= (0.006 if stream.storage == "bf16" else 0.06), (unit, error)
    assert cuda.report.clean


def rotated(stream: Captured, x: Array, unit: int, view: int | None = None) -> Array:
    """RMS norm and rotation in fp64: [F N, H, D]. view: the latest position that frames may have."""
    x = x.astype(np.float64)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS)
    frame, token = np.divmod(np.arange(stream.rows), stream.tokens)
    frame = frame + unit * stream.unit
    if view is not None:
        frame = np.minimum(frame, view)
    axes = zip(PAIRS, (frame, *np.divmod(token, stream.grid[1])), strict=True)
    turn = np.exp(1j * np.concatenate([at[:, None] * THETA ** (-np.arange(n) / n) for n, at in axes], axis=1))
    pairs = x.reshape(len(x), HEADS, -1, 2)
    z = (pairs[..., 0] + 1j * pairs[..., 1]) * turn[:, None]
    return np.stack([z.real, z.imag], axis=-1).reshape(len(x), HEADS, DIM)


@pytest.mark.parametrize("storage", ["bf16", "int8"])
@pytest.mark.parametrize("options", EVERY_SCHEDULE, ids=lambda o: f"{o.schedule}-{o.copies}")
def test_a_record_is_the_list_of_the_host(storage: str, options: Options) -> None:
    """Bit for bit with one part, where both sum in the same order."""
    stream = Captured(storage, splits=1, sink_view=2, options=options)
    with simulated(stream.memory, options) as cuda:
        stream.start(cuda)
        calibrated(stream, cuda, 3)
        for unit in range(3):
            out = stream.step(cuda, unit).copy()
            cuda.attention(**stream.attention | stream.listed())
            assert (from_bf16(stream.out.array) == out).all()


def test_noise_follows_the_record() -> None:
    memory, count = Memory(), 1021
    with simulated(memory) as cuda:
        ring = _cfrt.cuda.Ring(_cfrt.Geometry(unit=1, window=3), frame_tokens=5, layers=1, heads=1, dim=64)
        record = memory.put(np.frombuffer(ring.open(0, 7).record, np.uint8))
        x0, out = memory.put(np.zeros(count, np.float32)), memory.empty(count, np.float32)
        call = (out.address, x0.address, count, "float32", 1.0, _cfrt.Noise(0, 0, 2, 0), record.address)
        for unit, seed in ((0, 7), (1, 2**63 + 5)):
            ring.commit(unit - 1) if unit else None
            record.array[...] = np.frombuffer(ring.open(unit, seed).record, np.uint8)
            cuda.renoise(*call)
            np.testing.assert_allclose(out.array, noise.normal(seed, unit, 2, 0, (count,)), rtol=3e-7, atol=1e-6)


def test_rows_are_quantised() -> None:
    memory, rows, width = Memory(), 3, 64
    x = normal(0, rows, width)
    source = memory.put(to_bf16(x))
    out, scale = memory.empty((rows, width), np.int8), memory.empty(rows, np.float32)
    with simulated(memory) as cuda:
        cuda.quantise_rows(out=out.address, scale=scale.address, x=source.address, rows=rows, width=width,
                           stride=width, stream=0)  # fmt: skip
    np.testing.assert_allclose(scale.array[:, None] * out.array, x, atol=0.51 * scale.array.max())


def test_pixels_are_those_of_their_cpu_twin() -> None:
    memory = Memory()
    x = normal(3, 2, 3, 1156).astype(np.float32)
    source, out = memory.put(x), memory.empty((2, 1156, 3), np.uint8)
    with simulated(memory) as cuda:
        cuda.pixels(out=out.address, x=source.address, dtype="float32", frames=2, plane=1156, gain=0.5, offset=0.5,
                    stream=0)  # fmt: skip
    positions = np.ascontiguousarray(x.reshape(6, 1, 1156).transpose(1, 2, 0))
    twin = _cfrt.kernels.pixels(positions, frames=2, fold=1, gain=0.5, offset=0.5)
    assert (out.array == twin.reshape(2, 1156, 3)).all()


@pytest.mark.parametrize(
    ("which", "changes", "words"),
    [
        ("attention", {"dim": 96}, "heads of 64 or 128 numbers, got 96"),
        ("attention", {"storage": "fp8"}, "storage bf16 or int8, got fp8"),
        ("attention", {"q": 0}, "the address of q, got 0"),
        ("attention", {"v": 0x1008}, "v at a multiple of 16 bytes, got 0x1008"),
        ("attention", {"scratch": 0}, "the address of scratch, got 0"),
        ("attention", {"record": 0, "pieces": []}, "1 to 128 pieces of keys, got 0"),
        ("attention", {"accumulate": "fp16"}, "fp32 with bf16 storage"),
        ("attention", {"storage": "int8"}, "the address of q_scale, got 0"),
        ("append", {"pairs": (1, 2, 3)}, "three numbers of pairs, 32 together"),
        ("append", {"record": 0, "place": [1, 2]}, "a place for each of 1 frames, got 2"),
        ("append", {"frames": 33}, "1 to 32 frames, got 33"),
        ("append", {"storage": "int8"}, "the address of q_scale, got 0"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused_in_words(which: str, changes: dict[str, Any], words: str) -> None:
    stream = Captured()
    with simulated(stream.memory) as cuda:
        stream.start(cuda)
        with pytest.raises(ValueError, match=words):
            getattr(cuda, which)(**getattr(stream, which) | changes)


def test_a_device_without_e4m3_is_refused_in_words() -> None:
    stream = Captured("int8")
    with simulated(stream.memory, major=8, minor=6) as cuda:
        stream.start(cuda)
        stream.record.array[...] = np.frombuffer(stream.ring.open(0).record, np.uint8)
        with pytest.raises(RuntimeError, match="CUDA refused the attention"):
            cuda.attention(**stream.attention)
        assert "compute capability 8.6" in str(cuda.refusal(0, "int8"))


def test_without_a_driver_cuda_says_so() -> None:
    """The installed module: no fake here."""
    if torch.cuda.is_available():
        pytest.skip("here is a GPU")
    call = {"out": 0, "x": 0, "dtype": "float32", "frames": 1, "plane": 4, "gain": 1.0, "offset": 0.0, "stream": 0}
    with pytest.raises(RuntimeError, match=r"CUDA refused to write pixels|built without CUDA"):
        _cfrt.cuda.pixels(**call)
    if _cfrt.build_info()["cuda"] is not None:
        with pytest.raises(ValueError, match="float32, float16 or bfloat16, got int8"):
            _cfrt.cuda.pixels(**call | {"dtype": "int8"})
