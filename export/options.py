"""What every export needs to be told, and the two ways in which a command of this version can end without a result."""

import sys
from dataclasses import dataclass
from pathlib import Path

from cfrt.config import PRESETS


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """From which weights, to which folder."""

    model: str
    """Preset the weights belong to; `cfrt models` lists them."""

    weights: Path
    """Checkpoint: .safetensors, or .pt with official, diffusers or cfrt names."""

    out: Path
    """Folder to write to."""


def refuse(command: str, options: Checkpoint, product: str) -> int:
    """Say in one line why `command` ends without its `product`. Returns the exit code: 2 wrong arguments, 1 failed."""
    if options.model not in PRESETS:
        reason, code = f"expected --model to be one of {', '.join(PRESETS)}; got {options.model!r}", 2
    else:
        reason, code = f"this version of cfrt does not build {product} yet; nothing was written", 1
    print(f"{command}: error: {reason}.", file=sys.stderr)
    return code
