"""Is it still as fast as it was? Measures what `gates.json` names and fails where a gate falls short.

    python -m benchmarks.gate             every gate, under a minute; exit code 1 when one fails
    python -m benchmarks.gate --json F    the verdicts as data (- for standard output)
    python -m benchmarks.gate --record    and append what was measured to results/gates.jsonl, the history

A gate is a ratio to a peer that ran in turns with it, one thread each, or a time of the paced stream over the time
there is for it; so it holds on a slower machine. What falls short is measured again, `repeats` times in all, and the
best counts: what else the machine does can only make a number worse. Gates stand at about three quarters of the lowest
that an idle machine has measured, of two generations of processors (results/gates.jsonl).

Kinds: `speedup` (time of `peer` over time of `engine`, `bench_cpu`'s workloads), `attention` (one layer against
PyTorch's fused attention), `sub_frame` (latency p95 x fps) and `real_time` (unit p95 / unit duration), the last two of
the embedded student through `cfrt.Stream` at its own 16 fps. `engine` is native, or onnx on the student as a bundle,
exported for the occasion. `gpu_attention` and `gpu_stream` (benchmarks/gpu_gate.py) run where there is a GPU; elsewhere
a line says that they did not, and with CFRT_GPU=1 that is a failure. A gate that `needs` instructions which the
processor lacks does not run either, and a line says so.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from . import machine

GATES = Path(__file__).with_name("gates.json")
HISTORY = Path(__file__).parent / "results" / "gates.jsonl"
SECONDS = 1.0
"""Of calls that each contender makes in a repeat."""

STREAM_SECONDS = 6.0
"""24 units, so that the 95th percentile is not the first of them, which has twice the steps."""

RECALLED = 5
"""Values of the history that a failure shows."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    name: str
    kind: str
    least: float | None = None
    most: float | None = None
    size: str = ""
    tokens: int = 0
    keys: int = 0
    precision: str = ""
    peer: str = "torch"
    engine: str = "native"
    needs: str = ""
    """An instruction set without which the ratio says nothing: PyTorch emulates bf16 there, and so do we."""

    def __post_init__(self) -> None:
        if (self.least is None) == (self.most is None):
            raise ValueError(f"expected either least or most for the gate {self.name!r}")
        if self.kind not in KINDS:
            raise ValueError(f"expected the kind of {self.name!r} to be one of {', '.join(KINDS)}, got {self.kind!r}")

    @property
    def on_gpu(self) -> bool:
        return self.kind.startswith("gpu_")

    def passes(self, value: float | None) -> bool:
        if value is None:
            return False
        return value >= self.least if self.least is not None else value < (self.most or 0.0)

    def better(self, values: Iterable[float]) -> float:
        return max(values) if self.least is not None else min(values)

    def limit(self) -> str:
        return f">= {self.least:g}" if self.least is not None else f"< {self.most:g}"


@dataclass(frozen=True)
class Verdict:
    gate: Gate
    value: float | None
    history: tuple[tuple[str, float], ...]
    """Date and value, the latest last."""

    @property
    def passed(self) -> bool:
        return self.gate.passes(self.value)

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.3g}"
        line = f"{'ok  ' if self.passed else 'FAIL'} {self.gate.name}: {value} (gate {self.gate.limit()})"
        if self.passed:
            return line
        before = ", ".join(f"{date} {past:.3g}" for date, past in self.history[-RECALLED:])
        return f"{line}; before: {before or 'no history'}"


def load(path: Path = GATES) -> tuple[list[Gate], int]:
    """The gates, and how often one may be measured."""
    data = json.loads(path.read_text(encoding="utf-8"))
    gates = [Gate(**gate) for gate in data["gates"]]
    names = [gate.name for gate in gates]
    if not gates or len(set(names)) < len(names) or data["repeats"] < 1:
        raise ValueError(f"expected gates of different names and repeats >= 1 in {path}")
    return gates, data["repeats"]


def judge(
    gates: Sequence[Gate],
    measure: Callable[[Sequence[Gate]], Mapping[str, float]],
    repeats: int,
    history: Sequence[Mapping[str, Any]] = (),
) -> list[Verdict]:
    """Measures every gate, and those that fall short again; the best value counts. `measure` gives values by name; a
    gate without one fails."""
    values: dict[str, list[float]] = {gate.name: [] for gate in gates}
    waiting = list(gates)
    for _ in range(repeats):
        for name, value in measure(waiting).items():
            values[name].append(value)
        waiting = [g for g in waiting if not (values[g.name] and g.passes(g.better(values[g.name])))]
        if not waiting:
            break
    return [
        Verdict(gate, gate.better(values[gate.name]) if values[gate.name] else None, recall(history, gate.name))
        for gate in gates
    ]


# ------------------------------------------------------------------------------------------------------------ history


def read_history(path: Path = HISTORY) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def recall(history: Sequence[Mapping[str, Any]], name: str) -> tuple[tuple[str, float], ...]:
    return tuple((run["date"], run["values"][name]) for run in history if name in run["values"])


def record(verdicts: Sequence[Verdict], path: Path = HISTORY) -> None:
    """One line: date, machine, versions, values by name."""
    values = {verdict.gate.name: float(f"{verdict.value:.4g}") for verdict in verdicts if verdict.value is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(machine.header() | {"values": values}) + "\n")


# ---------------------------------------------------------------------------------------------------------- measuring


def measure(gates: Sequence[Gate]) -> dict[str, float]:
    """Every gate once."""
    groups: dict[tuple[str, str, int, str], list[Gate]] = {}
    for gate in gates:
        stream = gate.kind in ("sub_frame", "real_time")
        group = ("stream" if stream else gate.kind, gate.size, gate.tokens, gate.engine if stream else "")
        groups.setdefault(group, []).append(gate)
    values: dict[str, float] = {}
    for (group, *_), members in groups.items():
        values |= MEASURES[group](members)
    return values


def _speedups(gates: Sequence[Gate]) -> dict[str, float]:
    """Gates of one size and number of tokens: their contenders run in the same turns."""
    contenders = {pair for gate in gates for pair in ((gate.engine, gate.precision), (gate.peer, gate.precision))}
    rows = _rows(gates[0].size, gates[0].tokens, tuple(sorted(contenders)))
    return _ratios(gates, rows)


def _rows(size: str, tokens: int, contenders: tuple[tuple[str, str], ...]) -> list[dict[str, Any]]:
    from . import bench_cpu

    return bench_cpu.measure(_work(size, tokens), 1, contenders, SECONDS)


@cache
def _work(size: str, tokens: int) -> Any:
    from .workload import workload

    return workload(size, tokens, Path(_folder().name))


@cache
def _folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory()


def _attention(gates: Sequence[Gate]) -> dict[str, float]:
    from . import attention

    dim = int(gates[0].size.removeprefix("attention-"))
    return _ratios(gates, attention.measure(1, 2 * SECONDS, [dim], [gates[0].tokens]))


def _ratios(gates: Sequence[Gate], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Time of the peer over ours; a row that failed gives none."""
    ms = {(row["engine"], row["precision"]): row["ms"] for row in rows if row["ms"] is not None}
    pairs = {gate.name: ((gate.peer, gate.precision), (gate.engine, gate.precision)) for gate in gates}
    return {name: ms[peer] / ms[ours] for name, (peer, ours) in pairs.items() if peer in ms and ours in ms}


def _model(engine: str) -> Any:
    """What that engine streams: the embedded student, or its bundle."""
    from .contenders import exported

    return exported(_work("student", 4).folder) if engine == "onnx" else "tiny"


def _stream(gates: Sequence[Gate]) -> dict[str, float]:
    import cfrt

    model, engine = _model(gates[0].engine), gates[0].engine
    with cfrt.Stream("a large red circle moving left", model=model, engine=engine, threads=1) as stream:
        for _ in stream.frames(seconds=STREAM_SECONDS):
            pass
        stats, fps = stream.stats, stream.config.fps
    found = {"sub_frame": stats.latency.p95 * fps, "real_time": stats.unit.p95 / stats.unit_duration}
    return {gate.name: found[gate.kind] for gate in gates}


def _gpu_attention(gates: Sequence[Gate]) -> dict[str, float]:
    from . import gpu_gate

    return gpu_gate.attention(gates)


def _gpu_stream(gates: Sequence[Gate]) -> dict[str, float]:
    from . import gpu_gate

    return gpu_gate.stream(gates)


def instructions() -> Sequence[str]:
    """Of those that a gate may need, what this processor has."""
    isa: list[str] = machine.machine()["isa"]
    return isa


def gpu_refusal() -> str | None:
    from . import gpu_gate

    return gpu_gate.refusal()


MEASURES: dict[str, Callable[[Sequence[Gate]], dict[str, float]]] = {
    "speedup": _speedups,
    "attention": _attention,
    "stream": _stream,
    "gpu_attention": _gpu_attention,
    "gpu_stream": _gpu_stream,
}
KINDS = ("speedup", "attention", "sub_frame", "real_time", "gpu_attention", "gpu_stream")


# ------------------------------------------------------------------------------------------------------------ command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="F", help="write the verdicts there as JSON; - for standard output")
    parser.add_argument("--record", action="store_true", help="append what was measured to the history")
    parser.add_argument("--only", default="", metavar="TEXT", help="only gates whose name holds TEXT")
    options = parser.parse_args(argv)
    gates, repeats = load()
    chosen = [gate for gate in gates if options.only in gate.name]
    if not chosen:
        parser.error(f"no gate's name holds {options.only!r}")
    no_gpu = gpu_refusal() if any(gate.on_gpu for gate in chosen) else None
    lacking = [gate for gate in chosen if gate.needs and gate.needs not in instructions()]
    here = [gate for gate in chosen if gate not in lacking and (no_gpu is None or not gate.on_gpu)]
    verdicts = judge(here, measure, repeats, read_history())
    said = sys.stderr if options.json == "-" else sys.stdout
    for verdict in verdicts:
        print(verdict, file=said)
    for gate in lacking:
        print(f"not run: {gate.name}: it wants {gate.needs}, which this processor lacks", file=said)
    if no_gpu is not None:
        print(f"not run: {sum(gate.on_gpu for gate in chosen)} gates that want a GPU: {no_gpu}", file=said)
    if options.json:
        _write(verdicts, no_gpu, options.json)
    if options.record:
        record(verdicts)
    missing = no_gpu is not None and os.environ.get("CFRT_GPU") == "1"
    return 0 if all(verdict.passed for verdict in verdicts) and not missing else 1


def _write(verdicts: Sequence[Verdict], no_gpu: str | None, where: str) -> None:
    data = [asdict(verdict) | {"passed": verdict.passed} for verdict in verdicts]
    text = json.dumps(machine.header() | {"no_gpu": no_gpu, "verdicts": data}, indent=1)
    if where == "-":
        print(text)
    else:
        Path(where).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
