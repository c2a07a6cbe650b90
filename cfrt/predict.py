"""How fast a stream would be on a GPU that is not here: an explicit model, an interval, and what it takes for granted.

A unit is S denoising passes, one commit and a decode. A pass is, one after another: the dense products by their
operations, attention at the rate that the kernels' machine code predicts (cfrt/sass.json, of benchmarks/sass_gate.py),
what moves through memory between the products by its bytes, and launches. The fast end overlaps half of the memory
traffic and has products at `FAST_SHARE` of the tensor cores' peak; the slow end overlaps nothing and has them at the
share that published measurements of this model leave for them (`calibrate`). Nothing in here is measured by us.

Legend: L layers, d width, N tokens a frame, F frames of a unit, T text rows, S steps.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from math import ceil

from . import memory
from .config import PRESETS, ModelConfig
from .errors import ConfigError

PRECISIONS = ("bf16", "fp16", "fp8", "int8")


@dataclass(frozen=True)
class Card:
    """Dense peaks in TFLOP/s by the products' type, memory in GB/s, multiprocessors; from NVIDIA's data sheets."""

    name: str
    tensor: dict[str, float]
    bandwidth: float
    processors: int
    attention: float = 0.0
    """Share of the bf16 peak that published attention reaches there; 0 where our own kernels' machine code says it."""


CARDS = {
    "rtx4090": Card("RTX 4090", {"bf16": 165.2, "fp16": 165.2, "fp8": 330.3, "int8": 660.6}, 1008, 128),
    # FlashAttention-2 (arXiv:2307.08691): 50-73 % of an A100; FlashAttention-3 (arXiv:2407.08608): 75 % of an H100.
    "a800": Card("A800", {"bf16": 312}, 2039, 108, attention=0.62),
    "h100": Card("H100", {"bf16": 989}, 3350, 132, attention=0.65),
}

FAST_SHARE = {"bf16": 0.85, "fp16": 0.85, "fp8": 0.75, "int8": 0.64}
"""Of the peak, in dense products of this size at the fast end: what good libraries reach. Assumed."""
WIDE = ("fp8",)
"""Of 8 bits, the precisions whose exports leave the feed-forward's last product in bf16 (export/quantize.py)."""
WIDTHS, WIDTHS_FFN = 30, 2
"""Rows of width d, and of the feed-forward's, that a layer writes or reads for each token between its products: norms,
modulation, residuals, q, k, v, their rotation, both attentions."""
MEMORY_SHARE = 0.85
"""Of the bandwidth that kernels bound by memory reach. Assumed."""
KERNELS, LAUNCH = 14, (1e-6, 2e-6)
"""Kernels of a layer, and seconds between two of them within a CUDA graph, fast and slow. Assumed."""
DECODER_OPERATIONS = {"taehv": 87.2e6, "wan": 2.171e9}
"""For each latent cell of a frame, counted over the decoders' layers: 0.544 and 13.55 TFLOP at 60 x 104."""
DECODER_SHARE = (0.6, 0.39)
"""Of the bf16 peak in convolutions: assumed, and TAEHV's on an A100 (13.5 ms for three latent frames, FlashDreams)."""

TARGETS = {"wan-1.3b-framewise-2step": 24.0, "wan-1.3b-chunkwise-4step": 16.0}
"""Frames a second that we want on an RTX 4090 at 480 x 832, TAEHV, W = 9, 8 bits."""
MOST_MEMORY = 10e9


@dataclass(frozen=True)
class Interval:
    """Seconds, or what they make: the fast and the slow end."""

    fast: float
    slow: float

    def __add__(self, other: "Interval") -> "Interval":
        return Interval(self.fast + other.fast, self.slow + other.slow)

    def times(self, count: float) -> "Interval":
        return Interval(self.fast * count, self.slow * count)


@dataclass(frozen=True)
class Shape:
    """One pass of a model: F frames that see `seen` frames, themselves included."""

    config: ModelConfig
    seen: int

    @property
    def tokens(self) -> int:
        return self.config.unit * self.config.frame_tokens

    @property
    def products(self) -> float:
        """Operations: 8 d^2 of self-attention's projections, 4 d^2 of the text's, 4 d f of the feed-forward."""
        c = self.config
        return c.depth * self.tokens * (12.0 * c.width**2 + 4 * c.width * c.ffn)

    def left_wide(self, precision: str) -> float:
        """Of `products`, the operations that are done in bf16."""
        return 2.0 * self.tokens * left_wide(self.config, precision)

    @property
    def attention(self) -> float:
        return 4.0 * self.config.depth * self.tokens * self.seen * self.config.frame_tokens * self.config.width

    @property
    def cross_attention(self) -> float:
        return 4.0 * self.config.depth * self.tokens * self.config.text.length * self.config.width

    def bytes(self, precision: str) -> float:
        """Weights once, and what moves between the products, in 16 bits."""
        c = self.config
        moved = c.depth * self.tokens * 2.0 * (WIDTHS * c.width + WIDTHS_FFN * c.ffn)
        return moved + memory.BYTES[precision] * memory.parameters(c) + left_wide(c, precision)


def left_wide(config: ModelConfig, precision: str) -> int:
    """Numbers in the weights of products that a precision of 8 bits leaves in 16, and so bytes more: L d f, or none."""
    return config.depth * config.width * config.ffn if precision in WIDE else 0


# ---------------------------------------------------------------------- attention by machine code


@cache
def figures() -> dict[tuple[str, int, str], dict[str, float]]:
    """The gate's rows for sm_89: {(kernel, head_dim, accumulate): its figures}."""
    text = files(__package__).joinpath("sass.json").read_text(encoding="utf-8")
    return {(row["kernel"], row["head_dim"], row["accumulate"]): row for row in json.loads(text)["rows"]}


def kernel_rates(precision: str, head_dim: int) -> Interval:
    """TFLOP/s of ring attention on an RTX 4090 in balance. The slow end counts the rare blocks as run every time."""
    kernel = "ring_attention_bf16" if precision in ("bf16", "fp16") else "ring_attention_int8_fp8"
    row = figures().get((kernel, head_dim, "fp32"))
    if row is None:
        known = sorted({dim for _, dim, _ in figures()})
        raise ConfigError(
            f"expected heads of {' or '.join(map(str, known))} numbers, as the kernels have, got {head_dim}"
        )
    return Interval(row["tflops_high"], row["tflops_low_with_cold"])


def balance(queries: int, heads: int, frames: int, frame_tokens: int, processors: int) -> float:
    """Share of the time in which all multiprocessors work, as csrc/cuda/split.h plans it (granules of 32 keys, blocks
    of 128 queries; a block costs three granules more, merging one)."""
    granules, tiles = ceil(frame_tokens / 32) * frames, ceil(queries / 128)
    best = (float("inf"), 0.0)
    for wanted in range(1, min(32, granules) + 1):
        part = ceil(granules / wanted)
        splits = ceil(granules / part)
        turns = ceil(tiles * heads * splits / processors)
        time = turns * (part + 3 + (splits > 1))
        share = queries / 128 * heads * frames * frame_tokens / 32 / processors / (turns * part)
        best = min(best, (time, share), key=lambda found: found[0])
    return best[1]


# ---------------------------------------------------------------------- a pass, and its calibration


def pass_terms(shape: Shape, card: Card, precision: str, slow_share: float) -> dict[str, Interval]:
    """Seconds of the parts of one pass. slow_share: of the peak, in the products at the slow end."""
    wide = card.tensor["bf16"] * 1e12
    moved = shape.bytes(precision) / (MEMORY_SHARE * card.bandwidth * 1e9)
    launches = KERNELS * shape.config.depth
    return {
        "dense products": _products(shape, card, precision, slow_share),
        "self-attention": _attention(shape, card, precision),
        "attention to the text": Interval(shape.cross_attention / (0.8 * wide), shape.cross_attention / (0.5 * wide)),
        "memory between products": Interval(moved / 2, moved),
        "launches": Interval(launches * LAUNCH[0], launches * LAUNCH[1]),
    }


def _products(shape: Shape, card: Card, precision: str, slow_share: float) -> Interval:
    left = shape.left_wide(precision)
    return _sum(
        Interval(*(operations / (share * card.tensor[kind] * 1e12) for share in (FAST_SHARE[kind], slow_share)))
        for kind, operations in ((precision, shape.products - left), ("bf16", left))
    )


def _attention(shape: Shape, card: Card, precision: str) -> Interval:
    if card.attention:
        seconds = shape.attention / (card.attention * card.tensor["bf16"] * 1e12)
        return Interval(seconds, seconds)
    c = shape.config
    rates = kernel_rates(precision, c.head_dim)
    share = balance(shape.tokens, c.heads, shape.seen, c.frame_tokens, card.processors)
    return Interval(shape.attention / (rates.fast * share * 1e12), shape.attention / (rates.slow * share * 1e12))


@dataclass(frozen=True)
class Published:
    """A measurement of this model by others: `seconds` for `passes`, decoding left out."""

    what: str
    card: str
    seconds: float
    passes: tuple[Shape, ...]
    compiled: bool
    """Compiled and captured, as our engine is; else the released eager code."""

    def share(self) -> float:
        """Of the peak that is left for the dense products when everything else takes what the slow end says."""
        card = CARDS[self.card]
        left = self.seconds - sum(
            sum(term.slow for name, term in pass_terms(shape, card, "bf16", 1.0).items() if name != "dense products")
            for shape in self.passes
        )
        return sum(shape.products for shape in self.passes) / (left * card.tensor["bf16"] * 1e12)


def clip(name: str) -> tuple[Shape, ...]:
    """All passes of a clip of 21 latent frames: the window grows, and each unit ends with its commit."""
    config = PRESETS[name]
    units = config.trained_frames // config.unit
    return tuple(
        Shape(config, min((unit + 1) * config.unit, config.window))
        for unit in range(units)
        for _ in range(len(config.unit_steps(unit)) + 1)
    )


def published() -> tuple[Published, ...]:
    """81 frames over the frame rates of arXiv:2605.15141, table 1 (one A800, released code); four passes of a chunk as
    FlashDreams publishes them (docs/benchmarks, PERFORMANCE.md): its own stack, and the released code beside it."""
    chunk = PRESETS["wan-1.3b-chunkwise-4step"]
    rows = [
        Published(f"Causal Forcing++ {steps}-step, released code", "a800", 81 / fps, clip(name), False)
        for steps, fps in ((1, 20.7), (2, 14.1), (4, 8.69))
        for name in (f"wan-1.3b-framewise-{steps}step",)
    ]
    four = lambda seen: (Shape(chunk, seen),) * 4  # noqa: E731
    return (
        *rows,
        Published("Causal Forcing chunk-wise 4-step, released code", "a800", 81 / 10.4, clip(chunk.name), False),
        Published("Self Forcing chunk-wise, released code, 18 frames in sight", "h100", 0.432, four(18), False),
        Published("Self Forcing chunk-wise, FlashDreams, 18 frames in sight", "h100", 0.344, four(18), True),
        Published("Self Forcing chunk-wise, FlashDreams, 21 frames in sight", "a800", 1.058, four(21), True),
    )


@cache
def calibrate() -> float:
    """The share of the peak for dense products at the slow end: the least that a compiled stack left for them."""
    return min(row.share() for row in published() if row.compiled)


# ---------------------------------------------------------------------- a stream


@dataclass(frozen=True)
class Prediction:
    """A stream in its steady state, window full. Milliseconds, frames a second, bytes. Never measured."""

    label: str
    gpu: str
    model: str
    resolution: tuple[int, int]
    window: int
    sinks: int
    steps: int
    precision: str
    decoder: str
    pass_ms: dict[str, Interval]
    decode_ms: Interval
    unit_ms: Interval
    latency_ms: Interval
    fps: Interval
    memory: int
    assumptions: tuple[str, ...]
    calibration: dict[str, float]
    """Of each published measurement: the share of the peak that it leaves for dense products."""
    targets: tuple[str, ...]


def predict(
    config: ModelConfig, *, gpu: str = "rtx4090", precision: str = "int8", decoder: str = "taehv"
) -> Prediction:
    """ConfigError for a card, a precision or a decoder that the model knows nothing of."""
    _check(gpu, precision, decoder, config)
    card, steps = CARDS[gpu], len(config.unit_steps(config.window // config.unit))
    terms = pass_terms(Shape(config, config.window + config.sinks), card, precision, calibrate())
    one = _sum(terms.values())
    operations = DECODER_OPERATIONS[decoder] * config.latent_grid[0] * config.latent_grid[1] * config.unit
    decode = Interval(*(operations / (share * card.tensor["bf16"] * 1e12) for share in DECODER_SHARE))
    unit, latency = one.times(steps + 1) + decode, one.times(steps) + decode
    frames = config.unit_frames(1)
    fps = Interval(frames / unit.fast, frames / unit.slow)
    kept = memory_of(config, precision, decoder)
    return Prediction(
        label="predicted",
        gpu=card.name,
        model=config.name,
        resolution=config.frame_size,
        window=config.window,
        sinks=config.sinks,
        steps=steps,
        precision=precision,
        decoder=decoder,
        pass_ms={name: term.times(1e3) for name, term in terms.items()},
        decode_ms=decode.times(1e3),
        unit_ms=unit.times(1e3),
        latency_ms=latency.times(1e3),
        fps=fps,
        memory=kept,
        assumptions=tuple(_assumptions(config, precision)),
        calibration={f"{row.what}, on one {CARDS[row.card].name}": row.share() for row in published()},
        targets=tuple(_targets(config, precision, decoder, fps, latency, kept)),
    )


def resized(config: ModelConfig, resolution: str) -> ModelConfig:
    """The model at HEIGHTxWIDTH pixels; ConfigError where its patches do not fit."""
    height, _, width = resolution.lower().partition("x")
    cell = config.autoencoder.spatial
    if not (height.isdecimal() and width.isdecimal()) or int(height) % cell or int(width) % cell:
        raise ConfigError(f"expected a resolution such as 480x832, multiples of {cell}, got {resolution!r}")
    return replace(config, latent_grid=(int(height) // cell, int(width) // cell))


def memory_of(config: ModelConfig, precision: str, decoder: str) -> int:
    """Bytes on the card: weights and ring in the precision asked for, but for what it leaves wide; everything else in
    16 bits."""
    account = lambda kind: memory.stream(memory.Setup(config=config, precision=kind, decoder=decoder)).parts  # noqa: E731
    small = {part.name: part.bytes for part in account(precision)}
    return left_wide(config, precision) + sum(
        small[part.name] if part.name.startswith(("transformer", "KV ring")) else part.bytes for part in account("bf16")
    )


def _sum(terms: Iterable[Interval]) -> Interval:
    return sum(terms, Interval(0, 0))


def _check(gpu: str, precision: str, decoder: str, config: ModelConfig) -> None:
    if gpu != "rtx4090":
        raise ConfigError(f"expected --gpu rtx4090, the card whose kernels' machine code is known, got {gpu!r}")
    if precision not in PRECISIONS:
        raise ConfigError(f"expected a precision out of {', '.join(PRECISIONS)}, got {precision!r}")
    if decoder not in DECODER_OPERATIONS or config.autoencoder.kind != "wan":
        raise ConfigError(
            f"expected a model with Wan's latents and a decoder out of {', '.join(DECODER_OPERATIONS)}, got "
            f"{config.name!r} with {decoder!r}"
        )


def _assumptions(config: ModelConfig, precision: str) -> Iterable[str]:
    fast, slow = (1e6 * seconds for seconds in LAUNCH)
    yield (
        f"dense products at {FAST_SHARE[precision]:g} of the {precision} peak (fast, assumed) and {calibrate():.2f} "
        "(slow: the least that a compiled stack leaves in the published measurements below)"
    )
    one = Shape(config, config.unit)
    if left := one.left_wide(precision):
        yield (
            f"of these, the feed-forward's last product ({100 * left / one.products:.0f} % of the operations) in bf16, "
            f"as exports in {precision} leave it: at {FAST_SHARE['bf16']:g} (fast) and {calibrate():.2f} (slow) of the "
            "bf16 peak"
        )
    yield (
        "self-attention by the machine code of our kernels at 2.52 GHz, times the balance of the grid; not timed on "
        "that card yet"
    )
    yield "attention to the text at 0.8 and 0.5 of the bf16 peak"
    yield f"memory at {MEMORY_SHARE} of the bandwidth, half of it hidden at the fast end"
    yield f"{KERNELS} kernels a layer in a CUDA graph, {fast:g}-{slow:g} us between them; the clock does not fall"
    yield f"the decoder at {DECODER_SHARE[0]} (assumed) and {DECODER_SHARE[1]} (TAEHV on an A100) of the bf16 peak"
    yield "nothing runs beside anything else; text encoding and copies to the host are left out; the window is full"
    if config.window < config.trained_frames:
        yield f"quality at a window of {config.window} is not known: the model was trained at {config.trained_frames}"


def _targets(
    config: ModelConfig, precision: str, decoder: str, fps: Interval, latency: Interval, kept: int
) -> Iterable[str]:
    beat = 1 / config.fps
    yield f"latency below a frame ({1e3 * beat:.1f} ms): {_verdict(latency.slow < beat, latency.fast < beat)}"
    yield f"memory of at most {MOST_MEMORY / 1e9:g} GB: {_verdict(kept <= MOST_MEMORY, kept <= MOST_MEMORY)}"
    wanted = TARGETS.get(config.name)
    if wanted is not None and decoder == "taehv" and precision in ("fp8", "int8"):
        yield f"at least {wanted:g} fps: {_verdict(fps.slow >= wanted, fps.fast >= wanted)}"


def _verdict(slow: bool, fast: bool) -> str:
    return "holds at both ends" if slow else "holds at the fast end alone" if fast else "does not hold"


# ---------------------------------------------------------------------- as a page


def page(found: Prediction) -> str:
    """Everything, with the word predicted in front."""
    height, width = found.resolution
    lines = [
        f"PREDICTED, not measured: {found.model} on one {found.gpu}, {height}x{width}, {found.precision}, "
        f"{found.steps} steps, W = {found.window}, K = {found.sinks}, {found.decoder} decoder included",
        "",
        f"{'frames a second':26} {found.fps.slow:8.1f} - {found.fps.fast:.1f}",
        _span("unit", found.unit_ms),
        _span("latency", found.latency_ms),
        *(_span(f"  a pass: {name}", term) for name, term in found.pass_ms.items()),
        _span("  decoding", found.decode_ms),
        f"{'memory':26} {found.memory / 1e9:8.2f} GB",
        "",
        "targets",
        *(f"  {line}" for line in found.targets),
        "",
        "assumed",
        *(f"  {line}" for line in found.assumptions),
        "",
        "what published measurements leave for dense products, of the bf16 peak",
        *(f"  {share:.2f}  {what}" for what, share in found.calibration.items()),
    ]
    return "\n".join(lines)


def _span(name: str, term: Interval) -> str:
    return f"{name:34} {term.fast:8.2f} - {term.slow:.2f} ms"
