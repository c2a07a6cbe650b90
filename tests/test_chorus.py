"""Streams of a bundle in step are the streams that they would be alone; what a bundle loses is measured with them."""

import json
from pathlib import Path

import numpy as np
import pytest
from bundle_fixture import chorus_engine, onnx_engine
from sampling_fixture import EULER, sampled
from student_fixture import BLUE, RED, random_weights, small_config

import cfrt
from cfrt.bundle import Bundle
from cfrt.engines import Spec
from cfrt.engines.chorus import ChorusEngine
from cfrt.errors import BundleError
from cfrt.students import find
from cfrt.text import encoder
from cfrt.weights import load_model, save_model
from export.onnx import main as export
from training import quality

pytestmark = pytest.mark.cpu

SEEDS = (5, 9, 2**63)
GEOMETRIES = [
    {"unit": 1, "window": 3, "sinks": 1},
    {"unit": 3, "window": 6, "sinks": 2, "patch": (1, 1, 2)},
    {"depth": 1, "width": 32, "latent_grid": (2, 6), **EULER},
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "int8"
    assert export(["--model", "tiny", "--precision", "int8", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_each_stream_is_the_one_that_it_would_be_alone(geometry: dict) -> None:
    """Through the ring's wrap, with a text of its own."""
    config = small_config(**geometry)
    units = 2 * (config.window + config.sinks) // config.unit + 2
    texts = np.random.default_rng(0).standard_normal((len(SEEDS), 4, 16)).astype(np.float32)
    together = chorus_engine(config, SEEDS)
    together.set_text(texts)
    clips = np.concatenate(list(together.play(units)))
    for stream, (seed, text) in enumerate(zip(SEEDS, texts, strict=True)):
        alone = onnx_engine(config, seed)
        alone.set_text(text)
        for unit in range(units):
            x = sampled(alone, config, unit)
            first = config.first_frame(unit)
            expected = alone.decode(x).astype(int)
            assert np.abs(clips[first : first + len(expected), stream] - expected).max() <= 1
            alone.commit(x, unit)


def test_a_bundle_of_8_bits_plays_as_its_streams_do(bundle: Path) -> None:
    """Its rounding is where it was: a sum in another order may fall on the other side of a step now and then. And the
    ring of 8 bits that it has on a GPU is another one than the engine's, but not by much."""
    config, weights = load_model(bundle)
    text, prompts = encoder(config, weights), (RED, BLUE)
    without = {name: array for name, array in weights.items() if name != "v_scale"}
    plays = []
    for tensors in (without, weights):
        engine = ChorusEngine((1, 2))
        engine.prepare(Spec(config=config, weights=tensors, threads=1, bundle=Bundle.open(bundle)))
        engine.set_text(np.stack([text.encode(prompt).rows for prompt in prompts]))
        plays.append(np.concatenate(list(engine.play(4))).astype(int))
    for number, prompt in enumerate(prompts):
        with cfrt.Stream(prompt, model=bundle, seed=number + 1, fps="max", threads=1) as stream:
            alone = np.stack([frame.pixels for frame in stream.frames(len(plays[0]))])
        assert np.abs(plays[0][:, number] - alone).mean() < 0.5, "in levels of 255"
    assert 0 < np.abs(plays[1] - plays[0]).mean() < 3


def test_what_is_lost_is_written_into_the_manifest(bundle: Path, tmp_path: Path) -> None:
    """From the command line; the numbers of so few clips say nothing, but that they are there."""
    file, before = tmp_path / "quality.json", Bundle.open(bundle).manifest
    arguments = [str(bundle), "--prompts", "3", "--frames", "9", "--json", str(file)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "ALLOWED", 100.0)
        quality.main(arguments)
    opened = Bundle.open(bundle)
    opened.check()
    note = opened.manifest.notes[quality.NOTE]
    assert note == json.loads(file.read_text())["int8"]
    assert (note["prompts"], note["frames"]) == (3, 9)
    assert note["model_sha256"] == quality.digest(find("tiny"))
    assert note["measures"].keys() == {"instruction", "dynamic", "valid"}
    for numbers in note["measures"].values():
        assert 0 <= numbers["mean"] <= 100
        assert numbers["difference"]["margin"] >= 0
    assert {**before.notes, quality.NOTE: note} == opened.manifest.notes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "ALLOWED", -401.0)
        with pytest.raises(SystemExit, match=r"more than -401 point is lost by int8"):
            quality.main(arguments)


def test_what_was_exported_from_other_weights_is_not_compared(bundle: Path, tmp_path: Path) -> None:
    config, _ = load_model(find("tiny"))
    save_model(tmp_path / "tiny", config, random_weights(config))
    with pytest.raises(BundleError, match="its weights are others: export it again"):
        quality.check_origin(Bundle.open(bundle), tmp_path / "tiny")
    with pytest.raises(SystemExit, match=r"expected --frames 1 \+ 4 n"):
        quality.main([str(bundle), "--frames", "10"])


def test_points_are_of_pairs() -> None:
    """A loss is the worst difference, as far as its interval makes it certain, with the sign of a loss."""
    import torch

    pairs = torch.tensor([0.0, -4.0, 0.0, 0.0])
    found = quality.estimate(pairs)
    assert found == {"mean": -1.0, "margin": pytest.approx(1.96, abs=1e-3)}
    better = {"mean": 2.0, "margin": 0.1}
    assert quality.lost({"a": {"difference": better}, "b": {"difference": found}}) == 1.0 - found["margin"]


def test_a_shorter_window_is_measured_beside_the_own_one() -> None:
    """Two clips say nothing, but that both were played and the first is what the other is compared with."""
    from benchmarks import windows

    found = windows.measured([2], 2, 13)
    assert list(found["windows"]) == ["8", "2"]
    assert all(numbers["difference"]["mean"] == 0 for numbers in found["windows"]["8"].values())
    assert found["windows"]["2"].keys() == {"instruction", "dynamic", "valid"}
