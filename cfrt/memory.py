"""What a stream, or a training, keeps in memory, before anything is loaded.

Weights, rings and states are counted exactly, from the shapes that the modules have (tests/test_memory.py holds them
against real ones). Workspaces are an upper estimate of what eager PyTorch has alive at once, and marked so.

Legend: L layers, d width, N tokens a frame, F W K frames of unit, window and sinks, T text rows, h x w the latent grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from . import shapes
from .config import AutoencoderConfig, ModelConfig

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}
DECODERS = ("wan", "taehv", "tiny")


@dataclass(frozen=True)
class Part:
    """One item of the account."""

    name: str
    bytes: int
    exact: bool = True


@dataclass(frozen=True, kw_only=True)
class Account:
    """The parts on one device, and what would make them smaller."""

    parts: tuple[Part, ...]
    host: tuple[Part, ...] = ()
    """What is in the host's memory beside them."""
    remedies: tuple[Part, ...] = ()
    """A change, and the bytes that it saves."""

    @property
    def total(self) -> int:
        """Bytes of all parts on the device."""
        return sum(part.bytes for part in self.parts)

    def enough(self, budget: int) -> tuple[Part, ...]:
        """The fewest remedies, largest first, after which all fits; all of them when it never does."""
        chosen: list[Part] = []
        for remedy in sorted(self.remedies, key=lambda part: -part.bytes):
            if self.total - sum(part.bytes for part in chosen) <= budget:
                break
            chosen.append(remedy)
        return tuple(chosen)


# ---------------------------------------------------------------------- a stream


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a stream runs."""

    config: ModelConfig
    precision: str = "bf16"
    decoder: str = "wan"
    text: str = "cpu"
    """Where the text encoder is: "cpu" or "gpu"."""
    text_precision: str = "bf16"
    """What it is kept in: "bf16", "int8" or "fp32"."""
    guided: bool = False
    """Teachers: a second ring and a second text for the negative prompt."""


def stream(setup: Setup) -> Account:
    """The account of one stream on the device that denoises."""
    parts = _stream_parts(setup)
    total = sum(part.bytes for part in parts)
    remedies = [
        Part(name, saved)
        for name, changed in _changes(setup)
        if (saved := total - sum(part.bytes for part in _stream_parts(changed))) > 0
    ]
    return Account(parts=tuple(parts), host=_host_parts(setup), remedies=tuple(remedies))


def _host_parts(setup: Setup) -> tuple[Part, ...]:
    if setup.config.text.kind != "umt5" or setup.text != "cpu":
        return ()
    return (Part(f"umT5-xxl text encoder in {setup.text_precision}", text_encoder(setup.text_precision)),)


def _changes(setup: Setup) -> list[tuple[str, Setup]]:
    config, changes = setup.config, []
    if setup.precision in ("fp32", "fp64"):
        changes.append(("--precision bf16", replace(setup, precision="bf16")))
    if setup.decoder == "wan":
        changes.append(("--decoder taehv", replace(setup, decoder="taehv")))
    if setup.text == "gpu":
        changes.append(("--text cpu", replace(setup, text="cpu")))
    for window in (12, 9, 6):
        window = window // config.unit * config.unit
        if config.unit <= window < config.window:
            changes.append((f"--window {window}", replace(setup, config=replace(config, window=window))))
            break
    return changes


def _stream_parts(setup: Setup) -> list[Part]:
    config, size = setup.config, BYTES[setup.precision]
    branches = 2 if setup.guided else 1
    kind = config.autoencoder.kind
    _, state = decoder(config.autoencoder, config.latent_grid, setup.decoder)
    parts = [
        Part("transformer weights", size * parameters(config)),
        Part(f"KV ring of {config.geometry.capacity} latent frames", branches * size * ring(config)),
        Part("keys and values of the text", branches * size * text_kv(config)),
        Part(f"{kind} autoencoder weights", size * autoencoder(config.autoencoder)),
    ]
    if setup.decoder != kind:
        weights, _ = decoder(config.autoencoder, config.latent_grid, setup.decoder)
        parts.append(Part(f"{setup.decoder} decoder weights", size * weights))
    third = state if config.unit > 1 and kind != "tiny" else 0  # large latent frames are decoded one by one
    parts.append(Part("decoder state, and the one before it to go back to", 2 * size * state))
    if config.text.kind == "umt5" and setup.text == "gpu":
        name = f"umT5-xxl text encoder in {setup.text_precision}"
        parts.append(Part(name, text_encoder(setup.text_precision)))
    return [
        *parts,
        Part("workspace of a pass", branches * size * workspace(config), exact=False),
        Part("workspace of the decoder", size * (decoder_workspace(config, setup.decoder) + third), exact=False),
    ]


def parameters(config: ModelConfig) -> int:
    """Numbers in the transformer."""
    return sum(map(prod, shapes.dit(config).values()))


def ring(config: ModelConfig) -> int:
    """Numbers in the ring: 2 L (K + W + F) N d."""
    return 2 * config.depth * config.geometry.capacity * config.frame_tokens * config.width


def text_kv(config: ModelConfig) -> int:
    """Numbers in the text's keys and values: 2 L T d."""
    return 2 * config.depth * config.text.length * config.width


def workspace(config: ModelConfig) -> int:
    """Numbers alive at once in a pass over a unit, or the units of a rolling window, at most: of each of their tokens
    the residual, a normed copy, q, k, v and their rotations (8 d), or the residual, the norm and both sides of the
    activation (2 d + 2 f); and what they see, where a backend wants keys and values side by side."""
    tokens = config.joint_units * config.unit * config.frame_tokens
    seen = config.geometry.capacity * config.frame_tokens
    return tokens * max(8 * config.width, 2 * config.width + 2 * config.ffn) + 2 * seen * config.width


@dataclass(frozen=True, kw_only=True)
class TextSizes:
    """What the memory of an encoder of umT5's kind follows from; the released one's sizes."""

    layers: int = 24
    width: int = 4096
    inner: int = 4096
    """Numbers of all heads."""
    ffn: int = 10240
    heads: int = 64
    words: int = 256_384
    buckets: int = 32

    @property
    def maps(self) -> tuple[tuple[int, int], ...]:
        """Outputs and inputs of a layer's linear maps: q, k, v, o; the two gates; the way back."""
        attention = (*[(self.inner, self.width)] * 3, (self.width, self.inner))
        return (*attention, *[(self.ffn, self.width)] * 2, (self.width, self.ffn))

    @property
    def rest(self) -> int:
        """Numbers that are neither in a linear map nor in the table of words: norms and relative positions."""
        return self.layers * (2 * self.width + self.buckets * self.heads) + self.width

    @property
    def parameters(self) -> int:
        """Numbers in the encoder."""
        return self.layers * sum(o * i for o, i in self.maps) + self.words * self.width + self.rest


UMT5_XXL = TextSizes().parameters


def text_encoder(precision: str, sizes: TextSizes = TextSizes()) -> int:
    """Bytes of the text encoder's weights. "int8": a byte for each number of linear maps and table, an fp32 scale for
    each output and word, the rest in bf16."""
    if precision != "int8":
        return BYTES[precision] * sizes.parameters
    rows = [*sizes.maps * sizes.layers, (sizes.words, sizes.width)]
    return sum(o * (i + BYTES["fp32"]) for o, i in rows) + BYTES["bf16"] * sizes.rest


# ---------------------------------------------------------------------- autoencoders


def autoencoder(config: AutoencoderConfig) -> int:
    """Numbers in both halves of an autoencoder, which an engine loads whole; TAEHV has one half."""
    if config.kind == "wan":
        return _wan_encoder(config) + _wan_decoder(config)
    return _tiny(config) if config.kind == "tiny" else _taehv_decoder(config.latent_channels)


def decoder(config: AutoencoderConfig, grid: tuple[int, int], kind: str) -> tuple[int, int]:
    """Numbers in a decoder's weights and in its streaming state, for a latent grid h x w."""
    cells = grid[0] * grid[1]
    if kind == "tiny":
        return _tiny_decoder(config), config.latent_channels * cells
    if kind == "taehv":
        return _taehv_decoder(config.latent_channels), cells * sum(3 * width * scale for width, scale in _TAEHV_LEVELS)
    return _wan_decoder(config), _wan_state(config) * cells


def decoder_workspace(config: ModelConfig, kind: str) -> int:
    """Numbers alive at once while a latent frame becomes `temporal` pictures, at most: four maps of the last level."""
    autoencoder = config.autoencoder
    height, width = config.frame_size
    if kind == "wan":
        return 4 * autoencoder.temporal * autoencoder.widths[0] * height * width
    if kind == "taehv":
        return 4 * autoencoder.temporal * 64 * height * width
    return 4 * autoencoder.widths[-1] * height * width // 16


def _conv(i: int, o: int, taps: int) -> int:
    return i * o * taps + o


def _residual(i: int, o: int) -> int:
    """Wan: norm, 3x3x3, norm, 3x3x3, and a 1x1x1 where the width changes."""
    return i + _conv(i, o, 27) + o + _conv(o, o, 27) + (_conv(i, o, 1) if i != o else 0)


def _middle(d: int) -> int:
    """Two residual blocks around one spatial attention."""
    return 2 * _residual(d, d) + d + _conv(d, 3 * d, 1) + _conv(d, d, 1)


def _wan_levels(config: AutoencoderConfig) -> list[tuple[int, int, bool, bool]]:
    """The decoder's levels from latents to pixels: width in, width out, doubled in space, doubled in time."""
    a, b, c, d = config.widths  # from pixels to latents, as the encoder has them
    doubled = config.temporal.bit_length() - 1  # levels that double time
    ins, outs = (d, d // 2, c // 2, b // 2), (d, c, b, a)
    return [(ins[i], outs[i], i < 3, i < doubled) for i in range(4)]


def _wan_decoder(config: AutoencoderConfig) -> int:
    z, deep = config.latent_channels, config.widths[3]
    count = _conv(z, z, 1) + _conv(z, deep, 27) + _middle(deep)
    for i, o, space, time in _wan_levels(config):
        count += _residual(i, o) + 2 * _residual(o, o)
        count += (_conv(o, o // 2, 9) if space else 0) + (_conv(o, 2 * o, 3) if time else 0)
    return count + config.widths[0] + _conv(config.widths[0], 3, 27)


def _wan_encoder(config: AutoencoderConfig) -> int:
    z, widths, last = config.latent_channels, config.widths, len(config.widths) - 1
    count = _conv(3, widths[0], 27) + _conv(2 * z, 2 * z, 1)
    for level, (before, width) in enumerate(pairwise((widths[0], *widths))):
        count += _residual(before, width) + _residual(width, width)
        if level < last:
            temporal = level >= last - (config.temporal.bit_length() - 1)
            count += _conv(width, width, 9) + (_conv(width, width, 3) if temporal else 0)
    return count + _middle(widths[-1]) + widths[-1] + _conv(widths[-1], 2 * z, 27)


def _wan_state(config: AutoencoderConfig) -> int:
    """Numbers kept for each latent cell: two frames before each causal convolution, finer levels having more cells."""
    z, deep = config.latent_channels, config.widths[3]
    frame, cells = z + 4 * deep, 1  # the first convolution, and those of the middle
    for i, o, space, time in _wan_levels(config):
        frame += cells * (i + 5 * o + (o if time else 0))
        cells *= 4 if space else 1
    return 2 * (frame + cells * config.widths[0])


_TAEHV_LEVELS = ((256, 1), (128, 4), (64, 16))
"""Width of a level, and its cells for each latent cell."""


def _taehv_decoder(z: int) -> int:
    """TAEHV for Wan 2.1: three levels of three memory blocks (3x3 on two frames, two more 3x3), each followed by a
    doubling of the grid, a 1x1 that grows time, and a 3x3 to the next width; the last two have no bias."""
    count, grown = _conv(z, 256, 9), (1, 2, 2)
    for (width, _), following, more in zip(_TAEHV_LEVELS, (128, 64, 64), grown, strict=True):
        count += 3 * (_conv(2 * width, width, 9) + 2 * _conv(width, width, 9))
        count += width * width * more + 9 * width * following
    return count + _conv(64, 3, 9)


def _tiny(config: AutoencoderConfig) -> int:
    """All tensors of the small autoencoder, those that are no parameters too."""
    return sum(map(prod, shapes.autoencoder(config).values()))


def _tiny_decoder(config: AutoencoderConfig) -> int:
    *_, d16, d8, d4 = config.widths
    pixels = 3 * config.temporal * 16

    def residual(d: int) -> int:
        return 2 * _conv(d, d, 9)

    count = _conv(2 * config.latent_channels, d16, 9) + residual(d16)
    count += _conv(d16, 4 * d8, 1) + 2 * residual(d8) + _conv(d8, 4 * d4, 1) + 2 * residual(d4)
    return count + _conv(d4, pixels, 9)


# ---------------------------------------------------------------------- training


def training(config: ModelConfig, *, real: ModelConfig | None = None, processes: int = 1) -> Account:
    """Of one of `processes` GPUs that share everything out (FSDP2), fp32 masters and bf16 compute: the student and,
    with `real`, asymmetric DMD's critic and frozen score. Activations depend on batch and clip:
    `python -m training NAME --dry-run` counts those too."""
    own = parameters(config)
    parts = [
        Part("student: weights", 4 * own),
        Part("student: gradients", 4 * own),
        Part("student: AdamW's moments", 8 * own),
        Part("student: average", 4 * own),
    ]
    if real is not None:
        parts += [
            Part("critic: weights, gradients, moments", 16 * own),
            Part("real score, frozen, bf16", 2 * parameters(real)),
        ]
    shared = tuple(replace(part, bytes=-(-part.bytes // processes)) for part in parts)
    more = Part(f"{2 * processes} GPUs instead of {processes}", sum(part.bytes for part in shared) // 2)
    return Account(parts=shared, remedies=(more,))


# ---------------------------------------------------------------------- as a page


def read_size(text: str) -> int:
    """ "24GB", "24 GiB" or "800MB" in bytes; ValueError otherwise."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    plain = text.strip().upper().replace(" ", "")
    for unit in sorted(units, key=len, reverse=True):
        if plain.endswith(unit):
            return round(float(plain.removesuffix(unit)) * units[unit])
    raise ValueError(f"expected a size such as 24GB, got {text!r}")


def page(account: Account, budget: int | None) -> str:
    """A table, the total, and what to change to fit into `budget` bytes."""
    rows = [(part.name, part.bytes, "" if part.exact else "  estimate") for part in account.parts]
    width = max(len(name) for name, *_ in rows)
    lines = [f"{name:<{width}}  {size / 1e9:8.3f} GB{note}" for name, size, note in rows]
    lines += ["-" * (width + 13), f"{'total':<{width}}  {account.total / 1e9:8.3f} GB"]
    lines += [f"{'on the host: ' + part.name:<{width}}  {part.bytes / 1e9:8.3f} GB" for part in account.host]
    if budget is None:
        return "\n".join([*lines, *_saves(account.remedies)])
    if account.total <= budget:
        return "\n".join([*lines, f"fits into {budget / 1e9:.1f} GB, {(budget - account.total) / 1e9:.1f} GB left"])
    chosen = account.enough(budget)
    left = account.total - sum(part.bytes for part in chosen)
    verdict = "then it fits" if left <= budget else "and even then it does not fit"
    lines.append(f"does not fit into {budget / 1e9:.1f} GB; change this, {verdict} ({left / 1e9:.1f} GB):")
    return "\n".join([*lines, *_saves(chosen)])


def _saves(remedies: Sequence[Part]) -> list[str]:
    return [f"  {part.name} would save {part.bytes / 1e9:.2f} GB" for part in remedies]
