"""Wan2.1's text encoder: umT5-xxl (arXiv:2304.09151), run by transformers, its tokenizer by tokenizers. Files on disk
only, never the network.

The reference pads every prompt to 512 tokens, masks the padding inside the encoder and puts zeros in its place
afterwards. A masked token changes nothing for the others, so only the prompt's own tokens are run here.

Legend: n tokens of a prompt, L = 512 rows at most, width 4096."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel
from transformers.utils.logging import disable_progress_bar

from ..checkpoint import read_torch
from ..errors import WeightsError
from ..tokens import Tokens
from ..weights import match, umt5_from_official
from .int8 import Int8Embedding, Int8Linear

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PRECISIONS = (*DTYPES, "int8")
XXL = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
}  # fmt: skip
"""What models_t5_umt5-xxl-enc-bf16.pth holds and does not say."""


@dataclass(frozen=True)
class UMT5:
    """The encoder, and its tokenizer, which stops at L tokens."""

    model: nn.Module
    tokens: Tokens

    @classmethod
    def load(cls, weights: Path, tokenizer: Path, length: int, *, device: str = "cpu", precision: str = "bf16") -> Self:
        """For prompts of at most `length` tokens. weights: transformers' folder (config.json, .safetensors) or the
        official .pth; tokenizer: tokenizer.json. precision: one of PRECISIONS; "int8" keeps its linear maps and the
        table of words in int8, and computes in bf16.

        WeightsError when they are damaged or not umT5's."""
        if precision == "int8":
            model = _in_int8(weights).to(device)
        else:
            dtype = DTYPES[precision]
            model = (_official(weights) if weights.is_file() else _of_transformers(weights, dtype)).to(device, dtype)
        return cls(model.eval().requires_grad_(False), Tokens(tokenizer, length))

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return int(self.model.config.d_model)  # type: ignore[union-attr, arg-type]

    @torch.inference_mode()
    def __call__(self, prompt: str) -> tuple[np.ndarray, str]:
        """float32 rows [n, width], n <= L, and the end of the prompt for which there was no room."""
        ids, rest = self.tokens(prompt)
        device = next(self.model.parameters()).device
        rows = self.model(input_ids=torch.tensor([ids], device=device)).last_hidden_state[0]
        return rows.float().cpu().numpy(), rest


def _of_transformers(folder: Path, dtype: torch.dtype) -> nn.Module:
    disable_progress_bar()
    try:
        model, report = UMT5EncoderModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=dtype
        )
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise WeightsError(f"{folder} holds no umT5 that can be read ({_first_line(error)}); fetch it again") from error
    wrong = {kind: sorted(names)[:4] for kind, names in report.items() if names and "keys" in kind}
    if wrong:
        raise WeightsError(f"{folder} is not umT5's encoder: {wrong}; fetch it again")
    return model


def _official(path: Path) -> nn.Module:
    model, state = _apart(path)
    model.load_state_dict(state, assign=True)
    return model


def _apart(weights: Path) -> tuple[UMT5EncoderModel, dict[str, Tensor]]:
    """The network without numbers, and the numbers, which stay on disk until they are looked at."""
    if weights.is_file():
        config = UMT5Config(**XXL, feed_forward_proj="gated-gelu")
        state = {umt5_from_official(name): tensor for name, tensor in read_torch(weights).items()}
    else:
        try:
            config = UMT5Config.from_pretrained(weights, local_files_only=True)
        except (OSError, ValueError) as error:
            raise WeightsError(f"{weights} is not umT5's encoder ({_first_line(error)}); fetch it again") from error
        state = {name: x for file in sorted(weights.glob("*.safetensors")) for name, x in read_torch(file).items()}
    if "shared.weight" in state:
        state["encoder.embed_tokens.weight"] = state["shared.weight"]  # one tensor, two names
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    match({name: tuple(x.shape) for name, x in model.state_dict().items()}, state)
    return model, state


def _in_int8(weights: Path) -> nn.Module:
    """A layer at a time: what is in memory is never much more than the result."""
    model, state = _apart(weights)
    model.shared = Int8Embedding(state["shared.weight"], torch.bfloat16)
    model.encoder.embed_tokens = model.shared
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent), child, Int8Linear(state[f"{name}.weight"]))
        elif f"{name}.weight" in state and not isinstance(module, Int8Embedding):
            module.weight = nn.Parameter(state[f"{name}.weight"].to(torch.bfloat16))
    return model


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
