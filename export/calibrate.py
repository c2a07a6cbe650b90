"""What are the inputs of a product like? Seen in streams of `cfrt.nn` in fp32, before anything is quantised.

Every prompt is one stream of the student as it will run: its own step lists, noise, ring and clean passes. Random
weights have no prompts that they could read: they are shown random text and noise, a few tokens of it, which is what
such an export is verified with as well. It measures time and size, not what quantising costs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save
from torch import Tensor
from tqdm import tqdm

from cfrt import flow, memory, noise
from cfrt.config import ModelConfig
from cfrt.errors import ExportError
from cfrt.nn.dit import CausalDiT, TextKV
from cfrt.nn.ring import RingCache
from cfrt.predict import Shape
from cfrt.text import TABLE as TEXT_TABLE
from cfrt.text import encoder

from .draft import Draft, key, source_of, write_bytes
from .options import Checkpoint
from .quantize import FORMATS, OUTPUT, Inputs, cut, kept, rows, table, values
from .sources import RANDOM, Source

FILE = "calibration.safetensors"
"""In the bundle: the ranges that its scales come from."""
UNITS = 8
"""Of each stream."""
OPERATIONS, MEMORY, READING, START = 60e9, 8e9, 2e8, 2e-3
"""Operations, bytes of weights that pass by and bytes that are read first, a second each; seconds for each pass. What
PyTorch in fp32 does on one core of an AMD EPYC, roughly."""
SAMPLES, PICKED = 256, 4
"""Rows that are kept of each product's inputs, and looked at in each pass."""
SEED = 1
PROMPTS = (
    "a large red circle moving left over the ocean",
    "a small blue square moving up",
    "a large green triangle moving right slowly",
    "a small yellow circle moving down fast",
    "a large white square moving left fast",
    "a small pink triangle moving up over the night sky",
)
"""For the vocabulary of the embedded student."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What is shown to a model. `find` makes it."""

    origin: str
    """Of the prompts, in words."""
    texts: tuple[np.ndarray, ...] = field(repr=False)
    """Rows of text of each stream, fp32 [L, text width]."""
    config: ModelConfig
    """The model's, or the same with fewer tokens."""

    @property
    def seconds(self) -> float:
        """About what one core takes: to make the network, and for all passes by their operations and weights."""
        config, weights = self.config, 4.0 * memory.parameters(self.config)
        total = 0.0
        for unit in range(UNITS):
            shape = Shape(config, min((unit + 1) * config.unit, config.window + config.sinks))
            operations = shape.products + shape.attention + shape.cross_attention
            total += (len(config.unit_steps(unit)) + 1) * (operations / OPERATIONS + weights / MEMORY + START)
        return weights / READING + len(self.texts) * total

    def run(self, source: Source, made: Draft, precision: str) -> tuple[Source, dict[str, Any]]:
        """The source with its ranges, which are put in the draft or found there; and notes for the manifest."""
        begin = perf_counter()
        weights = (part for name in sorted(source.dit) for part in (name, source.dit[name].tobytes()))
        texts = (text.tobytes() for text in self.texts)
        content = key(source_of(("calibrate", "quantize")), repr(self.config), precision, *texts, *weights)
        again = made.make(FILE, content, lambda path: write_bytes(save(self.observe(source, precision)), path))
        notes = {
            "prompts": self.origin,
            "streams": len(self.texts),
            "units": UNITS,
            "seconds": round(perf_counter() - begin, 1) if again else "done by an earlier run of this export",
            "ranges": FILE,
        }
        return replace(source, ranges=load_file(made.folder / FILE)), notes

    @torch.no_grad()
    def observe(self, source: Source, precision: str) -> dict[str, np.ndarray]:
        """`quantize.Ranges`, of all products that will be quantised in this precision, and of the ring's values."""
        dit = CausalDiT.from_arrays(self.config, source.dit).eval()
        products = {layers[0]: Seen() for _, layers in rows(self.config, precision)}
        for _, layers in rows(self.config, precision):  # the last one: the clean pass of the last block has no q
            dit.get_submodule(layers[-1]).register_forward_pre_hook(_entering(products[layers[0]]))
        ring_values = {values(block): Seen() for block in range(self.config.depth)}
        for name, seen in ring_values.items():
            dit.get_submodule(name.removesuffix(OUTPUT)).register_forward_hook(_leaving(seen))
        self._play(dit)
        found = {name: torch.maximum(-seen.low, seen.high).numpy() for name, seen in ring_values.items()}
        for row, layers in rows(self.config, precision):
            seen = products[layers[0]]
            weight = np.concatenate([source.dit[f"{layer}.weight"] for layer in layers]).T
            inputs = Inputs(low=seen.low.numpy(), high=seen.high.numpy(), mean=seen.mean.numpy())
            samples = torch.cat(seen.samples).numpy()
            inputs = cut(inputs, samples, weight, precision, balanced=row.balanced is not None)
            found |= inputs.ranges(layers[0])
        return found

    def _play(self, dit: CausalDiT) -> None:
        with tqdm(total=len(self.texts) * UNITS, desc="calibration", unit="unit", leave=False) as bar:
            for number, rows_of_text in enumerate(self.texts):
                ring, text = RingCache(self.config), dit.text_kv(torch.from_numpy(rows_of_text)[None, None])
                for unit in range(UNITS):
                    latents = _played(dit, text, ring, unit, SEED + number)
                    dit.commit(latents, text, ring, unit)
                    bar.update()


class Seen:
    """What has passed one place: the least, the largest and the mean of each channel, and some rows."""

    def __init__(self) -> None:
        self.low, self.high = torch.tensor(torch.inf), torch.tensor(-torch.inf)
        self.samples = list[Tensor]()
        self._sum, self._count = torch.zeros(()), 0
        self._random = torch.Generator().manual_seed(SEED)

    def add(self, x: Tensor) -> None:
        """Rows [..., d]; a few of them are kept, from now and before alike."""
        x = x.flatten(0, -2).float()
        self.low, self.high = torch.minimum(self.low, x.amin(0)), torch.maximum(self.high, x.amax(0))
        self._sum, self._count = self._sum + x.double().sum(0), self._count + len(x)
        for row in x[torch.randint(len(x), (PICKED,), generator=self._random)].split(1):
            if len(self.samples) < SAMPLES:
                self.samples.append(row)
            elif torch.rand((), generator=self._random) < SAMPLES / self._count:
                self.samples[int(torch.randint(SAMPLES, (), generator=self._random))] = row

    @property
    def mean(self) -> Tensor:
        return (self._sum / self._count).float()


def _entering(seen: Seen) -> Any:
    return lambda module, inputs: seen.add(inputs[0])


def _leaving(seen: Seen) -> Any:
    return lambda module, inputs, output: seen.add(output)


def _played(dit: CausalDiT, text: TextKV, ring: RingCache, unit: int, seed: int) -> Tensor:
    """A unit's latents [1, F, C, h, w], by the student's own steps."""
    config = dit.config
    shape = (1, config.unit, config.latent_channels, *config.latent_grid)
    drawn = lambda step: torch.from_numpy(noise.normal(seed, unit, step, 0, shape))  # noqa: E731
    x = drawn(0)
    for step, (s, s_next) in enumerate(flow.descent(config.unit_steps(unit), config.shift), 1):
        t = torch.tensor([flow.TIME_SCALE * s], dtype=torch.float64)
        x0 = flow.x0_from_v(x, dit.step(x, t, text, ring, unit), s)
        x = flow.onward(config.solver, x, x0, s, s_next, partial(drawn, step))
    return x


# ---------------------------------------------------------------------- what is shown


def find(options: Checkpoint, source: Source, precision: str) -> Calibration | None:
    """What to calibrate with; None for a precision without scales. ExportError when it is not said or cannot be read,
    PromptError or WeightsError when a prompt cannot."""
    if precision not in FORMATS:
        if options.calibration is not None:
            raise ExportError(f"--calibration is for --precision fp8 and int8, not for {precision}; leave it out")
        return None
    if options.weights == RANDOM:
        return _at_random(options, source.config)
    origin, prompts = _prompts(options.calibration, source)
    table = {} if source.table is None else {TEXT_TABLE: source.table}
    text = encoder(source.config, table, options.text_encoder)
    texts = []
    for prompt in prompts:
        encoded = text.encode(prompt)
        if encoded.unknown:
            raise ExportError(
                f"the model does not know {', '.join(encoded.unknown)} of the calibration prompt {prompt!r}; "
                "give prompts like those of its streams, one a line: --calibration FILE"
            )
        texts.append(np.ascontiguousarray(encoded.rows, dtype=np.float32))
    return Calibration(origin=origin, texts=tuple(texts), config=source.config)


def _at_random(options: Checkpoint, config: ModelConfig) -> Calibration:
    if options.calibration is not None:
        raise ExportError("random weights read no prompts: leave out --calibration, or give real --weights")
    _, ph, pw = config.patch
    text = noise.normal(SEED, 0, 0, 0, (config.text.length, config.text.width))
    few = replace(config, latent_grid=(2 * ph, 2 * pw))
    return Calibration(origin="none: random text and noise, for random weights", texts=(text,), config=few)


def _prompts(file: Path | None, source: Source) -> tuple[str, tuple[str, ...]]:
    """Where they come from, and the prompts."""
    if file is None:
        if source.config.text.kind != "table":
            raise ExportError(
                "8-bit products need prompts to measure activations with: give some like those that will be streamed, "
                "one a line, with --calibration FILE"
            )
        return "built in", PROMPTS
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"expected --calibration to be a file of prompts, one a line; {file}: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ExportError(f"expected prompts in {file}, one a line, got none")
    return file.name, prompts


def described(calibration: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """The note `quantization` of a manifest: the table, and where its scales come from."""
    return {
        "format": {"int8": "int8", "fp8": "fp8 E4M3"}[precision],
        "weights": "a scale for each output, from its largest number",
        "scales": {"int8": "numbers of bf16; powers of two where exact", "fp8": "powers of two"}[precision],
        "activations": "a static scale for the tensor, from the share of the largest number seen that costs least",
        "offsets": {"int8": "of inputs that reach further to one side", "fp8": "none"}[precision],
        "biases": "without what rounded weights add to the mean",
        "ring": "on a GPU: queries and keys in int8, values in fp8 E4M3; not in what was verified here",
        "products": {"+".join(row.layers): {"inputs balanced in": row.balanced} for row in table(precision)},
        "kept": list(kept(precision)),
        "calibration": dict(calibration),
    }
