"""`python -m export.trt`: from a checkpoint to a bundle of TensorRT-RTX engines, on any machine, no GPU needed.

    python -m export.trt --model wan-1.3b-framewise-2step --weights framewise-2step.pt --out bundle/
    cfrt generate "a fox in the snow" --model bundle/ -o fox.mp4

It is `python -m export.onnx` and then an engine from every graph: the bundle also streams on a CPU.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from cfrt.errors import CfrtError, ExportError

from .draft import check_space
from .engines import Engines, expected_bytes, expected_seconds
from .onnx import FREE, Export, finished, plan
from .options import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Options(Checkpoint):
    """Build a bundle of TensorRT engines from a checkpoint."""

    target: str = "sm89"
    """GPU architectures to build for, between commas: sm80, sm86, sm89 (RTX 4090), sm120. One engine serves all."""

    precision: Literal["bf16", "fp16", "fp8", "int8"] = "bf16"
    """Number format of the linear layers; the rest follows a per-layer table."""

    backend: Literal["rtx", "tensorrt"] = "rtx"
    """tensorrt is full TensorRT, which builds only on the GPU that it builds for."""


def engines_of(options: Options) -> Engines:
    targets = tuple(target for target in options.target.replace(",", " ").split())
    return Engines(backend=options.backend, targets=targets, precision=options.precision)


def described(export: Export, engines: Engines) -> str:
    """What would be made, for people."""
    size, seconds = expected_bytes(export.sizes), expected_seconds(export.sizes)
    return (
        f"{export}\n{len(export.segments)} engines for {', '.join(engines.targets)}, about {size / 1e6:.0f} MB more "
        f"and {seconds:.0f} s more"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; `argv` defaults to the process's own. Returns the exit code: 1 failed, 2 wrong arguments, 130
    interrupted."""
    options = tyro.cli(Options, prog="cfrt-export", args=argv, config=(tyro.conf.DisallowNone,))
    engines = engines_of(options)
    try:
        engines.check()
        lacking = engines.lacking()
        if lacking is not None and not options.dry_run:
            raise ExportError(f"no engine can be built: {lacking}")
        export = plan(options, options.precision)
        print(described(export, engines))
        if options.dry_run:
            if lacking is not None:
                print(f"building them needs more than this machine has: {lacking}")
            return 0
        check_space(export.out, sum(export.sizes.values()) + expected_bytes(export.sizes) + FREE)
        manifest = export.run(engines.run)
    except CfrtError as error:
        print(f"cfrt-export: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cfrt-export: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    print(finished(manifest, Path(options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
