"""`python -m export.onnx`: from a checkpoint to a bundle of ONNX graphs that ONNX Runtime streams on any CPU.

    python -m export.onnx --model tiny --out bundle/
    cfrt generate "a large red circle moving left" --model bundle/ --engine onnx -o circle.mp4

`python -m export.trt` makes the same bundle and builds engines into it: `plan` and `Export.run` are shared.
"""

import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import tyro
from safetensors.numpy import save as to_safetensors
from tqdm import tqdm

from cfrt import __version__, memory
from cfrt.bundle import TENSORS, Manifest, Segment, Verification
from cfrt.errors import CfrtError

from . import calibrate, text_encoder, verify
from .build import PIXELS, build, eight_bits, numbers, outside, tensors_of
from .calibrate import Calibration
from .draft import Draft, check_space, draft, key, source_of, write_bytes
from .options import Checkpoint
from .quantize import FORMATS
from .segments import activations, layout
from .sources import Source, find
from .text_encoder import TextEncoder

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
RATE = 60e6
"""Bytes a second that graphs are built and written at."""
SECONDS = {"tiny": 1.0, "taehv": 3.0, "wan": 8.0}
"""That PyTorch's exporter needs for one graph of such an autoencoder."""
FREE = 256 << 20
"""Bytes that a disk must have left over."""
CODE = ("graph", "transformer", "pixels", "segments", "quantize")

Extras = Callable[[Draft, Sequence[Segment]], Mapping[str, Any]]
"""What more to make in the draft, once the graphs are verified: fields of the manifest, in place of its own or more."""


@dataclass(frozen=True, kw_only=True)
class Options(Checkpoint):
    """Write the ONNX graphs of a model, verified, as a bundle that streams without PyTorch."""

    precision: Literal["fp32", "bf16", "fp16", "fp8", "int8"] = "fp32"
    """Number format of the graphs. ONNX Runtime computes in fp32 in any case; bf16 halves the files. fp8 and int8 have
    the large products in 8 bits, and bf16 around them."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """An export that was checked and is ready: `plan` makes it."""

    source: Source
    segments: tuple[Segment, ...]
    precision: str
    level: str
    out: Path
    text: TextEncoder | None
    calibration: Calibration | None = None
    """For 8 bits."""
    sizes: Mapping[str, int] = field(repr=False)
    """Segment -> about how many bytes its graph has."""

    def run(self, extras: Extras = lambda draft, segments: {}) -> Manifest:
        """Makes the bundle. ExportError when it cannot be written or fails its verification; then there is none."""
        check_space(self.out, sum(self.sizes.values()) + (0 if self.text is None else self.text.bytes) + FREE)
        with draft(self.out) as made:
            ready, notes = self._calibrated(made)
            ready._graphs(made)
            verification, text = ready._verified(made), None
            if self.text is not None:
                text = self.text.make(made)
                notes["text_encoder"] = self.text.check(made.folder)
            more = dict(extras(made, self.segments))
            fields: dict[str, Any] = {
                "config": self.source.config,
                "precision": self.precision,
                "decoder": self.source.decoder,
                "segments": self.segments,
                "tools": tools(),
                "verification": verification,
                "text_encoder": text,
                **more,
                "notes": notes | more.get("notes", {}),
            }
            manifest = Manifest(files=made.entries(), **fields)
            made.finish(manifest)
        return manifest

    def _calibrated(self, made: Draft) -> tuple["Export", dict[str, Any]]:
        """With the ranges of all that is quantised, and notes about them."""
        if self.calibration is None:
            return self, {}
        source, seen = self.calibration.run(self.source, made, self.precision)
        return replace(self, source=source), {"quantization": calibrate.described(seen, self.precision)}

    def _graphs(self, made: Draft) -> None:
        with tqdm(total=sum(self.sizes.values()), unit="B", unit_scale=True, desc="graphs", leave=False) as bar:
            for segment in self.segments:
                bar.set_postfix_str(segment.name)
                made.make(segment.onnx, self._key(segment), partial(self._write, segment))
                bar.update(self.sizes[segment.name])
        tensors = outside(self.source, self.precision)
        content = key(*(part for name, array in tensors.items() for part in (name, array.tobytes())))
        made.make(TENSORS, content, partial(write_bytes, to_safetensors(tensors)))

    def _write(self, segment: Segment, path: Path) -> None:
        onnx.save(build(segment, self.source, self.precision), path)

    def _key(self, segment: Segment) -> str:
        """Names everything that a graph is made from: the code, the sizes, the weights."""
        config = self.source.config
        tensors = tensors_of(segment, self.source)
        content = (part for name in sorted(tensors) for part in (name, np.ascontiguousarray(tensors[name]).tobytes()))
        ranges = self.source.ranges if segment.name not in PIXELS else {}
        seen = (part for name in sorted(ranges) for part in (name, ranges[name].tobytes()))
        said = (source_of(CODE), repr(segment), repr(config), self.precision, self.source.decoder)
        return key(*said, *content, *seen)

    def _verified(self, made: Draft) -> Verification:
        print(f"verifying ({self.level}) ...", file=sys.stderr)
        check = verify.full if self.level == "full" else verify.by_segments
        return check(self.source, self.segments, made.folder, self.precision)

    def __str__(self) -> str:
        config, total = self.source.config, sum(self.sizes.values())
        (height, width), own = config.frame_size, memory.parameters(config)
        exported = [segment.name for segment in self.segments if segment.name in PIXELS]
        kinds = (config.autoencoder.kind if name == "encoder" else self.source.decoder for name in exported)
        seconds = total / RATE + sum(SECONDS[kind] for kind in kinds)
        lines = [
            f"{config.name}: {self.source.parameters / 1e6:.2f} M parameters, {own / 1e6:.2f} M of them in the "
            f"transformer; {width}x{height} pixels, F = {config.unit}, W = {config.window}, K = {config.sinks}",
            f"weights from {self.source.origin}; decoder {self.source.decoder}; {self._format()} graphs",
            f"{len(self.segments)} segments, about {total / 1e6:.0f} MB and {seconds:.0f} s; verified: {self.level}",
        ]
        if self.calibration is not None:
            count, more = len(self.calibration.texts), max(1.0, self.calibration.seconds)
            lines.append(f"calibration: {count} streams, prompts {self.calibration.origin}; about {more:.0f} s more")
        if self.text is not None:
            lines.append(f"text encoder: int8, {self.text.bytes / 1e6:.0f} MB")
        return "\n".join([*lines, *(f"  {name:<14} {size / 1e6:9.2f} MB" for name, size in self._by_kind().items())])

    def _format(self) -> str:
        narrow = f"{self.precision} products in " if self.precision in FORMATS else ""
        return f"{narrow}{activations(self.precision)}"

    def _by_kind(self) -> dict[str, int]:
        kinds: dict[str, list[int]] = {}
        for segment in self.segments:
            kinds.setdefault(segment.kind, []).append(self.sizes[segment.name])
        return {kind if len(s) == 1 else f"{kind} ({len(s)})": sum(s) for kind, s in kinds.items()}


def plan(options: Checkpoint, precision: str) -> Export:
    """Finds and checks everything that the export needs; writes nothing. ConfigError, WeightsError or ExportError."""
    source = find(options)
    segments = layout(source.config, precision, source.decoder, pictures=source.encodes is not None)
    text = None if options.text_encoder is None else text_encoder.find(options.text_encoder, source.config.text)
    small = memory.parameters(source.config) < verify.SMALL
    sizes = {segment.name: _size(segment, source, precision) for segment in segments}
    return Export(
        source=source,
        segments=segments,
        precision=precision,
        level=options.verify or ("full" if small else "segments"),
        out=options.out.expanduser(),
        text=text,
        calibration=calibrate.find(options, source, precision),
        sizes=sizes,
    )


def _size(segment: Segment, source: Source, precision: str) -> int:
    dtype = "fp32" if segment.name == "encoder" else activations(precision)
    narrow = eight_bits(segment, source, precision)
    return BYTES[dtype] * (numbers(segment, source) - narrow) + narrow


def tools() -> dict[str, str]:
    """What a bundle is made with -> its version."""
    found = {"cfrt": __version__, "python": platform.python_version()}
    for name in ("torch", "onnx", "onnxruntime", "onnxscript", "numpy"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


# ---------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; `argv` defaults to the process's own. Returns the exit code: 1 failed, 2 wrong arguments, 130
    interrupted."""
    options = tyro.cli(Options, prog="python -m export.onnx", args=argv, config=(tyro.conf.DisallowNone,))
    try:
        export = plan(options, options.precision)
        print(export)
        if options.dry_run:
            return 0
        manifest = export.run()
    except CfrtError as error:
        print(f"export.onnx: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("export.onnx: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    print(finished(manifest, options.out))
    return 0


def finished(manifest: Manifest, out: Path) -> str:
    """What was made, for people."""
    check = manifest.verification
    errors = ", ".join(f"{name} {error:.2g} (at most {check.limits[name]:g})" for name, error in check.errors.items())
    size = sum(entry.bytes for entry in manifest.files.values())
    return (
        f"{out}: {len(manifest.files)} files, {size / 1e6:.1f} MB\n"
        f"verified {check.level}, {check.units} units, {check.seconds:.1f} s; relative errors: {errors}\n"
        f"cfrt generate ... --model {out}{'' if manifest.plans else ' --engine onnx'}"
    )


if __name__ == "__main__":
    sys.exit(main())
