"""The onnx engine: exported graphs with the host's ring between them, against the torch engine in fp64; and streams of
a bundle."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_fixture import onnx_engine
from sampling_fixture import EULER, sample
from student_fixture import random_weights, small_config

import cfrt
from cfrt.bundle import Bundle
from cfrt.engines import Spec, choose
from cfrt.engines.torch import TorchEngine
from cfrt.errors import BundleError, EngineError
from export.onnx import main

pytestmark = pytest.mark.cpu

PROMPT = "a large red circle moving left"
GEOMETRIES = [
    {"unit": 1, "window": 4},
    {"unit": 3, "window": 7, "sinks": 2},  # a window that is no multiple of the unit; sinks at their trained distance
    {"unit": 1, "window": 2, "sinks": 2, "sink_position": "absolute"},
    {"depth": 1, "width": 32, "latent_grid": (2, 6), "patch": (1, 1, 2)},
    {"heads": 1, "depth": 3, **EULER},
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded student, as anybody would export it."""
    out = tmp_path_factory.mktemp("export") / "bundle"
    assert main(["--model", "tiny", "--out", str(out), "--precision", "bf16"]) == 0
    return out


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_chain_is_as_exact_as_pytorch_in_fp32(geometry: dict) -> None:
    """Theorem 6, through wrap and sinks: error at most twice that of PyTorch in fp32, both against fp64. Every unit is
    denoised from the latents that fp64 has committed, so that errors of earlier samples do not add up."""
    config = small_config(**geometry)
    spec = Spec(config=config, weights=random_weights(config), seed=5)
    truth, peer, engine = TorchEngine(), TorchEngine(), onnx_engine(config)
    for torch_engine, precision in ((truth, "fp64"), (peer, "fp32")):
        torch_engine.prepare(Spec(**{**vars(spec), "precision": precision}))
    rows = np.random.default_rng(1).standard_normal((4, 16)).astype(np.float32)
    for each in (truth, peer, engine):
        each.set_text(rows)
    errors = {"onnx": 0.0, "torch": 0.0}
    for unit in range(2 * (config.window + config.sinks) // config.unit + 2):

        def denoise(x: Any, s: float, unit: int = unit) -> Any:
            clean = truth.denoise(x, 1000 * s, unit)
            scale = clean.norm()
            errors["torch"] += float((peer.denoise(x.float(), 1000 * s, unit) - clean).norm() / scale) ** 2
            found = engine.denoise(x.float().numpy(), 1000 * s, unit)
            errors["onnx"] += float(np.linalg.norm(found - clean.numpy()) / scale) ** 2
            return clean

        x = sample(config, unit, truth.noise, denoise, unit)
        pixels = engine.decode(x.float().numpy()).astype(int)
        assert np.abs(pixels - truth.decode(x)).max() <= 1
        truth.commit(x, unit)
        peer.commit(x.float(), unit)
        engine.commit(x.float().numpy(), unit)
    assert errors["onnx"] ** 0.5 <= 2 * errors["torch"] ** 0.5 < 1e-4


@pytest.mark.parametrize("geometry", [{}, {"unit": 2, "window": 4, "sinks": 2}], ids=str)
@pytest.mark.parametrize("towards", ["onnx", "torch"])
def test_what_it_remembers_goes_to_another_engine_and_back(geometry: dict, towards: str) -> None:
    """Portable snapshots: keys, values and the decoder's state, in the one form that all engines read. Heads of 12
    numbers lie among zeros here, and nowhere else."""
    config = small_config(**geometry)
    engines = {"onnx": onnx_engine(config), "torch": TorchEngine()}
    engines["torch"].prepare(Spec(config=config, weights=random_weights(config), seed=5, precision="fp32"))
    rows = np.random.default_rng(1).standard_normal((4, 16)).astype(np.float32)
    for each in engines.values():
        each.set_text(rows)
    source, target = engines.pop("torch" if towards == "onnx" else "onnx"), engines.pop(towards)
    first = 7
    for unit in range(first):
        x = source.noise(unit, 0)
        source.decode(x)
        source.commit(x, unit)
    frames = [f for span in config.geometry.visible_frames(first) for f in range(*span)]
    target.recall(source.memory(frames))
    for unit in range(first, first + 2):
        x = source.host(source.noise(unit, 0))
        made = [
            (e.host(e.denoise(e.place(x), 800.0, unit)), e.decode(e.place(x)).astype(int)) for e in (source, target)
        ]
        assert np.linalg.norm(made[0][0] - made[1][0]) < 1e-5 * np.linalg.norm(made[0][0])
        assert np.abs(made[0][1] - made[1][1]).max() <= 1
        for each in (source, target):
            each.commit(each.place(x), unit)


def test_a_twin_shares_the_graphs_and_nothing_else() -> None:
    config = small_config()
    engine = onnx_engine(config)
    engine.set_text(np.ones((4, 16), np.float32))
    engine.commit(engine.noise(0, 0), 0)
    twin, fresh = engine.twin(), onnx_engine(config)
    for each in (twin, fresh):
        each.set_text(np.zeros((4, 16), np.float32))
    x = fresh.noise(0, 0)
    np.testing.assert_array_equal(twin.denoise(x, 900.0, 0), fresh.denoise(x, 900.0, 0))
    before = engine.noise(1, 0)
    twin.reseed(6)
    assert (twin.noise(1, 0) != before).any()
    np.testing.assert_array_equal(engine.noise(1, 0), before)


def test_a_decoders_state_keeps_its_order() -> None:
    """As the ports count, not as the segments named them: a first latent frame does not write all of it."""
    engine = onnx_engine(small_config())
    device = engine._on
    device.buffers |= {f"state.{i}": np.full(1, i, np.float32) for i in (10, 2, 0, 1)}
    assert [int(array[0]) for array in device.fetch("state.")] == [0, 1, 2, 10]


def test_a_bundle_streams(bundle: Path) -> None:
    """By its folder's name alone, and close to the student that it was made of, whose weights it rounds to bf16."""
    with cfrt.Stream(PROMPT, model=bundle, seed=7, fps="max") as stream:
        assert (stream.engine, stream.precision) == ("onnx", "fp32")
        made = [frame.pixels for frame in stream.frames(n=9)]
        change = stream.prompt("a small blue square moving up")
        following = [frame.prompt for frame in islice(stream.frames(), 8)]
    assert change.unit == 3
    assert following[-1] == "a small blue square moving up"
    with cfrt.Stream(PROMPT, model="tiny", engine="torch", seed=7, fps="max") as stream:
        expected = [frame.pixels for frame in stream.frames(n=9)]
    difference = np.abs(np.stack(made).astype(int) - np.stack(expected))
    assert difference.mean() < 2, "in levels of 255"


def test_a_bundles_stream_goes_back_branches_and_goes_on_elsewhere(bundle: Path, tmp_path: Path) -> None:
    def pixels(stream: cfrt.Stream, count: int) -> np.ndarray:
        return np.stack([frame.pixels for frame in stream.frames(count)]).astype(int)

    with (
        cfrt.Stream(PROMPT, model=bundle, seed=7, fps="max") as stream,
        cfrt.Stream(PROMPT, engine="native", precision="fp32", threads=1, fps="max") as native,
    ):
        first = pixels(stream, 21)
        cut = stream.config.first_frame(stream.rewind(3))
        np.testing.assert_array_equal(pixels(stream, 21 - cut), first[cut:])
        stream.snapshot(portable=True).save(tmp_path / "snapshot")
        native.restore(cfrt.Snapshot.load(tmp_path / "snapshot"))
        with stream.branch() as twin:
            expected = pixels(twin, 12)
        np.testing.assert_array_equal(pixels(stream, 12), expected)
        assert np.abs(pixels(native, 12) - expected).mean() < 1, "in levels of 255"
        stream.restore(native.snapshot(portable=True))
        assert np.abs(pixels(stream, 8) - pixels(native, 8)).mean() < 1


def test_the_same_seed_gives_the_same_bytes(bundle: Path) -> None:
    def frames() -> np.ndarray:
        with cfrt.Stream(PROMPT, model=bundle, seed=1, fps="max") as stream:
            return np.stack([frame.pixels for frame in stream.frames(n=13)])

    np.testing.assert_array_equal(frames(), frames())


def test_a_stream_of_a_bundle_can_start_from_a_picture(bundle: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pictures = []
    for model, engine in ((bundle, "auto"), ("tiny", "torch")):
        with cfrt.Stream(PROMPT, model=model, engine=engine, image=image, fps="max") as stream:
            pictures.append(next(iter(stream.frames(n=1))).pixels.astype(int))
    assert np.abs(pictures[0] - pictures[1]).mean() < 2


def test_engines_of_bundles_and_of_models_refuse_each_other(bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"onnx: it runs exported bundles: .*export"):
        cfrt.Stream(PROMPT, model="tiny", engine="onnx")
    with pytest.raises(EngineError, match=r"native: .*exported bundle.*these can: onnx"):
        cfrt.Stream(PROMPT, model=bundle, engine="native")


def test_what_it_cannot_do_is_refused_before_anything_is_loaded(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    spec = {"config": opened.manifest.config, "weights": {}, "bundle": opened}
    for changes, words in (({"device": "cuda"}, "on cpu"), ({"precision": "bf16"}, "fp32"), ({"tile": 4}, "tiles")):
        with pytest.raises(EngineError, match=words):
            choose("onnx", Spec(**spec, **changes))


def test_a_tampered_graph_is_an_error_before_it_runs(bundle: Path, tmp_path: Path) -> None:
    """One flipped bit in the middle of a weight, found by its hash."""
    for path in bundle.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(bundle)).parent.mkdir(exist_ok=True)
            (tmp_path / path.relative_to(bundle)).write_bytes(path.read_bytes())
    graph = tmp_path / "segments" / "mid_1.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(BundleError, match=r"mid_1.onnx was changed .* expected sha256"):
        cfrt.Stream(PROMPT, model=tmp_path)
