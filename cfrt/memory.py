"""What a stream, or a training, keeps in memory, before anything is loaded.

Weights, rings and states are counted exactly, from the shapes that the modules have (tests/test_memory.py holds them
against real ones). Workspaces are an upper estimate of what eager PyTorch has alive at once, and marked so.

Legend: L layers, d width, N tokens a frame, F W K frames of unit, window and sinks, T text rows, h x w the latent grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from . import shapes
from .config import AutoencoderConfig, ModelConfig

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}
DECODERS = ("wan", "taehv", "tiny")
UMT5_XXL = 5_680_910_336
"""Parameters of the text encoder: 24 layers of width 4096, 64 heads of 64, feed-forward 10240, 256,384 words."""


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
    remedies: tuple[Part, ...] = ()
    """A change, and the bytes that it saves."""

    @property
    def total(self) -> int:
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
    return Account(parts=tuple(parts), remedies=tuple(remedies))


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
    weights, state = decoder(config.autoencoder, config.latent_grid, setup.decoder)
    parts = [
        Part("transformer weights", size * parameters(config)),
        Part(f"KV ring of {config.geometry.capacity} latent frames", branches * size * ring(config)),
        Part("keys and values of the text", branches * size * text_kv(config)),
        Part(f"{setup.decoder} decoder weights", size * weights),
        Part("decoder state", size * state),
    ]
    if config.text.kind == "umt5" and setup.text == "gpu":
        parts.append(Part("umT5-xxl text encoder", BYTES["bf16"] * UMT5_XXL))
    return [
        *parts,
        Part("workspace of a pass", branches * size * workspace(config), exact=False),
        Part("workspace of the decoder", size * decoder_workspace(config, setup.decoder), exact=False),
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
    """Numbers alive at once in a pass over a unit, at most: of each of its F N tokens the residual, a normed copy, q,
    k, v and their rotations (8 d), or the residual, the norm and both sides of the activation (2 d + 2 f); and the
    window's keys and values where a backend wants them side by side."""
    tokens = config.unit * config.frame_tokens
    seen = config.geometry.capacity * config.frame_tokens
    return tokens * max(8 * config.width, 2 * config.width + 2 * config.ffn) + 2 * seen * config.width


# ---------------------------------------------------------------------- autoencoders


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
    return [f"  {part.name} saves {part.bytes / 1e9:.2f} GB" for part in remedies]
