"""README.md and docs/cpu-performance.md say what the committed measurements say."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("cpu_speed")


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("roofline")


def test_the_table_and_the_chart_are_those_of_the_committed_run(tool: ModuleType) -> None:
    """`python tools/cpu_speed.py` would change nothing."""
    kept = tool.load()
    assert tool.section(kept) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / tool.CHART).read_text(encoding="utf-8") == tool.chart(kept)


def test_the_chart_is_a_picture_for_dark_and_light_pages(tool: ModuleType) -> None:
    text = (ROOT / tool.CHART).read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert "prefers-color-scheme:dark" in text
    width = float(root.attrib["viewBox"].split()[2])
    bars = [node for node in root if node.tag.endswith("rect")]
    assert len(bars) > 40
    assert all(float(bar.attrib["x"]) + float(bar.attrib["width"]) < width for bar in bars)


def test_a_ratio_is_the_fastest_others_time_over_ours(tool: ModuleType) -> None:
    row = {"size": "S", "tokens": 64, "threads": 1, "precision": "fp32", "gops": 1.0, "error": 0.0}
    rows = [
        row | {"engine": engine, "ms": ms} for engine, ms in (("native", 10.0), ("torch", 30.0), ("openvino", 25.0))
    ]
    rows.append(row | {"engine": "onnxruntime", "ms": None, "failed": "it was wrong"})
    kept = json.loads(json.dumps(tool.load() | {"rows": rows}))
    assert "| S/64, 1 thread | 10.0, 25.0 (OpenVINO), **2.5x** |" in tool.section(kept)


def test_the_page_on_control_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python tools/steering.py` would change nothing; and the long run kept its promises."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    steering = importlib.import_module("steering")
    text = steering.PAGE.read_text(encoding="utf-8")
    assert steering.page(text) == text
    soak = json.loads(steering.SOAK.read_text())
    assert soak["seconds"] >= 600
    assert abs(soak["drift_frames"]["largest"]) <= 1
    assert soak["memory"]["growth_mb"] < 8


def test_the_roofline_is_that_of_the_committed_run(roofline: ModuleType) -> None:
    """`python tools/roofline.py` would change nothing."""
    kept = roofline.load()
    assert roofline.section(kept) in roofline.PAGE.read_text(encoding="utf-8")
    picture = (ROOT / "docs" / roofline.CHART).read_text(encoding="utf-8")
    assert picture == roofline.chart(kept)
    assert ElementTree.fromstring(picture).tag.endswith("svg")


def test_the_page_on_exports_says_what_8_bits_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python tools/exported.py` would change nothing; a loss is one for certain by its whole interval."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    exported = importlib.import_module("exported")
    text = exported.PAGE.read_text(encoding="utf-8")
    assert exported.page(text) == text
    measures = {name: {"difference": {"mean": 0.04, "margin": 1.55}} for name in exported.MEASURES}
    kept = {"fp8": {"measured_on": "2026-11-26", "prompts": 2048, "measures": measures}}
    assert "| fp8 | 2,048 | +0.0 ± 1.6 | +0.0 ± 1.6 | +0.0 ± 1.6 | 2026-11-26 |" in exported.section(kept)
    for loss, worse in ((2.5, "none"), (2.6, "fp8")):
        measures["dynamic"]["difference"]["mean"] = -loss
        assert exported.section(kept).endswith(f"lost for certain by {worse}.")


@pytest.mark.parametrize(
    ("peer", "ours", "verdict"),
    [(40.0, 80.0, "met"), (40.0, 79.0, "missed"), (49.0, 90.0, "missed"), (50.0, 99.0, "beyond the ceiling")],
)
def test_a_target_past_the_ceiling_is_told_from_one_that_is_missed(
    roofline: ModuleType, peer: float, ours: float, verdict: str
) -> None:
    """Twice the peer, on a core that can do 100."""
    row = {"size": "S", "tokens": 64, "threads": 1, "precision": "fp32"}
    rows = [row | {"engine": e, "ms": 1000 / rate, "gops": rate} for e, rate in (("native", ours), ("openvino", peer))]
    (line,) = roofline.lines({"rows": rows, "ceiling": {"fp32": 100.0, "bf16": 200.0, "int8": 400.0}})
    assert (line.verdict, line.needed) == (verdict, 2 * peer / 100)


def test_attention_keeps_its_own_ceiling_in_an_int8_pass(roofline: ModuleType) -> None:
    """Size S at 64 tokens: 0.308 of 1.02 GOP are attention."""
    rates = {"fp32": 1.0, "bf16": 2.0, "int8": 4.0}
    assert roofline.ceiling(rates, ("S", 64, 1), "bf16", 1.02) == 2.0
    mixed = roofline.ceiling(rates, ("S", 64, 1), "int8", 1.02)
    assert mixed == pytest.approx(1.02 / ((1.02 - 0.308) / 4 + 0.308 / 2), rel=1e-3)


def test_the_page_on_speed_says_what_an_h200_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python tools/gpu_speed.py` would change nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    speed = importlib.import_module("gpu_speed")
    text = speed.PAGE.read_text(encoding="utf-8")
    assert speed.page(text) == text
