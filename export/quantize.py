"""Products of 8-bit numbers: which layers have them, in which formats, and by which scales.

A quantised product is written out in the graph, by QuantizeLinear and DequantizeLinear around a MatMul, so that every
engine that runs it rounds in the same places:

    y = (D(Q((x - c) / f)) D(W' f)) + b'        Q divides by a scale, rounds and cuts off; D multiplies by it again

Weights have a scale for each output, from their own largest number. Activations have one for the tensor, from what was
seen during calibration (export/calibrate.py). In fp8 both are powers of two. f evens out the inputs of a product
(SmoothQuant, arXiv:2211.10438): a channel with large activations and small weights gives some of its size to the
weights, so that one scale fits all channels. f is of powers of two, so nothing is rounded by it, and it is folded into
what is computed before the product: the rows of a modulation, or the weight and bias of a norm. Where only an attention
or a GELU comes before, there is no such place, and f is 1. It is 1 as well where int8 holds a weight as it is, with
powers of two for scales: what was trained so (training/rounded.py) is not rounded.

c moves inputs that reach further to one side than to the other (Outlier Suppression+, arXiv:2304.09145): what a GELU
leaves is hardly ever below zero, so that half of the numbers of int8 were idle. One scale serves all inputs, so c is 0
for those that fit as they are, and no more than others need: b' has W c in return, and large numbers in it are rounded.
It is folded in where f is, and subtracted where f has no place. A floating format is finest around zero: there c is 0.

What is cut off and what is rounded are two errors, and in int8 one is traded for the other: calibration lowers the
largest number that a scale is made for as long as the product comes closer (`cut`). Rounded weights move the mean of an
output, always the same way, and a stream adds that up frame by frame: it is taken off the bias again.

Legend: in and out, the widths of a product; R rows of samples.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import ml_dtypes
import numpy as np

from cfrt.config import ModelConfig

Ranges = Mapping[str, np.ndarray]
"""The first layer of a product and each of `Inputs.KINDS` -> what `Inputs` says, fp32 [in]; `values(block)` -> the
largest |x| of the values that go into the ring, [d]."""
OUTPUT = ".output"
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

    @property
    def is_even(self) -> bool:
        """Are its numbers as far apart everywhere?"""
        return self.dtype == np.int8


FORMATS = {
    "int8": Format(dtype=np.dtype(np.int8), largest=127),
    "fp8": Format(dtype=np.dtype(ml_dtypes.float8_e4m3fn), largest=448),
}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What calibration has seen of each input of a product, fp32 [in]."""

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    share: np.ndarray = field(default_factory=lambda: np.ones((), np.float32))
    """Of the reach that holds all of them, [], that a scale is made for."""

    KINDS: ClassVar = (".low", ".high", ".mean", ".share")

    @property
    def largest(self) -> np.ndarray:
        """|x|."""
        return np.maximum(-self.low, self.high)

    @classmethod
    def of(cls, ranges: Ranges, layer: str) -> Self:
        return cls(**{kind[1:]: ranges[layer + kind] for kind in cls.KINDS})

    def ranges(self, layer: str) -> dict[str, np.ndarray]:
        return {layer + kind: getattr(self, kind[1:]) for kind in self.KINDS}


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product in 8 bits."""

    weight: np.ndarray
    """[in, out] in the format."""
    weight_scale: np.ndarray
    """fp32 [out]; as all scales, a number that bf16 holds."""
    input_scale: np.ndarray
    """fp32 []."""
    inverse_factors: np.ndarray | None
    """1 / f, fp32 [in], powers of two; None where there is no place to fold anything in."""
    offset: np.ndarray | None
    """c / f, fp32 [in], numbers that bf16 holds; None where all are 0."""
    shift: np.ndarray
    """b' - b, fp32 [out]: W c, without what rounding the weight adds to the mean of the outputs."""

    @property
    def is_folded(self) -> bool:
        """Does what comes before it do both to its inputs?"""
        return self.inverse_factors is not None

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


def quantise(weight: np.ndarray, inputs: Inputs, precision: str, *, balanced: bool) -> Product:
    """The product with fp32 weight [in, out] and such inputs."""
    known = FORMATS[precision]
    inverse = _factors(weight, inputs, known) if balanced else None
    even = np.ones(len(weight), np.float32) if inverse is None else inverse
    weight = weight / even[:, None]
    scale = _weight_scale(weight, known)
    narrow = _narrowed(weight / scale, known)
    offset, input_scale = _fitted(inputs, even, known)
    rounding = (inputs.mean * even - offset) @ (narrow.astype(np.float32) * scale - weight)
    return Product(
        weight=narrow,
        weight_scale=scale,
        input_scale=input_scale,
        inverse_factors=inverse,
        offset=offset if offset.any() else None,
        shift=offset @ weight - rounding,
    )


def product_of(row: Row, layers: tuple[str, ...], weight: np.ndarray, ranges: Ranges, precision: str) -> Product:
    """The product of a row of the table, with what calibration has seen."""
    return quantise(weight, Inputs.of(ranges, layers[0]), precision, balanced=row.balanced is not None)


def cut(inputs: Inputs, samples: np.ndarray, weight: np.ndarray, precision: str, *, balanced: bool) -> Inputs:
    """With the share, of SHARES, at which rounding `samples` [R, in] moves their product with weight [in, out] the
    least."""
    known = FORMATS[precision]
    inverse = _factors(weight, inputs, known) if balanced else np.ones(len(weight), np.float32)
    tried = [replace(inputs, share=np.array(share, np.float32)) for share in SHARES]
    errors = []
    for each in tried:
        offset, scale = _fitted(each, inverse, known)
        x = samples * inverse - offset
        rounded = _narrowed(x / scale, known).astype(np.float32) * scale
        errors.append(np.square(((rounded - x) / inverse) @ weight).sum())
    return tried[int(np.argmin(errors))]


def _fitted(inputs: Inputs, inverse: np.ndarray, known: Format) -> tuple[np.ndarray, np.ndarray]:
    """c / f and the scale with which the share of inputs / f that counts fits the format."""
    low, high = inputs.low * inverse, inputs.high * inverse
    if not known.is_even:
        return np.zeros_like(low), _scale(inputs.share * np.maximum(-low, high).max(), known)
    reach = np.asarray(inputs.share * (high - low).max() / 2)
    least, most = high - reach, low + reach  # offsets with which nothing is cut off, where there are any
    offset = np.where(least <= most, np.clip(0, least, most), (low + high) / 2)
    return _held(offset), _scale(reach, known)


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


def _factors(weight: np.ndarray, inputs: Inputs, known: Format) -> np.ndarray:
    """1 / f; 1 where int8 holds the weight as it is, and would not after factors: that is worth more."""
    if known.is_even and _is_whole(weight, _power(weight, known)).all():
        return np.ones(len(weight), np.float32)
    return inverse_factors(weight, inputs.largest)


def _weight_scale(weight: np.ndarray, known: Format) -> np.ndarray:
    """For each output of [in, out]. In int8 a power of two as well where that rounds nothing."""
    scale, power = _scale(np.abs(weight).max(axis=0), known), _power(weight, known)
    return np.where(_is_whole(weight, power), power, scale) if known.is_even else scale


def _power(weight: np.ndarray, known: Format) -> np.ndarray:
    """The least power of two for each output of [in, out] that is a scale for it."""
    power: np.ndarray = np.exp2(np.ceil(np.log2(_scale(np.abs(weight).max(axis=0), known)))).astype(np.float32)
    return power


def _is_whole(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """bool [out]: are all weights of an output whole numbers of its scale?"""
    steps = weight / scale
    whole: np.ndarray = (np.rint(steps) == steps).all(axis=0)
    return whole


def _scale(largest: np.ndarray, known: Format) -> np.ndarray:
    """One that bf16 holds, and 1 for what is all zeros. Of a floating format a power of two: what it holds is then the
    same under every scale, and a weight that has no more bits than that (training/rounded.py) is not rounded at all."""
    scale = np.where(largest == 0, 1, largest / known.largest)
    if not known.is_even:
        scale = np.exp2(np.ceil(np.log2(scale)))
    return _held(scale)


def _held(array: np.ndarray) -> np.ndarray:
    """The nearest numbers that bf16 holds, fp32."""
    near: np.ndarray = array.astype(ml_dtypes.bfloat16).astype(np.float32)
    return near


def _narrowed(array: np.ndarray, known: Format) -> np.ndarray:
    limited = np.clip(array, -known.largest, known.largest)
    narrow: np.ndarray = (np.rint(limited) if known.is_even else limited).astype(known.dtype)
    return narrow
