"""`python -m export.trt`: the engines of a bundle, built for real, each checked against the graph it was built from.

How one engine is built: tests/test_export_rtx.py; what is read in it: tests/test_engine_report.py."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from bundle_fixture import graphs, source_of
from rtx_fixture import quantised, save
from student_fixture import save_student
from trt_fixture import gpu_config

from cfrt.bundle import Bundle, Segment
from cfrt.errors import ExportError
from export import builder
from export import engines as module
from export.builder import Builder
from export.draft import Draft, draft
from export.engine_checks import check
from export.engine_report import Port, Report, read
from export.engines import Engines, file_of
from export.trt import main

pytestmark = pytest.mark.cpu

SM89 = Engines(backend="rtx", targets=("sm89",), precision="bf16")


@pytest.fixture
def made(tmp_path: Path) -> Draft:
    """A draft with the graphs of a small model's transformer; its engines take about a second."""
    segments, models = graphs(source_of(gpu_config()), "bf16")
    with draft(tmp_path / "bundle") as found:
        found.folder.joinpath("segments").mkdir()
        for segment in segments:
            onnx.save(models[segment.name], str(found.folder / segment.onnx))
        return found


def transformer() -> tuple[Segment, ...]:
    return graphs(source_of(gpu_config()), "bf16")[0][:4]  # text_kv, head, mid_0, tail


# ---------------------------------------------------------------------- the command


def test_a_bundle_with_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a model's folder to a bundle that is whole: an engine of each segment for two GPUs, described in its
    manifest, and nothing else. The dry run says what comes, and writes nothing."""
    student = save_student(tmp_path / "student", gpu_config(depth=1))
    out = tmp_path / "bundle"
    arguments = ["--model", str(student), "--out", str(out), "--target", "sm86,sm89"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "5 engines for sm86, sm89, about" in capsys.readouterr().out
    assert not out.exists()
    assert main(arguments) == 0
    bundle = Bundle.open(out)
    bundle.check()
    manifest = bundle.manifest
    assert {(plan.segment, plan.target) for plan in manifest.plans} == {
        (segment.name, target) for segment in manifest.segments for target in ("sm86", "sm89")
    }
    assert all(plan.builder.startswith("tensorrt_rtx 1.") for plan in manifest.plans)
    tail = next(plan.summary for plan in manifest.plans if plan.segment == "tail")
    assert tail["targets"] == ["sm86", "sm89"]
    assert (tail["fused_attentions"], tail["fused_gelu"]) == (1, 1)
    assert manifest.notes["engines"]["rebuilt_identically"] == ["text_kv", "head", "tail", "decoder", "encoder"]
    assert list(out.parent.glob(".*")) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "sm90"], "expected targets among sm80, sm86, sm89, sm120, got sm90"),
        (["--target", "sm86,sm89", "--precision", "fp8"], r"expected targets with fp8 \(sm89, sm120\), got sm86"),
        (["--backend", "tensorrt"], r"tensorrt is not installed|no NVIDIA driver"),
        (["--model", "huge"], "huge"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["--model", "tiny", "--out", str(tmp_path / "bundle"), *arguments]) == 1
    assert re.search(words, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_needs_nothing_that_building_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what is missing, behind the plan; without --dry-run that is the first thing that is said."""
    monkeypatch.setattr(builder, "find_spec", lambda name: None)
    student = save_student(tmp_path / "student", gpu_config(depth=1))
    arguments = ["--model", str(student), "--out", str(tmp_path / "bundle")]
    missing = "tensorrt_rtx is not installed: pip install 'cfrt[trt]'"
    assert main([*arguments, "--dry-run"]) == 0
    *_, engines, last = capsys.readouterr().out.splitlines()
    assert engines.startswith("5 engines for sm89, about")
    assert last == f"building them needs more than this machine has: {missing}"
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"cfrt-export: error: no engine can be built: {missing}\n")
    assert not (tmp_path / "bundle").exists()
    assert main([*arguments, "--dry-run", "--target", "sm90"]) == 1


def test_an_interrupted_export_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engines, "check", interrupted)
    assert main(["--model", "tiny", "--out", str(tmp_path / "bundle")]) == 130
    assert "goes on where it stopped" in capsys.readouterr().err


# ---------------------------------------------------------------------- going on, and not trusting


def test_an_export_that_was_cut_off_builds_only_what_is_missing(made: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    original = Builder.build

    def build(self: Builder, graph: Path, path: Path) -> float:
        if path.name == ".again":
            return original(self, graph, path)
        built.append(graph.stem)
        if graph.stem == "tail" and built.count("tail") == 1:
            raise ExportError("cut off")
        return original(self, graph, path)

    monkeypatch.setattr(Builder, "build", build)
    with pytest.raises(ExportError, match="cut off"):
        SM89.run(made, transformer())
    again = Draft(made.folder, made.out)
    plans = SM89.run(again, transformer())["plans"]
    assert built == ["text_kv", "head", "mid_0", "tail", "tail"]
    assert len(plans) == 4
    built.clear()
    SM89.run(Draft(made.folder, made.out), transformer())
    assert built == []


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_a_bundle_does_not_say_8_bits_of_graphs_that_have_none(made: Draft, precision: str) -> None:
    with pytest.raises(ExportError, match=f"--precision {precision} was asked for, and the graphs hold no product"):
        replace(SM89, precision=precision).run(made, transformer())
    assert not (made.folder / "engines").exists()


def test_a_machine_that_builds_two_different_engines_is_not_trusted(
    made: Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Builder.build

    def build(self: Builder, graph: Path, path: Path) -> float:
        seconds = original(self, graph, path)
        if path.name == ".again":
            path.write_bytes(path.read_bytes() + b"!")
        return seconds

    monkeypatch.setattr(Builder, "build", build)
    with pytest.raises(ExportError, match="two builds of head differ"):
        SM89.run(made, transformer()[1:2])
    assert not (made.folder / ".again").exists()


def test_an_engine_that_does_not_say_what_it_is_is_shipped_unchecked_and_said_so(
    made: Draft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full TensorRT's, or those of another RTX."""
    monkeypatch.setattr(module, "read", lambda path: None)
    (plan,) = SM89.run(made, transformer()[1:2])["plans"]
    assert plan.summary == {}
    assert "head: the engine's own description cannot be read, so it is not checked" in capsys.readouterr().err


# ---------------------------------------------------------------------- checks


@pytest.fixture(scope="module")
def mid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Segment, onnx.ModelProto, Report]:
    folder = tmp_path_factory.mktemp("mid")
    segments, models = graphs(source_of(gpu_config()), "bf16")
    segment = next(segment for segment in segments if segment.name == "mid_0")
    with Builder() as builder:
        builder.build(save(models["mid_0"], folder, "mid_0"), folder / "mid_0.engine")
    report = read(folder / "mid_0.engine")
    assert report is not None
    return segment, models["mid_0"], report


def fails(mid: tuple[Segment, onnx.ModelProto, Report], words: str, *, targets: Sequence[str] = ("sm89",)) -> None:
    segment, model, report = mid
    with pytest.raises(ExportError, match=f"the engine of 'mid_0' is not what was asked for: .*{words}"):
        check(segment, model, report, targets, "1.7.1.116")


def test_what_was_built_passes(mid: tuple[Segment, onnx.ModelProto, Report]) -> None:
    segment, model, report = mid
    check(segment, model, report, ("sm89",), report.version)
    assert report.gemm_types() == {"bf16": 6}


def test_everything_that_an_engine_can_be_instead_is_said(mid: tuple[Segment, onnx.ModelProto, Report]) -> None:
    segment, model, report = mid
    fails(mid, "expected it to be for sm86, found sm89", targets=("sm86",))
    for changes, words in (
        ({"version": "1.6"}, "of TensorRT 1.7.1.116, found 1.6"),
        ({"stream_capturable": False}, "cannot be captured in a CUDA graph"),
        ({"attentions": 0}, "expected 1 attentions in one kernel each, found 0"),
        ({"fused_gelu": 0}, "expected 1 GELUs in the kernel of their product, found 0"),
        ({"scaled_gelu": 1}, "expected 0 GELUs in the kernel that scales their product of 8 bits, found 1"),
        ({"device_memory": 1 << 30}, r"scratch memory of at most \d+ MB, found 1074 MB"),
        ({"inputs": {**report.inputs, "x": Port((4, 128), "fp32")}}, r"input x to be .*bf16.*, found .*fp32"),
        ({"inputs": {k: v for k, v in report.inputs.items() if k != "text_k"}}, "input text_k to be .*found None"),
        ({"outputs": {}}, "output out.qkv to be .*found None; .*output out.x"),
    ):
        fails((segment, model, replace(report, **changes)), words)


@pytest.mark.parametrize("kind", ["float8e4m3fn", "int8"])
def test_a_product_that_was_quantised_multiplies_8_bits(
    mid: tuple[Segment, onnx.ModelProto, Report], tmp_path: Path, kind: str
) -> None:
    """A real engine's product does; one whose product is said to be of bf16 does not."""
    segment = replace(mid[0], name="decoder", inputs=(), outputs=())
    model = quantised(kind)
    with Builder() as builder:
        builder.build(save(model, tmp_path, "quantised"), tmp_path / "engine")
    report = read(tmp_path / "engine")
    assert report is not None
    report = replace(report, inputs={}, outputs={})
    check(segment, model, report, ("sm89",), report.version)
    wide = replace(report, gemms=dict.fromkeys(report.gemms, ("bf16", "bf16")))
    with pytest.raises(ExportError, match="to be a product of 8-bit numbers, found bf16 x bf16"):
        check(segment, model, wide, ("sm89",), report.version)


def test_where_an_engine_lies() -> None:
    assert file_of(transformer()[2]) == "engines/mid_0.engine"
