"""The CUDA kernels without a GPU: their production launchers, run by ptxsim, over buffers that it watches."""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from ptxsim import Built, Device, Memory, Module, Options, Report, Runtime, build

from benchmarks.exact import Array, formula, from_bf16, normal, to_bf16

__all__ = ["formula", "from_bf16", "normal", "to_bf16"]  # and all that is defined here

CSRC = Path(__file__).parents[1] / "csrc" / "cuda"
GRANULE = {"bf16": 32, "int8": 64}  # CFRT_GRANULE_*
Piece = tuple[int, int]


class RawPiece(ctypes.Structure):
    _fields_ = (("start", ctypes.c_int32), ("rows", ctypes.c_int32))


def _structure(pointers: str, longs: str, ints: str, *rest: tuple) -> tuple:
    names = [(name, ctypes.c_void_p) for name in pointers.split()]
    names += [(name, ctypes.c_int64) for name in longs.split()] + [(name, ctypes.c_int32) for name in ints.split()]
    return (*names, *rest)


class RawAttention(ctypes.Structure):
    """cfrt_attention of attention.h."""

    _fields_ = _structure(
        "q q_sink q_scale q_sink_scale k v k_scale v_scale out scratch",
        "q_stride out_stride row_stride",
        "queries heads dim splits piece_count sink_pieces",
        ("scale", ctypes.c_float),
        ("record", ctypes.c_void_p),
        ("pieces", RawPiece * 128),
    )


class RawPass(ctypes.Structure):
    """cfrt_pass of pass.h."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("unit", ctypes.c_uint32),
        *_structure("", "", "granules sink_granules piece_count sink_pieces frames"),
        ("first_frame", ctypes.c_int64),
        ("place", ctypes.c_int32 * 32),
        ("pieces", RawPiece * 128),
    )


class RawAppend(ctypes.Structure):
    """cfrt_append of append.h."""

    _fields_ = (
        *_structure("q k v", "stride", ""),
        *_structure(
            "q_weight k_weight q_out q_sink_out q_scale q_sink_scale k_out v_out k_scale v_scale scratch", "", ""
        ),
        *_structure("record", "first_frame last_sink_view", "heads dim frames rows columns"),
        ("pairs", ctypes.c_int32 * 3),
        ("eps", ctypes.c_float),
        ("granules", ctypes.c_int32 * 32),
        ("turns", ctypes.c_uint64 * 64),
    )


@cache
def compiled(name: str) -> tuple[Built, list[Module]]:
    """A file of csrc/cuda, with the flags that CMakeLists.txt gives it."""
    built = build(CSRC / f"{name}.cu", flags=("--fmad=false",) if name == "renoise" else ())
    return built, built.modules()


def host(name: str) -> ctypes.CDLL:
    """Its functions that launch nothing."""
    built, modules = compiled(name)
    return Runtime(built, Memory(), modules=modules).library


def launch(name: str, function: str, memory: Memory, *arguments, options: Options = Options(), **device) -> Report:  # noqa: B008
    """Calls a launcher of a file; fails on an error code."""
    built, modules = compiled(name)
    with Runtime(built, memory, options, Device(**device), modules) as run:
        passed = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments]
        code = getattr(run.library, function)(*passed, None)
    assert run.report.clean, run.report
    assert code == 0, f"{function} returned {code}"
    return run.report


def fill(raw: ctypes.Structure, **values) -> ctypes.Structure:
    """Sets fields: buffers by address, None as NULL, sequences item by item."""
    for name, value in values.items():
        if isinstance(value, Sequence):
            for i, item in enumerate(value):
                getattr(raw, name)[i] = item
        else:
            setattr(raw, name, getattr(value, "address", value))
    return raw


# ---------------------------------------------------------------------- numbers


def granules(x: Array, rows: int, padding: float) -> Array:
    """[frames, N, H, D] -> [frames granules, H, rows, D], the last granule of a frame filled up with `padding`."""
    frames, tokens, heads, dim = x.shape
    count = -(-tokens // rows)
    padded = np.full((frames, count * rows, heads, dim), padding, x.dtype)
    padded[:, :tokens] = x
    return np.ascontiguousarray(padded.reshape(frames * count, rows, heads, dim).transpose(0, 2, 1, 3))
