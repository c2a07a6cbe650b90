"""The hook around the stages of a stream."""

import json
from pathlib import Path

import pytest
from student_fixture import BLUE, RED, save_student

import cfrt
from cfrt.engines.native import NativeEngine
from cfrt.trace import Trace

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("student"))


def test_a_trace_shows_every_stage(student: Path, tmp_path: Path) -> None:
    trace = Trace()
    stream = cfrt.Stream(RED, model=student, fps=2000.0, trace=trace)
    list(stream.frames(17))
    stream.prompt(BLUE, recache=True)
    list(stream.frames(8))
    stream.close()
    totals = trace.totals()
    assert {"unit", "noise", "denoise 0", "denoise 1", "decode", "commit", "recache", "wait"} <= set(totals)
    assert totals["recache"][0] == 1
    assert totals["decode"][0] >= 7
    trace.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(trace)
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"cfrt-stream", "MainThread"}
    unit = next(event for event in spans if event["name"] == "unit")
    inner = [event for event in spans if event["tid"] == unit["tid"] and event["name"].startswith("denoise")]
    assert any(unit["ts"] <= e["ts"] and e["ts"] + e["dur"] <= unit["ts"] + unit["dur"] for e in inner)
    assert len(Trace(longest=2)) == 0


def test_an_engine_may_mark_its_stages_too(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the torch engine does on CUDA with NVTX ranges."""
    theirs, ours = Trace(), Trace()
    monkeypatch.setattr(NativeEngine, "annotate", theirs, raising=False)
    stream = cfrt.Stream(RED, model=student, fps="max", trace=ours)
    list(stream.frames(9))
    stream.close()
    counts = [{stage: count for stage, (count, _) in trace.totals().items()} for trace in (theirs, ours)]
    assert counts[0] == counts[1] != {}
