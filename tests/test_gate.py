"""The logic of benchmarks/gate.py on made-up numbers: what falls short fails, and so does what was not measured."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
FASTER = {"name": "faster", "kind": "speedup", "size": "S", "tokens": 64, "precision": "fp32", "least": 2.0}
SOONER = {"name": "sooner", "kind": "sub_frame", "most": 1.0}


@pytest.fixture(scope="module")
def gate() -> Iterator[ModuleType]:
    """The module, found in the checkout; cfrt stays the installed one, for the checkout comes last."""
    sys.path.append(str(ROOT))
    yield importlib.import_module("benchmarks.gate")
    sys.path.remove(str(ROOT))


def always(**values: float) -> Callable[[Sequence[object]], Mapping[str, float]]:
    return lambda gates: {g.name: values[g.name] for g in gates if g.name in values}  # type: ignore[attr-defined]


def test_good_numbers_pass(gate: ModuleType) -> None:
    gates = [gate.Gate(**FASTER), gate.Gate(**SOONER)]
    assert all(verdict.passed for verdict in gate.judge(gates, always(faster=2.0, sooner=0.99), 3))


@pytest.mark.parametrize("values", [{"faster": 1.99, "sooner": 0.5}, {"faster": 3.0, "sooner": 1.0}])
def test_a_number_that_falls_short_fails_and_shows_its_history(gate: ModuleType, values: dict[str, float]) -> None:
    gates = [gate.Gate(**FASTER), gate.Gate(**SOONER)]
    history = [{"date": f"2026-11-{day:02}", "values": {"faster": day / 2, "sooner": 1 / day}} for day in range(1, 9)]
    verdicts = gate.judge(gates, always(**values), 2, history)
    failed = [verdict for verdict in verdicts if not verdict.passed]
    assert len(failed) == 1
    text = str(failed[0])
    assert text.startswith("FAIL")
    assert f"{failed[0].value:.3g} (gate {failed[0].gate.limit()})" in text
    assert "2026-11-08" in text
    assert "2026-11-03" not in text, "only the latest five"


def test_a_missing_row_fails(gate: ModuleType) -> None:
    verdicts = gate.judge([gate.Gate(**FASTER), gate.Gate(**SOONER)], always(sooner=0.5), 3)
    assert [verdict.passed for verdict in verdicts] == [False, True]
    assert "not measured" in str(verdicts[0])


def test_only_what_fell_short_is_measured_again_and_the_best_counts(gate: ModuleType) -> None:
    asked: list[list[str]] = []
    runs = iter([{"faster": 1.0, "sooner": 0.5}, {"faster": 1.8}, {"faster": 1.5}])

    def measure(gates: Sequence[object]) -> Mapping[str, float]:
        asked.append([g.name for g in gates])  # type: ignore[attr-defined]
        return next(runs)

    verdicts = gate.judge([gate.Gate(**FASTER), gate.Gate(**SOONER)], measure, 3)
    assert asked == [["faster", "sooner"], ["faster"], ["faster"]]
    assert [verdict.value for verdict in verdicts] == [1.8, 0.5]


def test_a_row_with_a_wrong_output_gives_no_ratio(gate: ModuleType) -> None:
    rows = [{"engine": "native", "precision": "fp32", "ms": None}, {"engine": "torch", "precision": "fp32", "ms": 3.0}]
    assert gate._ratios([gate.Gate(**FASTER)], rows) == {}
    rows[0]["ms"] = 1.5
    assert gate._ratios([gate.Gate(**FASTER)], rows) == {"faster": 2.0}


def test_history_is_appended_and_read_back(gate: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "gates.jsonl"
    verdicts = gate.judge([gate.Gate(**FASTER), gate.Gate(**SOONER)], always(faster=2.123456), 1)
    for _ in range(2):
        gate.record(verdicts, path)
    history = gate.read_history(path)
    assert [run["values"] for run in history] == [{"faster": 2.123}] * 2
    assert [value for _, value in gate.recall(history, "faster")] == [2.123] * 2


def test_the_committed_gates_are_whole(gate: ModuleType) -> None:
    gates, repeats = gate.load()
    assert repeats >= 2
    assert {g.kind for g in gates} == set(gate.KINDS)
    speedups = {(g.size, g.precision) for g in gates if g.kind == "speedup"}
    assert speedups >= {(size, precision) for size in ("student", "S") for precision in ("fp32", "bf16")}
    assert all(g.least > 1 for g in gates if g.least and not g.on_gpu), "slower than the peer is no gate"
    assert all(g.most <= 1 for g in gates if g.most and not g.on_gpu)


@pytest.mark.parametrize("change", [{"least": None}, {"most": 1.0}, {"kind": "speed"}])
def test_a_gate_that_makes_no_sense_is_refused(gate: ModuleType, change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        gate.Gate(**(FASTER | change))


def test_where_there_is_no_gpu_a_line_says_which_gates_did_not_run(
    gate: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And on a machine that is said to have one, that is a failure."""
    asked: list[str] = []

    def measure(gates: Sequence[object]) -> Mapping[str, float]:
        asked.extend(g.kind for g in gates)  # type: ignore[attr-defined]
        return {g.name: 100.0 if g.least else 0.0 for g in gates}  # type: ignore[attr-defined]

    monkeypatch.setattr(gate, "measure", measure)
    monkeypatch.delenv("CFRT_GPU", raising=False)
    monkeypatch.setattr(gate, "gpu_refusal", lambda: "there is no NVIDIA driver here")
    assert gate.main(["--json", str(tmp_path / "verdicts.json")]) == 0
    assert not any(kind.startswith("gpu_") for kind in asked)
    assert "not run: 5 gates that want a GPU: there is no NVIDIA driver here" in capsys.readouterr().out
    assert json.loads((tmp_path / "verdicts.json").read_text())["no_gpu"] == "there is no NVIDIA driver here"
    monkeypatch.setenv("CFRT_GPU", "1")
    assert gate.main([]) == 1
    monkeypatch.setattr(gate, "gpu_refusal", lambda: None)
    assert gate.main([]) == 0
    assert {"gpu_attention", "gpu_stream"} <= set(asked)


def test_a_processor_without_bf16_is_asked_for_fp32_alone(
    gate: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And told so, gate by gate."""
    asked: list[str] = []

    def measure(gates: Sequence[object]) -> Mapping[str, float]:
        asked.extend(g.precision for g in gates)  # type: ignore[attr-defined]
        return {g.name: 100.0 if g.least else 0.0 for g in gates}  # type: ignore[attr-defined]

    monkeypatch.setattr(gate, "measure", measure)
    monkeypatch.setattr(gate, "gpu_refusal", lambda: "none")
    monkeypatch.setattr(gate, "instructions", lambda: ("avx2",))
    monkeypatch.delenv("CFRT_GPU", raising=False)
    assert gate.main([]) == 0
    assert set(asked) == {"fp32", ""}
    said = capsys.readouterr().out
    assert "not run: S/64, bf16: native over torch: it wants avx512_bf16, which this processor lacks" in said
    assert "not run: S/64, int8: native over ONNX Runtime: it wants avx512_vnni" in said


def test_the_command_fails_where_a_gate_does(
    gate: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gates, _ = gate.load()
    monkeypatch.setattr(gate, "instructions", lambda: ("avx512_bf16", "avx512_vnni"))
    good = {g.name: 2 * g.least if g.least is not None else g.most / 2 for g in gates}
    monkeypatch.setattr(gate, "gpu_refusal", lambda: None)
    monkeypatch.setattr(gate, "measure", always(**good))
    assert gate.main([]) == 0
    monkeypatch.setattr(gate, "measure", always(**(good | {gates[0].name: 0.1})))
    assert gate.main(["--json", str(tmp_path / "verdicts.json")]) == 1
    assert f"FAIL {gates[0].name}: 0.1" in capsys.readouterr().out
    found = json.loads((tmp_path / "verdicts.json").read_text())
    assert [verdict["passed"] for verdict in found["verdicts"]] == [False] + [True] * (len(gates) - 1)
