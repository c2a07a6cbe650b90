"""What a launch did and what was found wrong with it."""

import ctypes
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

KINDS = ("bounds", "alignment", "race", "uninitialised", "divergence", "barrier", "limit")
COUNTERS = np.dtype([(name, np.uint64) for name in (
    "warps", "lanes", "wavefronts", "ideal_wavefronts", "sectors", "ideal_sectors"
)])  # fmt: skip


class RawFinding(ctypes.Structure):
    """Finding of engine/machine.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("instruction", ctypes.c_int32),
        ("block", ctypes.c_int32 * 3),
        ("thread", ctypes.c_int32),
        ("count", ctypes.c_uint64),
        ("text", ctypes.c_char * 200),
    )


@dataclass(frozen=True)
class Finding:
    """Something wrong at one instruction: the first time, and how often."""

    kind: str
    kernel: str
    opcode: str
    line: int  # of the PTX
    source: str  # file:line, or ''
    block: tuple[int, int, int]
    thread: int  # within the block; -1 for a whole warp
    count: int
    text: str

    def __str__(self) -> str:
        where = f"{self.source}, PTX line {self.line}" if self.source else f"PTX line {self.line}"
        who = f"block {self.block}" + (f" thread {self.thread}" if self.thread >= 0 else "")
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{self.kind}: {where}, {self.opcode}: {who}: {self.text}{times}"


@dataclass(frozen=True)
class Row:
    """The counts of one instruction over a launch."""

    kernel: str
    opcode: str
    line: int
    source: str
    warps: int
    lanes: int
    wavefronts: int
    ideal_wavefronts: int
    sectors: int
    ideal_sectors: int


@dataclass(repr=False)
class Report:
    """Findings and counts, of one launch or, added up, of several."""

    findings: list[Finding] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    launches: list[str] = field(default_factory=list)  # 'name<<<grid, block, shared>>>'

    @property
    def clean(self) -> bool:
        return not self.findings

    @property
    def instructions(self) -> int:
        """Executed by warps."""
        return sum(row.warps for row in self.rows)

    @property
    def opcodes(self) -> Counter[str]:
        """How often warps executed each opcode."""
        counts: Counter[str] = Counter()
        for row in self.rows:
            if row.warps:
                counts[row.opcode] += row.warps
        return counts

    @property
    def bank_ratio(self) -> float:
        """Wavefronts of shared memory over the fewest possible: 1 without bank conflicts."""
        return _ratio((row.wavefronts, row.ideal_wavefronts) for row in self.rows)

    @property
    def sector_ratio(self) -> float:
        """Sectors of global memory over the fewest possible: 1 where accesses are coalesced."""
        return _ratio((row.sectors, row.ideal_sectors) for row in self.rows)

    def of(self, kernel: str) -> "Report":
        """Of one kernel, by its mangled name, what it counted and what was found."""
        launches = [launch for launch in self.launches if launch.startswith(f"{kernel}<<<")]
        return Report(
            [f for f in self.findings if f.kernel == kernel], [r for r in self.rows if r.kernel == kernel], launches
        )

    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.findings}

    def worst(self, count: int = 5) -> list[Row]:
        """The instructions with the most wavefronts and sectors beyond the ideal."""
        excess = lambda r: r.wavefronts - r.ideal_wavefronts + r.sectors - r.ideal_sectors  # noqa: E731
        return sorted((r for r in self.rows if excess(r)), key=excess, reverse=True)[:count]

    def check(self) -> None:
        """AssertionError with all that was found, if anything was."""
        if self.findings:
            raise AssertionError(str(self))

    def __add__(self, other: "Report") -> "Report":
        return Report(self.findings + other.findings, self.rows + other.rows, self.launches + other.launches)

    def __repr__(self) -> str:
        lines = [f"{len(self.launches)} launches, {self.instructions} warp instructions, "
                 f"bank ratio {self.bank_ratio:.2f}, sector ratio {self.sector_ratio:.2f}, "
                 f"{len(self.findings)} findings"]  # fmt: skip
        return "\n".join(lines + [f"  {finding}" for finding in self.findings])


def _ratio(pairs: Iterable[tuple[int, int]]) -> float:
    actual, ideal = (sum(column) for column in zip(*pairs, strict=True)) if (pairs := list(pairs)) else (0, 0)
    return actual / ideal if ideal else 1.0


def source_name(files: dict[int, str], source: tuple[int, int]) -> str:
    """'renoise.cu:57', or '' where nvcc gave no place."""
    file, line = source
    return f"{Path(files[file]).name}:{line}" if file in files and line else ""
