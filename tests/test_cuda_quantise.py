"""The CUDA quantisers, run by ptxsim: rows of activations, and the scales of values."""

import ctypes

import numpy as np
import pytest
from cuda_fixture import Array, from_bf16, launch, normal, to_bf16
from hypothesis import given, settings
from hypothesis import strategies as st
from ptxsim import EVERY_SCHEDULE, Memory, Options, Report
from ptxsim.memory import Buffer

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("executor")]

LEAST = 1e-12


def sizes(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def pointer(buffer: Buffer) -> ctypes.c_void_p:
    return ctypes.c_void_p(buffer.address)


def quantised(x: Array, width: int, options: Options = Options()) -> tuple[Array, Array, Report]:  # noqa: B008
    """int8 [rows, width], its scales: of x [rows, stride]."""
    memory, (rows, stride) = Memory(), x.shape
    source, out = memory.put(to_bf16(x)), memory.empty((rows, width), np.int8)
    scale = memory.empty(rows, np.float32)
    report = launch("quantise", "cfrt_quantise_rows", memory, pointer(out), pointer(scale), pointer(source),
                    *sizes(rows, width, stride), options=options)  # fmt: skip
    return out.array, scale.array, report


def check_rows(x: Array, out: Array, scale: Array) -> None:
    wanted = np.maximum(np.abs(x).max(axis=1).astype(np.float64), LEAST) / 127
    np.testing.assert_allclose(scale, wanted, rtol=1e-6)
    assert (np.abs(out - x / wanted[:, None]) <= 0.5001).all()


@pytest.mark.parametrize("options", EVERY_SCHEDULE, ids=lambda o: f"{o.schedule}-{o.copies}")
def test_a_row_is_rounded_to_255_steps_of_its_own_range(options: Options) -> None:
    """Longer than a block reads at once, in a wider array; large, small and zero rows beside each other."""
    width = 2064
    x = from_bf16(to_bf16(normal(0, 5, width + 16) * np.array([1, 1e-3, 30, 0, 5], np.float32)[:, None]))
    out, scale, report = quantised(x, width, options)
    check_rows(x[:, :width], out, scale)
    assert (report.bank_ratio, report.sector_ratio <= 1.1) == (1, True)


@settings(max_examples=10)
@given(rows=st.integers(1, 4), width=st.integers(1, 200).map(lambda n: 16 * n), more=st.sampled_from([0, 8, 64]))
def test_any_row_is_quantised(rows: int, width: int, more: int) -> None:
    x = normal(width, rows, width + more)
    out, scale, _ = quantised(x, width)
    check_rows(x[:, :width], out, scale)


def scaled(batches: list[Array], width: int, limit: float, options: Options = Options()) -> tuple[Array, Report]:  # noqa: B008
    memory = Memory()
    scale, report = memory.put(np.zeros(width, np.float32)), Report()
    for x in batches:
        report += launch("quantise", "cfrt_value_scales", memory, pointer(scale), pointer(memory.put(to_bf16(x))),
                         *sizes(len(x), width, x.shape[1]), ctypes.c_float(limit), options=options)  # fmt: skip
    return scale.array, report


@pytest.mark.parametrize("options", EVERY_SCHEDULE, ids=lambda o: f"{o.schedule}-{o.copies}")
def test_scales_of_values_hold_all_that_they_have_seen(options: Options) -> None:
    batches = [normal(seed, rows, 200) * np.float32(gain) for seed, rows, gain in ((0, 70, 1), (1, 5, 4))]
    batches[0][:, 17] = batches[1][:, 17] = 0
    scale, report = scaled(batches, 192, 448, options)
    most = np.abs(np.concatenate(batches)[:, :192]).max(axis=0)
    np.testing.assert_allclose(scale, np.maximum(most, LEAST) / 448, rtol=1e-6)
    assert scale[17] > 0
    assert report.bank_ratio == 1


@pytest.mark.parametrize(
    ("function", "values", "code"),
    [
        ("cfrt_quantise_rows", (1, 40, 40), 1),
        ("cfrt_quantise_rows", (0, 32, 32), 1),
        ("cfrt_quantise_rows", (1, 32, 16), 1),
        ("cfrt_quantise_rows", (1, 32, 33), 716),
        ("cfrt_value_scales", (1, 32, 32), 1),
        ("cfrt_value_scales", (1, 64, 66), 716),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(function: str, values: tuple[int, int, int], code: int) -> None:
    memory = Memory()
    some = pointer(memory.put(np.zeros(64, np.uint16)))
    pointers = [some] * (3 if function == "cfrt_quantise_rows" else 2)
    limit = [ctypes.c_float(448)] if function == "cfrt_value_scales" else []
    with pytest.raises(AssertionError, match=f"returned {code}$"):
        launch("quantise", function, memory, *pointers, *sizes(*values), *limit)
