"""The choices that a GPU makes and a kernel must not depend on."""

import ctypes
from dataclasses import dataclass

SCHEDULES = ("sequential", "reversed", "random")
COPIES = ("eager", "lazy", "mixed")


class _RawOptions(ctypes.Structure):
    """Options of engine/machine.h."""

    _fields_ = (
        ("schedule", ctypes.c_int32),
        ("copies", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("max_instructions", ctypes.c_uint64),
        ("races", ctypes.c_int32),
        ("fp8_accumulator_bits", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Options:
    """How a launch runs.

    schedule: the order of blocks, and of a block's warps: sequential (a warp runs until a barrier), reversed, or random
        (by `seed`, switching every 1 to 64 instructions).
    copies: when a cp.async arrives: eager (at once), lazy (when it is waited for; poison before), mixed (by `seed`).
    races: whether happens-before is checked, for shared and global memory. Costs about half the speed.
    fp8_accumulator_bits: 32, or 22 for what Ada's tensor cores keep of an FP8 product's sum.
    """

    schedule: str = "sequential"
    copies: str = "lazy"
    seed: int = 0
    races: bool = True
    fp8_accumulator_bits: int = 32
    max_instructions: int = 10**10  # of warps, per launch

    def raw(self) -> _RawOptions:
        for name, value, known in (("schedule", self.schedule, SCHEDULES), ("copies", self.copies, COPIES)):
            if value not in known:
                raise ValueError(f"expected {name} to be one of {known}, got {value!r}")
        if self.fp8_accumulator_bits not in (22, 32):
            raise ValueError(f"expected fp8_accumulator_bits to be 22 or 32, got {self.fp8_accumulator_bits}")
        return _RawOptions(
            SCHEDULES.index(self.schedule), COPIES.index(self.copies), self.seed, self.max_instructions,
            int(self.races), self.fp8_accumulator_bits,
        )  # fmt: skip


EVERY_SCHEDULE = (
    Options("sequential", "eager"),
    Options("reversed", "lazy"),
    Options("random", "mixed", seed=1),
)
