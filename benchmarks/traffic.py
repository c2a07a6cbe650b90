"""What the CUDA kernels move beside what they must, counted by the executor (tests/ptxsim) on one small case each.

Counts are exact and do not depend on the size: a wavefront of shared memory or a sector of global memory more than the
ideal is a property of the addresses that the lanes of a warp compute. Only a kernel's own lines are counted: the tables
of CUDA's sine and cosine are not.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # whose cases these are

import test_cuda_append as append
import test_cuda_attention as attention
import test_cuda_combine as combine
import test_cuda_pixels as pixels
import test_cuda_quantise as quantise
import test_cuda_renoise as renoise
from ptxsim import Report
from ptxsim.report import Row

OWN = {path.name for path in (Path(__file__).parents[1] / "csrc" / "cuda").iterdir()}


@dataclass(frozen=True)
class Traffic:
    """1 is ideal: wavefronts of shared memory (bank conflicts), and sectors of global memory (coalescing)."""

    bank_ratio: float
    sector_ratio: float


def measure() -> dict[str, Traffic]:
    """By the kernels' mangled names."""
    total = sum(_reports(), Report())
    total.check()
    names = dict.fromkeys(launch.split("<<<")[0] for launch in total.launches)
    return {name: _traffic([row for row in total.of(name).rows if _is_own(row)]) for name in names}


def _is_own(row: Row) -> bool:
    return row.source.split(":")[0] in OWN


def _traffic(rows: list[Row]) -> Traffic:
    report = Report(rows=rows)
    return Traffic(round(report.bank_ratio, 3), round(report.sector_ratio, 3))


def _reports() -> Iterator[Report]:
    for dim in (64, 128):
        case = attention.Case(128, 2, dim, 96, [0, 2, 1], sinks=1, splits=2)  # granules whole and half full
        yield from (case.bf16(layout)[1] for layout in ("granules", "rows"))
        for half in (False, True):
            yield attention.Quantised(attention.copied(case), half).run()[1]
        unit = append.Case(heads=2, dim=dim, grid=(8, 12), slots=(1,))
        yield from (unit.run(storage)[1] for storage in ("bf16", "int8"))
    for dtype in pixels.DTYPES:
        yield pixels.run(pixels.picture(1, 4096, dtype), dtype)[1]
        yield from (renoise.run(dtype, 4096, offset)[2] for offset in (0, 1))
    yield combine.combined(4096)
    yield quantise.quantised(attention.normal(0, 4, 1024), 1024)[2]
    yield quantise.scaled([attention.normal(0, 64, 128)], 128, 448)[1]
