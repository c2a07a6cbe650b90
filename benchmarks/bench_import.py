"""What an import costs: `import cfrt` in under 0.15 s, in a fresh interpreter."""

import subprocess
import sys

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

LIMIT = 0.15  # seconds


def seconds(module: str) -> float:
    """Of `import module` itself, the interpreter's own start left out."""
    code = f"from time import perf_counter as now; begin = now(); import {module}; print(now() - begin)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("module", ["cfrt", "cfrt.cli", "cfrt.stream"])
def test_import(module: str, benchmark: BenchmarkFixture) -> None:
    taken: list[float] = []
    benchmark.pedantic(lambda: taken.append(seconds(module)), rounds=7, warmup_rounds=1)
    benchmark.extra_info["import_seconds"] = min(taken)  # what else the machine does can only add
    if module == "cfrt":
        assert min(taken) < LIMIT
