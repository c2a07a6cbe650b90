"""Weights on disk: whole or not at all, checked when read, under everybody's names."""

import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from cfrt import checkpoint, weights
from cfrt.config import PRESETS
from cfrt.errors import ConfigError, WeightsError
from cfrt.nn.dit import CausalDiT
from cfrt.weights import CONFIG_FILE, WEIGHTS_FILE

pytestmark = pytest.mark.cpu

CONFIG = replace(PRESETS["tiny"], width=12, heads=2, depth=2, ffn=16, time_width=8)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "dit.head.head.weight": rng.normal(size=(4, 6)).astype(np.float32),
        "text.table": rng.normal(size=(3, 8)).astype(np.float64).T,
        "autoencoder.steps": np.arange(3),
    }


@pytest.fixture
def folder(tmp_path, tensors):
    weights.save_model(tmp_path / "model", CONFIG, tensors)
    return tmp_path / "model"


# ---------------------------------------------------------------------- own folders


def test_round_trip(folder, tensors):
    """Floats come back as fp32 of their fp16 values, whole numbers as they were; nothing else is in the folder."""
    config, loaded = weights.load_model(folder)
    assert config == CONFIG
    assert loaded.keys() == tensors.keys()
    for name in ("dit.head.head.weight", "text.table"):
        assert loaded[name].dtype == np.float32
        assert np.array_equal(loaded[name], tensors[name].astype(np.float16))
    assert np.array_equal(loaded["autoencoder.steps"], tensors["autoencoder.steps"])
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_floats_are_stored_as_fp16(folder):
    with safe_open(folder / WEIGHTS_FILE, framework="numpy") as file:
        assert file.get_tensor("text.table").dtype == np.float16


def test_parts():
    tensors = {"dit.a.b": np.zeros(1), "text.table": np.ones(1), "dither": np.ones(1)}
    assert list(weights.part(tensors, "dit")) == ["a.b"]


@pytest.mark.parametrize("kept", [0, 4, 100, -1], ids=["empty", "no header", "half", "one byte short"])
def test_truncated(folder, kept):
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightsError, match="truncated or damaged"):
        weights.load_model(folder)


def test_corrupt_header(folder):
    path = folder / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="damaged"):
        weights.load_model(folder)


def test_values_that_are_not_finite(folder, tensors):
    broken = {"text.table": np.array([1, np.nan], dtype=np.float16)}
    save_file(broken, folder / WEIGHTS_FILE)
    with pytest.raises(WeightsError, match=r"text\.table"):
        weights.load_model(folder)


def test_nothing_there(tmp_path, folder):
    with pytest.raises(WeightsError, match="found nothing"):
        weights.load_model(tmp_path / "no such model")
    with pytest.raises(WeightsError, match="found a file"):
        weights.load_model(folder / CONFIG_FILE)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(WeightsError, match="no such file"):
        weights.load_model(folder)
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        weights.load_model(folder)


def test_another_config(folder):
    """A config beside weights that it was not saved with would run, and make garbage: theta is in no tensor's shape."""
    replace(CONFIG, rope_theta=7.0, shift=9.0).save(folder / CONFIG_FILE)
    with pytest.raises(WeightsError, match="rope_theta, shift differ"):
        weights.load_model(folder)


def test_weights_of_another_version(folder, tensors):
    saved = {**CONFIG.to_dict(), "gates": 3}
    save_file({"text.table": np.ones(2, np.float16)}, folder / WEIGHTS_FILE, metadata={"config": json.dumps(saved)})
    with pytest.raises(WeightsError, match=r"another version.*gates"):
        weights.load_model(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, 7e4])
def test_unstorable_values_save_nothing(tmp_path, value):
    with pytest.raises(WeightsError, match=r"text\.table"):
        weights.save_model(tmp_path / "model", CONFIG, {"text.table": np.array([1.0, value])})
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("when", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_model(folder, tensors, monkeypatch, when):
    """The disk fills up at the worst moments: what was there can still be read, and no draft is left behind."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync" if when == "fsync" else "pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space left"):
        weights.save_model(folder, replace(CONFIG, name="new"), {"text.table": np.zeros(3)})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_crash_between_the_two_files_is_noticed(folder, monkeypatch):
    """Killed after the first of the two moves: new config, old weights."""
    replace_file, moved = type(folder).replace, []

    def once(self, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        return replace_file(self, target)

    monkeypatch.setattr("pathlib.Path.replace", once)
    with pytest.raises(KeyboardInterrupt):
        weights.save_model(folder, replace(CONFIG, shift=9.0), {"text.table": np.zeros(3)})
    monkeypatch.undo()
    with pytest.raises(WeightsError, match="shift differ"):
        weights.load_model(folder)


def test_other_files_in_the_folder_stay(folder, tensors):
    (folder / "card.md").write_text("a card")
    weights.save_model(folder, CONFIG, tensors)
    assert (folder / "card.md").read_text() == "a card"


def test_a_file_in_the_way(tmp_path, tensors):
    (tmp_path / "model").write_text("in the way")
    with pytest.raises(FileExistsError):
        weights.save_model(tmp_path / "model", CONFIG, tensors)


# ---------------------------------------------------------------------- matching


def test_match_lists_the_first_differences():
    expected = {f"w{i}": (2, 3) for i in range(6)} | {"bias": (2,), "scale": (2,)}
    got = {"bias": np.zeros(2), "scale": np.zeros(3), "extra": np.zeros(1)}
    with pytest.raises(WeightsError) as error:
        weights.match(expected, got)
    said = str(error.value)
    assert "6 missing: w0, w1, w2, w3 and 2 more" in said
    assert "1 unknown: extra" in said
    assert "1 of another shape: scale (expected (2,), got (3,))" in said
    weights.match({"bias": (2,)}, {"bias": np.zeros(2)})


def test_a_network_takes_its_own_weights_only():
    arrays = {name: p.numpy() for name, p in CausalDiT(CONFIG).state_dict().items()}
    CausalDiT.from_arrays(CONFIG, arrays)
    with pytest.raises(WeightsError, match=r"1 missing: head\.modulation"):
        CausalDiT.from_arrays(CONFIG, {n: x for n, x in arrays.items() if n != "head.modulation"})
    with pytest.raises(WeightsError, match="of another shape"):
        CausalDiT.from_arrays(replace(CONFIG, ffn=17), arrays)


# ---------------------------------------------------------------------- other people's names


@pytest.fixture
def state():
    torch.manual_seed(0)
    return CausalDiT(CONFIG).state_dict()


def same(got, state):
    return got.keys() == state.keys() and all(np.array_equal(got[n], state[n].numpy()) for n in state)


@pytest.mark.parametrize("prefix", ["model.", "model._fsdp_wrapped_module.", "_orig_mod.", ""])
def test_official_wrappers(tmp_path, state, prefix):
    """A pickled dict of the wrapper's state dict, with what FSDP and torch.compile put into the names."""
    wrapped = {
        prefix + name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): x for name, x in state.items()
    }
    torch.save({"generator": wrapped}, tmp_path / "causal_forcing.pt")
    assert same(checkpoint.read_checkpoint(tmp_path / "causal_forcing.pt"), state)


def test_the_average_is_preferred_and_can_be_declined(tmp_path, state):
    live = {name: x + 1 for name, x in state.items()}
    torch.save({"generator": live, "generator_ema": state, "step": 3}, tmp_path / "two.pt")
    assert same(checkpoint.read_checkpoint(tmp_path / "two.pt"), state)
    assert same(checkpoint.read_checkpoint(tmp_path / "two.pt", "generator"), live)
    with pytest.raises(WeightsError, match=r"expected 'model'.*generator_ema, generator"):
        checkpoint.read_checkpoint(tmp_path / "two.pt", "model")


def test_diffusers_in_bf16(tmp_path, state):
    theirs = {weights.to_diffusers(name): x.bfloat16() for name, x in state.items()}
    save_torch_file(theirs, tmp_path / "diffusion_pytorch_model.safetensors")
    rounded = {name: x.bfloat16().float() for name, x in state.items()}
    assert same(checkpoint.read_checkpoint(tmp_path / "diffusion_pytorch_model.safetensors"), rounded)


def test_wan_names_at_full_size():
    """The official checkpoint's keys: 825 of them, both ways."""
    with torch.device("meta"):
        names = CausalDiT(PRESETS["wan-1.3b-chunkwise-4step"]).state_dict().keys()
    assert len(names) == 825
    assert {weights.from_diffusers(weights.to_diffusers(name)) for name in names} == set(names)


def test_strange_names():
    with pytest.raises(WeightsError, match=r"decoder\.conv\.weight"):
        weights.from_diffusers("decoder.conv.weight")


class Bomb:
    def __reduce__(self):
        return (os.system, ("true",))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"", "damaged"),
        (b"not a checkpoint", "damaged"),
        (pickle.dumps({"generator": Bomb()}), "damaged"),
    ],
    ids=["missing", "empty", "text", "code"],
)
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_bad_checkpoints(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=said):
        checkpoint.read_checkpoint(tmp_path / name)


def test_truncated_checkpoint(tmp_path, state):
    torch.save({"generator": state}, tmp_path / "half.pt")
    content = (tmp_path / "half.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match="damaged"):
        checkpoint.read_checkpoint(tmp_path / "half.pt")


def test_a_checkpoint_without_tensors(tmp_path):
    torch.save({"step": 3}, tmp_path / "step.pt")
    with pytest.raises(WeightsError, match="named tensors"):
        checkpoint.read_checkpoint(tmp_path / "step.pt")
