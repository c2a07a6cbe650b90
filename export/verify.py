"""Does the exported chain say what `cfrt.nn` says? Asked before the manifest is written.

The graphs run as fp32 twins in ONNX Runtime, between them the ring and the attention of the native engine: the host
code of a stream (cfrt/engines/segmented.py). Beside it `cfrt.nn` runs in fp32 with the same weights, rounded as the
graphs hold them, so that what differs is a wrong graph and not a rounding; and once more with the weights as they came,
which says what the rounding costs. Every unit is given the same latents in all three, so errors do not feed on
themselves through the sampling, but the ring keeps what each has written.

Activations in 8 bits go through unrounded when graphs are compared. One that lies between two numbers may become either
of them, and what follows from that grows from layer to layer, so that the same arithmetic, summed up in another order,
differs from itself by almost as much as the rounding costs. What it costs is measured with them rounded.

`full` takes the bundle's own files through at least 2 (W + K) latent frames: the ring wraps, sinks stay. `segments` is
for models too large for that: a model of two layers, the first and the last, at full width with few tokens, through a
short ring's wrap; and every file of the bundle must be the same graph, node by node, as the one that was run.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, helper

from cfrt import noise, shapes
from cfrt.bundle import Segment, Verification
from cfrt.config import ModelConfig
from cfrt.engines.onnx import CpuDevice, OnnxEngine
from cfrt.engines.twin import widen
from cfrt.errors import ExportError
from cfrt.flow import TIME_SCALE, v_from_x0, x0_from_v
from cfrt.nn.codec import Codec, codec
from cfrt.nn.dit import CausalDiT
from cfrt.nn.ring import RingCache
from cfrt.nn.taehv import TAEHV
from cfrt.nn.wan_vae import WanVAE

from .build import PIXELS, build, norms
from .graph import rounded
from .quantize import FORMATS, Inputs, product_of, rows
from .segments import activations, decoder_config, layout
from .sources import Lazy, Source, Tensors

EXACT = 1e-4
"""Relative error (L2) of a graph against the same arithmetic in PyTorch, both fp32; measured: 1e-6 to 1e-5."""
SCALARS = 1e-2
"""The same of pixels from Wan's decoder or TAEHV in half precision, in which PyTorch's exporter rounds scalars too;
measured: 2e-3."""
ROUNDING = {"fp32": EXACT, "bf16": 0.1, "fp16": 0.05, "fp8": 0.4, "int8": 0.4}
"""Relative error of the velocity that rounding the weights (in 8 bits the inputs too) may cause. It finds wrong scales,
which make it 0.6 (tests/test_quantize.py), and says nothing of quality (`python -m training quality` does): what a
network says of a past of noise is small and steep. Two embedded students that lost as little as each other in int8 had
0.12 and 0.25."""
SMALL = 300_000_000
"""Parameters below which a model is verified in full."""
DECODED = 4
"""Units that are decoded: the start, the first later one, and two whose state came from a later one."""

LEVELS = (1.0, 0.4)
"""s of the two passes over every unit."""


class Files(Mapping[str, ModelProto]):
    """The graphs of a folder's segments, each read when it is asked for."""

    def __init__(self, folder: Path, segments: Sequence[Segment]) -> None:
        self._paths = {segment.name: folder / segment.onnx for segment in segments}

    def __getitem__(self, name: str) -> ModelProto:
        return onnx.load(self._paths[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def full(source: Source, segments: Sequence[Segment], folder: Path, precision: str) -> Verification:
    """The files in `folder`, through the ring's wrap. ExportError, with numbers, when they differ too much."""
    config = source.config
    units = -(-2 * (config.window + config.sinks) // config.unit)
    begin = perf_counter()
    errors = compare(source, segments, Files(folder, segments), precision, units)
    return _verified("full", source, precision, units, errors, perf_counter() - begin)


def by_segments(source: Source, segments: Sequence[Segment], folder: Path, precision: str) -> Verification:
    """One segment of each kind at full width, and the files in `folder` against them. ExportError as above."""
    begin = perf_counter()
    small = few_tokens(source, precision)
    own = layout(small.config, precision, small.decoder, pictures=small.encodes is not None)
    graphs = {segment.name: build(segment, small, precision) for segment in own}
    kinds = {segment.kind: graphs[segment.name] for segment in own}
    files = Files(folder, segments)
    for segment in segments:
        same_graph(segment.name, files[segment.name], kinds[segment.kind])
    units = 2 * (small.config.window + small.config.sinks) // small.config.unit
    errors = compare(small, own, graphs, precision, units)
    return _verified("segments", source, precision, units, errors, perf_counter() - begin)


def few_tokens(source: Source, precision: str) -> Source:
    """The same model with two layers, its first and its last, four tokens a frame, and a short ring."""
    config = source.config
    _, ph, pw = config.patch
    window, sinks = 3 * config.unit, min(config.sinks, config.unit)
    small = replace(
        config,
        depth=min(2, config.depth),
        latent_grid=(2 * ph, 2 * pw),
        window=window,
        sinks=sinks,
        trained_frames=window + config.unit,
    )
    last = f"blocks.{config.depth - 1}."
    names = {name: name.replace("blocks.1.", last) if small.depth == 2 else name for name in shapes.dit(small)}
    dit = Lazy(shapes.dit(small), lambda name: source.dit[names[name]])
    products = [layers[0] for _, layers in rows(small, precision)]
    theirs = {name: names[f"{name}.weight"].removesuffix(".weight") for name in products}
    ranges = {name + kind: source.ranges[theirs[name] + kind] for name in products for kind in Inputs.KINDS}
    return replace(source, config=small, dit=dit, ranges=ranges)


def same_graph(name: str, found: ModelProto, expected: ModelProto) -> None:
    """ExportError unless both are the same nodes with the same attributes, whatever their sizes."""
    ours, theirs = _signature(expected), _signature(found)
    if ours != theirs:
        place = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
        raise ExportError(f"{name} is not the graph that was verified: node {place} of {len(theirs)} differs")


def _signature(model: ModelProto) -> list[tuple[str, str]]:
    return [(node.op_type, " ".join(sorted(str(a) for a in node.attribute))) for node in model.graph.node]


def _verified(
    level: str, source: Source, precision: str, units: int, errors: Mapping[str, float], seconds: float
) -> Verification:
    """ExportError when an error is above its limit, or is no number."""
    limits = dict.fromkeys(errors, EXACT)
    if activations(precision) != "fp32" and source.decoder != "tiny":
        limits["video"] = SCALARS
    limits["rounding"] = ROUNDING[precision]
    wrong = [
        f"{name} {errors[name]:.3g} (at most {limits[name]:g})" for name in errors if not errors[name] <= limits[name]
    ]
    if wrong:
        raise ExportError(
            f"verification failed ({level}, {units} units, {precision}): the relative error of {', '.join(wrong)}. "
            "No bundle was written"
        )
    return Verification(
        level=level,
        units=units,
        limits=limits,
        errors={name: float(f"{e:.4g}") for name, e in errors.items()},
        seconds=round(seconds, 1),
    )


# ---------------------------------------------------------------------- side by side


@torch.no_grad()
def compare(
    source: Source, segments: Sequence[Segment], graphs: Mapping[str, ModelProto], precision: str, units: int
) -> dict[str, float]:
    """The largest relative errors (L2), over `units` units, of the graphs against `cfrt.nn` with weights rounded alike:
    `velocity`; `text`, of keys and values; `ring`, of what each layer remembers at the end; `video`; `picture`, of the
    encoder's latent. And `rounding`: of the velocity against unrounded weights."""
    config, act = source.config, activations(precision)
    device, chain = _chain(source, segments, graphs, precision)
    networks = [_alike(source, precision), *([_Network(config, source.dit)] if act != "fp32" else [])]
    rounding = [_chain(source, segments, graphs, precision, rounding=True)[1]] if precision in FORMATS else []
    everybody: tuple[OnnxEngine | _Network, ...] = (chain, *networks, *rounding)
    found: dict[str, list[float]] = {"velocity": [], "rounding": [], "text": []}
    for unit in range(units):
        if unit in (0, units // 2):
            rows = noise.normal(1, unit, 0, 0, (config.text.length, config.text.width))
            for each in everybody:
                each.set_text(rows)
            found["text"] += _text_errors(device, networks[0])
        for step, s in enumerate(LEVELS):
            x = chain.noise(unit, step)
            v = [v_from_x0(x, each.denoise(x, TIME_SCALE * s, unit), np.float32(s)) for each in everybody]
            found["velocity"].append(_error(v[0], v[1]))
            found["rounding"].append(_error(v[-1 if rounding else 0], v[len(networks)]))
        for each in everybody:
            each.commit(chain.noise(unit, len(LEVELS)), unit)
    found["ring"] = _ring_errors(device, networks[0])
    found |= _pixel_errors(source, chain, segments, precision)
    return {name: float(np.max(errors)) for name, errors in found.items()}  # NaN, where one is


def _pixel_errors(
    source: Source, chain: OnnxEngine, segments: Sequence[Segment], precision: str
) -> dict[str, list[float]]:
    """The decoder over the first units, and the encoder over a picture, where there is one."""
    module = _codec(source.config, source.decoder, source.decodes, activations(precision))
    state: Any = None
    errors: dict[str, list[float]] = {"video": []}
    for unit in range(DECODED):
        latents = chain.noise(unit, 0)
        expected = []
        for frame in torch.from_numpy(latents).split(1, dim=1):
            pixels, state = module.decode(frame, state)
            expected.append(pixels[0].numpy())
        errors["video"].append(_error(chain.decode(latents), np.concatenate(expected)))
    if source.encodes is not None and any(segment.name == "encoder" for segment in segments):
        reader = _codec(source.config, source.config.autoencoder.kind, source.encodes, "fp32")
        assert not isinstance(reader, TAEHV)
        picture = np.random.default_rng(0).integers(0, 256, (*source.config.frame_size, 3), dtype=np.uint8)
        plain = torch.from_numpy(picture).permute(2, 0, 1)[None, None].float() / 255
        errors["picture"] = [_error(chain.encode(picture), reader.encode(plain).numpy())]
    return errors


class _Witness(CpuDevice):
    """Shows pictures as the decoder left them: [f, 3, H, W], not cut to bytes."""

    def pixels(self, skip: int) -> np.ndarray:
        return self.buffers["video"][skip:]


def _chain(
    source: Source,
    segments: Sequence[Segment],
    graphs: Mapping[str, ModelProto],
    precision: str,
    *,
    rounding: bool = False,
) -> tuple[CpuDevice, OnnxEngine]:
    """rounding: with activations rounded to 8 bits where the graphs say so, and then without pixels."""
    device = _Witness(source.config, norms(source, precision), threads=torch.get_num_threads())
    for segment in segments:
        if not (rounding and segment.name in PIXELS):
            device.load(segment, _twin(graphs[segment.name], rounding))
    chain = OnnxEngine()
    chain.connect(device, source.config, segments)
    return device, chain


def _twin(model: ModelProto, rounding: bool) -> bytes:
    copy = ModelProto()
    copy.CopyFrom(model)
    widen(copy)
    if not rounding:
        _leave_unrounded(copy)
    twin: bytes = copy.SerializeToString()
    return twin


def _leave_unrounded(model: ModelProto) -> None:
    """Takes the rounding of activations out: what was quantised and dequantised again goes through as it was."""
    narrowed = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in narrowed:
            node.CopyFrom(helper.make_node("Identity", [narrowed[node.input[0]]], list(node.output), name=node.name))
    nodes = [node for node in model.graph.node if node.op_type != "QuantizeLinear"]
    used = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in used]
    for field, kept in ((model.graph.node, nodes), (model.graph.initializer, tensors)):
        del field[:]
        field.extend(kept)


class _Network:
    """`cfrt.nn` as the passes of an engine, on arrays."""

    def __init__(self, config: ModelConfig, tensors: Tensors) -> None:
        self.dit = CausalDiT.from_arrays(config, tensors).eval()
        self.ring = RingCache(config)

    def set_text(self, rows: np.ndarray) -> None:
        self.text = self.dit.text_kv(torch.from_numpy(rows)[None, None])

    def denoise(self, latents: np.ndarray, t: float, unit: int) -> np.ndarray:
        x = torch.from_numpy(latents)
        v = self.dit.step(x, torch.tensor([t], dtype=torch.float64), self.text, self.ring, unit)
        x0: np.ndarray = x0_from_v(x, v, t / TIME_SCALE).numpy()
        return x0

    def commit(self, latents: np.ndarray, unit: int) -> None:
        self.dit.commit(torch.from_numpy(latents), self.text, self.ring, unit)


def _alike(source: Source, precision: str) -> _Network:
    """In fp32, with weights rounded as the graphs hold them."""
    act = activations(precision)
    dit = Lazy(shapes.dit(source.config), lambda name: rounded(source.dit[name], act))
    network = _Network(source.config, dit)
    for row, layers in rows(source.config, precision):
        weight = np.concatenate([source.dit[f"{layer}.weight"] for layer in layers]).T
        product = product_of(row, layers, weight, source.ranges, precision)
        held = product.dequantised()
        whole = held if product.inverse_factors is None else held * product.inverse_factors[:, None]
        bias = rounded(np.concatenate([source.dit[f"{layer}.bias"] for layer in layers]) + product.shift, act)
        bias = bias if product.offset is None else bias - product.offset @ held
        for kind, array in (("weight", whole.T), ("bias", bias)):
            for layer, part in zip(layers, torch.from_numpy(array).chunk(len(layers)), strict=True):
                network.dit.get_parameter(f"{layer}.{kind}").copy_(part)
    return network


def _text_errors(device: CpuDevice, network: _Network) -> list[float]:
    """Of the text's keys and of its values, all layers together."""
    pairs = zip(("text_k", "text_v"), zip(*network.text, strict=True), strict=True)
    return [_error(device.buffers[name], torch.cat(parts).flatten(3)[:, 0].numpy()) for name, parts in pairs]


def _ring_errors(device: CpuDevice, network: _Network) -> list[float]:
    """Of the keys and values of every frame that each layer holds."""
    errors = []
    for frame in network.ring.held():
        for layer in range(device.config.depth):
            expected = network.ring.read(layer, frame)
            got = device.ring.read(layer, frame)  # heads may be longer there, by zeros
            errors += [_error(a[..., : b.shape[-1]], b[0].numpy()) for a, b in zip(got, expected, strict=True)]
    return errors


def _codec(config: ModelConfig, kind: str, tensors: Tensors, dtype: str) -> Codec:
    """In fp32, with the weights and the means and deviations of latents rounded as the graph holds them."""
    own = decoder_config(config, kind)
    module = codec(own, {name: rounded(array, dtype) for name, array in tensors.items()}).eval()
    if isinstance(module, WanVAE):
        mean, std = (rounded(np.array(values), dtype) for values in own.normalisation)
        module.normalisation = tuple(mean.tolist()), tuple(std.tolist())
    return module


def _error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
