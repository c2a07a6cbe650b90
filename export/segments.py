"""How the network is cut for engines that keep no state: names, inputs and outputs of every segment.

The ring, and what touches it, stays outside the graphs. So the cut goes through every self-attention, right after the
projections to q, k and v and right before the one to the output; RMS norm of q and k, rotation, the append to the ring
and the attention over it are the host's kernels.

    text_kv                        once a prompt: the rows of text to keys and values of all layers
    head                           latents and time to tokens; layer 0 up to q, k and v
    mid_0 .. mid_{depth - 2}       layer i from the attention's answer on, layer i + 1 up to q, k, v
    tail                           the last layer from the attention's answer on, and the way back to latents: velocity
    decoder_start, decoder         a latent frame to pixels; the first of a clip apart where that is another graph (Wan)
    encoder                        a picture to latents, for streams that start from one

Everything has batch 1 and a fixed size. Latents, text rows, time features and pixels are fp32 where they come in or go
out, so that a host needs no other format and no level of 255 is rounded; all between is of `activations(precision)`.

Legend: M = F N tokens of a unit, d width, H heads, D = d/H, L text rows, C latent channels, h x w the latent grid.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cfrt.bundle import Port, Segment
from cfrt.config import AutoencoderConfig, ModelConfig
from cfrt.errors import ConfigError
from cfrt.nn.codec import KINDS, Codec

FOLDER = "segments"
ENCODERS = ("tiny", "wan")
"""Kinds of autoencoder that read pictures."""


def activations(precision: str) -> str:
    """The format of what flows between segments: 8-bit products have bf16 around them."""
    return precision if precision in ("fp32", "fp16") else "bf16"


def between(act: str) -> str:
    """The format of what the host's kernels read and write around an attention: they take bf16, and fp32 on a CPU."""
    return "bf16" if act == "fp16" else act


def layout(config: ModelConfig, precision: str, decoder: str, *, pictures: bool = True) -> tuple[Segment, ...]:
    """Every segment of a model, in the order in which they are made. pictures: with an encoder, where a stream of this
    model can start from a picture."""
    last = config.depth - 1
    segments = [_text_kv(config, precision), _head(config, precision)]
    segments += [_mid(config, precision, i) for i in range(last)]
    segments += [_tail(config, precision), *_decoder(config, precision, decoder)]
    if pictures and config.autoencoder.kind in ENCODERS and config.unit == 1:
        segments.append(_encoder(config))
    return tuple(segments)


def decoder_config(config: ModelConfig, decoder: str) -> AutoencoderConfig:
    """What decodes; ConfigError unless it reads the model's latents."""
    own = config.autoencoder
    if decoder == own.kind:
        return own
    if decoder == "taehv" and own.kind == "wan":
        return replace(own, kind="taehv", widths=())
    raise ConfigError(f"expected a decoder for the latents of {own.kind!r}, got {decoder!r}")


def starts_apart(decoder: str) -> bool:
    """Is the first latent frame of a clip decoded by a graph of its own? Others begin with a state of zeros."""
    return decoder == "wan"


# ---------------------------------------------------------------------- the transformer


def _text_kv(config: ModelConfig, precision: str) -> Segment:
    text, act = config.text, activations(precision)
    shape = (config.depth, text.length, config.width)
    rows = Port(name="rows", shape=(text.length, text.width), dtype="fp32")
    return _segment("text_kv", [rows], [Port(name=name, shape=shape, dtype=act) for name in ("text_k", "text_v")])


def _head(config: ModelConfig, precision: str) -> Segment:
    act = activations(precision)
    time = Port(name="time", shape=(1, config.time_width), dtype="fp32")
    embedding = Port(name="embedding", shape=(1, config.width), dtype=act)
    outputs = [_tokens(config, act, "x"), _qkv(config, act), _modulation(config, act), embedding]
    return _segment("head", [_latents(config, "latents"), time], outputs)


def _mid(config: ModelConfig, precision: str, layer: int) -> Segment:
    act = activations(precision)
    inputs = [*_layer_inputs(config, act), *_text(config, act, layer)]
    return _segment(f"mid_{layer}", inputs, [_tokens(config, act, "x"), _qkv(config, act)])


def _tail(config: ModelConfig, precision: str) -> Segment:
    act = activations(precision)
    embedding = Port(name="embedding", shape=(1, config.width), dtype=act)
    inputs = [*_layer_inputs(config, act), embedding, *_text(config, act, config.depth - 1)]
    return _segment("tail", inputs, [_latents(config, "velocity")])


def _layer_inputs(config: ModelConfig, act: str) -> list[Port]:
    return [_tokens(config, act, "x"), _tokens(config, between(act), "attended"), _modulation(config, act)]


def _tokens(config: ModelConfig, act: str, name: str) -> Port:
    return Port(name=name, shape=(config.unit * config.frame_tokens, config.width), dtype=act)


def _qkv(config: ModelConfig, act: str) -> Port:
    """Rows of [q | k | v]: one product makes all three, and the kernels read with a stride."""
    return Port(name="qkv", shape=(config.unit * config.frame_tokens, 3 * config.width), dtype=between(act))


def _modulation(config: ModelConfig, act: str) -> Port:
    return Port(name="modulation", shape=(6, config.width), dtype=act)


def _text(config: ModelConfig, act: str, layer: int) -> list[Port]:
    shape = (config.text.length, config.width)
    return [Port(name=name, shape=shape, dtype=act, row=layer) for name in ("text_k", "text_v")]


def _latents(config: ModelConfig, name: str) -> Port:
    return Port(name=name, shape=(config.unit, config.latent_channels, *config.latent_grid), dtype="fp32")


# ---------------------------------------------------------------------- pixels


def _decoder(config: ModelConfig, precision: str, decoder: str) -> list[Segment]:
    act, own = activations(precision), decoder_config(config, decoder)
    latent = Port(name="latent", shape=(config.latent_channels, *config.latent_grid), dtype="fp32")
    state = [
        (Port(name=f"state.{i}", shape=tuple(left.shape), dtype=act), left.requires_grad)
        for i, left in enumerate(state_after_start(own, config))
    ]
    ports = [port for port, _ in state]
    video = Port(name="video", shape=(own.temporal, 3, *config.frame_size), dtype="fp32")
    segments = [_segment("decoder", [latent, *ports], [video, *ports])]
    if starts_apart(decoder):  # it leaves zeros where it does not write
        first = replace(video, shape=(1, *video.shape[1:]))
        written = [port for port, computed in state if computed]
        segments.insert(0, _segment("decoder_start", [latent], [first, *written]))
    return segments


def _encoder(config: ModelConfig) -> Segment:
    """In fp32 whatever the precision: it runs once, and the whole stream is made from what it gives."""
    picture = Port(name="picture", shape=(3, *config.frame_size), dtype="fp32")
    latent = Port(name="latent", shape=(config.latent_channels, *config.latent_grid), dtype="fp32")
    return _segment("encoder", [picture], [latent])


def state_after_start(own: AutoencoderConfig, config: ModelConfig) -> list[Tensor]:
    """What the decoder remembers after the first latent frame, without its numbers: the module is asked without its
    weights. What requires a gradient is computed, the rest are the zeros of layers that start later."""
    with torch.device("meta"), torch.enable_grad():
        module: Codec = KINDS[own.kind](own)
        latents = torch.empty(1, 1, config.latent_channels, *config.latent_grid, requires_grad=True)
        _, state = module.decode(latents)
    return [state] if isinstance(state, Tensor) else list(state)


def _segment(name: str, inputs: Sequence[Port], outputs: Sequence[Port]) -> Segment:
    return Segment(name=name, inputs=tuple(inputs), outputs=tuple(outputs), onnx=f"{FOLDER}/{name}.onnx")
