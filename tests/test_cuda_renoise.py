"""The re-noise kernel by its production launcher, run by ptxsim, against its CPU twin."""

import ctypes

import numpy as np
import pytest
import torch
from cuda_fixture import RawPass, compiled, fill, launch
from ptxsim import EVERY_SCHEDULE, Memory, Options, Report
from ptxsim.edits import Edit, edited

import _cfrt

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("executor")]

KEY = (2**63 + 5, 7, 2, 0)  # seed, unit, step, purpose
S = 0.8125
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}


def run(
    dtype: str, count: int, offset: int = 0, in_place: bool = False, options: Options = Options(),  # noqa: B008
    record: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, Report]:  # fmt: skip
    """(what the kernel wrote, what the twin says, report); the arrays start `offset` elements past an alignment."""
    kind = getattr(torch, dtype)
    x0 = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(kind)
    memory = Memory()
    bits = x0.view(torch.int32 if dtype == "float32" else torch.int16).numpy()
    source = memory.put(bits, offset * bits.itemsize)
    out = source if in_place else memory.empty(count, bits.dtype, offset * bits.itemsize)
    seed, *rest = KEY
    at = None
    if record:
        at = memory.put(np.frombuffer(bytes(fill(RawPass(), seed=seed, unit=rest[0])), np.uint8)).address
        seed, rest[0] = 0, 0
    report = launch(
        "renoise", "cfrt_renoise", memory, ctypes.c_void_p(out.address), ctypes.c_void_p(source.address),
        ctypes.c_int64(count), DTYPES[dtype], ctypes.c_double(S), ctypes.c_uint64(seed), *rest, ctypes.c_void_p(at),
        options=options,
    )  # fmt: skip
    expected = np.empty(count, np.float32)
    _cfrt.renoise(x0.float().numpy(), S, _cfrt.Noise(*KEY), expected)
    return torch.from_numpy(out.array.copy()).view(kind), torch.from_numpy(expected).to(kind), report


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3, 4, 1021, 1024])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
def test_renoise_equals_its_cpu_twin(dtype: str, count: int, offset: int) -> None:
    """Both take ln, sin and cos in fp64, so that only the last bit of `dtype` may differ."""
    out, expected, _ = run(dtype, count, offset)
    torch.testing.assert_close(out.float(), expected.float(), rtol=torch.finfo(out.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("options", EVERY_SCHEDULE, ids=lambda o: f"{o.schedule}-{o.copies}")
def test_renoise_does_not_depend_on_the_schedule(options: Options) -> None:
    assert torch.equal(run("bfloat16", 2500, options=options)[0], run("bfloat16", 2500)[0])


def test_renoise_by_a_record_in_device_memory() -> None:
    assert torch.equal(run("float32", 1030, record=True)[0], run("float32", 1030)[0])


def test_renoise_in_place() -> None:
    assert torch.equal(run("float32", 1030, in_place=True)[0], run("float32", 1030)[0])


def test_renoise_moves_no_more_than_it_must() -> None:
    """Of the arrays; the tables of sin and cos come on top."""
    rows = [row for row in run("float32", 4096)[2].rows if row.source.startswith("renoise.cu") and row.sectors]
    assert {row.opcode for row in rows} == {"ld.global.v4.f32", "st.global.v4.f32"}
    assert all(row.sectors == row.ideal_sectors == 4096 * 4 / 32 for row in rows)


def test_renoise_strides_over_more_than_the_grid() -> None:
    """The same with a grid of two blocks, where the kernel's own limit is 2^16."""
    whole = run("float32", 5000)[0]
    with edited(Edit("renoise.cu", "kMaxBlocks = 1 << 16", "kMaxBlocks = 2")):
        compiled.cache_clear()
        strided, _, report = run("float32", 5000)
    compiled.cache_clear()
    assert "<<<(2, 1, 1)" in report.launches[0]
    assert torch.equal(strided, whole)


@pytest.mark.parametrize(("count", "code"), [(-1, 1), (2**35, 1)])
def test_a_count_that_does_not_fit_is_refused(count: int, code: int) -> None:
    with pytest.raises(AssertionError, match=f"returned {code}$"):
        launch("renoise", "cfrt_renoise", Memory(), None, None, ctypes.c_int64(count), 0, ctypes.c_double(S),
               ctypes.c_uint64(1), 0, 0, 0, None)  # fmt: skip
