"""Weights on disk and other people's names for them.

A model is a folder with `config.json` and `model.safetensors`. Tensors are named `dit.*` (Wan2.1's own names),
`autoencoder.*` and `text.table`; floats are stored as fp16 and loaded as fp32. The safetensors file also carries the
config it was saved with, so that the pair cannot drift apart. A save replaces files whole or not at all.

numpy throughout. A model's file is mapped into memory: loading copies
nothing, and an engine that packs its weights never holds them twice.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from .bundle import TENSORS, Bundle, is_bundle
from .config import ModelConfig
from .errors import WeightsError

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
LISTED = 4
"""Differences that an error names before it counts the rest."""

SAMPLED = 256
"""Numbers of each tensor that count for its fingerprint."""

Arrays = Mapping[str, np.ndarray]

BF16 = np.dtype([("bits", np.uint16)])
"""The upper half of an fp32, for which numpy has no type."""
DTYPES: dict[str, Any] = {
    "BF16": BF16,
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BOOL": np.bool_},
    **{f"{letter}{bits}": np.dtype(f"{letter.lower()}{bits // 8}").type for letter in "IU" for bits in (8, 16, 32, 64)},
}
"""What safetensors calls the formats that are read."""


class MappedTensors(Mapping[str, np.ndarray]):
    """The tensors of a safetensors file. Each look-up gives fp32 anew: a view of the file where it is stored so, else a
    copy that the caller owns; whole numbers come as they are stored. Nothing can be written."""

    def __init__(self, views: Mapping[str, np.ndarray]) -> None:
        self._views = views

    def __getitem__(self, name: str) -> np.ndarray:
        view = self._views[name]
        if view.dtype == BF16:
            return (view["bits"].astype(np.uint32) << 16).view(np.float32)
        return view.astype(np.float32, copy=False) if np.issubdtype(view.dtype, np.floating) else view

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def part(self, prefix: str) -> "MappedTensors":
        """The tensors below `prefix.`, without it."""
        return MappedTensors(_below(self._views, prefix))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: view.shape for name, view in self._views.items()}

    def broken(self) -> list[str]:
        """The tensors with values that are not finite."""
        return [name for name, view in self._views.items() if not _finite(view)]


def _finite(view: np.ndarray) -> bool:
    """A block at a time: a large file is not to be held in memory for this."""
    flat, block = view.reshape(-1), 1 << 22
    parts = (flat[i : i + block] for i in range(0, len(flat), block))
    exponent = 0x7F80
    if view.dtype == BF16:
        return all(((part["bits"] & exponent) != exponent).all() for part in parts)
    return all(np.isfinite(part).all() for part in parts)


# ---------------------------------------------------------------------- own folders


def save_model(folder: str | Path, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes `config.json` and `model.safetensors` into `folder` (made if need be), other files there untouched.

    Each file is written beside its place, flushed to disk and moved in, so that a crash leaves the old or the new one.
    WeightsError when a float is not finite or beyond fp16; OSError when the folder cannot be written.
    """
    stored = {name: np.ascontiguousarray(_stored(name, tensor)) for name, tensor in tensors.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS_FILE) as weights, replacing(folder / CONFIG_FILE) as text:
        weights.write_bytes(to_safetensors(stored, metadata={"config": json.dumps(config.to_dict())}))
        text.write_text(config.to_json(), encoding="utf-8")


def load_model(folder: str | Path) -> tuple[ModelConfig, Arrays]:
    """The config and all tensors of `save_model`, floats as fp32, read from the mapped file when they are asked for.

    ConfigError for a bad config.json; WeightsError when the weights are missing, truncated, corrupt, not finite, or
    saved with another config. Whether every tensor is there is the reader's to say, through `match`.

    Of an exported bundle: its config, and the tensors outside its graphs.
    """
    folder = Path(folder)
    if is_bundle(folder):
        bundle = Bundle.open(folder)
        return bundle.manifest.config, _map_safetensors(bundle.file(TENSORS))[0]
    if not folder.is_dir():
        raise WeightsError(f"expected a model folder at {folder}, found {'a file' if folder.exists() else 'nothing'}")
    config = ModelConfig.load(folder / CONFIG_FILE)
    tensors, metadata = _map_safetensors(folder / WEIGHTS_FILE)
    if "config" in metadata:
        _check_same(config, metadata["config"], folder)
    return config, tensors


def read_config(folder: str | Path) -> ModelConfig:
    """The config of a model's folder, or of an exported bundle, alone."""
    if is_bundle(folder):
        return Bundle.open(folder).manifest.config
    return ModelConfig.load(Path(folder) / CONFIG_FILE)


def part(tensors: Arrays, prefix: str) -> Arrays:
    """The tensors below `prefix.`, without it: part(tensors, "dit") has Wan's names."""
    return tensors.part(prefix) if isinstance(tensors, MappedTensors) else _below(tensors, prefix)


def _below(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name[len(prefix) + 1 :]: x for name, x in tensors.items() if name.startswith(prefix + ".")}


def fingerprint(tensors: Arrays) -> str:
    """A SHA-256 of names, shapes and the first numbers of every tensor: which weights these are, without reading all
    of them. It is no proof that nothing is damaged."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(tensor.reshape(-1)[:SAMPLED]).astype(np.float32).tobytes())
    return digest.hexdigest()


def match(expected: Mapping[str, tuple[int, ...]], got: Mapping[str, np.ndarray]) -> None:
    """WeightsError that lists what is missing, extra or misshapen, unless `got` is exactly what is `expected`."""
    match_shapes(
        expected, got.shapes if isinstance(got, MappedTensors) else {name: tuple(x.shape) for name, x in got.items()}
    )


def match_shapes(expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """`match`, for shapes alone."""
    common = sorted(expected.keys() & shapes.keys())
    differences = [
        *listed("missing", sorted(expected.keys() - shapes.keys())),
        *listed("unknown", sorted(shapes.keys() - expected.keys())),
        *listed(
            "of another shape",
            [f"{n} (expected {expected[n]}, got {shapes[n]})" for n in common if tuple(expected[n]) != shapes[n]],
        ),
    ]
    if differences:
        raise WeightsError(f"the weights do not fit the model: {'; '.join(differences)}. Are they of another config?")


def listed(what: str, names: list[str]) -> list[str]:
    """A sentence's part about `names`, the first few of them named; none where there are none."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return [f"{len(names)} {what}: {', '.join(names[:LISTED])}{more}"] if names else []


def _stored(name: str, tensor: np.ndarray) -> np.ndarray:
    if not np.issubdtype(tensor.dtype, np.floating):
        return tensor
    if not np.isfinite(tensor).all() or np.abs(tensor).max(initial=0) > np.finfo(np.float16).max:
        raise WeightsError(f"{name} holds values that are not finite or beyond fp16; nothing was saved")
    return tensor.astype(np.float16)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes `path`'s place when the block succeeds and vanishes when it fails."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        with suppress(FileNotFoundError):
            draft.unlink()


def _map_safetensors(path: Path) -> tuple[MappedTensors, dict[str, str]]:
    try:
        with safe_open(path, framework="numpy") as file:  # checks the header against the size of the file
            metadata = file.metadata() or {}
        tensors = MappedTensors(_views(path))
    except FileNotFoundError as error:
        raise WeightsError(f"expected weights at {path}, found no such file") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is truncated or damaged ({error}); fetch or export it again") from error
    if broken := tensors.broken():
        raise WeightsError(f"{path} is damaged: {listed('tensors with values that are not finite', broken)[0]}")
    return tensors, metadata


def _views(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as a view of the file: 8 bytes with the length of the header, the header in JSON, then the data."""
    content = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))  # without the subclass, which costs at every view
    (length,) = struct.unpack("<Q", content[:8].tobytes())
    views = {}
    for name, entry in json.loads(content[8 : 8 + length].tobytes()).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} is stored as {entry['dtype']}, which this reader does not know")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        views[name] = content[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return views


def _check_same(config: ModelConfig, metadata: str, folder: Path) -> None:
    try:
        saved = ModelConfig.from_dict(json.loads(metadata))
    except ValueError as error:
        raise WeightsError(f"{folder / WEIGHTS_FILE} was saved by another version of cfrt ({error})") from error
    names = [f.name for f in fields(ModelConfig) if getattr(config, f.name) != getattr(saved, f.name)]
    if names:
        raise WeightsError(
            f"{folder / CONFIG_FILE} is not the config of its weights: {', '.join(sorted(names))} differ. "
            "Restore it, or write a new model with save_model"
        )


# ---------------------------------------------------------------------- other people's names

WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")

_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_OUTER = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _ATTENTION.items()},
}


def to_diffusers(name: str) -> str:
    """The name of a Wan tensor in diffusers' WanTransformer3DModel. Its norm2 is Wan's norm3."""
    return _renamed(name, _OUTER, _BLOCK)


def from_diffusers(name: str) -> str:
    """The Wan name of a tensor of diffusers' WanTransformer3DModel."""
    return _renamed(name, {b: a for a, b in _OUTER.items()}, {b: a for a, b in _BLOCK.items()})


def from_wrapper(name: str) -> str:
    """A name without what FSDP, activation checkpointing, torch.compile and the official wrapper put before it."""
    return WRAPPERS.sub("", name).removeprefix("model.")


_CONVOLUTIONS = {
    r"conv_in\.": "conv1.",
    r"norm_out\.": "head.0.",
    r"conv_out\.": "head.2.",
    r"mid_block\.resnets\.0\.": "middle.0.",
    r"mid_block\.attentions\.0\.": "middle.1.",
    r"mid_block\.resnets\.1\.": "middle.2.",
    r"down_blocks\.(\d+)\.": r"downsamples.\1.",
    r"\.norm1\.": ".residual.0.",
    r"\.conv1\.": ".residual.2.",
    r"\.norm2\.": ".residual.3.",
    r"\.conv2\.": ".residual.6.",
    r"\.conv_shortcut\.": ".shortcut.",
}


def vae_from_diffusers(name: str) -> str:
    """The name in Wan2.1_VAE.pth of a tensor of diffusers' AutoencoderKLWan, which counts decoder layers by level."""
    part, _, rest = name.partition(".")
    if part in ("quant_conv", "post_quant_conv"):
        return f"{'conv1' if part == 'quant_conv' else 'conv2'}.{rest}"
    if level := re.match(r"up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.", rest):
        place = 4 * int(level[1]) + int(level[2] or 3)
        rest = f"upsamples.{place}.{rest[level.end() :]}"
    rest = f".{rest}"
    for theirs, ours in reversed(_CONVOLUTIONS.items()):
        rest = re.sub(theirs, ours, rest)
    if part not in ("encoder", "decoder") or "_block" in rest:
        raise WeightsError(f"expected a tensor of Wan's autoencoder, got one called {name!r}")
    return part + rest


_T5 = {
    "norm1": "layer.0.layer_norm",
    **{f"attn.{x}": f"layer.0.SelfAttention.{x}" for x in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def umt5_from_official(name: str) -> str:
    """The name in transformers' UMT5EncoderModel of a tensor of models_t5_umt5-xxl-enc-bf16.pth."""
    outer = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
    if name in outer:
        return outer[name]
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
    if block is None or block[2] not in _T5:
        raise WeightsError(f"expected a tensor of umT5's encoder, got one called {name!r}")
    return f"encoder.block.{block[1]}.{_T5[block[2]]}.weight"


def _renamed(name: str, outer: Mapping[str, str], block: Mapping[str, str]) -> str:
    place, stem, kind = re.fullmatch(r"(blocks\.\d+\.)?(.*?)(\.weight|\.bias)?", name).groups()  # type: ignore[union-attr]
    table = block if place else outer
    if stem not in table:
        raise WeightsError(f"expected a tensor of a Wan video transformer, got one called {name!r}")
    return f"{place or ''}{table[stem]}{kind or ''}"
