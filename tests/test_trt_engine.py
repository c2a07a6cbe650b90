"""The engine for RTX GPUs without one: its whole chain on a GPU that is a fake and computes for real (fake_gpu.py)."""

from pathlib import Path

import numpy as np
import pytest
from fake_gpu import FakeGpu, Policy
from safetensors.numpy import save_file
from student_fixture import random_weights, small_config

from cfrt.bundle import TENSORS, Bundle, Manifest, Plan, Verification, entries
from cfrt.config import ModelConfig
from cfrt.engines import Engine, Spec
from cfrt.engines.torch import TorchEngine
from cfrt.engines.trt import TrtEngine
from cfrt.flow import TIME_SCALE, renoise, sigmas
from export import pixels, transformer
from export.segments import layout

pytestmark = pytest.mark.cpu

BUILDER = "tensorrt_rtx 1.7.1.116"


def model(**changes: object) -> ModelConfig:
    """Two layers of two heads of 64, 4 tokens a frame, with sinks, and a ring that goes round within a few units."""
    config = small_config(width=128, ffn=96, latent_grid=(4, 4), window=3, sinks=1, trained_frames=4, first_steps=None)
    from dataclasses import replace

    return replace(config, **changes)


def make_bundle(folder: Path, config: ModelConfig, weights: dict[str, np.ndarray], precision: str = "bf16") -> Bundle:
    """A bundle whose engines are no engines, but have names of their own."""
    segments = layout(config, precision, config.autoencoder.kind)
    dit = {k.removeprefix("dit."): v for k, v in weights.items() if k.startswith("dit.")}
    ae = {k.removeprefix("autoencoder."): v for k, v in weights.items() if k.startswith("autoencoder.")}
    plans = []
    for segment in segments:
        path = folder / segment.onnx
        path.parent.mkdir(parents=True, exist_ok=True)
        if segment.kind.startswith(("decoder", "encoder")):
            graph = pixels.build(segment, config, ae, config.autoencoder.kind)
        else:
            graph = transformer.build(segment, config, dit, precision)
        path.write_bytes(graph.SerializeToString())
        file = f"engines/{segment.name}.sm89.engine"
        (folder / "engines").mkdir(exist_ok=True)
        (folder / file).write_bytes(b"vtrt" + segment.name.encode())
        plans.append(Plan(segment=segment.name, target="sm89", builder=BUILDER, file=file))
    norms = {
        f"norm_{n}": np.stack([dit[f"blocks.{i}.self_attn.norm_{n}.weight"] for i in range(config.depth)]) for n in "qk"
    }
    save_file({**norms, "text.table": weights["text.table"]}, folder / TENSORS)
    names = [*(s.onnx for s in segments), *(p.file for p in plans), TENSORS]
    manifest = Manifest(
        config=config,
        precision=precision,
        decoder=config.autoencoder.kind,
        segments=segments,
        files=entries(folder, names),
        tools={},
        verification=Verification(level="segments", units=0, errors={}, limits={}, seconds=0.0),
        plans=tuple(plans),
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return Bundle.open(folder)


def spec_of(bundle: Bundle, **changes) -> Spec:
    from safetensors.numpy import load_file

    return Spec(
        config=bundle.manifest.config,
        weights=load_file(bundle.folder / TENSORS),
        device="cuda",
        seed=3,
        bundle=bundle,
        **changes,
    )


def stream(engine: Engine, config: ModelConfig, rows: np.ndarray, units: int) -> list[np.ndarray]:
    """What the worker does for each unit, commits apart."""
    engine.set_text(rows)
    frames = []
    for unit in range(units):
        x = engine.noise(unit, 0)
        for step, s in enumerate(sigmas(config.unit_steps(unit), config.shift)):
            if step:
                x = renoise(x, engine.noise(unit, step), s)
            x = engine.denoise(x, TIME_SCALE * s, unit)
        frames.append(engine.decode(x))
        engine.commit(x, unit)
    return frames


@pytest.mark.parametrize("policy", ["lazy", "eager"])
def test_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
    import time

    config = model()
    weights = random_weights(config)
    t = time.time()
    bundle = make_bundle(tmp_path, config, weights)
    print("bundle", time.time() - t)
    rows = np.random.default_rng(0).normal(size=(config.text.length, config.text.width)).astype(np.float32)
    spec = spec_of(bundle)
    t = time.time()
    with FakeGpu(bundle, policy=policy).installed(monkeypatch) as gpu:
        engine = TrtEngine()
        assert engine.supported(spec) is None
        engine.prepare(spec)
        got = stream(engine, config, rows, 6)
        print("stream", time.time() - t, gpu.done)
        engine.close()
        assert not gpu.blocks
    refs = {}
    for precision in ("fp32", "bf16"):
        torch_engine = TorchEngine()
        torch_engine.prepare(Spec(config=config, weights=weights, seed=3, precision=precision))
        refs[precision] = stream(torch_engine, config, rows, 6)
    for u in range(6):
        err = np.abs(got[u].astype(float) - refs["fp32"][u]).mean()
        own = np.abs(refs["bf16"][u].astype(float) - refs["fp32"][u]).mean()
        print(u, err, own, refs["fp32"][u].std())
