"""What a model is: derived sizes, JSON, and errors that name the field."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest

from cfrt.blocks import Geometry
from cfrt.config import PRESETS, AutoencoderConfig, ModelConfig, TextConfig
from cfrt.errors import CfrtError, ConfigError

pytestmark = pytest.mark.cpu

TINY = PRESETS["tiny"]
WAN = [config for name, config in PRESETS.items() if name.startswith("wan-1.3b")]


def test_presets_are_named_by_themselves():
    assert all(name == config.name for name, config in PRESETS.items())
    assert {"tiny", "wan-14b", "wan-1.3b-longvideo"} <= PRESETS.keys()
    for unit in ("chunkwise", "framewise"):
        assert {f"wan-1.3b-{unit}-{kind}" for kind in ("4step", "ar", "ode", "cd")} <= PRESETS.keys()


@pytest.mark.parametrize("config", WAN, ids=lambda config: config.name)
def test_wan_sizes(config):
    """1560 tokens a frame of 480 x 832; 22, 21, 21 rotary pairs; 21 latent frames are 81 pixel frames."""
    assert config.frame_tokens == 1560
    assert config.frame_size == (480, 832)
    assert config.head_dim == 128
    assert config.rope_pairs == (22, 21, 21)
    assert config.patch_width == 64
    assert sum(config.unit_frames(unit) for unit in range(21 // config.unit)) == 81


def test_tiny_sizes():
    assert (TINY.frame_tokens, TINY.frame_size, TINY.head_dim, TINY.rope_pairs) == (4, (64, 64), 64, (12, 10, 10))
    assert (TINY.unit_frames(0), TINY.unit_frames(1), TINY.unit_frames(7)) == (1, 4, 4)
    assert TINY.geometry == Geometry(unit=1, window=8, sinks=0)


def test_first_unit_has_its_own_steps():
    two_step, four_step = PRESETS["wan-1.3b-framewise-2step"], PRESETS["wan-1.3b-framewise-4step"]
    assert two_step.unit_steps(0) == (1.0, 0.75, 0.5, 0.25)
    assert two_step.unit_steps(1) == (1.0, 0.5)
    assert four_step.unit_steps(0) == four_step.unit_steps(9) == (1.0, 0.75, 0.5, 0.25)


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS.keys())
def test_json_round_trip(config, tmp_path):
    path = tmp_path / "config.json"
    config.save(path)
    assert ModelConfig.load(path) == config
    assert hash(ModelConfig.from_dict(config.to_dict())) == hash(config)


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        TINY.width = 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 0}, "width"),
        ({"width": 190}, "multiple of 2"),
        ({"width": "192"}, "width"),
        ({"depth": True}, "depth"),
        ({"heads": 2.0}, "heads"),
        ({"latent_grid": (4, 3)}, "latent_grid"),
        ({"latent_grid": (4,)}, "latent_grid"),
        ({"patch": (2, 2, 2)}, "patch"),
        ({"latent_channels": 8}, "latent_channels"),
        ({"rope_split": (1, 2, 3)}, "rope_split"),
        ({"window": 0}, "window"),
        ({"unit": 9}, "window"),
        ({"sinks": -1}, "sinks"),
        ({"sinks": 11}, "sinks"),
        ({"unit": 3}, "trained_frames"),
        ({"sink_position": "near"}, "sink_position"),
        ({"steps": ()}, "steps"),
        ({"steps": (0.9, 0.5)}, "steps"),
        ({"steps": (1.0, 0.5, 0.5)}, "steps"),
        ({"steps": (1.0, 0.0)}, "steps"),
        ({"first_steps": (0.5,)}, "first_steps"),
        ({"shift": 0}, "shift"),
        ({"fps": float("nan")}, "fps"),
        ({"time_width": 255}, "time_width"),
        ({"text": None}, "text"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_contradictions_are_errors_that_name_the_field(change, said):
    with pytest.raises(ConfigError, match=said):
        replace(TINY, **change)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TextConfig(kind="bert", width=8, length=2), "table, umt5"),
        (lambda: TextConfig(kind="table", width=8, length=2, vocab={"red": 0}), "padding"),
        (lambda: TextConfig(kind="table", width=8, length=2, vocab={"Red": 1}), "lower-case"),
        (lambda: AutoencoderConfig(kind="vq", latent_channels=4, spatial=8), "tiny, wan, taehv"),
        (lambda: AutoencoderConfig(kind="tiny", latent_channels=4, spatial=8, widths=(0,)), "widths"),
    ],
)
def test_parts_check_themselves(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_unknown_and_missing_keys_are_all_named():
    data = TINY.to_dict()
    data["colour"] = data.pop("width")
    del data["depth"]
    with pytest.raises(ConfigError, match=r"unknown keys \['colour'\], missing keys \['depth', 'width'\]"):
        ModelConfig.from_dict(data)
    data = TINY.to_dict()
    data["text"]["tokens"] = 3
    with pytest.raises(ConfigError, match=r"text in the model config.*tokens"):
        ModelConfig.from_dict(data)


def test_a_bad_value_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**TINY.to_dict(), "shift": -1}))
    with pytest.raises(ConfigError, match=r"config\.json.*shift"):
        ModelConfig.load(path)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", '"tiny"', "\x00\xff"])
def test_a_file_without_a_model_is_a_config_error(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match="config"):
        ModelConfig.load(path)


def test_no_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot read") as error:
        ModelConfig.load(tmp_path / "nothing.json")
    assert isinstance(error.value, CfrtError)
    assert isinstance(error.value, ValueError)
