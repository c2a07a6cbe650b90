"""Mutants of norm, rotation and write into the ring, and of the pixels."""

import numpy as np
import test_cuda_append as tests
import test_cuda_pixels as pixel_tests
from cuda_fixture import compiled

from .framework import Subject, bug

KERNEL, EIGHT = "append.cuh", "eight.cuh"
BARRIER, ONWARD = "__syncthreads();\n#pragma unroll\n    for (", "#pragma unroll\n    for ("
MUTANTS = [
    bug("race", "no barrier after the sums of squares", KERNEL, BARRIER + "int i", ONWARD + "int i"),
    bug("race", "no barrier before the transposed read", KERNEL, BARRIER + "int warp", ONWARD + "int warp"),
    bug("value", "no epsilon", KERNEL, " + eps)", ")"),
    bug("value", "turned the other way", EIGHT, "- b * turn[i * step].y", "+ b * turn[i * step].y"),
    bug(
        "value",
        "rows and columns exchanged",
        KERNEL,
        "? blockIdx.x / call.columns : blockIdx.x % call.columns",
        "? blockIdx.x % call.columns : blockIdx.x / call.columns",
    ),
    bug("value", "sinks looked at from too late", KERNEL, "min(frame, call.last_sink_view)", "frame"),
    bug("race", "all frames into one slot", KERNEL, "place_of(call, blockIdx.y) +", "place_of(call, 0) +"),
    bug(
        "any",
        "frames one granule apart",
        KERNEL,
        "(place_of(call, blockIdx.z) + blockIdx.x)",
        "(place_of(call, blockIdx.z) + blockIdx.x + 1)",
    ),
    bug("any", "padding read", KERNEL, "const bool real = of_frame < tokens;", "const bool real = true;"),
    bug(
        "value",
        "range of half a warp",
        EIGHT,
        "for (int step = kLanes / 2; step > 0; step /= 2) x",
        "for (int step = kLanes / 4; step > 0; step /= 2) x",
    ),
    bug("bounds", "threads past the width", KERNEL, "const bool real = channel < width;", "const bool real = true;"),
    bug(
        "value",
        "norm over one head",
        KERNEL,
        "root[i] / static_cast<float>(width)",
        "root[i] / static_cast<float>(width / 2)",
    ),
    bug("any", "the record's places ignored", KERNEL, "call.pass ? call.pass->place[frame] :", ""),
    bug("value", "the record's time ignored", KERNEL, "call.pass ? call.pass->first_frame :", ""),
]


def _rows_of_almost_nothing() -> None:
    """Whose mean square is about epsilon."""
    case = tests.Case(heads=1, dim=64, grid=(2, 2), slots=(0,), sink_view=None)
    case.q = case.q * np.float32(2**-12)
    tests.assert_rounded(case.run("bf16")[0]["q_out"], case.turned(case.q, case.weights[0], case.positions()))


SUBJECT = Subject(
    "append",
    {
        "bf16": lambda: tests.test_bf16_is_norm_and_rotation("three frames, sink view"),
        "bf16, head of 64": lambda: tests.test_bf16_is_norm_and_rotation("one frame, head of 64"),
        "int8": lambda: tests.test_int8_fp8_is_the_bf16_rounded("three frames, sink view"),
        "rows of almost nothing": _rows_of_almost_nothing,
        "zeros": tests.test_a_row_of_zeros_has_a_scale,
        "record": lambda: tests.test_a_record_in_device_memory_is_the_call("bf16"),
    },
    MUTANTS,
    compiled.cache_clear,
)
PICTURE = "pixels.cu"
PIXELS = Subject(
    "pixels",
    {
        "quads": lambda: pixel_tests.test_pixels_equal_their_cpu_twin("float16", 1, 1156),
        "a plane of no whole quads": lambda: pixel_tests.test_pixels_equal_their_cpu_twin("float32", 1, 1157),
        "bytes": lambda: pixel_tests.test_pixels_equal_their_cpu_twin("float32", 3, 37),
        "misaligned": lambda: pixel_tests.test_misaligned_planes(pixel_tests.EVERY_SCHEDULE[1]),
    },
    [
        bug("race", "words read before the warp has written them", PICTURE, "__syncwarp();", ""),
        bug("bounds", "quads past the plane", PICTURE, "aligned && start + kWarpPixels <= picture.plane", "aligned"),
        bug("any", "alignment taken for granted", PICTURE, "plane % 4 == 0 && reinterpret_cast", "reinterpret_cast"),
        bug("value", "colours exchanged", PICTURE, "byte[3 * i + c]", "byte[3 * i + 2 - c]"),
        bug("value", "rounded down", PICTURE, "__float2int_rn", "__float2int_rd"),
    ],
    compiled.cache_clear,
)
