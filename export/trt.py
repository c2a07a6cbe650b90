"""`python -m export.trt`: from a checkpoint to a bundle of TensorRT-RTX engines, on any machine, no GPU needed.

Only the command line is here: it names what an export needs, and refuses, since this version builds no engines yet.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from .options import Checkpoint, refuse

Target = Literal["sm80", "sm86", "sm89", "sm120"]
"""What TensorRT-RTX builds for. It has no sm90: an H100 cannot run its engines."""


@dataclass(frozen=True, kw_only=True)
class Options(Checkpoint):
    """Build a bundle of TensorRT-RTX engines from a checkpoint."""

    target: tuple[Target, ...] = ("sm89",)
    """GPU architectures to build for; sm89 is the RTX 4090."""

    precision: Literal["bf16", "fp16", "fp8", "int8"] = "bf16"
    """Number format of the linear layers; the rest follows a per-layer table."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; `argv` defaults to the process's own. Returns the exit code: 1 failed, 2 wrong arguments."""
    options = tyro.cli(Options, prog="cfrt-export", args=argv)
    return refuse("cfrt-export", options, "TensorRT-RTX engines")


if __name__ == "__main__":
    sys.exit(main())
