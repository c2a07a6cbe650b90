"""The engines of a bundle: built, each checked against its graph, and one of each kind built twice."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from tqdm import tqdm

from cfrt.bundle import Plan, Segment, sha256
from cfrt.errors import ExportError

from .builder import Builder, lacking, unknown
from .draft import Draft
from .engine_checks import EIGHT_BITS, check, is_transformer, quantised_products
from .engine_report import Report, read

FOLDER = "engines"
RATE, START = 60e6, 0.3
"""Bytes a second and seconds for each engine: what building takes. Measured on one core of an AMD EPYC."""
SPARE = 1.2e6
"""Bytes that an engine has beyond its graph's weights."""
NO_FP8 = ("sm80", "sm86")


@dataclass(frozen=True, kw_only=True)
class Engines:
    """What to build: `run` is what an export does once its graphs are verified."""

    backend: str
    targets: tuple[str, ...]
    precision: str

    def check(self) -> None:
        """ExportError when no machine can build these engines."""
        without = [target for target in self.targets if target in NO_FP8]
        if self.precision == "fp8" and without:
            raise ExportError(
                f"expected targets with fp8 (sm89, sm120), got {', '.join(without)}; take --precision int8 or bf16"
            )
        reason = unknown(self.targets)
        if reason is not None:
            raise ExportError(f"no engine can be built: {reason}")

    def lacking(self) -> str | None:
        """What this machine lacks to build them, or None."""
        return lacking(self.backend, self.targets)

    def run(self, made: Draft, segments: Sequence[Segment]) -> Mapping[str, Any]:
        """Fields of the manifest. ExportError when an engine cannot be built, or is not what its graph asked for."""
        self._demand_8_bits(made, segments)
        with Builder(self.backend, targets=self.targets) as builder:
            seconds = self._build(made, segments, builder)
            reports = {segment.name: self._checked(made, segment, builder) for segment in segments}
            again = self._rebuilt(made, segments, builder)
            plans = [
                Plan(
                    segment=segment.name,
                    target=target,
                    builder=builder.name,
                    file=file_of(segment),
                    summary={} if (report := reports[segment.name]) is None else report.summary(),
                )
                for segment in segments
                for target in self.targets
            ]
            notes = {"seconds": round(seconds, 1), "peak_bytes": builder.peak_bytes, "rebuilt_identically": again}
        return {"plans": tuple(plans), "notes": {"engines": notes}}

    def _demand_8_bits(self, made: Draft, segments: Sequence[Segment]) -> None:
        """A bundle that says 8 bits has products of 8 bits: engines are only compared with their graphs."""
        if self.precision not in EIGHT_BITS:
            return
        graphs = (onnx.load(str(made.folder / segment.onnx)) for segment in segments if is_transformer(segment))
        if not any(quantised_products(graph) for graph in graphs):
            raise ExportError(f"--precision {self.precision} was asked for, and the graphs hold no product of 8 bits")

    def _build(self, made: Draft, segments: Sequence[Segment], builder: Builder) -> float:
        """Seconds of those that were not there yet."""
        seconds = 0.0

        def write(graph: Path, path: Path) -> None:
            nonlocal seconds
            seconds += builder.build(graph, path)

        sizes = {segment.name: (made.folder / segment.onnx).stat().st_size for segment in segments}
        with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="engines", leave=False) as bar:
            for segment in segments:
                bar.set_postfix_str(segment.name)
                graph = made.folder / segment.onnx
                made.make(file_of(segment), builder.key(graph), partial(write, graph))
                bar.update(sizes[segment.name])
        return seconds

    def _checked(self, made: Draft, segment: Segment, builder: Builder) -> Report | None:
        report = read(made.folder / file_of(segment))
        if report is None:  # full TensorRT writes other files; another RTX may
            print(f"{segment.name}: the engine's own description cannot be read, so it is not checked", file=sys.stderr)
            return None
        model = onnx.load(str(made.folder / segment.onnx), load_external_data=False)
        check(segment, model, report, self.targets, builder.version)
        return report

    def _rebuilt(self, made: Draft, segments: Sequence[Segment], builder: Builder) -> list[str]:
        """The kinds of which one was built once more: ExportError unless that gave the same bytes."""
        kinds = {segment.kind: segment for segment in segments}
        again = made.folder / ".again"
        try:
            for segment in kinds.values():
                builder.build(made.folder / segment.onnx, again)
                if sha256(again) != sha256(made.folder / file_of(segment)):
                    raise ExportError(f"two builds of {segment.name} differ: this machine or tool cannot be trusted")
        finally:
            again.unlink(missing_ok=True)
        return list(kinds)


def file_of(segment: Segment) -> str:
    """One file, whatever the number of targets."""
    return f"{FOLDER}/{segment.name}.engine"


def expected_bytes(sizes: Mapping[str, int]) -> int:
    """Of all engines, by the sizes of their graphs."""
    return int(sum(sizes.values()) + SPARE * len(sizes))


def expected_seconds(sizes: Mapping[str, int]) -> float:
    return sum(sizes.values()) / RATE + START * len(sizes)
