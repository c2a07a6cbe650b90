"""Checkpoints from one layout into another, one tensor at a time.

Into ours: a model folder that `cfrt.Stream` takes. Into diffusers': a folder for WanTransformer3DModel.from_pretrained.
Memory holds one tensor, and of a `.pt`, which is one file, what the system keeps of its mapping: less than 1.3 times
the largest shard either way. A failure leaves nothing behind.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from . import shapes
from .checkpoint import Checkpoint, as_bytes, open_checkpoint, read_torch
from .config import PRESETS, ModelConfig
from .errors import WeightsError
from .official import OFFICIAL, preset_of
from .weights import CONFIG_FILE, WEIGHTS_FILE, match_shapes, to_diffusers

Tensor = Any
"""torch's; only `cfrt.checkpoint` imports torch."""

LAYOUTS = ("cfrt", "diffusers")
FORMATS = {"fp32": ("F32", 4), "bf16": ("BF16", 2), "fp16": ("F16", 2)}
"""Numbers in a file: safetensors' name, bytes."""

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
FREE = 64 << 20
"""Bytes that a disk must have left over."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One conversion, checked and ready: `plan` makes it, `run` writes it."""

    config: ModelConfig
    layout: str
    format: str
    checkpoint: Checkpoint = field(repr=False)
    beside: Mapping[str, Tensor] = field(repr=False)
    """What goes along under its own name, such as `autoencoder.*`."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the new file, in its order."""
        return {self._named(name): shape for name, shape in sorted(self.checkpoint.shapes.items())} | {
            name: tuple(tensor.shape) for name, tensor in sorted(self.beside.items())
        }

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return FORMATS[self.format][1] * sum(map(prod, self.shapes.values()))

    def run(self, target: str | Path, progress: Callable[[int], None] = lambda _: None) -> None:
        """Writes the folder `target`, which must not exist; `progress` is told of every so many bytes.

        WeightsError when it exists, when the disk is too small, or when a tensor is damaged or does not fit the format:
        then nothing is left behind."""
        target = Path(target)
        if target.exists():
            raise WeightsError(f"{target} exists; name a new folder, or remove it first")
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < self.size + FREE:
            needed, found = f"{self.size / 1e9:.2f} GB", f"{free / 1e9:.2f} GB"
            raise WeightsError(f"expected {needed} of free disk at {target.parent}, found {found}; free some")
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        draft.mkdir()
        try:
            self._write(draft, progress)
            draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _write(self, folder: Path, progress: Callable[[int], None]) -> None:
        config = self.config.to_dict()
        if self.layout == "cfrt":
            self.config.save(folder / CONFIG_FILE)
            file, metadata = WEIGHTS_FILE, {"config": json.dumps(config)}
        else:
            (folder / CONFIG_FILE).write_text(json.dumps(diffusers_config(self.config), indent=2) + "\n")
            file, metadata = DIFFUSERS_FILE, {"format": "pt"}
        with (folder / file).open("wb") as out:
            out.write(_header(self.shapes, self.format, metadata))
            for name, tensor in self._tensors():
                out.write(as_bytes(name, tensor, self.format))
                progress(FORMATS[self.format][1] * tensor.numel())
            out.flush()
            os.fsync(out.fileno())

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in sorted(self.checkpoint.shapes):
            yield name, self.checkpoint.tensor(name)
        yield from sorted(self.beside.items())

    def _named(self, name: str) -> str:
        return f"dit.{name}" if self.layout == "cfrt" else to_diffusers(name)


def plan(
    source: str | Path,
    *,
    model: str | ModelConfig | None = None,
    layout: str = "cfrt",
    format: str = "fp32",
    branch: str | None = None,
    autoencoder: str | Path | None = None,
    taehv: str | Path | None = None,
) -> Conversion:
    """Opens `source` (see `cfrt.checkpoint.open_checkpoint`) and checks that it is the transformer of `model`.

    model: a preset's name or a config; None = what the folder's own config says, or the released file's name, such as
        framewise/causal_forcing.pt.
    format: fp32 (exact), bf16 or fp16, of all tensors.
    branch: which dict of an official file; None = the one that its release names, else the average if there is one.
    autoencoder, taehv: Wan2.1_VAE.pth and taew2_1.pth, to go into a model folder of ours.

    WeightsError when something is missing, damaged, or of another shape; it names the preset that would fit."""
    source = Path(source)
    if layout not in LAYOUTS or format not in FORMATS:
        raise WeightsError(f"expected a layout of {LAYOUTS}, a format of {tuple(FORMATS)}; got {layout!r}, {format!r}")
    own = (source / WEIGHTS_FILE).is_file()
    if own and layout == "cfrt":
        raise WeightsError(f"{source} is a model folder of ours already")
    config = _config(source, model, own)
    if branch is None and config.name in OFFICIAL and preset_of(source) == config.name:
        branch = OFFICIAL[config.name].branch
    checkpoint = open_checkpoint(source, branch)
    _check(checkpoint, config)
    files = {"autoencoder": autoencoder, "taehv": taehv}
    beside = {f"{prefix}.{n}": x for prefix, path in files.items() if path for n, x in read_torch(Path(path)).items()}
    if beside and layout != "cfrt":
        raise WeightsError("a diffusers transformer folder holds no autoencoder; leave it out or choose layout 'cfrt'")
    return Conversion(config=config, layout=layout, format=format, checkpoint=checkpoint, beside=beside)


def _config(source: Path, model: str | ModelConfig | None, own: bool) -> ModelConfig:
    if isinstance(model, ModelConfig):
        return model
    if model is None and own:
        return ModelConfig.load(source / CONFIG_FILE)
    name = model or preset_of(source)
    if name not in PRESETS:
        said = f"{name!r} is no preset" if name else f"{source} does not say which model it is"
        raise WeightsError(f"{said}; expected one of {', '.join(OFFICIAL)}")
    return PRESETS[name]


def closest(found: Mapping[str, tuple[int, ...]]) -> str | None:
    """The preset most of whose tensors are there in the same shape, if half of them are."""
    shared = {name: len(shapes.dit(config).items() & found.items()) for name, config in PRESETS.items()}
    best = max(shared, key=lambda name: shared[name])
    return best if 2 * shared[best] > len(shapes.dit(PRESETS[best])) else None


def diffusers_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of diffusers' WanTransformer3DModel."""
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(config.patch),
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "text_dim": config.text.width,
        "freq_dim": config.time_width,
        "ffn_dim": config.ffn,
        "num_layers": config.depth,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": config.eps,
        "rope_max_seq_len": 1024,
    }


def _check(checkpoint: Checkpoint, config: ModelConfig) -> None:
    try:
        match_shapes(shapes.dit(config), checkpoint.shapes)
    except WeightsError as error:
        near = closest(checkpoint.shapes)
        hint = f"The closest preset is {near!r}." if near and near != config.name else "No preset fits better."
        raise WeightsError(f"{checkpoint.path} against {config.name!r}: {error} {hint}") from error


def _header(layout: Mapping[str, tuple[int, ...]], format: str, metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with: the library itself writes whole files from memory only."""
    dtype, size = FORMATS[format]
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, shape in layout.items():
        start, at = at, at + size * prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, at]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
