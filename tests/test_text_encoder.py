"""umT5 inside a bundle: int8 weights, ONNX Runtime, and what the real encoder says."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from student_fixture import random_weights, small_config
from transformers import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5Attention
from umt5_fixture import save_umt5, write_official

from cfrt.bundle import Bundle
from cfrt.config import TextConfig
from cfrt.errors import BundleError, ExportError, WeightsError
from cfrt.text import ExportedText, UMT5Text, encoder
from cfrt.weights import save_model
from export import text_encoder
from export.draft import draft
from export.onnx import main
from export.text_encoder import Shape, bucket_table, find, places, quantised

pytestmark = pytest.mark.cpu

CONFIG = TextConfig(kind="umt5", width=16, length=12)
PROMPT = "a red fox in the snow"


@pytest.fixture(scope="module")
def umt5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_umt5(tmp_path_factory.mktemp("umt5"))


@pytest.fixture(scope="module")
def bundle(umt5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that reads through umT5, exported with it."""
    folder = tmp_path_factory.mktemp("export")
    plain = small_config()
    weights = random_weights(plain)
    del weights["text.table"]
    save_model(folder / "model", replace(plain, text=CONFIG), weights)
    arguments = ["--model", str(folder / "model"), "--text-encoder", str(umt5), "--out", str(folder / "bundle")]
    assert main(arguments) == 0
    return folder / "bundle"


def test_a_bundle_reads_prompts_by_itself(bundle: Path, umt5: Path, tmp_path: Path) -> None:
    """As the encoder that it was made of does, within what eight bits lose; on the disk they are a quarter."""
    opened = Bundle.open(bundle)
    opened.check()
    assert opened.manifest.notes["text_encoder"]["level"] == "rows"
    assert opened.manifest.notes["text_encoder"]["error"] < 1e-5
    exported = ExportedText(CONFIG, opened, kept=tmp_path / "kept")
    exact = UMT5Text(CONFIG, [umt5], precision="fp32", kept=tmp_path / "other")
    for prompt in (PROMPT, "it’s a &amp;amp; fox", "a red fox in the snow runs in the blue snow in the snow"):
        got, expected = exported.encode(prompt), exact.encode(prompt)
        assert got.dropped == expected.dropped
        assert np.linalg.norm(got.rows - expected.rows) < 0.06 * np.linalg.norm(expected.rows)
    assert isinstance(encoder(opened.manifest.config, {}, bundle), ExportedText)


def test_the_released_file_is_the_same_encoder(umt5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its own layout and names, at a fraction of its size, and through the same verification."""
    plain, released = find(umt5, CONFIG), find(write_official(umt5, tmp_path / "released", monkeypatch), CONFIG)
    assert released.shape == plain.shape
    for name in plain.shape.tensors():
        np.testing.assert_array_equal(released.tensors[name], plain.tensors[name])
    with draft(tmp_path / "bundle") as made:
        assert released.make(made) == text_encoder.FOLDER
        assert released.check(made.folder)["level"] == "rows"


def test_reading_needs_no_pytorch(bundle: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from cfrt.bundle import Bundle
from cfrt.text import ExportedText
from pathlib import Path
bundle = Bundle.open({str(bundle)!r})
print(ExportedText(bundle.manifest.config.text, bundle, kept=Path({str(tmp_path)!r})).encode({PROMPT!r}).rows.shape)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "(12, 16)\n", done.stderr


def test_tampered_weights_are_not_read(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "b")
    path = tmp_path / "b" / "text" / "encoder.data"
    content = bytearray(path.read_bytes())
    content[100] ^= 4
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"encoder.data was changed"):
        ExportedText(CONFIG, Bundle.open(tmp_path / "b"), kept=tmp_path / "kept").encode(PROMPT)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (16, 64)])
def test_distances_fall_into_the_buckets_of_transformers(buckets: int, distance: int) -> None:
    sizes = {"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    said = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": distance}
    theirs = UMT5Attention(UMT5Config(**sizes, **said), has_relative_attention_bias=True)
    offset = torch.arange(1 - 512, 512)
    expected = theirs._relative_position_bucket(offset)
    np.testing.assert_array_equal(bucket_table(Shape(**sizes, **said), 512), expected)


def test_eight_bits_lose_half_a_level_at_most() -> None:
    weight = np.random.default_rng(0).standard_normal((7, 50)).astype(np.float32)
    weight[3] = 0
    values, scale = quantised(weight, 0)
    assert values.dtype == np.int8
    assert (np.abs(values * scale[:, None] - weight).max(axis=1) <= 0.5001 * scale).all()
    assert not values[3].any()


def test_the_full_size_is_five_and_a_half_gigabytes() -> None:
    """And every tensor has a place of its own, on a page."""
    from cfrt.nn.umt5 import XXL

    shape = Shape(**XXL)
    taken = sorted((start, dims) for start, dims in places(shape).values())
    assert all(start % text_encoder.ALIGNED == 0 for start, _ in taken)
    assert 5.6e9 < taken[-1][0] < 5.8e9
    assert sum(int(np.prod(size)) for size in shape.tensors().values()) == 5_680_910_336


def test_what_is_no_umt5_is_refused(umt5: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"expected text_encoder/config.json or .* in"):
        find(tmp_path, CONFIG)
    with pytest.raises(WeightsError, match="of width 32, got 16"):
        find(umt5, replace(CONFIG, width=32))
    with pytest.raises(ExportError, match="leave --text-encoder out"):
        find(umt5, small_config().text)
    shutil.copytree(umt5, tmp_path / "relative")
    path = tmp_path / "relative" / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"feed_forward_proj": "relu"}))
    with pytest.raises(ExportError, match="gated-gelu"):
        find(tmp_path / "relative", CONFIG)
