"""The gates that want a GPU, without one: attention over the executor, a unit taken apart on the CPU."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated_cuda import SimulatedMemory, simulated

from benchmarks import full_size_gpu, gpu_gate, gpu_unit
from benchmarks.gate import Gate, load

pytestmark = pytest.mark.cpu

SHAPES = {"near": (40, 80), "far": (33, 120)}
RING = {"heads": 1, "frame_tokens": 40, "repeats": 3}


class Turns:
    """A clock on which the peer takes 6 ms and we take 4."""

    def __init__(self) -> None:
        self.count = 0

    def milliseconds(self, call: Any) -> float:
        call()
        self.count += 1
        return 6.0 if self.count % 2 else 4.0


def peer(queries: int, keys: int) -> list[Any]:
    return [lambda: None]


@pytest.mark.usefixtures("nvcc")
def test_the_ratio_is_the_peers_time_over_ours() -> None:
    memory = SimulatedMemory()
    with simulated(memory.memory) as cuda:
        assert gpu_gate.ratios(cuda, memory, Turns(), peer, SHAPES, **RING) == {"near": 1.5, "far": 1.5}


@pytest.mark.usefixtures("nvcc")
def test_a_wrong_answer_gives_no_ratio() -> None:
    """One key in eighty left out, in the shape that has eighty."""
    memory = SimulatedMemory()
    with simulated(memory.memory) as cuda:
        attention = cuda.attention

        def careless(**call: Any) -> None:
            start, rows = call["pieces"][-1]
            short = [*call["pieces"][:-1], (start, rows - (len(call["pieces"]) == 2))]
            attention(**call | {"pieces": short})

        cuda.attention = careless
        assert set(gpu_gate.ratios(cuda, memory, Turns(), peer, SHAPES, **RING)) == {"far"}


def test_a_unit_is_compared_with_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps and a commit of 10 ms, in a unit of 36 ms; the model has a third of the layers."""
    seen: list[int] = []
    monkeypatch.setattr(full_size_gpu, "random_model", lambda config, folder: seen.append(config.depth) or folder)
    monkeypatch.setattr(full_size_gpu, "measured", lambda *_: {"unit": {"p50": 0.036}})
    monkeypatch.setattr(gpu_unit, "engine_on", lambda folder, device: None)
    monkeypatch.setattr(gpu_unit, "run", lambda engine, folder: {"stages": {"pass": {"done": 0.010}}})
    (gate,) = (gate for gate in load()[0] if gate.kind == "gpu_stream")
    assert gpu_gate.stream([gate])[gate.name] == pytest.approx(1.2)
    assert seen == [full_size_gpu.MODEL.depth // 3]


def test_the_gates_are_at_the_shapes_that_were_measured() -> None:
    """On an H200 (results/gpu_h200.json): each of the limits is below what was measured, and not by half."""
    folder = Path(gpu_gate.__file__).parent / "results"
    rows = json.loads((folder / "gpu_h200.json").read_text())["timings"]
    ms = {(row["name"], row["queries"], row["keys"]): row["milliseconds"] for row in rows}
    for gate in (gate for gate in load()[0] if gate.kind == "gpu_attention"):
        shape = (gate.tokens, gate.keys)
        measured = ms["PyTorch SDPA bf16", *shape] / ms["cfrt bf16", *shape]
        assert measured / 2 < gate.least < measured


def test_a_unit_is_taken_apart(tmp_path: Path) -> None:
    """At a fraction of the size, on the CPU: every stage has its time, and the profile its seconds."""
    config = replace(full_size_gpu.smoke(full_size_gpu.MODEL), window=2)
    folder = full_size_gpu.random_model(config, tmp_path / "model")
    found = gpu_unit.run(gpu_unit.engine_on(folder, "cpu"), folder)
    assert set(found["stages"]) == {"noise", "pass", "decode", "commit"}
    assert all(0 < stage["host"] <= stage["done"] for stage in found["stages"].values())
    assert found["profile"]["host"] > np.sum([stage["host"] for stage in found["stages"].values()])
    assert found["profile"]["gpu"] == 0
    assert json.loads(json.dumps(found)) == found


def test_without_a_gpu_there_is_a_reason() -> None:
    assert gpu_gate.refusal()


def test_a_gate_on_a_gpu_says_so() -> None:
    gate = Gate(name="x", kind="gpu_attention", least=1.0)
    assert gate.on_gpu
    assert not Gate(name="x", kind="attention", least=1.0).on_gpu
