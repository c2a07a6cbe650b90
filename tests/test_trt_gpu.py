"""What the trt engine asks of a GPU, on one: memory, streams and graphs through cuda-python, sums of latents by the
kernels, and, where TensorRT-RTX has engines for the GPU, a whole stream of a bundle. No H100 is among those."""

from pathlib import Path

import numpy as np
import pytest

import _cfrt
import cfrt
from cfrt.engines import gpu as module
from cfrt.engines.gpu import Gpu, Upload
from cfrt.engines.gpu_latents import GpuLatents, Noise, Pool, Sums
from cfrt.engines.trt import NO_ENGINES
from cfrt.flow import renoise
from cfrt.noise import Purpose, normal
from export.builder import TARGETS
from export.trt import main

pytestmark = pytest.mark.gpu

COUNT = 100_003


def test_sums_of_latents_in_a_graph() -> None:
    """Captured once and launched for other numbers: each launch computes what lies in the buffers then."""
    gpu = Gpu()
    stream, pool = gpu.stream(), Pool(gpu)
    sums = Sums(_cfrt.cuda, pool, stream, COUNT, lambda unit, step: _cfrt.Noise(3, unit, step, Purpose.SAMPLE))
    clean, out, upload = sums.new(), sums.new(), Upload(gpu, 4 * COUNT)
    back = gpu.pinned(4 * COUNT)
    latents = renoise(GpuLatents({clean: 1.0}), GpuLatents({Noise(5, 1): 1.0}), 0.3)
    with stream.captured() as graph:
        sums.into(out.memory.address, latents)
    noise = normal(3, 5, 1, Purpose.SAMPLE, (COUNT,))
    for seed in range(6):
        x = np.random.default_rng(seed).standard_normal(COUNT).astype(np.float32)
        upload.send(stream, clean.memory.address, x.view(np.uint8))
        stream.launch(graph)
        stream.copy(back.address, out.memory.address, 4 * COUNT)
        stream.wait()
        np.testing.assert_allclose(back.array.view(np.float32), renoise(x, noise, 0.3), rtol=1e-6, atol=1e-6)
    graph.close()


def test_the_decoders_stream_follows_the_other() -> None:
    gpu = Gpu()
    one, two = gpu.stream(), gpu.stream()
    size = 1 << 26
    source, middle, target = (gpu.memory(size) for _ in range(3))
    back = gpu.pinned(size)
    for _ in range(3):
        one.zero(source.address, size)
        for _ in range(50):
            one.copy(middle.address, source.address, size)
        two.follow(one)
        two.copy(target.address, middle.address, size)
        two.copy(back.address, target.address, size)
        two.wait()
        assert not back.array.any()


def test_a_bundle_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same frames as by ONNX Runtime on the CPU, up to bf16."""
    pytest.importorskip("tensorrt_rtx", reason="no TensorRT-RTX to build engines with")
    here = module.capability()
    monkeypatch.setenv("CFRT_CACHE", str(tmp_path / "cache"))
    target = here if here in TARGETS else TARGETS[-1]
    assert main(["--model", "tiny", "--out", str(tmp_path / "bundle"), "--target", target]) == 0
    prompt = "a large red circle moving left"
    if here not in TARGETS:
        assert here in NO_ENGINES
        with pytest.raises(cfrt.EngineError, match="TensorRT-RTX builds none"):
            cfrt.Stream(prompt, model=tmp_path / "bundle", engine="trt")
        return
    frames = []
    for engine in ("trt", "onnx"):
        with cfrt.Stream(prompt, model=tmp_path / "bundle", engine=engine, seed=7, fps="max") as stream:
            frames.append(np.stack([frame.pixels for frame in stream.frames(n=41)]).astype(int))
    assert np.abs(frames[0] - frames[1]).mean() < 2, "in levels of 255"
