"""A text encoder of umT5's kind with random weights and a vocabulary of a few dozen pieces, in the released layout."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import UMT5Config, UMT5EncoderModel

from cfrt.nn import umt5
from cfrt.text import OFFICIAL_WEIGHTS
from cfrt.weights import umt5_from_official

SIZES = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
SPECIAL = ("<pad>", "</s>", "<unk>")
PIECES = (
    "▁",
    "▁a",
    "▁red",
    "▁fox",
    "▁in",
    "▁the",
    "▁snow",
    "▁it's",
    "▁blue",
    "▁runs",
    *"abcdefghijklmnopqrstuvwxyz'&<>.,",
)


def save_umt5(folder: Path, seed: int = 0) -> Path:
    """`text_encoder/` and `tokenizer/` in `folder`."""
    torch.manual_seed(seed)
    model = UMT5EncoderModel(UMT5Config(vocab_size=len(SPECIAL) + len(PIECES), **SIZES))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer().save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder


def tokenizer() -> Tokenizer:
    """As google/umt5-xxl's: a unigram model over pieces that begin with a blank, `</s>` at the end."""
    scores = [(piece, -float(i)) for i, piece in enumerate((*SPECIAL, *PIECES))]
    made = Tokenizer(models.Unigram(scores, unk_id=2))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    made.add_special_tokens(list(SPECIAL))
    return made


def write_official(folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The encoder in the official layout; its size, which the file does not say, is patched in."""
    state = UMT5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True).state_dict()
    monkeypatch.setattr(umt5, "XXL", {"vocab_size": len(state["shared.weight"]), **SIZES})
    (target / "google" / "umt5-xxl").mkdir(parents=True)
    torch.save(
        {name: state[umt5_from_official(name)] for name in official_names(SIZES["num_layers"])},
        target / OFFICIAL_WEIGHTS,
    )
    tokenizer().save(str(target / "google" / "umt5-xxl" / "tokenizer.json"))
    return target


def official_names(layers: int) -> Iterator[str]:
    yield from ("token_embedding.weight", "norm.weight")
    parts = (
        "norm1",
        "norm2",
        "pos_embedding.embedding",
        "ffn.gate.0",
        "ffn.fc1",
        "ffn.fc2",
        *(f"attn.{x}" for x in "qkvo"),
    )
    yield from (f"blocks.{layer}.{part}.weight" for layer in range(layers) for part in parts)
