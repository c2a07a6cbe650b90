"""Products in 8 bits: scales, balancing, calibration, and graphs that say what `cfrt.nn` says on the same weights."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from bundle_fixture import source_of
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, numpy_helper
from sampling_fixture import EULER, sampled
from student_fixture import BLUE, RED, random_weights, save_student, small_config

import cfrt
from cfrt.bundle import Bundle, Segment
from cfrt.engines import Spec
from cfrt.engines.torch import TorchEngine
from cfrt.errors import ExportError
from cfrt.nn.dit import CausalDiT
from cfrt.nn.ring import RingCache
from cfrt.text import TableText
from cfrt.weights import save_model
from export import calibrate, transformer, verify
from export.build import PIXELS, build, eight_bits, outside
from export.builder import Builder
from export.calibrate import Calibration, find
from export.engine_checks import check, quantised_products
from export.engine_report import read
from export.onnx import Options, main
from export.quantize import (
    FORMATS,
    Inputs,
    Product,
    cut,
    inverse_factors,
    kept,
    quantise,
    rows,
    value_scales,
    values,
)
from export.segments import layout
from export.sources import Source

pytestmark = pytest.mark.cpu

PRECISIONS = sorted(FORMATS)
Chain = tuple[tuple[Segment, ...], Mapping[str, ModelProto]]
CONFIG = small_config(window=2, sinks=1, trained_frames=3)


def calibrated(source: Source, precision: str) -> Source:
    text = TableText(source.config.text, np.asarray(source.table))
    texts = tuple(text.encode(prompt).rows for prompt in (RED, BLUE))
    return replace(
        source, ranges=Calibration(origin="a test", texts=texts, config=source.config).observe(source, precision)
    )


@pytest.fixture(scope="module")
def sources() -> dict[str, Source]:
    return {precision: calibrated(source_of(CONFIG), precision) for precision in PRECISIONS}


@pytest.fixture(scope="module")
def source(sources: dict[str, Source]) -> Source:
    return sources["fp8"]


@pytest.fixture(scope="module")
def chain(source: Source) -> Chain:
    """In fp8. Segments are the same in int8, and so are the decoder and the encoder."""
    segments = layout(CONFIG, "fp8", "tiny")
    return segments, {segment.name: build(segment, source, "fp8") for segment in segments}


def mid(source: Source, precision: str) -> ModelProto:
    segment = next(segment for segment in layout(source.config, precision, "tiny") if segment.name == "mid_0")
    return transformer.build(segment, source.config, source.dit, precision, source.ranges)


# ---------------------------------------------------------------------- numbers


def reaching(x: np.ndarray) -> Inputs:
    """Rows of inputs as calibration sees them."""
    narrow = x.astype(np.float32)
    return Inputs(low=narrow.min(axis=0), high=narrow.max(axis=0), mean=narrow.mean(axis=0))


def multiplied(x: np.ndarray, product: Product, precision: str) -> np.ndarray:
    """As the graph of a product without a bias says it."""
    known, scale = FORMATS[precision], product.input_scale
    even = x if product.inverse_factors is None else x * product.inverse_factors
    narrow = (even if product.offset is None else even - product.offset) / scale
    limited = narrow.clip(-known.largest, known.largest)
    rounded = (np.rint(limited) if known.is_even else limited).astype(known.dtype).astype(np.float32)
    return rounded * scale @ product.dequantised() + product.shift


@pytest.mark.parametrize("precision", PRECISIONS)
@given(seed=st.integers(0, 99), spread=st.floats(0, 6), balanced=st.booleans())
def test_a_weight_is_within_half_a_step(precision: str, seed: int, spread: float, balanced: bool) -> None:
    """Of its output's scale in int8, of its own last bit in fp8; whatever the balancing, which rounds nothing."""
    random = np.random.default_rng(seed)
    weight = (random.normal(size=(24, 8)) * np.exp(spread * random.normal(size=(24, 1)))).astype(np.float32)
    largest = np.exp(spread * random.normal(size=24)).astype(np.float32)
    inputs = reaching(np.stack([largest, -largest * random.uniform(-1, 1, 24)]))
    product = quantise(weight, inputs, precision, balanced=balanced)
    even = weight if product.inverse_factors is None else weight / product.inverse_factors[:, None]
    error = np.abs(product.dequantised() - even)
    if precision == "int8":
        assert (error <= 0.51 * product.weight_scale).all()
    else:
        assert (error <= np.maximum(np.abs(even) / 16, product.weight_scale / 1024) * 1.01).all()
    for scale in (product.weight_scale, product.input_scale):
        np.testing.assert_array_equal(scale, np.asarray(scale).astype(ml_dtypes.bfloat16).astype(np.float32))
    ends = np.stack([inputs.low, inputs.high]) * (1 if product.inverse_factors is None else product.inverse_factors)
    offset = np.zeros(24) if product.offset is None else product.offset
    np.testing.assert_array_equal(offset, offset.astype(ml_dtypes.bfloat16).astype(np.float32))
    reach = np.abs(ends - offset).max() - np.abs(offset).max() / 256  # by which it may be off
    assert reach <= product.input_scale * FORMATS[precision].largest * 1.004


def test_factors_are_powers_of_two_that_halve_the_difference() -> None:
    largest = np.array([64, 1, 1, 1, 1, 0], np.float32)
    weight = np.full((6, 3), 0.7, np.float32)
    np.testing.assert_array_equal(inverse_factors(weight, largest), [1 / 8, 1, 1, 1, 1, 1])
    product = quantise(weight, reaching(np.stack([largest, -largest])), "int8", balanced=True)
    assert product.input_scale == np.float32(8 / 127).astype(ml_dtypes.bfloat16)


def test_balancing_helps_where_channels_differ() -> None:
    """A product with a loud input, as transformers have them."""
    random = np.random.default_rng(0)
    x, weight = random.normal(size=(200, 64)), random.normal(size=(64, 32)).astype(np.float32)
    x[:, :2] *= 100
    weight[:2] /= 30
    errors = []
    for balanced in (False, True):
        product = quantise(weight, reaching(x), "int8", balanced=balanced)
        errors.append(np.linalg.norm(multiplied(x, product, "int8") - x @ weight))
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_a_gelu_leaves_uses_all_of_int8(precision: str) -> None:
    """Inputs that reach further to one side: half a step is lost instead of a whole one. Those that fit stay."""
    random = np.random.default_rng(0)
    x, weight = random.normal(size=(4000, 64)).astype(np.float32), random.normal(size=(64, 32)).astype(np.float32)
    x[:, 16:] = 0.25 * np.tanh(x[:, 16:])
    x[:, :16] = np.maximum(-0.17, 2 * x[:, :16])
    product = quantise(weight, reaching(x), precision, balanced=False)
    if precision == "fp8":
        assert product.offset is None
        return
    assert product.offset is not None
    assert (product.offset[:16] > 0).all()
    assert not product.offset[16:].any()
    even = replace(reaching(x), low=-reaching(x).largest, high=reaching(x).largest)
    plain = quantise(weight, even, precision, balanced=False)
    assert plain.offset is None
    errors = [np.square(multiplied(x, each, precision) - x @ weight).mean() for each in (product, plain)]
    assert errors[0] < errors[1] / 3


def test_what_is_cut_off_is_cut_off_on_both_sides() -> None:
    """Where a share of the reach counts, the widest input is cut in its middle; others move no more than they must."""
    inputs = Inputs(low=np.array([0, 0, -1], np.float32), high=np.array([16, 6, 1], np.float32), mean=np.zeros(3))
    product = quantise(np.ones((3, 1), np.float32), replace(inputs, share=np.float32(0.5)), "int8", balanced=False)
    np.testing.assert_array_equal(product.offset, [8, 2, 0])
    assert product.input_scale == np.float32(4 / 127).astype(ml_dtypes.bfloat16)


def test_values_in_the_ring_have_room(source: Source) -> None:
    """Half of what e4m3 reaches, for each channel; 1 where nothing was seen."""
    largest = np.stack([source.ranges[values(block)] for block in range(CONFIG.depth)])
    assert largest.shape == (CONFIG.depth, CONFIG.width)
    assert (largest > 0).all()
    scales = value_scales(source.ranges, CONFIG)
    np.testing.assert_allclose(largest / scales, 224, rtol=1e-6)
    np.testing.assert_array_equal(outside(source, "fp8")["v_scale"], scales)
    assert "v_scale" not in outside(source, "bf16")
    silent = {values(block): np.zeros(CONFIG.width, np.float32) for block in range(CONFIG.depth)}
    assert (value_scales(silent, CONFIG) == 1).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_mean_of_an_output_is_what_it_was(precision: str) -> None:
    """Rounded weights alone move it; the bias takes that back."""
    random = np.random.default_rng(0)
    x, weight = 1 + random.normal(size=(4000, 24)), random.normal(size=(24, 8)).astype(np.float32)
    product = quantise(weight, reaching(x), precision, balanced=True)
    assert product.inverse_factors is not None
    even = x * product.inverse_factors - (0 if product.offset is None else product.offset)
    found, expected = (even @ product.dequantised()).mean(axis=0), (x @ weight).mean(axis=0)
    assert np.abs(found - expected).max() > 1e-3
    np.testing.assert_allclose(found + product.shift, expected, atol=1e-5)


def test_a_thin_tail_is_cut_off_and_what_all_reach_is_not() -> None:
    """In int8: for 8 bits the best cut of a Laplace distribution is at about ten of its scales (arXiv:1810.05723). A
    floating format has little to gain, and loses what it cuts off."""
    random, weight = np.random.default_rng(0), np.ones((4, 2), np.float32)
    even = random.uniform(-1, 1, (2000, 4)).astype(np.float32)
    tail = random.laplace(size=(50_000, 4)).astype(np.float32)
    assert cut(reaching(even), even, weight, "int8", balanced=False).share == 1
    inputs = cut(reaching(tail), tail, weight, "int8", balanced=False)
    assert 9 < 127 * quantise(weight, inputs, "int8", balanced=False).input_scale < 12 < inputs.largest.max()
    assert cut(reaching(even), even, weight, "fp8", balanced=True).share == 1


# ---------------------------------------------------------------------- graphs


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_graph_of_8_bits_says_what_pytorch_says(sources: dict[str, Source], chain: Chain, precision: str) -> None:
    """The whole chain through the ring's wrap, against `cfrt.nn` on the same 8-bit weights; and what rounding costs."""
    source, (segments, graphs) = sources[precision], chain
    if precision != "fp8":
        own = {s.name: build(s, source, precision) for s in segments if s.name not in PIXELS}
        graphs = {**graphs, **own}
    errors = verify.compare(source, segments, graphs, precision, 6)
    assert errors["velocity"] < 1e-5
    assert errors["ring"] < 1e-5
    assert errors["text"] < 1e-5
    assert 1e-3 < errors["rounding"] < verify.ROUNDING[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scales_that_are_far_too_small_cost_more_than_an_export_may(sources: dict[str, Source], precision: str) -> None:
    """Eight times: what is cut off then is most of an input."""
    good = sources[precision]
    ranges = {name: x / np.float32(8) if name.endswith(".share") else x for name, x in good.ranges.items()}
    bad, segments = replace(good, ranges=ranges), layout(CONFIG, precision, "tiny")
    errors = verify.compare(bad, segments, {s.name: build(s, bad, precision) for s in segments}, precision, 6)
    assert errors["velocity"] < 1e-5
    assert errors["rounding"] > verify.ROUNDING[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_products_of_the_table_and_no_others(sources: dict[str, Source], precision: str) -> None:
    """By their names, in 8 bits both, the weights held in 8 bits; what an export says of its size counts the same."""
    source = sources[precision]
    model = mid(source, precision)
    names = {node.name for node in quantised_products(model)}
    named = {"+".join(layers) for _, layers in rows(CONFIG, precision)}
    assert names == {name for name in named if name.startswith(f"blocks.{int('self_attn.q' in name)}.")}
    held = {tensor.name: numpy_helper.to_array(tensor).dtype for tensor in model.graph.initializer}
    weights = {f"{name}.weight" for name in names}
    assert {held[name] for name in weights} == {FORMATS[precision].dtype}
    segment = next(segment for segment in layout(CONFIG, precision, "tiny") if segment.name == "mid_0")
    counted = eight_bits(segment, source, precision)
    assert counted == sum(prod(tensor.dims) for tensor in model.graph.initializer if tensor.name in weights)


def test_fp8_leaves_the_last_product_alone(sources: dict[str, Source]) -> None:
    """Its weight is the model's own in bf16, and nothing is said of it in the ranges that come along."""
    model, name = mid(sources["fp8"], "fp8"), "blocks.0.ffn.2"
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    own = sources["fp8"].dit[f"{name}.weight"].T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(held[f"{name}.weight"], own)
    assert f"{name}.high" not in sources["fp8"].ranges
    assert f"{name}.high" in sources["int8"].ranges
    assert "ffn.2" in kept("fp8")
    assert "ffn.2" not in kept("int8")


@pytest.mark.parametrize(
    ("precision", "harm"),
    [
        ("fp8", "ffn.0.weight_scale"),
        ("fp8", "ffn.0.inverse_factors"),
        ("fp8", "self_attn.o.weight"),
        ("int8", "ffn.2.offset"),
        ("int8", "self_attn.q.offset"),
    ],
)
def test_verification_sees_a_wrong_number(sources: dict[str, Source], chain: Chain, precision: str, harm: str) -> None:
    """One scale, one factor, the weights of one input, or an offset, in a graph that is otherwise right."""
    source, (segments, graphs) = sources[precision], chain
    if precision != "fp8":
        graphs = {**graphs, **{s.name: build(s, source, precision) for s in segments if s.name not in PIXELS}}
    model = ModelProto()
    model.CopyFrom(graphs["mid_0"])
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(harm))
    array = numpy_helper.to_array(tensor).astype(np.float32)
    array[np.abs(array).reshape(len(array), -1).max(axis=1).argmax()] /= 2
    tensor.CopyFrom(numpy_helper.from_array(array.astype(numpy_helper.to_array(tensor).dtype), tensor.name))
    errors = verify.compare(source, segments, {**graphs, "mid_0": model}, precision, 3)
    assert errors["velocity"] > 10 * verify.EXACT


def test_a_weight_that_is_no_number_is_refused(source: Source) -> None:
    harmed = {**source.dit, "blocks.0.ffn.0.weight": np.full_like(source.dit["blocks.0.ffn.0.weight"], np.nan)}
    with pytest.raises(ExportError, match=r"ffn\.0\.weight holds values that are not finite"):
        mid(replace(source, dit=harmed), "int8")


# ---------------------------------------------------------------------- engines


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_engine_multiplies_8_bits(precision: str, tmp_path: Path) -> None:
    """A real build: every product of the table multiplies 8-bit numbers, GELU and attention stay in fused kernels."""
    config = small_config(width=128, heads=2, ffn=256, latent_grid=(4, 4))
    model = mid(calibrated(source_of(config), precision), precision)
    onnx.save(model, tmp_path / "mid_0.onnx")
    with Builder() as builder:
        builder.build(tmp_path / "mid_0.onnx", tmp_path / "mid_0.engine")
        version = builder.version
    report = read(tmp_path / "mid_0.engine")
    assert report is not None
    segment = next(segment for segment in layout(config, precision, "tiny") if segment.name == "mid_0")
    check(segment, model, report, ("sm89",), version)
    assert report.gemm_types() == {"int8": {"int8": 6}, "fp8": {"fp8": 5, "bf16": 1}}[precision]
    assert (report.rounded_gelu, report.scaled_gelu) == {"int8": (1, 0), "fp8": (0, 1)}[precision]
    wrong = replace(report, rounded_gelu=0, scaled_gelu=0)
    with pytest.raises(ExportError, match=r"expected 1 GELUs in the kernel that (scales|rounds) the.*, found 0"):
        check(segment, model, wrong, ("sm89",), version)


# ---------------------------------------------------------------------- the command


def test_a_bundle_says_where_its_scales_come_from(tmp_path: Path) -> None:
    """And streams; the same export again is of the same bytes."""
    (tmp_path / "prompts.txt").write_text(f"{RED}\n\n{BLUE}\n")
    model = save_student(tmp_path / "model", CONFIG)
    arguments = ["--model", str(model), "--precision", "int8", "--calibration", str(tmp_path / "prompts.txt")]
    assert main([*arguments, "--out", str(tmp_path / "b")]) == 0
    bundle = Bundle.open(tmp_path / "b")
    bundle.check()
    note = bundle.manifest.notes["quantization"]
    assert note["calibration"]["prompts"] == "prompts.txt"
    assert note["calibration"]["streams"] == 2
    assert note["products"]["self_attn.q+self_attn.k+self_attn.v"] == {"inputs balanced in": "modulation"}
    assert bundle.manifest.verification.limits["velocity"] == verify.EXACT
    with cfrt.Stream(RED, model=tmp_path / "b", engine="onnx", seed=1) as stream:
        assert [frame.pixels.shape for frame in stream.frames(2)] == [(32, 32, 3)] * 2


@pytest.mark.parametrize("changes", [{}, EULER], ids=["renoise", "euler"])
@torch.no_grad()
def test_a_unit_is_calibrated_with_the_student_s_own_steps(changes: dict) -> None:
    config = replace(CONFIG, **changes)
    engine = TorchEngine()
    engine.prepare(Spec(config=config, weights=random_weights(config), seed=5, precision="fp32"))
    engine.set_text(rows_of_text := np.ones((4, 16), np.float32))
    dit = CausalDiT.from_arrays(config, source_of(config).dit).eval()
    ring, text = RingCache(config), dit.text_kv(torch.from_numpy(rows_of_text)[None, None])
    for unit in range(3):
        expected = sampled(engine, config, unit)
        found = calibrate._played(dit, text, ring, unit, 5)
        torch.testing.assert_close(found, expected)
        engine.commit(expected, unit)
        dit.commit(found, text, ring, unit)


def test_random_weights_are_shown_random_text() -> None:
    """A few tokens of it; and a model that is verified by segments takes the ranges of its last layer along."""
    source = source_of(replace(CONFIG, depth=3, latent_grid=(4, 6)))
    options = Options(model="small", weights="random", out=Path("b"))
    shown = find(options, source, "fp8")
    assert shown is not None
    assert shown.origin.startswith("none: random text and noise")
    assert (len(shown.texts), shown.config.frame_tokens) == (1, 4)
    source = replace(source, ranges=shown.observe(source, "fp8"))
    products = {layers[0] for _, layers in rows(source.config, "fp8")}
    seen = {name + kind for name in products for kind in Inputs.KINDS}
    assert source.ranges.keys() == seen | {values(i) for i in range(3)}
    small = verify.few_tokens(source, "fp8")
    np.testing.assert_array_equal(small.ranges["blocks.1.ffn.0.high"], source.ranges["blocks.2.ffn.0.high"])
    assert len(quantised_products(mid(small, "fp8"))) == 5


REFUSED = {
    "a wide precision": (["--precision", "bf16"], "red circle", "--calibration is for --precision fp8 and int8"),
    "no prompts": (["--precision", "int8"], "\n", "expected prompts in"),
    "an unknown word": (["--precision", "int8"], "a red dragon", "does not know dragon of the calibration prompt"),
    "random weights": (["--precision", "fp8", "--weights", "random"], "red circle", "random weights read no prompts"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_prompts_that_cannot_calibrate_say_why(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, prompts, words = REFUSED[what]
    (tmp_path / "prompts.txt").write_text(prompts)
    model = save_student(tmp_path / "model", CONFIG)
    common = ["--model", str(model), "--calibration", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "b")]
    assert main([*common, *flags]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_model_that_reads_umt5_needs_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(CONFIG, text=replace(CONFIG.text, kind="umt5", vocab={}, ignored=()))
    weights = {name: array for name, array in random_weights(CONFIG).items() if name != "text.table"}
    save_model(model := tmp_path / "model", config, weights)
    assert main(["--model", str(model), "--precision", "int8", "--out", str(tmp_path / "b")]) == 1
    assert "one a line, with --calibration FILE" in capsys.readouterr().err
