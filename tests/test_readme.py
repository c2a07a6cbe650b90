"""README.md says what the committed measurements say."""

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
