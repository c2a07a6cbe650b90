"""`python -m export.onnx`: from a checkpoint to ONNX graphs that ONNX Runtime runs on any CPU.

Only the command line is here: it names what an export needs, and refuses, since this version writes no graphs yet.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from .options import Checkpoint, refuse


@dataclass(frozen=True, kw_only=True)
class Options(Checkpoint):
    """Write the ONNX graphs of a checkpoint."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; `argv` defaults to the process's own. Returns the exit code: 1 failed, 2 wrong arguments."""
    options = tyro.cli(Options, prog="python -m export.onnx", args=argv)
    return refuse("export.onnx", options, "ONNX graphs")


if __name__ == "__main__":
    sys.exit(main())
