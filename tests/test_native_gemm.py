"""The native products: fp64 twins on the same rounded operands, and an element of C is its row, its column, its level.

What lies beyond the end of an array is checked where it can be seen: tests/test_sanitizers.py.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import _cfrt

pytestmark = pytest.mark.cpu

kernels = _cfrt.kernels
ISAS = kernels.isas()
PRECISIONS = ("fp32", "bf16", "int8")
EPILOGUES = ("none", "gelu", "silu", "add", "gate")
UNIT = 2.0**-24  # of fp32

every_isa = pytest.mark.parametrize("isa", ISAS)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
every_epilogue = pytest.mark.parametrize("epilogue", EPILOGUES)
isas, precisions, epilogues = map(st.sampled_from, (ISAS, PRECISIONS, EPILOGUES))


def around(*sizes: int) -> st.SearchStrategy[int]:
    """Sizes at which something ends (a group, a vector, a tile, a panel, several), one less and one more."""
    return st.sampled_from(sorted({size + step for size in sizes for step in (-1, 0, 1) if size + step > 0}))


ms, ns, ks = around(1, 4, 6, 14, 28, 45), around(1, 4, 8, 16, 32, 64, 96), around(1, 2, 4, 8, 16, 64, 150)


# ---------------------------------------------------------------------- twins


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def bf16(x: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = torch.from_numpy(x).bfloat16().float().numpy()
    return rounded


def int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers and the scale of each row: symmetric, to nearest even, in fp32 as the kernels compute."""
    peak = np.abs(x).max(1).astype(np.float32)
    scale = np.where(peak < 1e-36, 0, peak / np.float32(127)).astype(np.float32)
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=scale > 0)
    return np.rint(x * inverse[:, None]), scale


def rounded(x: np.ndarray, precision: str) -> np.ndarray:
    """What a product in that precision makes of a matrix, in fp64."""
    if precision == "int8":
        whole, scale = int8(x)
        return whole.astype(np.float64) * scale[:, None]
    return (bf16(x) if precision == "bf16" else x).astype(np.float64)


def activation(y: np.ndarray, epilogue: str) -> np.ndarray:
    if epilogue == "gelu":
        return y * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return y / (1 + np.exp(-y)) if epilogue == "silu" else y


@dataclass
class Case:
    """x [m, k], w [n, k], a bias, what the result is added to, and gates for each group of rows."""

    x: np.ndarray
    w: np.ndarray
    bias: np.ndarray | None
    before: np.ndarray
    gate: np.ndarray
    precision: str = "fp32"
    epilogue: str = "none"
    gate_rows: int = 1

    @classmethod
    def random(cls, m: int, n: int, k: int, precision: str, epilogue: str = "none", gate_rows: int = 1, bias=True):
        seed = m + 100 * n + 10_000 * k
        gate = normal(seed + 4, -(-m // gate_rows), n)
        made = [normal(seed + i, *shape) for i, shape in enumerate([(m, k), (n, k), (n,), (m, n)])]
        return cls(made[0], made[1], made[2] if bias else None, made[3], gate, precision, epilogue, gate_rows)

    def native(self, isa: str, rows: slice | np.ndarray = slice(None), threads: int = 0, **how: Any) -> np.ndarray:
        """The product over some of the rows of x; each of them with a gate of its own where they are not all."""
        whole = isinstance(rows, slice) and rows == slice(None)
        gate, group = (self.gate, self.gate_rows) if whole else (self.gate.repeat(self.gate_rows, 0)[rows], 1)
        out = how.pop("out", self.before[rows].copy())
        packed = kernels.Weights(self.w, self.precision, isa=isa)
        stored = kernels.Rows(np.ascontiguousarray(self.x[rows]), self.precision, isa=isa)
        options = {
            "bias": self.bias,
            "epilogue": self.epilogue,
            "threads": kernels.Threads(threads) if threads else None,
        }
        if self.epilogue == "gate":
            options |= {"gate": np.ascontiguousarray(gate), "gate_rows": group}
        kernels.gemm(stored, packed, out, **(options | how))
        return out

    def check(self, got: np.ndarray) -> None:
        """Within what rounding can do: k + 2 roundings of a sum that is at most |x| |w| + |bias|, then an epilogue."""
        x, w = rounded(self.x, self.precision), rounded(self.w, self.precision)
        bias = 0.0 if self.bias is None else self.bias.astype(np.float64)
        y, size = x @ w.T + bias, np.abs(x) @ np.abs(w).T + np.abs(bias)
        steps = 4 if self.precision == "int8" else x.shape[1] + 2  # sums of whole numbers are exact
        slack = 1.2 * steps * UNIT * size + 8 * UNIT * np.abs(y)  # 1.2: the steepest slope of gelu and silu
        exact = activation(y, self.epilogue)
        if self.epilogue in ("add", "gate"):
            gate = self.gate.astype(np.float64).repeat(self.gate_rows, 0)[: len(y)] if self.epilogue == "gate" else 1.0
            exact, slack = self.before + gate * y, np.abs(gate) * slack
            slack = slack + 3 * UNIT * (np.abs(gate * y) + np.abs(self.before))
        np.testing.assert_array_less(np.abs(got - exact), slack + 1e-30)


# ---------------------------------------------------------------------- the formula


@given(
    m=ms,
    n=ns,
    k=ks,
    gate_rows=st.integers(1, 9),
    bias=st.booleans(),
    precision=precisions,
    epilogue=epilogues,
    isa=isas,
)
def test_product(m: int, n: int, k: int, gate_rows: int, bias: bool, precision: str, epilogue: str, isa: str) -> None:
    case = Case.random(m, n, k, precision, epilogue, gate_rows, bias)
    case.check(case.native(isa))


@every_isa
@every_precision
@every_epilogue
def test_every_epilogue(epilogue: str, precision: str, isa: str) -> None:
    """Several panels and tiles, none of them whole; three rows to a gate."""
    case = Case.random(47, 75, 61, precision, epilogue, gate_rows=3)
    case.check(case.native(isa))


@every_isa
@every_precision
def test_long_sums(precision: str, isa: str) -> None:
    """Longer than the plain level's exact sums of whole numbers, and than any cache's share of a panel."""
    case = Case.random(17, 35, 3075, precision)
    case.check(case.native(isa))


@every_isa
def test_the_largest_whole_numbers(isa: str) -> None:
    """127 * 127 * k, all of one sign and of the other: no product saturates, no sum wraps."""
    case = Case.random(2, 3, 65536, "int8", bias=False)
    case.x[:] = [[1], [-1]]
    case.w[:] = [[1], [-1], [0.5]]
    expected = 65536 * np.array([[1, -1, 0.5], [-1, 1, -0.5]], np.float32)
    np.testing.assert_allclose(case.native(isa), expected, rtol=2e-7)


@every_isa
@every_precision
def test_every_number_of_rows(precision: str, isa: str) -> None:
    """Each has micro-kernels of its own."""
    for m in range(1, 33):
        case = Case.random(m, 40, 21, precision)
        case.check(case.native(isa))


# ---------------------------------------------------------------------- an element is its row, its column, its level


@every_isa
@every_precision
@pytest.mark.parametrize("epilogue", ["none", "gelu", "gate"])
def test_a_row_does_not_depend_on_the_others(epilogue: str, precision: str, isa: str) -> None:
    """Bit for bit: alone, in calls of any size, shuffled. The fused commit rests on it."""
    case = Case.random(43, 70, 53, precision, epilogue, gate_rows=5)
    whole = case.native(isa)
    for size in range(1, 43):
        np.testing.assert_array_equal(case.native(isa, np.arange(43 - size, 43)), whole[43 - size :])
    order = np.random.default_rng(0).permutation(43)
    np.testing.assert_array_equal(case.native(isa, order), whole[order])


@every_isa
@every_precision
@pytest.mark.parametrize("m", [1, 3, 30])
def test_a_column_does_not_depend_on_the_others(m: int, precision: str, isa: str) -> None:
    """Bit for bit, at whichever place of whichever panel it is."""
    case = Case.random(m, 150, 53, precision, "silu")
    whole, w, bias = case.native(isa), case.w, case.bias
    order = np.random.default_rng(0).permutation(150)
    for columns in (slice(149, 150), slice(120, 150), slice(1, 34), order):
        case.w, case.bias, case.before = np.ascontiguousarray(w[columns]), bias[columns].copy(), whole[:, columns]
        np.testing.assert_array_equal(case.native(isa), whole[:, columns])


@given(m=ms, n=ns, threads=st.integers(1, 5), precision=precisions, isa=isas)
def test_threads_do_not_change_a_bit(m: int, n: int, threads: int, precision: str, isa: str) -> None:
    case = Case.random(m, n, 37, precision, "gate", gate_rows=4)
    np.testing.assert_array_equal(case.native(isa, threads=threads), case.native(isa))


@every_isa
@every_precision
def test_numbers_that_are_none_stay_in_their_row(precision: str, isa: str) -> None:
    """int8: a row that holds NaN or an infinity has no scale, and all of its results are NaN."""
    case = Case.random(20, 40, 33, precision)
    clean = case.native(isa)
    case.x[3, 0], case.x[11, 32], case.x[19, 16] = np.nan, np.inf, -np.inf
    got = case.native(isa)
    broken = np.isin(np.arange(20), (3, 11, 19))
    assert not np.isfinite(got[broken]).any()
    assert np.isnan(got[3]).all()
    if precision == "int8":
        assert np.isnan(got[broken]).all()
    np.testing.assert_array_equal(got[~broken], clean[~broken])


@every_isa
def test_int8_keeps_weights_that_are_whole_steps_of_a_power_of_two(isa: str) -> None:
    """Of one for each output, and inputs that fit: the product is exact. One weight that is no whole step, and its
    output has another scale."""
    random = np.random.default_rng(0)
    steps, x = (random.integers(-127, 128, shape).astype(np.float32) for shape in ((9, 40), (5, 40)))
    steps[:, 0], x[:, 0] = 65, 127
    w = steps * 2.0 ** random.integers(-12, 4, (9, 1)).astype(np.float32)
    out = np.zeros((5, 9), np.float32)
    kernels.gemm(kernels.Rows(x, "int8", isa=isa), kernels.Weights(w, "int8", isa=isa), out)
    np.testing.assert_array_equal(out, x @ w.T)
    w[4, 7] *= 1.001
    kernels.gemm(kernels.Rows(x, "int8", isa=isa), kernels.Weights(w, "int8", isa=isa), out)
    exact = (x.astype(np.float64) @ w.T.astype(np.float64)).astype(np.float32)
    assert [int((out[:, row] == exact[:, row]).all()) for row in range(9)] == [1, 1, 1, 1, 0, 1, 1, 1, 1]


# ---------------------------------------------------------------------- results as they are stored


@every_isa
@every_precision
@pytest.mark.parametrize("epilogue", ["none", "gelu", "silu"])
@pytest.mark.parametrize("n", [1, 40, 67])
def test_bf16_results_are_the_fp32_ones_rounded(n: int, epilogue: str, precision: str, isa: str) -> None:
    """With a zero behind a row of odd length, so that it can be the next product's row; nothing beyond it."""
    case = Case.random(19, n, 31, precision, epilogue)
    out = np.full((19, n + 5), 0x7FFF, np.uint16)
    case.native(isa, out=out)
    np.testing.assert_array_equal(wide(out[:, :n]), bf16(case.native(isa)))
    assert (out[:, n : n + n % 2] == 0).all()
    assert (out[:, n + n % 2 :] == 0x7FFF).all()


def wide(x: np.ndarray) -> np.ndarray:
    numbers: np.ndarray = (x.astype(np.uint32) << 16).view(np.float32)
    return numbers


@every_isa
@every_precision
@every_epilogue
def test_nothing_is_written_beyond_a_row(epilogue: str, precision: str, isa: str) -> None:
    case = Case.random(33, 45, 20, precision, epilogue, gate_rows=33)
    out = np.full((33, 64), 7, np.float32)
    out[:, :45] = case.before
    case.native(isa, out=out)
    np.testing.assert_array_equal(out[:, :45], case.native(isa))
    assert (out[:, 45:] == 7).all()


# ---------------------------------------------------------------------- rows


@given(m=st.integers(1, 5), k=ks, seed=st.integers(0, 99), isa=isas)
def test_rows(m: int, k: int, seed: int, isa: str) -> None:
    """Rounded to nearest even, with zeros up to whole groups."""
    x = normal(seed, m, k)
    whole, scale = int8(x)
    for precision, expected in [("fp32", x), ("bf16", bf16(x)), ("int8", whole)]:
        rows = kernels.Rows(x, precision, isa=isa)
        np.testing.assert_array_equal(rows.values[:, :k], expected)
        assert (rows.values[:, k:] == 0).all()
    np.testing.assert_array_equal(rows.scale, scale)


@every_isa
def test_ties_go_to_even(isa: str) -> None:
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 125.5, 0, -127]], np.float32)
    rows = kernels.Rows(x, "int8", isa=isa)
    np.testing.assert_array_equal(rows.values[0, :10], [127, 0, 2, 2, 0, -2, -126, 126, 0, -127])
    np.testing.assert_array_equal(rows.scale, np.float32(1))
    halves = np.array([[1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 3.4e38, 2.0**-133]], np.float32)
    np.testing.assert_array_equal(kernels.Rows(halves, "bf16", isa=isa).values[:, :3], [[1, 1 + 2.0**-6, -1]])


@every_isa
@pytest.mark.parametrize("k", [1, 33])
def test_rows_of_zeros_and_rows_of_no_numbers(k: int, isa: str) -> None:
    """Zeros and what is too small to have a scale: scale 0. NaN or an infinity, wherever it is: scale NaN, zeros."""
    x = np.zeros((6, k), np.float32)
    x[1], x[2, k // 2], x[3, -1], x[4, 0], x[5] = 1e-37, np.nan, np.inf, -np.inf, 3e38
    x[2:5, k // 3] = np.where(np.isfinite(x[2:5, k // 3]), 1, x[2:5, k // 3])
    rows = kernels.Rows(x, "int8", isa=isa)
    np.testing.assert_array_equal(rows.scale[:5], [0, 0, np.nan, np.nan, np.nan])
    assert (rows.values[:5] == 0).all()
    assert (rows.values[5, :k] == 127).all()
    np.testing.assert_array_equal(rows.scale[5], np.float32(3e38) / np.float32(127))


@every_isa
def test_a_column_of_zeros(isa: str) -> None:
    case = Case.random(5, 9, 16, "int8")
    case.w[4] = 0
    np.testing.assert_array_equal(case.native(isa)[:, 4], np.broadcast_to(case.bias[4], 5))


@every_precision
def test_packing_does_not_depend_on_the_threads(precision: str) -> None:
    case = Case.random(7, 200, 70, precision)
    rows = kernels.Rows(case.x, precision)
    results = []
    for threads in (None, *map(kernels.Threads, (1, 2, 3))):
        out = np.zeros((7, 200), np.float32)
        weights = kernels.Weights(case.w, precision, threads=threads)
        kernels.gemm(rows, weights, out, threads=threads)
        results.append((weights.bytes, out))
    for size, out in results[1:]:
        assert size == results[0][0]
        np.testing.assert_array_equal(out, results[0][1])


# ---------------------------------------------------------------------- refusals


def test_products_refuse_what_does_not_fit() -> None:
    case = Case.random(4, 6, 8, "fp32", "gate")
    short = case.gate[:, :5].copy()
    for options, words in [
        ({"out": np.zeros((4, 5), np.float32)}, r"expected out \[4, 6\], got \[4, 5\]"),
        ({"out": np.zeros((3, 6), np.float32)}, r"expected out \[4, 6\], got \[3, 6\]"),
        ({"out": np.zeros((4, 6), np.float64)}, "expected out to be contiguous and float32 or uint16"),
        ({"out": np.zeros((6, 4), np.float32).T}, "expected out to be contiguous and float32 or uint16"),
        ({"out": np.zeros((4, 6), np.uint16)}, "expected an fp32 result to add to, got bf16"),
        ({"bias": case.bias[:5].copy()}, "expected a bias of 6 elements, got 5"),
        ({"gate": short}, r"expected a gate \[at least 4 / gate_rows, 6\], got \[4, 5\] with gate_rows=1"),
        ({"gate": case.gate[:3].copy()}, r"got \[3, 6\] with gate_rows=1"),
        ({"gate_rows": 0}, "with gate_rows=0"),
        ({"gate": None}, "expected a gate and the number of rows that share one"),
        ({"epilogue": "relu"}, "expected epilogue to be one of none, gelu, silu, add, gate, got 'relu'"),
    ]:
        with pytest.raises(ValueError, match=words):
            case.native("plain", **options)
    odd = Case.random(4, 5, 8, "fp32")
    with pytest.raises(ValueError, match="expected rows of the result at least 6 elements apart, got 5"):
        odd.native("plain", out=np.zeros((4, 5), np.uint16))


def test_rows_and_weights_belong_together() -> None:
    x, out = normal(0, 4, 8), np.zeros((4, 6), np.float32)
    weights = kernels.Weights(normal(1, 6, 8), "bf16", isa="plain")
    with pytest.raises(ValueError, match="expected rows for plain and bf16 as the weights are, got plain and fp32"):
        kernels.gemm(kernels.Rows(x, "fp32", isa="plain"), weights, out)
    with pytest.raises(ValueError, match="expected rows of 8 elements, as the weights take, got 7"):
        kernels.gemm(kernels.Rows(x[:, :7].copy(), "bf16", isa="plain"), weights, out)


@every_precision
def test_rows_of_another_level_are_refused(precision: str) -> None:
    if len(ISAS) == 1:
        return
    weights = kernels.Weights(normal(1, 6, 8), precision, isa=ISAS[-1])
    rows = kernels.Rows(normal(0, 4, 8), precision, isa="plain")
    with pytest.raises(ValueError, match=f"expected rows for {ISAS[-1]} and {precision} as the weights are, got plain"):
        kernels.gemm(rows, weights, np.zeros((4, 6), np.float32))


def test_weights_refuse_what_they_cannot_hold() -> None:
    for bad in (np.nan, np.inf):
        w = normal(0, 3, 4)
        w[1, 2] = bad
        with pytest.raises(ValueError, match=r"expected finite weights, got (-?nan|inf) in row 1"):
            kernels.Weights(w, "int8")
    with pytest.raises(ValueError, match="expected at most 65536 inputs of an int8 product, got 65537"):
        kernels.Weights(np.zeros((1, 65537), np.float32), "int8")
    for shape in [(0, 3), (3, 0)]:
        with pytest.raises(ValueError, match="expected weights"):
            kernels.Weights(np.zeros(shape, np.float32), "fp32")
    with pytest.raises(ValueError, match="expected precision to be one of fp32, bf16, int8, got 'fp8'"):
        kernels.Weights(normal(0, 3, 4), "fp8")
    with pytest.raises(ValueError, match="expected threads >= 1, got 0"):
        kernels.Threads(0)
