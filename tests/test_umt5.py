"""umT5: what the network reads of a prompt is what diffusers' Wan pipeline makes of it; and what is kept on disk."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan as pipeline
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
from umt5_fixture import SIZES, official_names, save_umt5, tokenizer, write_official

from cfrt import memory
from cfrt.config import TextConfig
from cfrt.embeddings import Embeddings, fingerprint
from cfrt.errors import EngineError, PromptError, WeightsError
from cfrt.nn import int8, umt5
from cfrt.nn.int8 import quantised
from cfrt.text import OFFICIAL_WEIGHTS, PromptWarning, UMT5Text, umt5_folders
from cfrt.tokens import clean
from cfrt.weights import umt5_from_official

pytestmark = pytest.mark.cpu

CONFIG = TextConfig(kind="umt5", width=16, length=12)
PROMPTS = [
    "a red fox in the snow",
    "  A   red\n\tfox ",
    "it\u2019s a &amp;amp; fox",
    "a f\u00c3\u00bcr fox\u00a0runs",
    "a red fox in the snow runs in the blue snow in the snow",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_umt5(tmp_path_factory.mktemp("umt5"))


@pytest.fixture
def text(folder: Path, tmp_path: Path) -> Callable[..., UMT5Text]:
    def make(**changes: Any) -> UMT5Text:
        return UMT5Text(CONFIG, [folder], **{"precision": "fp32", "kept": tmp_path / "kept", **changes})

    return make


def theirs(folder: Path, prompt: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[L, width] by diffusers and transformers, padded to L as the reference pads."""
    pad = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    model = UMT5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True, dtype=dtype).eval()
    pipe = SimpleNamespace(tokenizer=pad, text_encoder=model, _execution_device=torch.device("cpu"))
    with torch.no_grad():
        rows = pipeline.WanPipeline._get_t5_prompt_embeds(pipe, prompt, max_sequence_length=CONFIG.length)
    return rows[0].double()


# ---------------------------------------------------------------------- the reference


@pytest.mark.parametrize(
    "prompt", [*PROMPTS, "&lt;b&gt; \u201cquotes\u201d", "\u3000wide\u2003blanks\u3000", "x&#160;y"]
)
def test_prompts_are_cleaned_as_the_reference_cleans_them(prompt: str) -> None:
    assert clean(prompt) == pipeline.prompt_clean(prompt)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_rows_equal_diffusers(text: Callable[..., UMT5Text], folder: Path, prompt: str) -> None:
    """Padded and masked there, not padded here; the rows after the prompt are zero in both, and are read."""
    expected, got = theirs(folder, prompt), text().encode(prompt).rows
    assert got.shape == (CONFIG.length, CONFIG.width)
    assert expected.std() > 0.1
    assert np.abs(got - expected.numpy()).max() <= 2e-6 * expected.abs().max()


def test_half_precision_errs_no_more_than_diffusers_does(text: Callable[..., UMT5Text], folder: Path) -> None:
    exact = theirs(folder, PROMPTS[0], torch.float64).numpy()
    allowed = np.abs(theirs(folder, PROMPTS[0], torch.bfloat16).numpy() - exact).max()
    assert np.abs(text(precision="bf16").encode(PROMPTS[0]).rows - exact).max() <= 2 * allowed


def dequantised(folder: Path, target: Path) -> Path:
    """The same encoder, its weights rounded to what int8 keeps of them."""
    model = UMT5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or name == "shared":
            q, scale = quantised(module.weight)
            module.weight.data = q * scale[:, None]
    model.save_pretrained(target / "text_encoder")
    return target


@pytest.mark.parametrize("official", [False, True])
def test_int8_errs_no_more_than_half_precision_on_what_it_keeps(
    official: bool, text: Callable[..., UMT5Text], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 2x rule on the same rounded weights; against the weights as they were, a few per cent at this width."""
    exact = theirs(dequantised(folder, tmp_path / "rounded"), PROMPTS[0], torch.float64).numpy()
    allowed = np.abs(theirs(tmp_path / "rounded", PROMPTS[0], torch.bfloat16).numpy() - exact).max()
    files = folder if not official else write_official(folder, tmp_path / "official", monkeypatch)
    encoder = UMT5Text(CONFIG, [files], precision="int8", kept=tmp_path / "kept")
    rows = encoder.encode(PROMPTS[0]).rows
    assert np.abs(rows - exact).max() <= 2 * allowed
    full = theirs(folder, PROMPTS[0], torch.float64).numpy()
    assert 0 < np.linalg.norm(rows - full) / np.linalg.norm(full) < 0.05
    assert (text(precision="bf16").encode(PROMPTS[0]).rows != rows).any()


def test_int8_keeps_what_the_plan_says(folder: Path) -> None:
    encoder = umt5.UMT5.load(
        folder / "text_encoder", folder / "tokenizer" / "tokenizer.json", CONFIG.length, precision="int8"
    )
    tensors = {x.data_ptr(): x for x in (*encoder.model.buffers(), *encoder.model.parameters())}
    sizes = memory.TextSizes(
        layers=SIZES["num_layers"], width=SIZES["d_model"], inner=SIZES["d_kv"] * SIZES["num_heads"],
        ffn=SIZES["d_ff"], heads=SIZES["num_heads"], words=encoder.model.config.vocab_size,
    )  # fmt: skip
    assert memory.text_encoder("int8", sizes) == sum(x.numel() * x.element_size() for x in tensors.values())
    assert memory.text_encoder("bf16") == 2 * memory.UMT5_XXL


def test_blocks_of_outputs_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(11, 6).double(), torch.randn(2, 3, 6).double()
    weight[4] = 0
    monkeypatch.setattr(int8, "BLOCK", 4)
    layer = int8.Int8Linear(weight)
    expected = x @ (layer.weight * layer.scale[:, None].double()).T
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-12)
    assert (layer.weight.abs().amax(1) == 127).sum() == 10
    assert ((layer.weight * layer.scale[:, None]) - weight).abs().max() <= layer.scale.max() / 2 * 1.0001


def test_what_finds_no_room_is_named(text: Callable[..., UMT5Text]) -> None:
    encoder = text()
    for _ in range(2):  # as it is read, and as it was kept
        encoded = encoder.encode(PROMPTS[-1])
        assert encoded.dropped == ("in the snow",)
        with pytest.warns(PromptWarning, match="at most 12 tokens, so 'in the snow' found no room"):
            encoded.warn()
    assert encoder.encode(PROMPTS[0]).dropped == ()


def test_the_official_file_has_other_names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file of 242 tensors at full size, bf16; `google/umt5-xxl` beside it."""
    write_official(folder, tmp_path, monkeypatch)
    official = torch.load(tmp_path / OFFICIAL_WEIGHTS, weights_only=True)
    same = [UMT5Text(CONFIG, [f], precision="fp32", kept=tmp_path / "kept") for f in (folder, tmp_path)]
    first, second = (each.encode(PROMPTS[0]).rows for each in same)
    np.testing.assert_array_equal(first, second)
    del official["norm.weight"]
    torch.save(official, tmp_path / OFFICIAL_WEIGHTS)
    with pytest.raises(WeightsError, match=r"missing: encoder\.final_layer_norm\.weight"):
        UMT5Text(CONFIG, [tmp_path], kept=tmp_path / "kept").encode(PROMPTS[1])


def test_the_full_size_is_the_released_one() -> None:
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**umt5.XXL, feed_forward_proj="gated-gelu"))
    names = {umt5_from_official(name) for name in official_names(24)}
    assert len(names) == 242
    assert names | {"encoder.embed_tokens.weight"} == set(model.state_dict())
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_680_910_336


def test_no_other_tensor_has_a_name() -> None:
    with pytest.raises(WeightsError, match="umT5"):
        umt5_from_official("blocks.0.cross_attn.q.weight")


# ---------------------------------------------------------------------- what is kept


def test_a_prompt_is_read_once(text: Callable[..., UMT5Text], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another encoder object, in a process that cannot load umT5, says the same."""
    expected = text().encode(PROMPTS[0]).rows
    monkeypatch.setattr(umt5.UMT5, "load", lambda *_, **__: pytest.fail("loaded again"))
    np.testing.assert_array_equal(text().encode(PROMPTS[0]).rows, expected)


def test_kept_prompts_need_no_encoder(text: Callable[..., UMT5Text], tmp_path: Path) -> None:
    expected = text().encode(PROMPTS[0]).rows
    without = UMT5Text(CONFIG, [tmp_path / "nowhere"], precision="fp32", kept=tmp_path / "kept")
    np.testing.assert_array_equal(without.encode(PROMPTS[0]).rows, expected)
    with pytest.raises(
        WeightsError, match=r"expected text_encoder/ or models_t5.* and tokenizer/tokenizer.json or .*nowhere"
    ):
        without.encode(PROMPTS[1])


def test_precisions_and_encoders_are_kept_apart(text: Callable[..., UMT5Text], tmp_path: Path) -> None:
    first = text().encode(PROMPTS[0]).rows
    assert (text(precision="bf16").encode(PROMPTS[0]).rows != first).any()
    other = UMT5Text(CONFIG, [save_umt5(tmp_path / "other", seed=1)], precision="fp32", kept=tmp_path / "kept")
    assert (other.encode(PROMPTS[0]).rows != first).any()


def test_the_longest_unread_go_first(tmp_path: Path) -> None:
    rows = np.ones((4, 64), dtype=np.float32)
    kept = Embeddings("it", folder=tmp_path, cap=3 * 1500)
    for i, name in enumerate("abc"):
        kept.put(name, rows * i)
        for path in tmp_path.rglob("*.safetensors"):  # an hour goes by
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 3600 * 10**9))
    assert kept.get("a") is not None
    kept.put("d", rows)
    assert [name for name in "abcd" if kept.get(name) is not None] == ["a", "c", "d"]


@pytest.mark.parametrize("damage", [b"", b"not tensors"])
def test_a_damaged_file_counts_as_absent(tmp_path: Path, damage: bytes) -> None:
    kept = Embeddings("it", folder=tmp_path)
    kept.put("a", np.ones((1, 4), dtype=np.float32), "rest")
    found = kept.get("a")
    assert found is not None
    assert found[1] == "rest"
    next(tmp_path.rglob("*.safetensors")).write_bytes(damage)
    assert kept.get("a") is None
    assert kept.get("b") is None


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    Embeddings("it", folder=tmp_path / "file").put("a", np.ones((1, 4), dtype=np.float32))


def test_a_fingerprint_sees_names_sizes_and_both_ends(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    found = set()
    for content in (b"abc", b"abd", b"abcd", b"abc"):
        file.write_bytes(content)
        found.add(fingerprint([file]))
    assert len(found) == 3


# ---------------------------------------------------------------------- manners


def test_half_of_the_files_says_which_half(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text_encoder").symlink_to(folder / "text_encoder")
    with pytest.raises(
        WeightsError, match=r"expected tokenizer/tokenizer.json or google/umt5-xxl/tokenizer.json \(of"
    ) as it:
        UMT5Text(CONFIG, [tmp_path], kept=tmp_path / "kept").encode(PROMPTS[0])
    assert "text_encoder/ or" not in str(it.value)


def test_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    save_umt5(tmp_path)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match="is no tokenizer"):
        UMT5Text(CONFIG, [tmp_path], kept=tmp_path / "kept").encode(PROMPTS[0])
    file = tmp_path / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="no umT5 that can be read"):
        umt5.UMT5.load(tmp_path / "text_encoder", folder / "tokenizer" / "tokenizer.json", 12)


def test_an_encoder_of_another_width_is_refused(folder: Path, tmp_path: Path) -> None:
    config = TextConfig(kind="umt5", width=8, length=12)
    with pytest.raises(WeightsError, match="width 8, got 16"):
        UMT5Text(config, [folder], kept=tmp_path).encode(PROMPTS[0])


@pytest.mark.parametrize("prompt", ["", " \n", "x" * 10_001])
def test_prompts_that_are_none(text: Callable[..., UMT5Text], prompt: str) -> None:
    with pytest.raises(PromptError, match="expected a prompt"):
        text().encode(prompt)


def test_unknown_precision_is_refused(folder: Path) -> None:
    with pytest.raises(EngineError, match="bf16, int8, fp32"):
        UMT5Text(CONFIG, [folder], precision="fp16")


def test_where_files_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CFRT_TEXT_ENCODER", str(tmp_path / "named"))
    found = umt5_folders(tmp_path / "model")
    assert found[:2] == [tmp_path / "named", tmp_path / "model"]
    assert found[2] == tmp_path / "cache" / "files" / "Wan-AI" / "Wan2.1-T2V-1.3B-Diffusers"
