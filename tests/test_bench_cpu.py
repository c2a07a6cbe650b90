"""The benchmark of the native engine compares the same model, and a wrong output is no number."""

import importlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """benchmarks.bench_cpu, found in the checkout; cfrt stays the installed one, for the checkout comes last."""
    sys.path.append(str(ROOT))
    yield importlib.import_module("benchmarks.bench_cpu")
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def work(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> object:
    return bench.workload("student", 4, tmp_path_factory.mktemp("work"))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


def test_a_student_without_a_ring_is_the_one_with(work: object) -> None:
    """Unit by unit, past the point where the first frames leave the window: what the exported graph computes, given
    keys and values by its host, is what the torch engine computes with its ring. Each goes on from its own units, so
    that differences in rounding grow: to 1.4e-4 after seven units of this student."""
    contenders, functional = module("contenders"), module("functional")
    step, decode = functional.Step(work.dit()), functional.Decode(work.autoencoder())  # type: ignore[attr-defined]
    past = functional.past(work)

    @torch.no_grad()
    def run(net: torch.nn.Module, kept: Sequence[np.ndarray], fresh: Sequence[np.ndarray]) -> list[np.ndarray]:
        out = net(*(torch.from_numpy(np.ascontiguousarray(x)) for x in (*fresh, *kept)))
        return [x.numpy() for x in (out if isinstance(out, tuple) else (out,))]

    host = contenders.Explicit(work, past, lambda x: run(step, past, x), lambda x: run(decode, (), x))
    ring = contenders.Ringed("torch", "fp32", work, 1)
    for unit in range(9):
        expected, got = ring(), host()
        scale = np.linalg.norm(expected)
        assert np.linalg.norm(got - expected) < 1e-3 * scale, f"unit {unit} after the start"


def test_truth_is_kept_and_its_work_is_counted(bench: ModuleType, work: object) -> None:
    """By hand: the passes and a commit, which lacks the last layer's rest, and the decoder's convolutions."""
    truth = work.truth  # type: ignore[attr-defined]
    assert (work.folder / "tiny-truth.pt").exists()  # type: ignore[attr-defined]
    d, ffn, tokens, seen, layers = 192, 576, 4, 32, 4
    layer = 2 * tokens * (6 * d * d + 2 * d * ffn) + 4 * tokens * (seen + 8) * d
    decoder, passes = 0.2, len(work.levels) + 1  # type: ignore[attr-defined]
    assert truth.gop == pytest.approx(passes * layers * layer / 1e9 + decoder, rel=0.3)
    assert bench.error(work, truth.x0.numpy()) == 0


def test_a_wrong_output_is_an_error_and_not_a_number(
    bench: ModuleType, work: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = work.truth.x0.numpy()  # type: ignore[attr-defined]
    answers = {"native": 1.1 * right, "torch": right}
    monkeypatch.setattr(bench, "build", lambda engine, *_: lambda: answers[engine])
    wrong, good = bench.measure(work, 1, [("native", "fp32"), ("torch", "fp32")], cap=0.01)
    assert (wrong["ms"], wrong["gops"]) == (None, None)
    assert wrong["error"] == pytest.approx(0.1)
    assert "expected an error below" in wrong["failed"]
    assert "FAILED" in bench.as_text(wrong)
    assert good["ms"] > 0
    assert good["gops"] == pytest.approx(1000 * work.truth.gop / good["ms"])  # type: ignore[attr-defined]
    assert "failed" not in good


def test_rows_of_several_runs_make_one_file(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    row = {"size": "S", "tokens": 64, "threads": 1, "engine": "native", "precision": "fp32", "ms": 2.0, "gops": 1.0}
    row |= {"error": 1e-7}
    bench._keep(bench._kept(path), [row, row | {"threads": 2}], path)
    bench._keep(bench._kept(path), [row | {"ms": 1.0}], path)
    kept = json.loads(path.read_text())
    assert [(r["threads"], r["ms"]) for r in kept["rows"]] == [(1, 1.0), (2, 2.0)]
    assert {"date", "machine", "versions"} <= set(kept)
    path.write_text(path.read_text().replace(kept["versions"]["numpy"], "1.0"))
    assert bench._kept(path)["rows"] == [], "rows of other versions are not mixed in"


def test_contenders_take_turns_and_each_gets_its_share(bench: ModuleType) -> None:
    rounds, order = module("rounds"), []

    def call(name: str) -> None:
        order.append(name)
        time.sleep(0.001)

    taken = rounds.side_by_side({name: partial(call, name) for name in "abc"}, seconds=0.01, burst=0.002)
    assert all(len(values) >= rounds.LEAST for values in taken.values())
    starts = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert starts[:3] == ["a", "b", "c"]
    assert starts[3] == "b", "another order in the next round"
