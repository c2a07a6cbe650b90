"""Weights on disk and other people's names for them.

A model is a folder with `config.json` and `model.safetensors`. Tensors are named `dit.*` (Wan2.1's own names),
`autoencoder.*` and `text.table`; floats are stored as fp16 and loaded as fp32. The safetensors file also carries the
config it was saved with, so that the pair cannot drift apart. A save replaces files whole or not at all.

numpy throughout; torch is imported only to read `.pt` checkpoints. A model's file is mapped into memory: loading copies
nothing, and an engine that packs its weights never holds them twice.
"""

import json
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from .config import ModelConfig
from .errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
LISTED = 4
"""Differences that an error names before it counts the rest."""

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
    with _replacing(folder / WEIGHTS_FILE) as weights, _replacing(folder / CONFIG_FILE) as text:
        weights.write_bytes(to_safetensors(stored, metadata={"config": json.dumps(config.to_dict())}))
        text.write_text(config.to_json(), encoding="utf-8")


def load_model(folder: str | Path) -> tuple[ModelConfig, Arrays]:
    """The config and all tensors of `save_model`, floats as fp32, read from the mapped file when they are asked for.

    ConfigError for a bad config.json; WeightsError when the weights are missing, truncated, corrupt, not finite, or
    saved with another config. Whether every tensor is there is the reader's to say, through `match`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(f"expected a model folder at {folder}, found {'a file' if folder.exists() else 'nothing'}")
    config = ModelConfig.load(folder / CONFIG_FILE)
    tensors, metadata = _map_safetensors(folder / WEIGHTS_FILE)
    if "config" in metadata:
        _check_same(config, metadata["config"], folder)
    return config, tensors


def part(tensors: Arrays, prefix: str) -> Arrays:
    """The tensors below `prefix.`, without it: part(tensors, "dit") has Wan's names."""
    return tensors.part(prefix) if isinstance(tensors, MappedTensors) else _below(tensors, prefix)


def _below(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name[len(prefix) + 1 :]: x for name, x in tensors.items() if name.startswith(prefix + ".")}


def match(expected: Mapping[str, tuple[int, ...]], got: Mapping[str, np.ndarray]) -> None:
    """WeightsError that lists what is missing, extra or misshapen, unless `got` is exactly what is `expected`."""
    match_shapes(
        expected, got.shapes if isinstance(got, MappedTensors) else {name: tuple(x.shape) for name, x in got.items()}
    )


def match_shapes(expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """`match`, for shapes alone."""
    common = sorted(expected.keys() & shapes.keys())
    differences = [
        *_listed("missing", sorted(expected.keys() - shapes.keys())),
        *_listed("unknown", sorted(shapes.keys() - expected.keys())),
        *_listed(
            "of another shape",
            [f"{n} (expected {expected[n]}, got {shapes[n]})" for n in common if tuple(expected[n]) != shapes[n]],
        ),
    ]
    if differences:
        raise WeightsError(f"the weights do not fit the model: {'; '.join(differences)}. Are they of another config?")


def _listed(what: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return [f"{len(names)} {what}: {', '.join(names[:LISTED])}{more}"] if names else []


def _stored(name: str, tensor: np.ndarray) -> np.ndarray:
    if not np.issubdtype(tensor.dtype, np.floating):
        return tensor
    if not np.isfinite(tensor).all() or np.abs(tensor).max(initial=0) > np.finfo(np.float16).max:
        raise WeightsError(f"{name} holds values that are not finite or beyond fp16; nothing was saved")
    return tensor.astype(np.float16)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
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
        raise WeightsError(f"{path} is damaged: {_listed('tensors with values that are not finite', broken)[0]}")
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

BRANCHES = ("generator_ema", "generator", "model")
"""Top-level keys of the official checkpoints, in order of preference; their README says which one a file is read by."""

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


def _renamed(name: str, outer: Mapping[str, str], block: Mapping[str, str]) -> str:
    place, stem, kind = re.fullmatch(r"(blocks\.\d+\.)?(.*?)(\.weight|\.bias)?", name).groups()  # type: ignore[union-attr]
    table = block if place else outer
    if stem not in table:
        raise WeightsError(f"expected a tensor of a Wan video transformer, got one called {name!r}")
    return f"{place or ''}{table[stem]}{kind or ''}"


@dataclass(frozen=True)
class Source:
    """Where one tensor of a checkpoint is."""

    shape: tuple[int, ...]
    read: "Callable[[], Tensor]"


class Checkpoint:
    """A foreign DiT checkpoint, opened: names and shapes at once, tensors one at a time and as they are stored."""

    def __init__(self, path: str | Path, sources: Mapping[str, Source]) -> None:
        self.path = Path(path)
        plain = {from_wrapper(name).removeprefix("dit."): source for name, source in sources.items()}
        if any(name.startswith("condition_embedder.") for name in plain):
            plain = {from_diffusers(name): source for name, source in plain.items()}
        self._sources = plain

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By Wan's names."""
        return {name: source.shape for name, source in self._sources.items()}

    def tensor(self, name: str) -> "Tensor":
        """One tensor, read now."""
        try:
            return self._sources[name].read()
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise WeightsError(
                f"{name} of {self.path} cannot be read ({_first_line(error)}); fetch it again"
            ) from error


def open_checkpoint(path: str | Path, branch: str | None = None) -> Checkpoint:
    """A DiT checkpoint of any layout: an official `.pt`, a `.safetensors` file, Wan's or diffusers' folder (sharded or
    not, or the whole pipeline), or a model folder of ours.

    branch: which of an official file's dicts to read (default: the first of BRANCHES that it has). Needs torch.
    WeightsError when the file is missing, damaged, half fetched, or holds no such thing. Only tensors are unpickled,
    never code.
    """
    path = Path(path)
    if path.is_dir():
        return Checkpoint(path, {name: x for file in _shards(path) for name, x in _open_safetensors(file).items()})
    if not path.is_file():
        raise WeightsError(f"expected a checkpoint at {path}, found no such file")
    if path.suffix == ".safetensors":
        return Checkpoint(path, _open_safetensors(path))
    state = _branch(read_torch(path), branch, path)
    return Checkpoint(path, {name: Source(tuple(x.shape), partial(_itself, x)) for name, x in state.items()})


def read_checkpoint(path: str | Path, branch: str | None = None) -> Arrays:
    """All of `open_checkpoint` as fp32 arrays under Wan's names."""
    checkpoint = open_checkpoint(path, branch)
    return {name: checkpoint.tensor(name).float().numpy() for name in checkpoint.shapes}


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder; WeightsError for those that its index names and nobody fetched."""
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise WeightsError(f"expected .safetensors files in {folder}, found none")
        return files
    try:
        files = sorted({folder / name for name in json.loads(indices[0].read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{indices[0]} is no index of safetensors files; fetch it again") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise WeightsError(f"{folder} is half fetched: {_listed('files missing', missing)[0]}")
    return files


def _open_safetensors(path: Path) -> dict[str, Source]:
    _torch()
    try:
        file = safe_open(path, framework="pt")
        names = [name for name in file.keys() if not name.startswith(("autoencoder.", "text."))]  # noqa: SIM118
        return {name: Source(tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name)) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is truncated or damaged ({_first_line(error)}); fetch it again") from error


def _branch(content: Any, branch: str | None, path: str | Path) -> Mapping[str, Any]:
    present = [name for name in BRANCHES if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)]
    wanted = branch or (present[0] if present else None)
    if wanted is not None and wanted not in present:
        raise WeightsError(f"expected {wanted!r} in {path}, which has {', '.join(present) or 'no such branch'}")
    state = content if wanted is None else content[wanted]
    if not isinstance(state, Mapping) or not state or not all(hasattr(tensor, "numpy") for tensor in state.values()):
        raise WeightsError(f"expected named tensors in {path}, or one of the dicts {', '.join(BRANCHES)}")
    return state


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise WeightsError("reading foreign checkpoints needs PyTorch: pip install 'cfrt[torch]'") from error
    return torch


def read_torch(path: Path) -> Any:
    torch = _torch()
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise WeightsError(
            f"{path} is truncated, damaged or no checkpoint ({_first_line(error)}); fetch it again"
        ) from error


def as_bytes(name: str, tensor: "Tensor", format: str) -> memoryview:
    """A tensor's numbers as fp32, bf16 or fp16; WeightsError when one is not finite in that format."""
    torch = _torch()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[format]
    stored = tensor.detach().to(dtype).contiguous()
    if not stored.isfinite().all():
        raise WeightsError(f"{name} holds values that are not finite in {format}; nothing was written")
    numbers: memoryview = stored.reshape(-1).view(torch.uint8).numpy().data
    return numbers


def _itself(tensor: "Tensor") -> "Tensor":
    return tensor


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
