"""Other people's checkpoints, opened: official `.pt` files, Wan's and diffusers' folders, sharded or not.

Names and shapes come at once, tensors one at a time. Names are translated by `cfrt.weights`. torch is imported only
when a file is opened.
"""

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from .errors import WeightsError
from .weights import Arrays, from_diffusers, from_wrapper, listed

if TYPE_CHECKING:
    from torch import Tensor

BRANCHES = ("generator_ema", "generator", "model")
"""Top-level keys of the official checkpoints, in order of preference; their README says which one a file is read by."""


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
        raise WeightsError(f"{folder} is half fetched: {listed('files missing', missing)[0]}")
    return files


OTHER = ("autoencoder.", "taehv.", "text.")
"""What a model folder of ours holds beside the DiT."""


def _open_safetensors(path: Path) -> dict[str, Source]:
    with _safetensors(path) as file:
        names = [name for name in file.keys() if not name.startswith(OTHER)]  # noqa: SIM118
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    return {name: Source(shape, partial(_one_of, path, name)) for name, shape in shapes.items()}


def _one_of(path: Path, name: str) -> "Tensor":
    """Through a mapping of its own, which goes with the tensor: what was read of a long-lived one would stay in
    memory."""
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    _torch()
    try:
        with safe_open(path, framework="pt") as file:
            yield file
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
    """What torch.save wrote, or the tensors of a safetensors file, mapped; WeightsError when there is no such thing."""
    torch = _torch()
    if not path.is_file():
        raise WeightsError(f"expected a checkpoint at {path}, found no such file")
    if path.suffix == ".safetensors":
        with _safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        said = _first_line(error)
        raise WeightsError(f"{path} is truncated, damaged or no checkpoint ({said}); fetch it again") from error


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
