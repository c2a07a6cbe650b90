"""Products of 8-bit numbers: which layers have them, in which formats, and by which scales.

A quantised product is written out in the graph, by QuantizeLinear and DequantizeLinear around a MatMul, so that every
engine that runs it rounds in the same places:

    y = (D(Q(x / f)) D(W' f)) + b        Q divides by a scale, rounds and cuts off; D multiplies by it again

Weights have a scale for each output, from their own largest number. Activations have one for the tensor, from what was
seen during calibration (export/calibrate.py). In fp8 both are powers of two. f evens out the inputs of a product
(SmoothQuant, arXiv:2211.10438): a channel with large activations and small weights gives some of its size to the
weights, so that one scale fits all channels. f is of powers of two, so nothing is rounded by it, and it is folded into
what is computed before the product: the rows of a modulation, or the weight and bias of a norm. Where only an attention
or a GELU comes before, there is no such place, and f is 1.

What is cut off and what is rounded are two errors, and in int8 one is traded for the other: calibration lowers the
largest number that a scale is made for as long as the product comes closer (`kept_share`). Rounded weights move the
mean of an output, always the same way, and a stream adds that up frame by frame: it is taken off the bias again.

Legend: in and out, the widths of a product; R rows of samples.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from cfrt.config import ModelConfig

Ranges = Mapping[str, np.ndarray]
"""The first layer of a product -> the largest |x| of each of its inputs that a scale is made for, fp32 [in]; that name
and MEAN -> the mean of each; `values(block)` -> the largest of the values that go into the ring, [d]."""
OUTPUT, MEAN = ".output", ".mean"
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Of the largest number seen, that are tried."""
RING_ROOM = 2
"""How much larger than the largest seen a value in the ring may become: a floating format loses nothing by it."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One product of every block, in the table of what is quantised."""

    layers: tuple[str, ...]
    """Side by side in one product."""
    balanced: str | None
    """Where the factors of its inputs are folded in."""
    precisions: tuple[str, ...] = ("int8", "fp8")
    """In which it is quantised; in all others it stays as it is."""


TABLE = (
    Row(layers=("self_attn.q", "self_attn.k", "self_attn.v"), balanced="modulation"),
    Row(layers=("self_attn.o",), balanced=None),
    Row(layers=("cross_attn.q",), balanced="norm3"),
    Row(layers=("cross_attn.o",), balanced=None),
    Row(layers=("ffn.0",), balanced="modulation"),
    Row(layers=("ffn.2",), balanced=None, precisions=("int8",)),
)
"""Of all precisions; `table` has the rows of one. Before `self_attn.o` lie the ring and before `cross_attn.o` the
text's values: both are seen by others, and a factor in them would be another format of the same bundle. A GELU lets no
factor through to `ffn.2`; rounding that to fp8 cost the embedded student motion (docs/export.md)."""
KEPT = (
    "patch_embedding",
    "text_embedding",
    "time_embedding",
    "time_projection",
    "cross_attn.k",
    "cross_attn.v",
    "head.head",
    "decoder",
    "encoder",
)
"""What stays as it is in every precision: a thousandth of the work of a pass, or once a prompt, and the first and the
last layers, which are the sensitive ones."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """8 bits: the type, and its largest number."""

    dtype: np.dtype
    largest: float


FORMATS = {
    "int8": Format(dtype=np.dtype(np.int8), largest=127),
    "fp8": Format(dtype=np.dtype(ml_dtypes.float8_e4m3fn), largest=448),
}


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product in 8 bits."""

    weight: np.ndarray
    """[in, out] in the format."""
    weight_scale: np.ndarray
    """fp32 [out]; as all scales, a number that bf16 holds."""
    input_scale: np.float32
    inverse_factors: np.ndarray | None
    """1 / f, fp32 [in], powers of two; None where there is no place for them."""
    shift: np.ndarray
    """What rounding the weight adds to the mean of the outputs, fp32 [out]."""

    def dequantised(self) -> np.ndarray:
        """The weight as the product sees it, f inside, fp32 [in, out]."""
        weight: np.ndarray = self.weight.astype(np.float32) * self.weight_scale
        return weight


def table(precision: str) -> tuple[Row, ...]:
    """The rows that are quantised in a precision: none where it is not of 8 bits."""
    return tuple(row for row in TABLE if precision in row.precisions)


def kept(precision: str) -> tuple[str, ...]:
    """The layers that are not quantised in a precision."""
    return *KEPT, *(layer for row in TABLE if precision not in row.precisions for layer in row.layers)


def row_of(precision: str, *layers: str) -> Row | None:
    """The row of the table for layers by their full names, in one product; None for what is not quantised."""
    parts = tuple(re.sub(r"^blocks\.\d+\.", "", layer) for layer in layers)
    return next((row for row in table(precision) if row.layers == parts), None)


def rows(config: ModelConfig, precision: str) -> Iterator[tuple[Row, tuple[str, ...]]]:
    """Every quantised product of a model: its row, and its layers by their full names."""
    for block in range(config.depth):
        for row in table(precision):
            yield row, tuple(f"blocks.{block}.{layer}" for layer in row.layers)


def is_quantised(name: str, precision: str) -> bool:
    """Is this tensor of the model held in 8 bits?"""
    layer, _, kind = re.sub(r"^blocks\.\d+\.", "", name).rpartition(".")
    return kind == "weight" and any(layer in row.layers for row in table(precision))


def quantise(
    weight: np.ndarray, largest: np.ndarray, precision: str, *, balanced: bool, mean: np.ndarray | None = None
) -> Product:
    """The product with fp32 weight [in, out], whose inputs reach `largest` [in] and are `mean` [in] on average."""
    known = FORMATS[precision]
    inverse = None
    if balanced:
        inverse = inverse_factors(weight, largest)
        weight, largest = weight / inverse[:, None], largest * inverse
    scale = _scale(np.abs(weight).max(axis=0), known)
    narrow = _narrowed(weight / scale, known)
    even = np.zeros(len(weight), np.float32) if mean is None else mean * (1 if inverse is None else inverse)
    return Product(
        weight=narrow,
        weight_scale=scale,
        input_scale=np.float32(_scale(largest.max(), known)),
        inverse_factors=inverse,
        shift=even @ (narrow.astype(np.float32) * scale - weight),
    )


def product_of(row: Row, layers: tuple[str, ...], weight: np.ndarray, ranges: Ranges, precision: str) -> Product:
    """The product of a row of the table, with what calibration has seen."""
    name = layers[0]
    return quantise(weight, ranges[name], precision, balanced=row.balanced is not None, mean=ranges[name + MEAN])


def kept_share(
    samples: np.ndarray, weight: np.ndarray, largest: np.ndarray, precision: str, *, balanced: bool
) -> float:
    """Of SHARES, the share of `largest` [in] at which rounding `samples` [R, in] moves their product with weight
    [in, out] least."""
    known = FORMATS[precision]
    inverse = inverse_factors(weight, largest) if balanced else np.ones(len(largest), np.float32)
    x, reach = samples * inverse, (largest * inverse).max()
    errors = []
    for share in SHARES:
        scale = _scale(share * reach, known)
        rounded = _narrowed(x / scale, known).astype(np.float32) * scale
        errors.append(np.square(((rounded - x) / inverse) @ weight).sum())
    return SHARES[int(np.argmin(errors))]


def values(block: int) -> str:
    """What a block puts into the ring, among ranges."""
    return f"blocks.{block}.self_attn.v{OUTPUT}"


def value_scales(ranges: Ranges, config: ModelConfig) -> np.ndarray:
    """fp32 [layers, d]: of each channel of the ring's values in e4m3."""
    largest = np.stack([ranges[values(block)] for block in range(config.depth)])
    scales: np.ndarray = np.where(largest == 0, 1, RING_ROOM * largest / FORMATS["fp8"].largest).astype(np.float32)
    return scales


def inverse_factors(weight: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """1 / f with f = sqrt(max |x| / max |W|) for each input, to the next power of two and with 1 in the middle: half of
    the difference goes to the weights. 1 for inputs that are never used."""
    heaviest = np.abs(weight).max(axis=1)
    used = (heaviest > 0) & (largest > 0)
    exponent = np.zeros(len(largest))
    exponent[used] = np.log2(heaviest[used] / largest[used]) / 2
    exponent[used] -= np.median(exponent[used]) if used.any() else 0
    return np.exp2(np.rint(exponent)).astype(np.float32)


def _scale(largest: np.ndarray, known: Format) -> np.ndarray:
    """One that bf16 holds, and 1 for what is all zeros. Of a floating format a power of two: what it holds is then the
    same under every scale, and a weight that has no more bits than that (training/rounded.py) is not rounded at all."""
    scale = np.where(largest == 0, 1, largest / known.largest)
    if known.dtype != np.int8:
        scale = np.exp2(np.ceil(np.log2(scale)))
    rounded: np.ndarray = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
    return rounded


def _narrowed(array: np.ndarray, known: Format) -> np.ndarray:
    limited = np.clip(array, -known.largest, known.largest)
    narrow: np.ndarray = (np.rint(limited) if known.dtype == np.int8 else limited).astype(known.dtype)
    return narrow
