"""`python -m export.onnx`: graphs that say what cfrt.nn says, bundles that are whole or not there, errors that help.

Streams of a bundle: tests/test_onnx_engine.py. The files themselves: tests/test_bundle.py."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from bundle_fixture import graphs, source_of
from onnx import ModelProto, numpy_helper
from sampling_fixture import EULER
from student_fixture import RED, random_weights, save_student, small_config
from torch import Tensor, nn

from cfrt import Stream, convert, shapes
from cfrt.bundle import MANIFEST, Bundle, Segment
from cfrt.cli import main as cfrt
from cfrt.config import PRESETS, ModelConfig
from cfrt.errors import ExportError
from export import onnx as command
from export import pixels, transformer, verify
from export.build import build, numbers
from export.calibrate import Calibration
from export.draft import draft, key
from export.graph import check
from export.onnx import Options, main, plan
from export.segments import layout
from export.sources import Lazy, find

pytestmark = pytest.mark.cpu

Geometry = dict[str, object]


def sinking(**changes: object) -> ModelConfig:
    """A small model with sinks that are looked at from less far away than they are."""
    return small_config(**{"window": 3, "sinks": 1, "trained_frames": 4, **changes})


# ---------------------------------------------------------------------- what the graphs say


CHUNKS = {"unit": 2, "window": 4, "sinks": 2}


@pytest.mark.parametrize(
    ("precision", "geometry"),
    [
        *product(["fp32"], [{}, CHUNKS, {"depth": 1}]),
        ("bf16", {}),
        ("fp16", CHUNKS),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("bf16", CHUNKS), ("fp16", {}))),
        *(pytest.param(half, {"depth": 1}, marks=pytest.mark.slow) for half in ("bf16", "fp16")),
    ],
    ids=str,
)
def test_the_chain_says_what_pytorch_says(precision: str, geometry: Geometry) -> None:
    """Through the ring's wrap, with another text half way. Graphs of half precision are compared with PyTorch in fp32
    on weights rounded as theirs are."""
    source = source_of(sinking(**geometry))
    segments, made = graphs(source, precision)
    units = 2 * (source.config.window + source.config.sinks) // source.config.unit
    errors = verify.compare(source, segments, made, precision, units)
    assert errors["velocity"] < 2e-5
    assert errors["text"] < 1e-5
    assert errors["ring"] < 1e-5
    assert errors["video"] < 1e-5
    assert errors.get("picture", 0) < 1e-5
    assert (errors["rounding"] < 2e-5) == (precision == "fp32")


def wan(**changes: object) -> ModelConfig:
    """The Wan preset in everything but size."""
    preset = replace(PRESETS["wan-1.3b-longvideo"], schedule="sequential", sink_position="relative")
    small = replace(preset, width=64, depth=2, heads=2, ffn=128, latent_grid=(4, 6), trained_frames=6, window=6)
    text = replace(preset.text, width=32, length=12)
    return replace(small, text=text, autoencoder=replace(preset.autoencoder, widths=(8, 8, 16, 16)), **changes)


def test_rolling_windows_stay_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bundle of the long-video model makes one unit after another, and only when asked to."""
    asked = ["--model", "wan-1.3b-longvideo", "--weights", "random", "--out", str(tmp_path / "bundle"), "--dry-run"]
    assert main(asked) == 1
    assert "denoises several units together, which bundles cannot; --sequential" in capsys.readouterr().err
    assert main([*asked, "--sequential"]) == 0


@pytest.mark.parametrize("decoder", ["wan", "taehv"])
def test_the_wan_preset_at_reduced_size(decoder: str, tmp_path: Path) -> None:
    """Chunk-wise, with sinks; Wan's decoder has a graph of its own for the first latent frame, TAEHV has not."""
    config = wan()
    config.save(tmp_path / "config.json")
    out = tmp_path / "bundle"
    arguments = ["--model", str(tmp_path / "config.json"), "--weights", "random", "--decoder", decoder]
    assert main([*arguments, "--out", str(out)]) == 0
    manifest = Bundle.open(out).manifest
    assert manifest.decoder == decoder
    assert manifest.has("decoder_start") == (decoder == "wan")
    assert not manifest.has("encoder"), "a chunk-wise stream cannot start from a picture"
    assert manifest.verification.level == "full"
    assert manifest.verification.units == 6
    assert manifest.verification.errors["video"] < 1e-5


def test_a_graph_reads_the_tensors_that_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """`transformer.reads` is what a hash over a segment's weights relies on; together they are the whole DiT, but for
    the norms of the kernel between graphs."""
    config = small_config(depth=3)
    weights, asked = random_weights(config), set()

    def read(name: str) -> np.ndarray:
        asked.add(name)
        return weights[f"dit.{name}"]

    everything: set[str] = set()
    for segment in layout(config, "fp32", "tiny"):
        if segment.name in ("decoder", "encoder"):
            continue
        asked.clear()
        transformer.build(segment, config, Lazy(shapes.dit(config), read), "fp32")
        assert asked == set(transformer.reads(segment, config)), segment.name
        everything |= asked
    left = shapes.dit(config).keys() - everything
    assert left == {f"blocks.{i}.self_attn.norm_{x}.weight" for i in range(3) for x in "qk"}


def test_the_largest_models_by_segments(tmp_path: Path) -> None:
    """Full width, few tokens: what is verified of a model too large to run is two layers of it, first and last."""
    config = replace(sinking(depth=4), latent_grid=(4, 8))
    source = source_of(config)
    small = verify.few_tokens(source, "bf16")
    assert (small.config.depth, small.config.latent_grid, small.config.width) == (2, (4, 4), config.width)
    np.testing.assert_array_equal(small.dit["blocks.1.ffn.0.weight"], source.dit["blocks.3.ffn.0.weight"])
    save_student(tmp_path / "model", config)
    assert main([*arguments(tmp_path), "--verify", "segments"]) == 0
    verification = Bundle.open(tmp_path / "bundle").manifest.verification
    assert (verification.level, verification.units) == ("segments", 8)
    assert verification.errors["velocity"] < 1e-5


# ---------------------------------------------------------------------- what a graph must keep to


def altered(segment: Segment, how: str) -> ModelProto:
    model = build(segment, source_of(small_config()), "fp32")
    if how == "foreign":
        model.graph.node[3].domain = "com.example"
        model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    elif how == "unused":
        for node in model.graph.node:
            node.input[:] = ["modulation" if name == "text_k" else name for name in node.input]
    elif how == "shape":
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value += 1
    elif how == "missing":
        del model.graph.output[-1]
    else:
        model.graph.node[-1].input[0] = "modulation"
    return model


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("foreign", r"mid_0.*com\.example"),
        ("unused", r"mid_0.*text_k"),
        ("shape", r"mid_0: expected input x to be .*, got .*"),
        ("missing", r"mid_0: outputs are missing: \['out.qkv'\]"),
        ("invalid", "mid_0"),
    ],
)
def test_a_graph_that_would_go_wrong_silently_is_refused(how: str, words: str) -> None:
    segment = layout(small_config(), "fp32", "tiny")[2]
    with pytest.raises(ExportError, match=words):
        check(altered(segment, how), segment)


def test_a_state_that_is_changed_in_place_cannot_get_lost() -> None:
    """PyTorch's exporter writes a graph without the change, and says nothing; here that is an error."""

    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("last", torch.zeros(1, 4, 2, 2))

        def forward(self, latent: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            video = (latent + state[0] + self.last[0]).mean(0).expand(4, 3, 2, 2)
            self.last.copy_(latent[None])
            return video, self.last * 1.0 if torch.is_grad_enabled() else state + 0.0

    segment = next(s for s in layout(small_config(), "fp32", "tiny") if s.name == "decoder")
    small = replace(segment, outputs=(replace(segment.outputs[0], shape=(4, 3, 2, 2)), *segment.outputs[1:]))
    with torch.no_grad(), pytest.raises(ExportError, match=r"state\.0 does not come from latent: a change was lost"):
        pixels._exported(Careless(), small)


def test_a_weight_that_the_format_cannot_hold_is_refused() -> None:
    weights = random_weights(small_config())
    weights["dit.blocks.1.ffn.2.weight"][0, 0] = 1e6
    source = source_of(small_config(), weights)
    segment = layout(small_config(), "fp16", "tiny")[3]
    with pytest.raises(ExportError, match=r"blocks.1.ffn.2.weight holds values that are not finite in fp16"):
        build(segment, source, "fp16")


# ---------------------------------------------------------------------- what verification refuses


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return save_student(tmp_path / "model", sinking())


def arguments(folder: Path) -> list[str]:
    return ["--model", str(folder / "model"), "--out", str(folder / "bundle")]


@pytest.fixture
def made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The autoencoder's graphs from the fixture's store: half of an export's time is PyTorch's exporter."""

    def quickly(segment: Segment, source: object, precision: str) -> ModelProto:
        if segment.name in ("decoder", "encoder"):
            return graphs(source, precision)[1][segment.name]  # type: ignore[arg-type]
        return build(segment, source, precision)  # type: ignore[arg-type]

    monkeypatch.setattr(command, "build", quickly)


WRONG = {
    "a bias in the head": ("head", "time_projection.1.bias", "velocity"),
    "one weight of the last layer": ("tail", "blocks.1.ffn.0.weight", "velocity"),
    "the text's keys": ("text_kv", "norm_k", "text"),
    "values that are remembered": (
        "mid_0",
        "blocks.1.self_attn.q+blocks.1.self_attn.k+blocks.1.self_attn.v.weight",
        "ring",
    ),
}


@pytest.mark.parametrize("place", WRONG)
def test_a_wrong_graph_is_refused_with_numbers(
    place: str,
    student: Path,
    tmp_path: Path,
    made_once: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One tensor off by a tenth, and there is no bundle."""
    name, tensor, quantity = WRONG[place]
    right = command.build

    def wrong(segment: Segment, source: object, precision: str) -> ModelProto:
        model = right(segment, source, precision)  # type: ignore[arg-type]
        if segment.name == name:
            (initializer,) = [x for x in model.graph.initializer if x.name == tensor]
            initializer.CopyFrom(numpy_helper.from_array(1.1 * numpy_helper.to_array(initializer), tensor))
        return model

    monkeypatch.setattr(command, "build", wrong)
    assert main(arguments(tmp_path)) == 1
    said = capsys.readouterr().err
    assert "verification failed (full, 8 units, fp32)" in said
    assert f"{quantity} 0." in said
    assert "(at most 0.0001)" in said
    assert not (tmp_path / "bundle").exists()


def test_a_graph_that_gives_no_number_is_refused() -> None:
    source = source_of(sinking())
    segments, made = graphs(source)
    broken = ModelProto()
    broken.CopyFrom(made["tail"])
    bias = next(x for x in broken.graph.initializer if x.name == "head.head.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(bias.dims, np.nan, np.float32), bias.name))
    errors = verify.compare(source, segments, {**made, "tail": broken}, "fp32", 2)
    with pytest.raises(ExportError, match="velocity nan"):
        verify._verified("full", source_of(small_config()), "fp32", 2, errors, 0.0)


def test_a_graph_that_was_not_the_one_verified_is_refused() -> None:
    _, made = graphs(source_of(small_config(depth=3)))
    verify.same_graph("mid_1", made["mid_1"], made["mid_0"])
    other = ModelProto()
    other.CopyFrom(made["mid_1"])
    next(node for node in other.graph.node if node.op_type == "Gelu").attribute[0].s = b"none"
    with pytest.raises(ExportError, match=r"mid_1 is not the graph that was verified: node \d+ of \d+ differs"):
        verify.same_graph("mid_1", other, made["mid_0"])


# ---------------------------------------------------------------------- solvers


def test_a_student_of_euler_steps_is_exported_calibrated_and_streams(tmp_path: Path, made_once: None) -> None:
    """In 8 bits, close to the model that it was made of."""
    save_student(tmp_path / "model", sinking(**EULER))
    (tmp_path / "prompts.txt").write_text(RED)
    flags = ["--precision", "int8", "--calibration", str(tmp_path / "prompts.txt")]
    assert main([*arguments(tmp_path), *flags]) == 0
    made = []
    for options in ({"model": tmp_path / "bundle"}, {"model": tmp_path / "model", "engine": "torch"}):
        with Stream(RED, **options, seed=7, fps="max", threads=1) as stream:
            assert (stream.config.solver, stream.engine) == ("euler", options.get("engine", "onnx"))
            made.append(np.stack([frame.pixels for frame in stream.frames(n=17)]).astype(int))
    assert np.abs(made[0] - made[1]).mean() < 2, "in levels of 255"


# ---------------------------------------------------------------------- whole or not at all


def test_a_full_disk_leaves_no_bundle_and_the_next_export_goes_on(
    student: Path,
    tmp_path: Path,
    made_once: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save = onnx.save

    def full(model: ModelProto, path: Path) -> None:
        if "mid" in path.name:
            path.write_bytes(b"half a gr")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(model, path)

    monkeypatch.setattr(onnx, "save", full)
    assert main(arguments(tmp_path)) == 1
    assert "mid_0.onnx cannot be written" in (said := capsys.readouterr().err)
    assert "the disk is full" in said
    assert "it goes on where it stopped" in said
    assert not (tmp_path / "bundle").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / ".bundle.draft").rglob("*.onnx")}
    assert {path.name for path in kept} == {"text_kv.onnx", "head.onnx"}
    monkeypatch.setattr(onnx, "save", save)
    assert main(arguments(tmp_path)) == 0
    Bundle.open(tmp_path / "bundle").check()
    for path, when in kept.items():
        assert (tmp_path / "bundle" / "segments" / path.name).stat().st_mtime_ns == when
    assert not (tmp_path / ".bundle.draft").exists()


def test_an_export_that_is_killed_leaves_no_bundle(student: Path, tmp_path: Path, made_once: None) -> None:
    """With SIGKILL, somewhere in the middle; what is left is no bundle, and the next export makes one of it."""
    command = [sys.executable, "-m", "export.onnx", *arguments(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    segments = tmp_path / ".bundle.draft" / "segments"
    deadline = time.monotonic() + 60
    while not (segments / "head.onnx").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (segments / "head.onnx").exists()
    assert not (tmp_path / "bundle").exists()
    assert not (tmp_path / ".bundle.draft" / MANIFEST).exists()
    assert main(arguments(tmp_path)) == 0
    Bundle.open(tmp_path / "bundle").check()


def test_what_changed_is_made_again(tmp_path: Path) -> None:
    def write(text: str) -> Mapping[str, object]:
        return {"key": key(text), "write": lambda path: path.write_text(text)}

    with draft(tmp_path / "b") as one:
        assert one.make("segments/a", **write("x"))
        assert one.make("segments/old", **write("x"))
    with draft(tmp_path / "b") as two:
        assert not two.make("segments/a", **write("x"))
        assert two.make("segments/a", **write("y"))
        (two.folder / "segments" / "a").write_text("harmed")
        assert two.make("segments/a", **write("y"))
    (two.folder / "journal.json").write_text("{")
    with draft(tmp_path / "b") as three:
        assert three.make("segments/a", **write("y"))
        assert list(three.entries()) == ["segments/a"], "what this export has not made is none of its files"


def test_two_exports_to_one_place_do_not_meet(tmp_path: Path) -> None:
    with draft(tmp_path / "b"), pytest.raises(ExportError, match="another export writes to"), draft(tmp_path / "b"):
        pass


def test_the_same_export_makes_the_same_bytes(student: Path, tmp_path: Path) -> None:
    """Of every file: an engine is kept by the hash of its graph."""
    hashes = []
    for out in ("one", "two"):
        assert main(["--model", str(student), "--out", str(tmp_path / out)]) == 0
        hashes.append({name: entry.sha256 for name, entry in Bundle.open(tmp_path / out).manifest.files.items()})
    assert hashes[0] == hashes[1]


# ---------------------------------------------------------------------- what is asked


def test_a_dry_run_says_what_would_be_made_and_writes_nothing(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(tmp_path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "6 segments, about 0 MB" in said
    assert "verified: full" in said
    assert "mid" in said
    assert "calibration" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_dry_run_counts_as_the_runtime_does_and_says_how_long_calibration_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The embedded student's numbers are those of `cfrt models`; at full size a prompt is the better part of an
    hour."""
    assert main(["--model", "tiny", "--precision", "int8", "--out", str(tmp_path / "b"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "calibration: 6 streams, prompts built in; about 1 s more" in said
    assert cfrt(["models"]) == 0
    counted = re.search(r"([0-9.]+ M) parameters", capsys.readouterr().out)
    assert counted is not None
    assert f"tiny: {counted[1]} parameters" in said
    large = Calibration(origin="a file", texts=(np.zeros((512, 4096)),), config=PRESETS["wan-1.3b-framewise-2step"])
    assert 1800 < large.seconds < 2 * 3600


def test_resolution_window_and_sinks_are_the_bundles(student: Path, tmp_path: Path, made_once: None) -> None:
    changes = ["--resolution", "64x32", "--window", "2", "--sinks", "2"]
    assert main([*arguments(tmp_path), *changes]) == 0
    config = Bundle.open(tmp_path / "bundle").manifest.config
    assert (config.frame_size, config.window, config.sinks) == ((64, 32), 2, 2)


def test_any_checkpoint_is_a_source(tmp_path: Path) -> None:
    """A diffusers folder of the transformer beside the model's own autoencoder."""
    config = sinking()
    folder = save_student(tmp_path / "model", config)
    convert.plan(folder, layout="diffusers").run(tmp_path / "diffusers")
    config.save(tmp_path / "config.json")
    torch.save(
        {k[12:]: torch.from_numpy(x) for k, x in random_weights(config).items() if k.startswith("autoencoder.")},
        tmp_path / "vae.pth",
    )
    options = Options(
        model=str(tmp_path / "config.json"),
        weights=str(tmp_path / "diffusers"),
        vae=tmp_path / "vae.pth",
        out=tmp_path / "b",
    )
    with pytest.raises(command.CfrtError, match=r"holds no text.table"):
        find(options)
    umt5 = replace(config, text=replace(config.text, kind="umt5", vocab={}, ignored=()))
    umt5.save(tmp_path / "config.json")
    source = find(options)
    expected = find(Options(model=str(folder), out=tmp_path / "b"))
    for name in shapes.dit(config):
        np.testing.assert_array_equal(source.dit[name], expected.dit[name])


WORDS = {
    "no such model": (["--model", "warp"], "there is no model 'warp'"),
    "a preset without its file": (["--model", "wan-1.3b-framewise-2step"], "--weights, or:\n  5.70 GB"),
    "a teacher": (["--model", "wan-1.3b-framewise-ar", "--weights", "random"], "is a teacher"),
    "a size between patches": (["--resolution", "48x48"], "multiples of 32 and 32 pixels, got '48x48'"),
    "no size": (["--resolution", "big"], "expected --resolution HEIGHTxWIDTH"),
    "another's decoder": (["--decoder", "taehv"], "a decoder for the latents of 'tiny', got 'taehv'"),
    "a window smaller than a unit": (["--window", "0"], "window"),
    "no such checkpoint": (["--weights", "nowhere.pt"], "expected a checkpoint at nowhere.pt"),
}


@pytest.mark.parametrize("what", WORDS)
def test_a_wish_that_cannot_be_met_says_why(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CFRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    flags, words = WORDS[what]
    model = [] if "--model" in flags else ["--model", str(save_student(tmp_path / "model"))]
    assert main([*model, *flags, "--out", str(tmp_path / "b")]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_an_interrupted_export_says_how_to_go_on(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx, "save", interrupted)
    assert main(arguments(tmp_path)) == 130
    assert "goes on where it stopped" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_an_occupied_place_is_refused(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bundle").mkdir()
    assert main(arguments(tmp_path)) == 1
    assert "exists; name a new folder" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_refused_first(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "FREE", 1 << 60)
    assert main(arguments(tmp_path)) == 1
    assert "GB of free disk at" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


def test_the_full_size_is_known_before_anything_is_read() -> None:
    """1.3B: 2.84 GB of graphs in bf16, within 0.1 % of the parameters."""
    config = PRESETS["wan-1.3b-framewise-2step"]
    source = find(Options(model=config.name, weights="random", decoder="taehv", out=Path("b")))
    segments = [s for s in layout(config, "bf16", "taehv") if s.name not in ("decoder", "encoder")]
    between = 2 * config.depth * config.width  # norms of the kernel between graphs
    twice = 6 * config.width * (config.depth - 1)  # a layer's modulation is in the two graphs that it is cut into
    tables = 6 * config.width  # ... the first and the last one's too
    assert sum(numbers(segment, source) for segment in segments) + between - twice - tables == 1_418_996_800
    planned = plan(Options(model=config.name, weights="random", decoder="taehv", out=Path("b")), "bf16")
    assert 2.84e9 < sum(planned.sizes.values()) < 3.2e9, "with TAEHV, and with Wan's encoder in fp32"
    assert "34 segments" in str(planned)
    assert "verified: segments" in str(planned)
    assert json.dumps(planned.sizes)
