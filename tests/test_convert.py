"""Checkpoints converted: into ours and diffusers', nothing lost, nothing left behind by a failure."""

import gc
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cfrt import checkpoint, convert, shapes, weights
from cfrt.config import PRESETS
from cfrt.errors import WeightsError
from cfrt.nn.dit import CausalDiT
from cfrt.official import OFFICIAL, preset_of

pytestmark = pytest.mark.cpu

CONFIG = replace(
    PRESETS["wan-1.3b-framewise-2step"],
    width=12,
    heads=2,
    depth=2,
    ffn=16,
    time_width=8,
    text=replace(PRESETS["wan-1.3b-framewise-2step"].text, width=8),
)


@pytest.fixture
def state():
    torch.manual_seed(0)
    return CausalDiT(CONFIG).state_dict()


@pytest.fixture
def official(tmp_path, state):
    """An official file, wrapped as those are: two dicts, FSDP's names."""
    path = tmp_path / "causal-forcing++" / "framewise-2step.pt"
    path.parent.mkdir()
    wrapped = {f"model._fsdp_wrapped_module.{name}": x for name, x in state.items()}
    torch.save({"generator": {name: x + 1 for name, x in wrapped.items()}, "generator_ema": wrapped}, path)
    return path


def read(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", list(PRESETS))
def test_shapes_of_every_preset(name):
    """The closed form against the network itself."""
    with torch.device("meta"):
        network = CausalDiT(PRESETS[name]).state_dict()
    assert shapes.dit(PRESETS[name]) == {n: tuple(x.shape) for n, x in network.items()}


def test_full_size_counts():
    full = shapes.dit(PRESETS["wan-1.3b-framewise-2step"])
    assert len(full) == 825
    assert sum(np.prod(shape) for shape in full.values()) == 1_418_996_800


def test_into_ours(tmp_path, official, state):
    told = []
    plan = convert.plan(official, model=CONFIG)
    plan.run(tmp_path / "model", told.append)
    assert sum(told) == plan.size
    config, loaded = weights.load_model(tmp_path / "model")
    assert config == CONFIG
    assert loaded.keys() == {f"dit.{name}" for name in state}
    assert all(np.array_equal(loaded[f"dit.{name}"], x.numpy()) for name, x in state.items())


@pytest.mark.parametrize(
    ("format", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_formats(tmp_path, official, state, format, dtype):
    convert.plan(official, model=CONFIG, format=format).run(tmp_path / "model")
    stored = read(tmp_path / "model" / weights.WEIGHTS_FILE)
    assert all(torch.equal(stored[f"dit.{name}"], x.to(dtype)) for name, x in state.items())
    _, loaded = weights.load_model(tmp_path / "model")
    assert all(np.array_equal(loaded[f"dit.{name}"], x.to(dtype).float().numpy()) for name, x in state.items())


def test_a_bf16_that_is_not_finite_is_noticed(tmp_path, official):
    convert.plan(official, model=CONFIG, format="bf16").run(tmp_path / "model")
    path = tmp_path / "model" / weights.WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[-2:] = b"\xc0\x7f"  # the last number becomes NaN
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="not finite"):
        weights.load_model(tmp_path / "model")


def test_diffusers_takes_it(tmp_path, official, state):
    """The oracle: diffusers' own network, made from the folder's config, takes every tensor of its file."""
    from diffusers import WanTransformer3DModel

    convert.plan(official, model=CONFIG, layout="diffusers").run(tmp_path / "theirs")
    theirs = WanTransformer3DModel.from_config(json.loads((tmp_path / "theirs" / "config.json").read_text()))
    theirs.load_state_dict(read(tmp_path / "theirs" / convert.DIFFUSERS_FILE), strict=True)
    assert all(torch.equal(theirs.state_dict()[weights.to_diffusers(name)], x) for name, x in state.items())


def test_diffusers_and_back(tmp_path, official, state):
    convert.plan(official, model=CONFIG, layout="diffusers").run(tmp_path / "theirs")
    convert.plan(tmp_path / "theirs", model=CONFIG).run(tmp_path / "back")
    assert all(
        torch.equal(x, state[n.removeprefix("dit.")]) for n, x in read(tmp_path / "back" / "model.safetensors").items()
    )
    convert.plan(tmp_path / "back", layout="diffusers").run(tmp_path / "again")
    name = convert.DIFFUSERS_FILE
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@pytest.mark.parametrize("pipeline", [False, True], ids=["transformer", "whole pipeline"])
def test_sharded_folders(tmp_path, state, pipeline):
    folder = tmp_path / "wan" / "transformer" if pipeline else tmp_path / "wan"
    write_shards(folder, state)
    opened = checkpoint.open_checkpoint(tmp_path / "wan")
    assert opened.shapes == {name: tuple(x.shape) for name, x in state.items()}
    assert all(torch.equal(opened.tensor(name), x) for name, x in state.items())


def write_shards(folder, state, count=3):
    folder.mkdir(parents=True)
    index = {}
    for i in range(count):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors"
        shard = {name: state[name] for name in sorted(state)[i::count]}
        save_file(shard, folder / file)
        index |= dict.fromkeys(shard, file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_half_fetched(tmp_path, state):
    write_shards(tmp_path / "wan", state)
    (tmp_path / "wan" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"half fetched: 1 files missing: diffusion_pytorch_model-00002"):
        checkpoint.open_checkpoint(tmp_path / "wan")


def test_truncated_shard(tmp_path, state):
    write_shards(tmp_path / "wan", state)
    path = tmp_path / "wan" / "diffusion_pytorch_model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightsError, match="damaged"):
        checkpoint.open_checkpoint(tmp_path / "wan")


def test_an_empty_folder_and_a_broken_index(tmp_path):
    with pytest.raises(WeightsError, match=r"expected \.safetensors files"):
        checkpoint.open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(WeightsError, match="no index"):
        checkpoint.open_checkpoint(tmp_path)


def test_the_wrong_preset_is_told_the_right_one(official, tmp_path):
    with pytest.raises(WeightsError, match=r"against 'tiny'.*missing.*No preset fits better"):
        convert.plan(official, model="tiny")
    wide = {name: torch.empty(shape, device="meta") for name, shape in shapes.dit(PRESETS["wan-14b"]).items()}
    assert convert.closest({name: tuple(x.shape) for name, x in wide.items()}) == "wan-14b"
    assert convert.closest({"x": (1,)}) is None


def test_a_missing_tensor_writes_nothing(tmp_path, state):
    del state["head.modulation"]
    torch.save({"generator": state}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=r"1 missing: head\.modulation"):
        convert.plan(tmp_path / "x.pt", model=CONFIG)


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_values_that_the_format_cannot_hold(tmp_path, state, value):
    state["head.head.bias"][3] = value
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=r"head\.head\.bias.*not finite in fp16"):
        convert.plan(tmp_path / "x.pt", model=CONFIG, format="fp16").run(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pt"]


def test_a_folder_that_exists_is_left_alone(tmp_path, official):
    (tmp_path / "model").mkdir()
    with pytest.raises(WeightsError, match="exists"):
        convert.plan(official, model=CONFIG).run(tmp_path / "model")


def test_a_full_disk_is_noticed_first(tmp_path, official, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(WeightsError, match=r"of free disk at .*found 0\.00 GB"):
        convert.plan(official, model=CONFIG).run(tmp_path / "model")


def test_released_names():
    """The release's own folder names say which preset a file is; another file's name says nothing."""
    from pathlib import PurePosixPath

    assert preset_of(PurePosixPath("/data/framewise/causal_forcing.pt")) == "wan-1.3b-framewise-4step"
    assert preset_of(PurePosixPath("causal-forcing++/framewise-1step.pt")) == "wan-1.3b-framewise-1step"
    assert preset_of(PurePosixPath("causal_forcing.pt")) is None
    assert OFFICIAL.keys() == {name for name in PRESETS if name.startswith("wan")}


def test_the_release_says_which_dict_counts(official, state, monkeypatch):
    monkeypatch.setitem(PRESETS, "wan-1.3b-framewise-2step", CONFIG)
    found = convert.plan(official).checkpoint
    assert torch.equal(found.tensor("head.head.weight"), state["head.head.weight"])
    live = convert.plan(official, branch="generator").checkpoint
    assert torch.equal(live.tensor("head.head.weight"), state["head.head.weight"] + 1)


def test_an_autoencoder_goes_along(tmp_path, official):
    torch.save({"decoder.conv1.bias": torch.ones(3)}, tmp_path / "vae.pth")
    convert.plan(official, model=CONFIG, autoencoder=tmp_path / "vae.pth").run(tmp_path / "model")
    stored = read(tmp_path / "model" / weights.WEIGHTS_FILE)
    assert torch.equal(stored["autoencoder.decoder.conv1.bias"], torch.ones(3))
    with pytest.raises(WeightsError, match="no autoencoder"):
        convert.plan(official, model=CONFIG, layout="diffusers", autoencoder=tmp_path / "vae.pth")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"layout": "onnx"}, "layout"), ({"format": "int4"}, "format"), ({"model": "wan-9b"}, "no preset")],
)
def test_nonsense(official, arguments, said):
    with pytest.raises(WeightsError, match=said):
        convert.plan(official, **arguments)


# ---------------------------------------------------------------------- memory


class Resident(threading.Thread):
    """The most memory that this process has had, mapped files included, above what it had at the start."""

    def __init__(self):
        super().__init__()
        self.start_at = self.peak = self._now()
        self.done = threading.Event()

    @staticmethod
    def _now():
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

    def run(self):
        while not self.done.wait(0.001):
            self.peak = max(self.peak, self._now())

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.join()

    @property
    def grown(self):
        return self.peak - self.start_at


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of memory")
@pytest.mark.parametrize("sharded", [True, False])
def test_it_holds_little_more_than_a_shard(tmp_path, sharded):
    """130 MB in three shards, or in one file that is its own only shard: at most 1.3 times the largest."""
    wide = replace(CONFIG, width=512, heads=4, depth=6, ffn=2048)
    state = CausalDiT(wide).state_dict()
    source = tmp_path / ("wan" if sharded else "wan.pt")
    if sharded:
        write_shards(source, state)
    else:
        torch.save({"generator": state}, source)
    del state
    gc.collect()
    largest = max(path.stat().st_size for path in (source.iterdir() if sharded else [source]))
    assert largest > 40e6
    with Resident() as memory:
        convert.plan(source, model=wide, format="bf16").run(tmp_path / "model")
    assert memory.grown < 1.3 * largest
