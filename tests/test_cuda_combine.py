"""The weighted sum of two latents, run by ptxsim, against numpy's."""

import numpy as np
import pytest
from ptxsim import EVERY_SCHEDULE, Memory, Options, Report
from simulated_cuda import simulated

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("executor")]

A, B = 0.3, -1.7


def combined(count: int, options: Options = Options(), *, into: str = "out") -> Report:  # noqa: B008
    """out = a x + b y, exactly as fp32 numbers do it, and not a number further."""
    numbers = np.random.default_rng(count)
    x, y = (numbers.normal(size=count).astype(np.float32) for _ in range(2))
    expected = np.float32(A) * x + np.float32(B) * y
    memory = Memory()
    buffers = {"x": memory.put(x), "y": memory.put(y), "out": memory.empty(count, np.float32)}
    addresses = {"x": buffers["x"].address, "y": buffers["y"].address, "out": buffers[into].address}
    with simulated(memory, options) as cuda:
        cuda.combine(**addresses, a=A, b=B, count=count, stream=0)
    assert cuda.report.clean, cuda.report
    np.testing.assert_array_equal(buffers[into].array, expected)
    return cuda.report


@pytest.mark.parametrize("count", [1, 3, 4, 1021, 5000])
def test_it_is_the_formula(count: int) -> None:
    combined(count)


@pytest.mark.parametrize("into", ["x", "y"])
def test_the_sum_may_replace_a_term(into: str) -> None:
    combined(1030, into=into)


@pytest.mark.parametrize("options", EVERY_SCHEDULE, ids=str)
def test_it_does_not_depend_on_the_schedule(options: Options) -> None:
    combined(2050, options)


def test_what_it_cannot_do_is_refused() -> None:
    memory = Memory()
    x = memory.put(np.zeros(8, np.float32))
    with simulated(memory) as cuda:
        call = {"out": x.address, "x": x.address, "y": x.address, "a": 1.0, "b": 1.0, "count": 4, "stream": 0}
        with pytest.raises(ValueError, match="expected y at a multiple of 16 bytes"):
            cuda.combine(**{**call, "y": x.address + 4})
        with pytest.raises(ValueError, match="expected count >= 0, got -1"):
            cuda.combine(**{**call, "count": -1})
        cuda.combine(**{**call, "count": 0})
