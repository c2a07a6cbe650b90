"""The engine protocol: choosing, and what every engine must keep. `torch` is the one that defines what is right;
tests/test_native_engine.py compares `native` with it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bundle_fixture import onnx_engine
from sampling_fixture import EULER, sampled
from student_fixture import random_weights, small_config

from cfrt import engines
from cfrt.config import ModelConfig
from cfrt.engines import Engine, Memory, Spec, choose, names, refusal
from cfrt.engines.native import NativeEngine
from cfrt.engines.onnx import OnnxEngine
from cfrt.engines.torch import TorchEngine
from cfrt.errors import EngineError, WeightsError

pytestmark = pytest.mark.cpu


def spec_of(config: ModelConfig, **changes: Any) -> Spec:
    return Spec(config=config, weights=random_weights(config), **{"seed": 5, **changes})


Prepared = Callable[..., Any]


@pytest.fixture(params=[(TorchEngine, "fp64"), (NativeEngine, "fp32"), (OnnxEngine, "fp32")], ids=lambda p: p[0].name)
def prepared(request: pytest.FixtureRequest) -> Prepared:
    """Makes an engine that has read its text."""
    kind, precision = request.param

    def make(config: ModelConfig, **changes: Any) -> Any:
        if kind is OnnxEngine:
            engine = onnx_engine(config, seed=changes.get("seed", 5))
        else:
            engine = kind()
            engine.prepare(spec_of(config, **{"precision": precision, **changes}))
        engine.set_text(rows(1))
        return engine

    return make


def rows(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, 16)).astype(np.float32)


def advance(engine: Engine, config: ModelConfig, units: range) -> list[np.ndarray]:
    pixels = []
    for unit in units:
        x = sampled(engine, config, unit)
        pixels.append(engine.decode(x))
        engine.commit(x, unit)
    return pixels


GEOMETRIES = [
    {"unit": 1, "window": 4},
    {"unit": 3, "window": 7, "sinks": 2},
    {"unit": 1, "window": 3, "sinks": 1},
    {"unit": 1, "window": 3, **EULER},
]
geometries = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


@geometries
def test_snapshot_and_restore_are_exact(geometry: dict[str, Any], prepared: Prepared) -> None:
    """Theorem 5: restore, then continue, equals uninterrupted, bit for bit; also into a fresh engine."""
    config = small_config(**geometry)
    engine = prepared(config, precision="fp32")
    advance(engine, config, range(6))
    snapshot = engine.snapshot()
    expected = advance(engine, config, range(6, 12))
    engine.restore(snapshot)
    np.testing.assert_array_equal(advance(engine, config, range(6, 12)), expected)
    other = prepared(config, precision="fp32")
    other.restore(snapshot)
    np.testing.assert_array_equal(advance(other, config, range(6, 12)), expected)


@geometries
def test_a_unit_taken_back_leaves_no_trace(geometry: dict[str, Any], prepared: Prepared) -> None:
    """Theorem 3 for `rewind`: denoised, decoded and committed under another text, then done again."""
    config = small_config(**geometry)
    plain, engine = prepared(config), prepared(config)
    expected = advance(plain, config, range(8))
    advance(engine, config, range(6))
    engine.set_text(rows(2))
    advance(engine, config, range(6, 7))
    engine.rewind(6)
    engine.set_text(rows(1))
    np.testing.assert_array_equal(np.concatenate(advance(engine, config, range(6, 8))), np.concatenate(expected[6:]))


in_core = pytest.mark.parametrize(
    "prepared", [(TorchEngine, "fp64"), (NativeEngine, "fp32")], ids=["torch", "native"], indirect=True
)
"""Engines of bundles have tests of their own."""


@in_core
@geometries
def test_recalling_what_was_overwritten_is_going_back(geometry: dict[str, Any], prepared: Prepared) -> None:
    """What each unit evicts, and the decoder's state before the first of them, undo three units; a twin of the engine
    that is given all frames in sight goes on alike."""
    config = small_config(**geometry)
    engine = prepared(config)
    advance(engine, config, range(6))
    seen, undone, expected = engine.memory(range(6 * config.unit)), [], []
    for unit in range(6, 9):
        undone.append(engine.memory(range(*config.geometry.evicted_by(unit))))
        expected += advance(engine, config, range(unit, unit + 1))
    keys = {frame: kv for memory in reversed(undone) for frame, kv in memory.keys.items() if frame < 6 * config.unit}
    engine.recall(Memory(unit=6, keys=keys, decoder=undone[0].decoder))
    twin = engine.twin()
    twin.set_text(rows(1))
    twin.recall(seen)
    for one in (engine, twin):
        np.testing.assert_array_equal(np.stack(advance(one, config, range(6, 9))), np.stack(expected))


@in_core
def test_a_memory_of_another_model_is_refused(prepared: Prepared) -> None:
    engine, other = prepared(small_config()), prepared(small_config(width=48))
    for one in (engine, other):
        advance(one, small_config(), range(3))
    with pytest.raises(EngineError, match="another model"):
        engine.recall(other.memory(range(3)))


def test_rewind_goes_one_unit_back_and_no_further(prepared: Prepared) -> None:
    config = small_config()
    engine = prepared(config)
    advance(engine, config, range(3))
    with pytest.raises(EngineError, match="back to unit 2 at most"):
        engine.rewind(1)
    engine.rewind(2)
    engine.rewind(2)
    advance(engine, config, range(2, 4))


@geometries
def test_fused_commit_equals_separate_commit(geometry: dict[str, Any], prepared: Prepared) -> None:
    """Theorem 4. For `torch` fusing is commit, then denoise; an engine that does not fuse refuses to."""
    config = small_config(**geometry)
    engine, fused = prepared(config), prepared(config)
    if not fused.fuses:
        with pytest.raises(EngineError, match="call commit first"):
            sampled(fused, config, 1, commit=sampled(fused, config, 0))
        return
    expected = advance(engine, config, range(6))
    pixels, owed = [], None
    for unit in range(6):
        owed = sampled(fused, config, unit, commit=owed)
        pixels.append(fused.decode(owed))
    np.testing.assert_array_equal(np.concatenate(pixels), np.concatenate(expected))


@geometries
def test_committing_the_window_again_forgets_whether_a_unit_was_made_ahead(
    geometry: dict[str, Any], prepared: Prepared
) -> None:
    """A recache gives the same ring, whether or not the next unit was begun before it was called off."""
    config = small_config(**geometry)
    results = []
    for ahead in (False, True):
        engine = prepared(config)
        past = []
        for unit in range(7):
            past.append(sampled(engine, config, unit))
            engine.commit(past[-1], unit)
        if ahead:
            sampled(engine, config, 7)
            engine.rewind(7)
        engine.set_text(rows(2))
        for unit in (5, 6):
            engine.commit(past[unit], unit)
        results.append(engine.decode(sampled(engine, config, 7)))
    np.testing.assert_array_equal(*results)


def test_text_changes_what_is_made(prepared: Prepared) -> None:
    config = small_config()
    engine = prepared(config)
    first = sampled(engine, config, 0)
    engine.set_text(rows(2))
    assert (first != sampled(engine, config, 0)).any()


def test_noise_is_a_function_of_seed_unit_and_step(prepared: Prepared) -> None:
    config = small_config()
    engine, other = prepared(config), prepared(config, seed=6)
    base = engine.noise(2, 1)
    assert base.shape == (1, 1, 4, 2, 2)
    assert (engine.noise(2, 1) == base).all()
    for different in (engine.noise(3, 1), engine.noise(2, 0), other.noise(2, 1)):
        assert (different != base).any()


def test_encode_then_decode_is_the_autoencoders_own_picture(prepared: Prepared) -> None:
    config = small_config()
    engine = prepared(config)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    latents = engine.encode(image)
    assert latents.shape == (1, 1, 4, 2, 2)
    assert engine.decode(latents).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("kind", [TorchEngine, NativeEngine])
def test_a_pass_without_text_says_so(kind: type[Engine]) -> None:
    config = small_config()
    engine = kind()
    engine.prepare(spec_of(config))
    with pytest.raises(EngineError, match="set_text"):
        sampled(engine, config, 0)


@pytest.mark.parametrize("kind", [TorchEngine, NativeEngine])
def test_weights_of_another_model_are_refused(kind: type[Engine]) -> None:
    weights = random_weights(small_config())
    with pytest.raises(WeightsError, match="of another shape"):
        kind().prepare(Spec(config=small_config(width=48), weights=weights))
    with pytest.raises(WeightsError, match=r"1 unknown: extra"):
        kind().prepare(Spec(config=small_config(), weights=weights | {"dit.extra": np.zeros(1, np.float32)}))
    del weights["autoencoder.latent_mean"]
    with pytest.raises(WeightsError, match="latent_mean"):
        kind().prepare(Spec(config=small_config(), weights=weights))


def test_a_snapshot_of_something_else_is_refused(prepared: Prepared) -> None:
    engine = prepared(small_config())
    with pytest.raises(EngineError, match=f"expected a snapshot of the {engine.name} engine, got dict"):
        engine.restore({})


# ---------------------------------------------------------------------- choosing


def test_auto_takes_the_first_that_can() -> None:
    assert choose("auto", spec_of(small_config())) == (NativeEngine, {})
    engine, refusals = choose("auto", spec_of(small_config(), precision="fp64"))
    assert engine is TorchEngine
    assert list(refusals) == ["native", "trt", "onnx"]
    assert refusals["native"] == "it computes in fp32, bf16, int8, not in 'fp64'"
    assert "it runs exported bundles" in refusals["trt"]
    assert choose("auto", spec_of(small_config(), precision="int8"))[0] is NativeEngine
    assert "not in 'int8'" in (refusal("torch", spec_of(small_config(), precision="int8")) or "")


def test_a_refusal_gives_its_reason() -> None:
    spec = Spec(config=small_config(), weights={}, decoder="taehv")
    assert "kind 'tiny'" in (refusal("torch", spec) or "")
    with pytest.raises(EngineError, match=r"no engine can run 'small' here \(native: .*decoder; .*torch: .*'tiny'"):
        choose("auto", spec)
    with pytest.raises(EngineError, match=r"'torch' cannot run 'small' \(torch: .*'tiny'.*no other engine"):
        choose("torch", spec)


def test_what_an_engine_does_not_claim_is_not_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance, tiles and the like must never be left out silently."""
    monkeypatch.setattr(TorchEngine, "features", frozenset({"tiles"}))
    spec = Spec(config=small_config(guidance=3.0), weights={}, tile=4, prefix=5)
    assert refusal("torch", spec) == "it cannot do a film to go on from or guidance"


def test_a_missing_framework_is_a_refusal_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    assert refusal("torch", spec_of(small_config())) == "torch is not installed: pip install 'cfrt[torch]'"


def test_an_unknown_engine_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=f"no engine 'warp'.*{names()[0]}"):
        choose("warp", spec_of(small_config()))
    monkeypatch.setenv("CFRT_ENGINE", "warp")
    with pytest.raises(EngineError, match="no engine 'warp'"):
        choose("auto", spec_of(small_config()))
    assert choose("torch", spec_of(small_config()))[0] is TorchEngine


def test_no_cuda_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "finds no CUDA device" in (refusal("torch", spec_of(small_config(), device="cuda")) or "")
    assert "not on 'tpu'" in (refusal("torch", spec_of(small_config(), device="tpu")) or "")


@pytest.mark.parametrize(
    "wrong",
    [{"precision": "fp12"}, {"seed": -1}, {"seed": 2**64}, {"seed": 1.5}, {"threads": 0}, {"decoder": "vq"}],
    ids=str,
)
def test_a_spec_that_makes_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="expected"):
        spec_of(small_config(), **wrong)
