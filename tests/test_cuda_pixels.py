"""CUDA planes to pixels, run by ptxsim, against the CPU twin."""

import ctypes

import numpy as np
import pytest
from cuda_fixture import from_bf16, launch, to_bf16
from ptxsim import EVERY_SCHEDULE, Memory, Options, Report

import _cfrt

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("executor")]

GAIN, OFFSET = 0.5, 0.5
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    return to_bf16(x) if dtype == "bfloat16" else x.astype(dtype)


def widened(x: np.ndarray, dtype: str) -> np.ndarray:
    return from_bf16(x) if dtype == "bfloat16" else x.astype(np.float32)


def run(x: np.ndarray, dtype: str, offset: int = 0, options: Options = Options()) -> tuple[np.ndarray, Report]:  # noqa: B008
    """uint8 [frames, plane, 3] of stored x [frames, 3, plane]."""
    memory = Memory()
    frames, _, plane = x.shape
    source, out = memory.put(x, offset * x.itemsize), memory.empty((frames, plane, 3), np.uint8, offset)
    sizes = (ctypes.c_int64(frames), ctypes.c_int64(plane), ctypes.c_float(GAIN), ctypes.c_float(OFFSET))
    pointers = (ctypes.c_void_p(out.address), ctypes.c_void_p(source.address))
    return out.array, launch("pixels", "cfrt_pixels", memory, *pointers, DTYPES[dtype], *sizes, options=options)


def twin(x: np.ndarray) -> np.ndarray:
    """The CPU's, which takes channels of a position side by side."""
    frames, _, plane = x.shape
    positions = np.ascontiguousarray(x.reshape(frames * 3, 1, plane).transpose(1, 2, 0))
    return _cfrt.kernels.pixels(positions, frames=frames, fold=1, gain=GAIN, offset=OFFSET).reshape(frames, plane, 3)


def picture(frames: int, plane: int, dtype: str) -> np.ndarray:
    """Values all over [0, 1] and beyond, among them halves of a step."""
    x = np.random.default_rng(plane).uniform(-1.3, 1.3, (frames, 3, plane)).astype(np.float32)
    x[:, :, ::7] = (np.arange(len(x[0, 0, ::7])) + 0.5) / 127.5 - 1
    return stored(x, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("frames", "plane"), [(2, 1024), (1, 1156), (3, 37), (1, 1)])
def test_pixels_equal_their_cpu_twin(dtype: str, frames: int, plane: int) -> None:
    x = picture(frames, plane, dtype)
    assert (run(x, dtype)[0] == twin(widened(x, dtype))).all()


@pytest.mark.parametrize("options", EVERY_SCHEDULE, ids=lambda o: f"{o.schedule}-{o.copies}")
def test_misaligned_planes(options: Options) -> None:
    x = picture(1, 512, "bfloat16")
    assert (run(x, "bfloat16", 1, options)[0] == twin(from_bf16(x))).all()


def test_what_is_no_number_is_black() -> None:
    x = np.full((1, 3, 128), np.nan, np.float32)
    assert (run(x, "float32")[0] == 0).all()


def test_nothing_is_moved_twice() -> None:
    _, report = run(picture(1, 4096, "float16"), "float16")
    assert (report.bank_ratio, report.sector_ratio) == (1, 1)
