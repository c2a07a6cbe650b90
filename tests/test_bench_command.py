"""`cfrt bench`: a real stream on this machine, its account, and what it refuses."""

import json

import pytest

from cfrt import bench
from cfrt.cli import main

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def found() -> dict:
    return bench.measure(seconds=0.3, engine="native")


def test_it_measures_a_stream(found: dict) -> None:
    assert (found["label"], found["model"], found["engine"], found["decoder"]) == ("measured", "tiny", "native", "tiny")
    assert found["fps"] == pytest.approx(found["frames"] / found["seconds"])
    assert found["seconds"] >= 0.3
    assert found["time_to_first_frame"] > 0
    for name in ("unit", "latency", "decode", "change_to_pixel"):
        timing = found[name]
        assert 0 < timing["p50"] <= timing["p95"] <= timing["p99"]
    assert found["change_to_pixel"]["count"] == bench.CHANGES
    assert found["unit"]["count"] * 4 >= found["frames"]
    assert found["memory"]["host_peak"] > 10_000_000
    assert found["sub_frame"] == (found["latency"]["p95"] < 1 / 16)


def test_the_page_says_on_what(found: dict) -> None:
    text = bench.as_text(found)
    assert text.startswith(f"measured on {found['date']}: tiny by native in {found['precision']}")
    assert "change to pixel" in text
    assert "host peak" in text


def test_what_is_not_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("cfrt.bench.subprocess.run", missing)
    assert bench.device_memory() is None
    assert bench.machine()["gpu"] is None


def test_the_memory_of_this_process_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfrt.bench.os.getpid", lambda: 42)
    monkeypatch.setattr("cfrt.bench._nvidia", lambda *_: "41, 900\n42, 100\n42, 20\n42, [N/A]")
    assert bench.device_memory() == 120 << 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--window", "9"], "--window: a model is measured as it is"),
        (["--seconds", "0"], "expected --seconds > 0"),
        (["--model", "nobody"], "there is no model 'nobody'"),
        (["--decoder", "taehv"], "no engine can run"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_json_is_the_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--seconds", "0.1", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) >= {"label", "date", "machine", "fps", "latency", "memory"}
