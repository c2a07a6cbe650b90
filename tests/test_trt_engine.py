"""The engine for RTX GPUs without one: the whole chain on a GPU that is a fake and computes for real (fake_gpu.py)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_fixture import source_of
from fake_gpu import FakeGpu, Policy
from sampling_fixture import sampled
from student_fixture import BLUE, RED, random_weights
from trt_fixture import BUILDER, gpu_config, make_bundle, rows_of, spec_of

import cfrt
from cfrt.bench import Bench
from cfrt.bundle import Bundle, Plan
from cfrt.config import ModelConfig
from cfrt.engines import Engine, Spec, choose, refusal, trt
from cfrt.engines.gpu import Gpu, Upload, as_bytes
from cfrt.engines.granules import Int8, as_held
from cfrt.engines.onnx import OnnxEngine
from cfrt.engines.torch import TorchEngine
from cfrt.engines.trt import TrtEngine
from cfrt.errors import BundleError, EngineError
from cfrt.flow import TIME_SCALE, euler, renoise, v_from_x0
from cfrt.noise import Purpose, normal
from cfrt.serve.command import Serve
from export.calibrate import Calibration
from export.quantize import value_scales

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("executor")]

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The least that still has every kind of call, since kernels run a hundred thousand times slower than on a GPU."""
    return make_bundle(tmp_path_factory.mktemp("bundle"), gpu_config(depth=1, steps=(1.0,), window=2))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: Patch) -> Path:
    monkeypatch.setenv("CFRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@contextmanager
def prepared(gpu: FakeGpu, patch: Patch, **changes: object) -> Iterator[TrtEngine]:
    """An engine on a fake GPU, and nothing left on it afterwards."""
    assert gpu.bundle is not None
    with gpu.installed(patch):
        engine = TrtEngine()
        engine.prepare(spec_of(gpu.bundle, **changes))
        yield engine
        engine.close()
        assert not gpu.blocks, "device memory is left"
        assert not gpu.pinned, "pinned memory is left"
        assert not gpu.queues, "streams are left"
        assert not gpu.marks, "events are left"
        assert not gpu.graphs, "graphs are left"


def unit_of(engine: Engine, config: ModelConfig, unit: int) -> np.ndarray:
    """What the worker does for a unit, the commit apart."""
    x = sampled(engine, config, unit)
    frames = engine.decode(x)
    engine.commit(x, unit)
    return frames


def stream(engine: Engine, config: ModelConfig, units: int) -> np.ndarray:
    engine.set_text(rows_of(config))
    return np.concatenate([unit_of(engine, config, unit) for unit in range(units)]).astype(float)


def by_torch(config: ModelConfig, precision: str, units: int) -> np.ndarray:
    engine = TorchEngine()
    engine.prepare(Spec(config=config, weights=random_weights(config), seed=3, precision=precision))
    return stream(engine, config, units)


# ---------------------------------------------------------------------- the chain

GEOMETRIES: dict[str, tuple[dict[str, object], str, Policy]] = {
    "sinks from no further than trained": ({"window": 2, "trained_frames": 3}, "bf16", "lazy"),
    "chunks": ({"unit": 2, "window": 4, "sinks": 2, "sink_position": "absolute", "solver": "euler"}, "bf16", "lazy"),
    "no sinks, three layers": ({"window": 2, "sinks": 0, "depth": 3, "steps": (1.0,)}, "fp16", "eager"),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_chain_gives_the_frames_of_pytorch(tmp_path: Path, monkeypatch: Patch, geometry: str) -> None:
    """Theorem 6, through the ring's wrap: error at most twice that of PyTorch in bf16, both against fp32. Kernels run
    by their PTX; segments by their graphs, rounded where engines hand numbers on; whatever the streams' order."""
    changes, precision, policy = GEOMETRIES[geometry]
    config = gpu_config(**changes)
    units = (config.window + config.sinks) // config.unit + 2
    gpu = FakeGpu(make_bundle(tmp_path / "bundle", config, precision), policy=policy)
    with prepared(gpu, monkeypatch) as engine:
        found = stream(engine, config, units)
    exact, peer = (by_torch(config, format, units) for format in ("fp32", "bf16"))
    assert found.shape == exact.shape
    assert np.abs(found - exact).mean() <= 2 * np.abs(peer - exact).mean() < exact.std() / 20


def test_8_bits_in_the_ring(tmp_path: Path, monkeypatch: Patch) -> None:
    """Keys in int8, values in e4m3, by scales as an 8-bit export calibrates them: close to the ring in bf16, and not
    equal."""
    config = gpu_config(steps=(1.0,))
    plain = make_bundle(tmp_path / "bf16", config)
    seen = Calibration(origin="a test", texts=(rows_of(config),), config=config).observe(source_of(config), "int8")
    small = make_bundle(tmp_path / "int8", config, tensors={"v_scale": value_scales(seen, config)})
    frames = []
    for bundle in (plain, small):
        with monkeypatch.context() as patch, prepared(FakeGpu(bundle), patch) as engine:
            frames.append(stream(engine, config, 3))
    assert 0 < np.abs(frames[0] - frames[1]).mean() < frames[0].std() / 20


def test_a_pass_is_captured_once_and_a_stream_takes_no_more_memory(bundle: Bundle, monkeypatch: Patch) -> None:
    """Theorem 7: two graphs for all units, changed texts a third, and nothing allocated after the first few units."""
    gpu, config = FakeGpu(bundle), bundle.manifest.config
    with prepared(gpu, monkeypatch) as engine:
        stream(engine, config, 3)
        engine.set_text(rows_of(config, seed=1))
        gpu.drain_all()
        graphs, taken, launched = set(gpu.graphs), set(gpu.blocks), gpu.done["graph"]
        assert len(graphs) == 3
        for unit in range(3, 6):
            unit_of(engine, config, unit)
        gpu.drain_all()
        assert (set(gpu.graphs), set(gpu.blocks)) == (graphs, taken)
        assert gpu.done["graph"] == launched + 3 * (len(config.steps) + 1), "each pass is one launch"


def test_steps_of_euler_s_are_a_kernel_or_two(tmp_path: Path, monkeypatch: Patch) -> None:
    """A student of four passes without new noise gives the frames of the `onnx` engine. A pass is one launch of the one
    graph. Around it: a sum of two latents and its copy to where the graph reads, however many passes came before, and
    the estimate; noise is drawn once."""
    config = gpu_config(depth=1, window=2, solver="euler", steps=(1.0, 0.75, 0.5, 0.25))
    bundle = make_bundle(tmp_path / "bundle", config)
    peer = OnnxEngine()
    peer.prepare(spec_of(bundle))
    expected = stream(peer, config, 5)
    gpu = FakeGpu(bundle)
    with prepared(gpu, monkeypatch) as engine:
        found = [stream(engine, config, 3)]
        gpu.drain_all()
        taken, before = set(gpu.blocks), gpu.done.copy()
        found += [unit_of(engine, config, unit) for unit in (3, 4)]
        gpu.drain_all()
        done, passes = gpu.done - before, 2 * len(config.steps)
        assert set(gpu.blocks) == taken
    assert (done["graph"], done["renoise"]) == (passes + 2, 2)
    assert done["combine"] == 3 * passes, "two of the first pass and one of the commit make three"
    assert np.abs(np.concatenate(found) - expected).mean() < expected.std() / 20


def test_the_worker_streams_from_it(bundle: Bundle, monkeypatch: Patch) -> None:
    """By the folder's name alone, in the worker's thread, with a change of prompt."""
    with FakeGpu(bundle).installed(monkeypatch), cfrt.Stream(RED, model=bundle.folder, seed=3, fps="max") as made:
        assert (made.engine, made.device, made.precision) == ("trt", "cuda", "bf16")
        pictures = [frame.pixels for frame in made.frames(n=9)]
        made.prompt(BLUE, recache=True)
        prompts = [frame.prompt for frame in made.frames(n=12)]
    assert np.std(pictures) > 1
    assert prompts[-1] == BLUE


def test_the_commands_take_the_gpu_that_is_there(bundle: Bundle, monkeypatch: Patch) -> None:
    """`cfrt serve` and `cfrt bench` with nothing but --model: the engine is trt, not the CPU's."""
    for command in (Serve(), Bench()):
        with FakeGpu(bundle).installed(monkeypatch):
            assert choose("auto", spec_of(bundle, device=command.device))[0].name == "trt"


def test_a_stream_can_start_from_a_picture(bundle: Bundle, monkeypatch: Patch) -> None:
    config = bundle.manifest.config
    picture = np.random.default_rng(0).integers(0, 256, (*config.frame_size, 3), dtype=np.uint8)
    reference = TorchEngine()
    reference.prepare(Spec(config=config, weights=random_weights(config)))
    expected = reference.decode(reference.encode(picture)).astype(int)
    with prepared(FakeGpu(bundle), monkeypatch) as engine:
        found = engine.decode(engine.encode(picture))
    assert np.abs(found - expected).mean() < 2, "in levels of 255"


def test_sums_on_the_gpu_are_those_of_flow(bundle: Bundle, monkeypatch: Patch) -> None:
    """Also those that are no re-noise: a teacher's step, and noise in other proportions."""
    config = bundle.manifest.config
    shape = (1, config.unit, config.latent_channels, *config.latent_grid)

    with prepared(FakeGpu(bundle), monkeypatch) as engine:
        engine.set_text(rows_of(config))
        e, again = (normal(3, 0, step, Purpose.SAMPLE, shape) for step in (0, 1))
        x, new = engine.noise(0, 0), engine.noise(0, 1)
        x0 = engine.denoise(x, TIME_SCALE, 0)
        clean = engine.host(x0)
        for found, expected in (
            (x, e),
            (renoise(x0, new, 0.3), renoise(clean, again, 0.3)),
            (euler(x, v_from_x0(x, x0, 1.0), 1.0, 0.5), euler(e, v_from_x0(e, clean, 1.0), 1.0, 0.5)),
            (x0 - 2 * x + new / 4, clean - 2 * e + again / 4),
        ):
            np.testing.assert_allclose(engine.host(found), expected, rtol=1e-5, atol=1e-5)
        del x0, found


def test_an_upload_is_not_written_over_before_it_has_gone(monkeypatch: Patch) -> None:
    """More of them than there is pinned memory for, none waited for."""
    fake = FakeGpu(policy="lazy")
    with fake.installed(monkeypatch):
        gpu = Gpu()
        stream, upload = gpu.stream(), Upload(gpu, 8)
        places = [gpu.memory(8) for _ in range(11)]
        for i, place in enumerate(places):
            upload.send(stream, place.address, np.full(8, i, np.uint8))
        assert [int(stream.fetch(place.address, 8)[0]) for place in places] == list(range(11))


# ---------------------------------------------------------------------- back and forth


def test_a_rewind_makes_the_unit_again(bundle: Bundle, monkeypatch: Patch) -> None:
    config = bundle.manifest.config
    with prepared(FakeGpu(bundle), monkeypatch) as engine:
        stream(engine, config, 3)
        first = unit_of(engine, config, 3)
        engine.rewind(3)
        np.testing.assert_array_equal(unit_of(engine, config, 3), first)


def test_a_snapshot_goes_on_exactly_also_in_another_engine(bundle: Bundle, monkeypatch: Patch) -> None:
    """Theorem 5, and the snapshot outlives the engine that it was taken from."""
    config = bundle.manifest.config
    gpu = FakeGpu(bundle)
    with gpu.installed(monkeypatch):
        one, two = TrtEngine(), TrtEngine()
        for engine in (one, two):
            engine.prepare(spec_of(bundle))
            engine.set_text(rows_of(config))
        stream(one, config, 4)
        snapshot = one.snapshot()
        expected = [unit_of(one, config, unit) for unit in (4, 5)]
        one.restore(snapshot)
        np.testing.assert_array_equal(unit_of(one, config, 4), expected[0])
        one.close()
        two.restore(snapshot)
        for unit, frames in zip((4, 5), expected, strict=True):
            np.testing.assert_array_equal(unit_of(two, config, unit), frames)
        two.close()
        with pytest.raises(EngineError, match="expected a snapshot of the trt engine, got dict"):
            TrtEngine().restore({})


@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_memory_of_the_host_loses_nothing(tmp_path: Path, monkeypatch: Patch, storage: str) -> None:
    """Keys and values of the ring, whatever its format, as numbers and back: the same bytes, and those of PyTorch up to
    the format. With them goes the decoder's state, so that a twin that is given both makes the same frames."""
    config = gpu_config(steps=(1.0,))
    scales = {"v_scale": np.full((config.depth, config.width), 4 / 448, np.float32)}
    bundle = make_bundle(tmp_path / "bundle", config, tensors=scales if storage == "int8" else {})
    reference = TorchEngine()
    reference.prepare(Spec(config=config, weights=random_weights(config), seed=3))
    stream(reference, config, 3)
    expected = reference.memory(range(3)).keys
    with prepared(FakeGpu(bundle), monkeypatch) as engine:
        stream(engine, config, 3)
        memory = engine.memory(range(3))
        assert memory.unit == 3
        for frame in range(3):
            error = np.abs(memory.keys[frame] - expected[frame]).mean()
            assert error < (0.02 if storage == "bf16" else 0.04) * np.abs(expected[frame]).mean()
        twin = engine.twin()
        twin.set_text(rows_of(config))
        twin.recall(memory)
        for frame, keys in twin.memory(range(3)).keys.items():
            np.testing.assert_array_equal(keys, memory.keys[frame])
        np.testing.assert_array_equal(unit_of(twin, config, 3), unit_of(engine, config, 3))
        latents = twin.host(twin.noise(7, 0))
        np.testing.assert_array_equal(twin.host(twin.place(latents)), latents)
        with pytest.raises(EngineError, match="another model's"):
            twin.recall(replace(memory, keys={0: memory.keys[0][:1]}))
        twin.close()


def test_memory_goes_from_engine_to_engine(bundle: Bundle, monkeypatch: Patch) -> None:
    """From the GPU to PyTorch, which goes on with nearly the same frames, and back."""
    config = bundle.manifest.config
    other = TorchEngine()
    other.prepare(Spec(config=config, weights=random_weights(config), seed=3))
    other.set_text(rows_of(config))
    with prepared(FakeGpu(bundle), monkeypatch) as engine:
        stream(engine, config, 4)
        held = range(config.sinks + config.window + config.unit)
        other.recall(engine.memory(held))
        expected = unit_of(engine, config, 4).astype(int)
        assert np.abs(unit_of(other, config, 4) - expected).mean() < 2, "in levels of 255"
        engine.recall(other.memory(held))
        found = unit_of(engine, config, 5).astype(int)
    assert np.abs(found - unit_of(other, config, 5)).mean() < 2


def test_another_seed_is_another_noise(bundle: Bundle, monkeypatch: Patch) -> None:
    with prepared(FakeGpu(bundle), monkeypatch) as engine:
        engine.reseed(9)
        shape = (1, 1, *engine.host(engine.noise(0, 0)).shape[2:])
        np.testing.assert_allclose(engine.host(engine.noise(2, 1)), normal(9, 2, 1, Purpose.SAMPLE, shape), rtol=1e-5)


def test_what_was_compiled_is_kept_for_the_next_start(bundle: Bundle, cache: Path, monkeypatch: Patch) -> None:
    gpu = FakeGpu(bundle)
    for warm in (False, True):
        with monkeypatch.context() as patch, prepared(gpu, patch) as engine:
            assert engine.warm == warm
            stream(engine, bundle.manifest.config, 1)
    (kept,) = (cache / "engines").glob("*.cache")
    assert "tail" in kept.read_text()
    kept.write_bytes(b"")  # damaged: it is compiled again
    with monkeypatch.context() as patch, prepared(gpu, patch) as engine:
        stream(engine, bundle.manifest.config, 1)


# ---------------------------------------------------------------------- refused before the GPU is touched


def changed(bundle: Bundle, **fields: object) -> Bundle:
    return Bundle(bundle.folder, replace(bundle.manifest, **fields))  # type: ignore[arg-type]


def without(bundle: Bundle, *names: str) -> Bundle:
    kept = tuple(segment for segment in bundle.manifest.segments if segment.name not in names)
    return changed(bundle, segments=kept)


def plans(bundle: Bundle, **fields: str) -> Bundle:
    return changed(bundle, plans=tuple(replace(plan, **fields) for plan in bundle.manifest.plans))


Refused = tuple[Callable[[Bundle], Bundle], dict[str, Any], dict[str, Any], str]
REFUSED: dict[str, Refused] = {
    "no driver": (lambda b: b, {}, {"driver": 0}, "there is no NVIDIA driver on this machine"),
    "no GPU": (lambda b: b, {}, {"devices": 0}, r"shows no GPU \(cudaErrorNoDevice\)"),
    "no such GPU": (lambda b: b, {"device": "cuda:1"}, {}, "shows 1 GPU, so there is no number 1"),
    "cpu": (lambda b: b, {"device": "cpu"}, {}, "runs on cuda, not on 'cpu'"),
    "another GPU": (lambda b: b, {}, {"capability": (8, 6)}, "for sm89 and this GPU is sm86: .*--target sm86"),
    "H100": (lambda b: b, {}, {"capability": (9, 0)}, "this GPU is sm90, for which TensorRT-RTX builds none"),
    "another version": (
        lambda b: plans(b, builder="tensorrt_rtx 1.6.0.9"), {}, {}, r"tensorrt-rtx 1.6.0.9 and 1.7.* is installed",
    ),
    "no TensorRT": (lambda b: plans(b, builder="tensorrt 11.4"), {}, {}, r"pip install tensorrt==11.4"),
    "graphs alone": (lambda b: changed(b, plans=()), {}, {}, "holds graphs and no engines: .*export.trt"),
    "an engine is missing": (
        lambda b: changed(b, plans=b.manifest.plans[1:]), {}, {}, "no engine of text_kv for sm89",
    ),
    "no decoder": (lambda b: without(b, "decoder"), {}, {}, "the bundle has no decoder"),
    "no encoder": (lambda b: without(b, "encoder"), {"prefix": 1}, {}, "no encoder, so"),
    "another precision": (lambda b: b, {"precision": "int8"}, {}, "exported in bf16, not in 'int8'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_come_before_the_gpu_is_touched(bundle: Bundle, monkeypatch: Patch, name: str) -> None:
    """Each says what is wrong and what to do, and nothing was asked of the GPU but its number and kind."""
    change, wish, machine, words = REFUSED[name]
    wrong = change(bundle)
    gpu = FakeGpu(wrong, **machine)
    with gpu.installed(monkeypatch):
        spec = spec_of(wrong, **wish)
        reason = refusal("trt", spec)
        assert reason is not None
        with pytest.raises(EngineError, match=words):
            TrtEngine().prepare(spec)
    assert gpu.touched == set()


def test_heads_that_the_kernels_do_not_take(tmp_path: Path, monkeypatch: Patch) -> None:
    wrong = make_bundle(tmp_path / "bundle", gpu_config(heads=4))
    with FakeGpu(wrong).installed(monkeypatch):
        assert "heads of 64 or 128 numbers, not 32" in str(refusal("trt", spec_of(wrong)))


def test_kernels_that_were_not_built(bundle: Bundle, monkeypatch: Patch) -> None:
    with FakeGpu(bundle).installed(monkeypatch) as gpu:
        monkeypatch.setattr(trt.cuda, "refusal", lambda device: "this _cfrt was built without CUDA", raising=False)
        assert "built without CUDA" in str(refusal("trt", spec_of(bundle)))
        assert gpu.touched == set()


# ---------------------------------------------------------------------- what goes wrong later


def copied(bundle: Bundle, to: Path) -> Path:
    for name in (*bundle.manifest.files, "manifest.json"):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes((bundle.folder / name).read_bytes())
    return to


def test_one_flipped_bit_of_an_engine(bundle: Bundle, tmp_path: Path, monkeypatch: Patch) -> None:
    """Found by its hash before TensorRT sees it; what was loaded before is given back."""
    folder = copied(bundle, tmp_path / "harmed")
    engine = folder / "engines" / "tail.engine"
    engine.write_bytes(engine.read_bytes()[:-1] + b"?")
    gpu = FakeGpu(Bundle.open(folder))
    with gpu.installed(monkeypatch):
        with pytest.raises(BundleError, match=r"tail.engine was changed after it was written: expected sha256"):
            TrtEngine().prepare(spec_of(gpu.bundle))
        assert not gpu.blocks


def test_an_engine_of_another_segment(bundle: Bundle, monkeypatch: Patch) -> None:
    """A bundle whose names were mixed up, and whose hashes fit."""
    files = {plan.segment: plan.file for plan in bundle.manifest.plans}
    mixed = {"head": files["tail"], "tail": files["head"]}
    swapped = tuple(replace(p, file=mixed.get(p.segment, p.file)) for p in bundle.manifest.plans)
    wrong = changed(bundle, plans=swapped)
    gpu = FakeGpu(bundle)
    with gpu.installed(monkeypatch):
        with pytest.raises(BundleError, match=r"expected the inputs and outputs .* of head in .*tail.engine, got"):
            TrtEngine().prepare(replace(spec_of(bundle), bundle=wrong))
        assert not gpu.blocks


def test_a_gpu_without_room(bundle: Bundle, monkeypatch: Patch) -> None:
    gpu = FakeGpu(bundle, room=100_000)
    with gpu.installed(monkeypatch):
        with pytest.raises(EngineError, match=r"the GPU has no room for 0\.\d+ GB more: .* are taken by this stream"):
            TrtEngine().prepare(spec_of(bundle))
        assert not gpu.blocks


def test_what_cuda_refuses_is_an_error_in_its_words(bundle: Bundle, monkeypatch: Patch) -> None:
    gpu = FakeGpu(bundle)
    with prepared(gpu, monkeypatch) as engine:
        engine.set_text(rows_of(bundle.manifest.config))
        gpu.fail["cudaMemcpyAsync"] = "cudaErrorIllegalAddress"
        with pytest.raises(EngineError, match=r"CUDA refused cudaMemcpyAsync: .*\(cudaErrorIllegalAddress\)"):
            engine.denoise(engine.noise(0, 0), TIME_SCALE, 0)
        gpu.fail.clear()


def test_a_unit_before_its_past_is_an_error(bundle: Bundle, monkeypatch: Patch) -> None:
    with prepared(FakeGpu(bundle), monkeypatch) as engine:
        with pytest.raises(EngineError, match="expected set_text"):
            engine.denoise(engine.noise(0, 0), TIME_SCALE, 0)
        engine.set_text(rows_of(bundle.manifest.config))
        with pytest.raises(EngineError, match="commit"):
            engine.denoise(engine.noise(2, 0), TIME_SCALE, 2)


def test_the_name_of_a_builder() -> None:
    assert trt.builder(Plan(segment="head", target="sm89", builder=BUILDER, file="f")) == ("tensorrt_rtx", "1.7.1.116")


@pytest.mark.parametrize("tokens", [4, 100])
def test_what_a_ring_of_8_bits_holds_is_said_without_one(tokens: int) -> None:
    """To the bit, for whoever rounds as it does elsewhere (chorus.py); values beyond the scale's reach are cut."""
    random, heads, dim = np.random.default_rng(tokens), 3, 64
    k, v = random.standard_normal((2, tokens, heads, dim)).astype(np.float32)
    scales = np.full((heads, dim), 2 / 448, np.float32)
    granules = Int8(tokens, heads, dim)
    expected = granules.unpack(*(as_bytes(part) for part in granules.pack(k, v, scales)), scales)
    found = as_held(k[None], v[None], scales)
    for ours, theirs, plain in zip(found, expected, (k, v), strict=True):
        np.testing.assert_array_equal(ours[0], theirs)
        assert 0 < np.abs(ours[0] - plain.clip(-2.0, 2.0)).mean() < 0.1
