"""`_cfrt.cuda`: calls whose arguments never change, as in a CUDA graph, stream right while a record does."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from ptxsim import EVERY_SCHEDULE, Memory, Options
from simulated_cuda import SimulatedMemory, simulated

import _cfrt
from benchmarks.gpu_checks import check_stream
from benchmarks.ring_stream import RingStream
from cfrt import noise

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("nvcc")]

STREAMS = {
    "bf16, F = 1": RingStream(),
    "bf16, F = 3, view of sinks": RingStream(unit=3, window=6, sinks=2, grid=(3, 11), sink_view=4),
    "int8": RingStream("int8", sink_view=2),
    "int8, fp16 sums": RingStream("int8", "fp16", unit=2, window=4, sinks=0, grid=(5, 9)),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_of_captured_calls_is_the_formula(name: str) -> None:
    """Seven units: while the window fills some parts are empty, then it wraps; nothing but the record changes."""
    memory = SimulatedMemory()
    with simulated(memory.memory) as cuda:
        check = check_stream(cuda, memory, STREAMS[name])
    assert check.passed, check
    assert cuda.report.clean


@pytest.mark.parametrize("storage", ["bf16", "int8"])
@pytest.mark.parametrize("options", EVERY_SCHEDULE, ids=lambda o: f"{o.schedule}-{o.copies}")
def test_a_record_is_the_list_of_the_host(storage: str, options: Options) -> None:
    """Bit for bit with one part, where both sum in the same order."""
    memory, stream = SimulatedMemory(), RingStream(storage, splits=1, sink_view=2)
    with simulated(memory.memory, options) as cuda:
        stream.start(memory)
        stream.calibrate(cuda, 3)
        for unit in range(3):
            out = stream.step(cuda, unit)
            listed = {"pieces": stream.opened.pieces, "sink_pieces": stream.opened.sink_pieces}
            cuda.attention(**stream.attention | {"record": 0} | listed)
            assert (stream.answer() == out).all()


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
    memory, stream = SimulatedMemory(), RingStream()
    with simulated(memory.memory) as cuda:
        stream.start(memory)
        with pytest.raises(ValueError, match=words):
            getattr(cuda, which)(**getattr(stream, which) | changes)


def test_a_device_without_e4m3_is_refused_in_words() -> None:
    memory, stream = SimulatedMemory(), RingStream("int8")
    with simulated(memory.memory, major=8, minor=6) as cuda:
        stream.start(memory)
        stream.record.set(np.frombuffer(stream.ring.open(0).record, np.uint8))
        with pytest.raises(RuntimeError, match="CUDA refused the attention"):
            cuda.attention(**stream.attention)
        assert "compute capability 8.6" in str(cuda.refusal(0, "int8"))


WRITE_PIXELS = """
import sys, _cfrt
try:
    _cfrt.cuda.pixels(out=0, x=0, dtype=sys.argv[1], frames=1, plane=4, gain=1.0, offset=0.0, stream=0)
except (RuntimeError, ValueError) as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("dtype", "words"),
    [("float32", "CUDA refused to write pixels"), ("int8", "float32, float16 or bfloat16, got int8")],
)
def test_without_a_gpu_cuda_says_so(dtype: str, words: str) -> None:
    """The installed module, no fake, in a process that sees no GPU."""
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", WRITE_PIXELS, dtype]
    said = subprocess.run(command, env=hidden, capture_output=True, text=True).stdout
    assert ("built without CUDA" if _cfrt.build_info()["cuda"] is None else words) in said
