"""`cfrt bench --predict`: the model of an RTX 4090 is what it says, follows what it is calibrated on, and is honest."""

import json
from dataclasses import replace
from importlib.resources import files
from math import prod
from pathlib import Path

import pytest

import _cfrt
from benchmarks import sass_gate
from cfrt import memory, predict, shapes
from cfrt.cli import main
from cfrt.config import PRESETS
from cfrt.errors import ConfigError
from export import quantize

pytestmark = pytest.mark.cpu

FRAMEWISE = replace(PRESETS["wan-1.3b-framewise-2step"], window=9)
CHUNKWISE = replace(PRESETS["wan-1.3b-chunkwise-4step"], window=9)


@pytest.mark.parametrize(
    ("config", "seen", "products", "cross", "attention"),
    [(FRAMEWISE, 9, 3.901, 0.147, 4.037), (FRAMEWISE, 21, 3.901, 0.147, 9.420), (CHUNKWISE, 12, 11.704, 0.442, 16.148)],
    ids=["F=1 W=9", "F=1 W=21", "F=3 W=12"],
)
def test_operations_of_a_pass(config, seen: int, products: float, cross: float, attention: float) -> None:
    """TFLOP, counted by hand from Wan2.1's layers."""
    shape = predict.Shape(config, seen)
    found = [shape.products, shape.cross_attention, shape.attention]
    assert [x / 1e12 for x in found] == pytest.approx([products, cross, attention], rel=2e-3)


def test_a_clip_is_its_published_operations() -> None:
    """390.8, 574.9 and 943.2 TFLOP of 21 latent frames in 1, 2 and 4 steps, four for the first unit."""
    for steps, wanted in ((1, 390.8), (2, 574.9), (4, 943.2)):
        passes = predict.clip(f"wan-1.3b-framewise-{steps}step")
        total = sum(p.products + p.cross_attention + p.attention for p in passes)
        assert total / 1e12 == pytest.approx(wanted, rel=2e-3)


def test_the_slow_end_gives_back_what_it_was_calibrated_on() -> None:
    """With the share that a row leaves for products, the slow end of its passes takes the row's own time."""
    for row in predict.published():
        card = predict.CARDS[row.card]
        terms = [predict.pass_terms(shape, card, "bf16", row.share()).values() for shape in row.passes]
        assert sum(term.slow for pass_ in terms for term in pass_) == pytest.approx(row.seconds)
    assert predict.calibrate() == min(row.share() for row in predict.published() if row.compiled)


def test_released_code_leaves_one_share_whatever_the_steps() -> None:
    """The three frame-wise rows differ by a factor of 2.4 in time: a model that explains them agrees on their share."""
    shares = [row.share() for row in predict.published() if "++" in row.what]
    assert max(shares) / min(shares) < 1.05


@pytest.mark.parametrize("queries", [1560, 4680])
@pytest.mark.parametrize("frames", [9, 21])
def test_the_balance_is_that_of_the_planner(queries: int, frames: int) -> None:
    if _cfrt.build_info()["cuda"] is None:
        pytest.skip("built without CUDA")
    shipped = sass_gate.balance(queries, frames * 1560) * 1560 / 32 / 49  # whose granules are counted whole
    assert predict.balance(queries, 12, frames, 1560, 128) == pytest.approx(shipped, rel=1e-6)


def test_the_figures_are_those_of_the_installed_kernels() -> None:
    shipped = json.loads(files("cfrt").joinpath("sass.json").read_text())
    assert shipped["label"] == "predicted"
    cuda = _cfrt.build_info()["cuda"]
    if cuda is None or 89 not in cuda["archs"]:
        pytest.skip("built without sm_89")
    made = sass_gate.figures(sass_gate.examine(Path(_cfrt.__file__), 89))
    assert len(made["rows"]) == len(shipped["rows"]) >= 6
    for ours, row in zip(shipped["rows"], made["rows"], strict=True):
        assert ours["kernel"] == row["kernel"]
        assert ours["tflops_low"] == pytest.approx(row["tflops_low"], rel=0.03)


@pytest.mark.parametrize("config", [FRAMEWISE, CHUNKWISE], ids=lambda c: c.name)
def test_less_work_is_faster(config) -> None:
    full = predict.predict(config)
    assert full.label == "predicted"
    assert 0 < full.fps.slow < full.fps.fast
    assert full.latency_ms.slow < full.unit_ms.slow
    assert predict.predict(replace(config, window=6)).fps.slow > full.fps.slow
    assert predict.predict(config, precision="bf16").fps.fast < full.fps.fast
    assert predict.predict(config, decoder="wan").fps.slow < full.fps.slow
    assert predict.predict(predict.resized(config, "240x416")).memory < full.memory
    assert any("is not known" in line for line in full.assumptions)


@pytest.mark.parametrize(("precision", "layers"), [("int8", []), ("fp8", ["ffn.2"])])
def test_what_exports_leave_in_bf16_is_priced_as_bf16(precision: str, layers: list[str]) -> None:
    """In its bytes, in its time and among the assumptions; by the exports' own table."""
    left = [layer for row in quantize.TABLE if row not in quantize.table(precision) for layer in row.layers]
    assert left == layers
    tensors = shapes.dit(FRAMEWISE)
    numbers = sum(prod(tensors[f"blocks.{i}.{layer}.weight"]) for i in range(FRAMEWISE.depth) for layer in left)
    assert predict.left_wide(FRAMEWISE, precision) == numbers
    shape, card = predict.Shape(FRAMEWISE, 9), predict.CARDS["rtx4090"]
    terms, wide = (predict.pass_terms(shape, card, kind, 0.3)["dense products"] for kind in (precision, "bf16"))
    done = 2 * numbers * shape.tokens / shape.products
    narrow = shape.products / (0.3 * card.tensor[precision] * 1e12)
    assert terms.slow == pytest.approx(done * wide.slow + (1 - done) * narrow)
    narrow_bytes = memory.BYTES[precision] * memory.parameters(FRAMEWISE)
    assert shape.bytes(precision) - shape.bytes("bf16") == narrow_bytes + numbers - 2 * memory.parameters(FRAMEWISE)
    found = predict.predict(FRAMEWISE, precision=precision)
    assert any("last product (33 % of the operations) in bf16" in line for line in found.assumptions) == bool(left)


def test_fp8_takes_the_bytes_that_it_leaves_wide() -> None:
    kept = [predict.predict(FRAMEWISE, precision=precision).memory for precision in ("int8", "fp8")]
    assert kept[1] - kept[0] == FRAMEWISE.depth * FRAMEWISE.width * FRAMEWISE.ffn


def test_the_command_says_predicted_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--predict", "--gpu", "rtx4090", "--model", "wan-1.3b-framewise-2step", "--window", "9",
                 "--resolution", "480x832", "--decoder", "taehv", "--precision", "int8"]) == 0  # fmt: skip
    text = capsys.readouterr().out
    assert text.startswith("PREDICTED, not measured: wan-1.3b-framewise-2step on one RTX 4090, 480x832, int8, 2 steps")
    assert "at least 24 fps" in text
    assert not set("{}'") & set(text)  # prose and numbers, nothing of how Python prints a container
    assert main(["bench", "--predict", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["label"], found["window"], found["steps"]) == ("predicted", 9, 2)
    assert found["unit_ms"]["fast"] < found["unit_ms"]["slow"]
    for end in ("fast", "slow"):
        one = sum(term[end] for term in found["pass_ms"].values())
        assert found["unit_ms"][end] == pytest.approx(3 * one + found["decode_ms"][end])
        assert found["latency_ms"][end] == pytest.approx(2 * one + found["decode_ms"][end])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h100"], "expected --gpu rtx4090"),
        (["--precision", "int4"], "expected a precision out of bf16, fp16, fp8, int8"),
        (["--model", "tiny"], "Wan's latents"),
        (["--model", "nobody"], "expected a preset to predict"),
        (["--resolution", "481x832"], "multiples of 8"),
    ],
    ids=str,
)
def test_what_is_not_known_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--predict", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_heads_that_no_kernel_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="heads of 64 or 128 numbers"):
        predict.kernel_rates("int8", 96)
