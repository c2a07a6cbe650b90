"""The graphs of the autoencoder: `decoder`, `decoder_start`, `encoder`, written by PyTorch's exporter.

The modules are those of `cfrt.nn`; what they remember between two latent frames is an input and an output here, so that
no state can be changed in place, which the exporter would drop without a word.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from onnx import ModelProto
from onnx.inliner import inline_local_functions
from torch import Tensor, nn

from cfrt.bundle import OUT, STATE, Segment
from cfrt.config import ModelConfig
from cfrt.nn.autoencoder import Autoencoder
from cfrt.nn.codec import Codec, codec
from cfrt.nn.taehv import TAEHV
from cfrt.nn.wan_vae import WanVAE

from .graph import IR_VERSION, OPSET, check
from .segments import decoder_config

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Decode(nn.Module):
    """One latent frame [C, h, w], fp32, and the state before it -> pixels [f, 3, H, W] in [0, 1], fp32, and the next
    state. Without a state: the first latent frame of a clip, and only `written` of the state, the rest being zeros."""

    def __init__(self, module: Codec, dtype: torch.dtype, written: Sequence[int]) -> None:
        super().__init__()
        self.module, self.dtype, self.written = module, dtype, written

    def forward(self, latent: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        x = latent.to(self.dtype)[None, None]
        if isinstance(self.module, Autoencoder):
            video, last = self.module.decode(x, *state)
            return video[0].float(), last
        video, left = self.module.decode(x, state or None)
        return (video[0].float(), *(left[i] for i in self.written))


class Encode(nn.Module):
    """A picture [3, H, W] in [0, 1] -> its latent frame [C, h, w], both fp32."""

    def __init__(self, module: Autoencoder | WanVAE) -> None:
        super().__init__()
        self.module = module

    def forward(self, picture: Tensor) -> Tensor:
        return self.module.encode(picture[None, None])[0, 0]


def build(segment: Segment, config: ModelConfig, weights: Mapping[str, np.ndarray], decoder: str) -> ModelProto:
    """The graph of one segment. `weights`: the tensors of what decodes, or for `encoder` of the autoencoder."""
    if segment.kind == "encoder":
        module = _module(config, weights, config.autoencoder.kind, "fp32")
        assert not isinstance(module, TAEHV)  # a layout has no encoder there
        return _exported(Encode(module), segment)
    _, *state = segment.outputs
    written, dtype = [int(port.name.removeprefix(STATE)) for port in state], state[0].dtype
    module = _module(config, weights, decoder, dtype)
    return _exported(Decode(module, TORCH[dtype], written), segment)


def _module(config: ModelConfig, weights: Mapping[str, np.ndarray], kind: str, dtype: str) -> Codec:
    return codec(decoder_config(config, kind), weights).to(TORCH[dtype]).eval().requires_grad_(False)


def _exported(module: nn.Module, segment: Segment) -> ModelProto:
    module.eval()
    inputs = tuple(torch.zeros(port.shape, dtype=TORCH[port.dtype]) for port in segment.inputs)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # torchvision is not missed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch about itself
        warnings.simplefilter("ignore", DeprecationWarning)
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=[port.name for port in segment.inputs],
            output_names=[OUT + port.name for port in segment.outputs],
        )
    assert program is not None
    return _plain(program.model_proto, segment)


def _plain(model: ModelProto, segment: Segment) -> ModelProto:
    """Functions written out, notes of the exporter dropped; checked."""
    if model.functions:
        model = inline_local_functions(model)
    model.ir_version, model.producer_name = IR_VERSION, "cfrt"
    for item in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    del model.graph.value_info[:]
    check(model, segment)
    return model
