"""Where the weights of an export come from: a model's folder, a checkpoint, released files on this machine, or chance.

Tensors are given by name, fp32, read when they are asked for: a model larger than memory is exported a segment at a
time.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from pathlib import Path

import numpy as np

from cfrt import convert, hub, shapes, students
from cfrt.checkpoint import Checkpoint as Opened
from cfrt.checkpoint import read_torch
from cfrt.config import PRESETS, ModelConfig
from cfrt.errors import ConfigError, ExportError, WeightsError
from cfrt.nn.codec import KINDS
from cfrt.official import AUTOENCODER, OFFICIAL, TAEHV, File
from cfrt.text import TABLE
from cfrt.weights import CONFIG_FILE, WEIGHTS_FILE, load_model, match_shapes, part

from .options import Checkpoint
from .quantize import Ranges
from .segments import decoder_config

Tensors = Mapping[str, np.ndarray]
RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to export: its configuration, as the bundle will have it, and its tensors."""

    config: ModelConfig
    decoder: str
    dit: Tensors = field(repr=False)
    """By Wan's names."""
    decodes: Tensors = field(repr=False)
    """Of what decodes."""
    encodes: Tensors | None = field(repr=False)
    """Of the autoencoder that reads pictures; None where it is not here, and the bundle then has no encoder."""
    table: np.ndarray | None = field(repr=False)
    """Rows of text, of a model that has its own."""
    origin: str
    """Where the transformer's weights come from, in words."""
    ranges: Ranges = field(default_factory=dict, repr=False)
    """Of the inputs of products in 8 bits, once they were seen."""

    @property
    def parameters(self) -> int:
        """Numbers in everything that is exported: transformer, text, and what makes pixels and reads them, once."""
        parts = [self.dit, self.decodes, *([] if self.encodes is self.decodes else [self.encodes])]
        own = sum(prod(shape) for part in parts if part is not None for shape in shapes_of(part).values())
        return own + (0 if self.table is None else self.table.size)


class Lazy(Mapping[str, np.ndarray]):
    """Tensors by name, each made by `read` whenever it is asked for."""

    def __init__(self, names: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]) -> None:
        self.shapes, self._read = names, read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def find(options: Checkpoint) -> Source:
    """Everything that `options` name, opened and checked against the configuration. ConfigError, WeightsError or
    ExportError when something contradicts itself, is missing (it says what to put where) or does not fit."""
    config, folder = _model(options.model)
    config = _changed(_one_by_one(config, options), options)
    decoder = options.decoder or config.autoencoder.kind
    decoder_config(config, decoder)
    if config.guided:
        raise ExportError(
            f"{config.name!r} is a teacher: expected a model without guidance, got {config.guidance:g}, for which "
            "every pass runs twice; the torch engine runs it, and bundles are made of the students distilled from it"
        )
    if options.weights == RANDOM:
        return _random(config, decoder)
    dit, own, origin = _transformer(options, config, folder)
    match_shapes(shapes.dit(config), shapes_of(dit))
    encodes = _beside(own, "autoencoder", options.vae, AUTOENCODER)
    small = decoder != config.autoencoder.kind
    decodes = _beside(own, "taehv", options.taehv, TAEHV) if small else encodes
    if decodes is None:
        file, flag = (TAEHV, "--taehv") if small else (AUTOENCODER, "--vae")
        raise WeightsError(f"the decoder is not here; name its weights with {flag}, or:\n{hub.instructions([file])}")
    table = own.get(TABLE) if config.text.kind == "table" else None
    if config.text.kind == "table" and table is None:
        raise WeightsError(f"{origin} holds no {TABLE}, without which {config.name!r} reads no prompt")
    return Source(config=config, decoder=decoder, dit=dit, decodes=decodes, encodes=encodes, table=table, origin=origin)


# ---------------------------------------------------------------------- which model


def _model(name: str) -> tuple[ModelConfig, Path | None]:
    """Its config, and the folder of its weights where it is one."""
    path = Path(name).expanduser()
    if path.suffix == ".json" and path.is_file():
        return ModelConfig.load(path), None
    if name in PRESETS and name not in students.embedded():
        made = hub.model_folder(name)
        return PRESETS[name], made if (made / CONFIG_FILE).is_file() else None
    try:
        folder = students.find(name)
    except WeightsError as error:
        raise WeightsError(f"{error}, a .json of a config, or one of {', '.join(PRESETS)}") from None
    if not (folder / WEIGHTS_FILE).is_file():
        raise WeightsError(f"expected {WEIGHTS_FILE} in {folder}, which is no model that can be exported")
    return ModelConfig.load(folder / CONFIG_FILE), folder


def _one_by_one(config: ModelConfig, options: Checkpoint) -> ModelConfig:
    """ExportError for what only the torch engine can do: denoise several units in one pass, or look at sinks as if they
    were right before the window; unless the model is to do without."""
    if options.sequential:
        return replace(config, schedule="sequential", sink_position="relative")
    if config.schedule == "rolling" or (config.sink_position == "window" and config.sinks):
        raise ExportError(
            f"{config.name!r} denoises several units together, which bundles cannot; --sequential makes one that makes "
            "them one after another, and the torch engine runs the model as it is"
        )
    return config


def _changed(config: ModelConfig, options: Checkpoint) -> ModelConfig:
    grid = config.latent_grid if options.resolution is None else _grid(config, options.resolution)
    window = config.window if options.window is None else options.window
    sinks = config.sinks if options.sinks is None else options.sinks
    return replace(config, latent_grid=grid, window=window, sinks=sinks)


def _grid(config: ModelConfig, resolution: str) -> tuple[int, int]:
    side = config.autoencoder.spatial
    height, _, width = resolution.lower().partition("x")
    steps = (side * config.patch[1], side * config.patch[2])
    if not (height.isdigit() and width.isdigit()) or int(height) % steps[0] or int(width) % steps[1]:
        raise ConfigError(
            f"expected --resolution HEIGHTxWIDTH in multiples of {steps[0]} and {steps[1]} pixels, got {resolution!r}"
        )
    return int(height) // side, int(width) // side


# ---------------------------------------------------------------------- which weights


def _transformer(options: Checkpoint, config: ModelConfig, folder: Path | None) -> tuple[Tensors, Tensors, str]:
    """The DiT's tensors, those of the folder that holds them (or of none), and where that is."""
    path = folder if options.weights is None else Path(options.weights).expanduser()
    if path is None:
        if config.name not in OFFICIAL:
            raise WeightsError(f"{config.name!r} was never released: name its weights with --weights")
        path = hub.locate(OFFICIAL[config.name])
        if path is None:
            raise WeightsError(
                f"the weights of {config.name!r} are not here; name them with --weights, or:\n"
                f"{hub.instructions([OFFICIAL[config.name]])}"
            )
    if (path / WEIGHTS_FILE).is_file() and (path / CONFIG_FILE).is_file():
        _, tensors = load_model(path)
        return part(tensors, "dit"), tensors, str(path)
    opened = convert.plan(path, model=config).checkpoint
    return Lazy(opened.shapes, lambda name: _numbers(opened, name)), {}, str(path)


def _numbers(opened: Opened, name: str) -> np.ndarray:
    array: np.ndarray = opened.tensor(name).float().numpy()
    return array


def _beside(own: Tensors, prefix: str, named: Path | None, file: File) -> Tensors | None:
    """Tensors of the model's folder, of a named file, or of a released one on this machine."""
    if named is None and any(name.startswith(f"{prefix}.") for name in own):
        return part(own, prefix)
    path = named or (hub.locate(file))
    if path is None:
        return None
    tensors = read_torch(path)
    return Lazy({name: tuple(x.shape) for name, x in tensors.items()}, lambda name: tensors[name].float().numpy())


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Without reading them, where that is known."""
    known: dict[str, tuple[int, ...]] | None = getattr(tensors, "shapes", None)
    return known if known is not None else {name: tuple(x.shape) for name, x in tensors.items()}


# ---------------------------------------------------------------------- no weights


def _random(config: ModelConfig, decoder: str) -> Source:
    """Numbers of about the size that trained weights have, none of them zero, so that every layer can be compared."""
    import torch

    with torch.device("meta"):
        names = [
            {name: tuple(x.shape) for name, x in KINDS[own.kind](own).state_dict().items()}
            for own in (config.autoencoder, decoder_config(config, decoder))
        ]
    rows = max(config.text.vocab.values(), default=0) + 1
    table = _drawn(TABLE, (rows, config.text.width)) * (np.arange(rows) > 0)[:, None]
    encodes = Lazy(names[0], lambda name: _drawn(name, names[0][name]))
    other = Lazy(names[1], lambda name: _drawn(name, names[1][name]))
    return Source(
        config=config,
        decoder=decoder,
        dit=Lazy(shapes.dit(config), lambda name: _drawn(name, shapes.dit(config)[name])),
        encodes=encodes,
        decodes=encodes if decoder == config.autoencoder.kind else other,
        table=table.astype(np.float32) if config.text.kind == "table" else None,
        origin="random numbers",
    )


def _drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor by its name alone, the same every time."""
    count, pool = int(np.prod(shape)), _pool()
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % len(pool)
    numbers = pool[start : start + count]
    if len(numbers) < count:  # round the pool, as often as it takes
        numbers = np.resize(np.concatenate([pool[start:], pool[:start]]), count)
    numbers = numbers.reshape(shape)
    if "norm" in name or name.endswith(("gamma", "std")):
        return 1 + 0.1 * numbers if name.endswith(("weight", "gamma", "std")) else 0.1 * numbers
    if name.endswith("modulation"):
        return 0.5 * numbers
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 2500
    return numbers / np.float32(fan_in**0.5)


@cache
def _pool() -> np.ndarray:
    """Normals that all tensors are made of: drawing 1.4 billion would take longer than to export them. Their number is
    prime, so that no two rows of a matrix are the same."""
    return np.random.default_rng(0).standard_normal(4_194_301, dtype=np.float32)
