"""The released inference loops, written out without a line of cfrt, beside streams of the same random weights: whole
clips of latents, with windows, sinks, given frames and changes of text, sequential and rolling."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from released_fixture import Noise, Released, drawn, one_by_one, rolling, warped
from student_fixture import random_weights, save_student, small_config
from torch import Tensor

import cfrt
from cfrt import noise
from cfrt.config import ModelConfig
from cfrt.engines import Spec, choose
from cfrt.engines.torch import TorchEngine
from cfrt.errors import ConfigError, EngineError
from cfrt.text import Encoded
from cfrt.weights import load_model, part

pytestmark = pytest.mark.cpu

UNITS, SEED = 7, 5
GRID = (4, 6)
CLOSE = 1e-9
"""Both sides compute in fp64; latents are about 1."""


class Rows:
    """A text encoder: the rows of a prompt are drawn from its letters."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def encode(self, prompt: str) -> Encoded:
        generator = np.random.default_rng(list(prompt.encode()))
        shape = (self.config.text.length, self.config.text.width)
        return Encoded(generator.standard_normal(shape).astype(np.float32), (prompt,))

    def tensor(self, prompt: str) -> Tensor:
        return torch.from_numpy(self.encode(prompt).rows).double()


def config(unit: int, window: int, sinks: int, **changes: Any) -> ModelConfig:
    base = small_config(latent_grid=GRID, shift=5.0, rope_theta=10000.0, unit=unit, window=window, sinks=sinks)
    return replace(base, trained_frames=UNITS * unit, sink_position="absolute", **changes)


ROLLING = {"schedule": "rolling", "steps": (1.0, 0.75, 0.5, 0.25), "first_steps": None, "sink_position": "window"}


def long_video(unit: int = 3, window: int = 15, **changes: Any) -> ModelConfig:
    """As wan-1.3b-longvideo: four units in a pass, one unit of sinks."""
    return replace(config(unit, window, 0), **{"sinks": unit, **ROLLING, **changes})


def released(model: ModelConfig, weights: dict[str, np.ndarray], size: int) -> Released:
    """`size`: frames of the cache."""
    tensors = {name: torch.from_numpy(x).double() for name, x in part(weights, "dit").items()}
    return Released(tensors, model.heads, model.token_grid, size, model.sinks)


@pytest.fixture
def latents(monkeypatch: pytest.MonkeyPatch) -> dict[int, Tensor]:
    """What the torch engine was last given to decode of each unit; it then does not decode it."""
    seen: dict[int, Tensor] = {}

    def watch(engine: Any, x: Tensor) -> np.ndarray:
        seen[engine._decoded] = x.clone()
        engine._state_before = (engine._decoded, None)
        engine._decoded += 1
        frames = engine._config.unit_frames(engine._decoded - 1)
        return np.zeros((frames, *engine._config.frame_size, 3), np.uint8)

    monkeypatch.setattr(TorchEngine, "decode", watch)
    return seen


def stream(folder: Path, model: ModelConfig, prompt: str = "a", **changes: Any) -> cfrt.Stream:
    save_student(folder, model)
    asked = {"engine": "torch", "precision": "fp64", "seed": SEED, "fps": "max", "text": Rows(model), **changes}
    return cfrt.Stream(prompt, model=folder, **asked)


def clip(live: cfrt.Stream, seen: dict[int, Tensor], units: int) -> Tensor:
    """[units F, C, h, w] as the stream makes it."""
    with live:
        list(live.frames(live.config.first_frame(units)))
    return joined(seen, units)


def joined(seen: dict[int, Tensor], units: int) -> Tensor:
    return torch.cat([seen[unit] for unit in range(units)], dim=1)[0]


def philox(model: ModelConfig) -> Noise:
    """The noise of cfrt's own streams."""

    def draw(unit: int, step: int, window: tuple[int, int]) -> Tensor:
        shape = (model.unit, model.latent_channels, *model.latent_grid)
        return torch.from_numpy(noise.normal(SEED, unit, step, noise.Purpose.SAMPLE, shape)).double()

    return draw


def nothing(model: ModelConfig) -> Tensor:
    return torch.zeros(0, model.latent_channels, *model.latent_grid).double()


def film(model: ModelConfig, units: int) -> np.ndarray:
    shape = (model.first_frame(units), *model.frame_size, 3)
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


# ---------------------------------------------------------------------- sequential

LOCAL = [(1, 21, 0), (1, 6, 0), (1, 6, 2), (1, 7, 1), (3, 21, 0), (3, 6, 0), (3, 9, 3), (3, 12, 3)]
"""Unit, local_attn_size and sink_size of the released configs, in latent frames."""


@pytest.mark.parametrize(("unit", "local", "sinks"), LOCAL)
@pytest.mark.parametrize("given", [0, 2])
def test_a_clip_of_the_released_loop(
    unit: int, local: int, sinks: int, given: int, tmp_path: Path, latents: dict[int, Tensor]
) -> None:
    """`reference_compat`, from nothing and from a film. The released window counts the sinks in."""
    model = config(unit, local - sinks, sinks)
    live = stream(tmp_path, model, reference_compat=True, prefix=film(model, given) if given else None)
    got = clip(live, latents, UNITS)
    _, weights = load_model(tmp_path)
    rows = [Rows(model).tensor("a")] * UNITS
    lists = (warped([1000, 750, 500, 250]), warped([1000, 500]))
    draws = drawn(SEED, UNITS * unit, unit, tuple(got.shape[1:]), given)
    expected = one_by_one(released(model, weights, local), rows, unit, lists, draws, got[: given * unit])
    assert expected.std() > 0.3
    assert (got - expected).abs().max() < CLOSE


def test_text_changes_at_its_unit(tmp_path: Path, latents: dict[int, Tensor]) -> None:
    model = config(3, 6, 3)
    live = stream(tmp_path, model)
    with live:
        list(live.frames(model.first_frame(3)))
        assert live.prompt("b").unit == 3
        list(live.frames(model.first_frame(6) - model.first_frame(3)))
    _, weights = load_model(tmp_path)
    rows = [Rows(model).tensor(text) for text in "aaabbb"]
    lists = (warped([1000, 750, 500, 250]), warped([1000, 500]))
    expected = one_by_one(released(model, weights, 9), rows, 3, lists, philox(model), nothing(model))
    assert (joined(latents, 6) - expected).abs().max() < CLOSE


# ---------------------------------------------------------------------- rolling


@pytest.mark.parametrize(("unit", "window"), [(3, 15), (3, 12), (1, 6), (2, 12)])
@pytest.mark.parametrize("given", [0, 2])
def test_a_clip_of_rolling_windows(
    unit: int, window: int, given: int, tmp_path: Path, latents: dict[int, Tensor]
) -> None:
    """`reference_compat`: noise drawn by windows, partial windows at both ends, sinks that move along. The cache holds
    one unit more than a pass sees, as there."""
    model = replace(long_video(unit, window), trained_frames=10 * unit)
    live = stream(tmp_path, model, reference_compat=True, prefix=film(model, given) if given else None)
    got = clip(live, latents, 10)
    _, weights = load_model(tmp_path)
    draws = drawn(SEED, 10 * unit, unit, tuple(got.shape[1:]), given, rolling=True)
    rows = [Rows(model).tensor("a")] * 10
    network = released(model, weights, window + 2 * unit)
    expected = rolling(network, rows, unit, warped([1000, 750, 500, 250]), draws, got[: given * unit])
    assert expected.std() > 0.3
    assert (got - expected).abs().max() < CLOSE


def test_a_rolling_stream_has_no_end(tmp_path: Path, latents: dict[int, Tensor]) -> None:
    """Beyond the trained clip, with the noise of streams: the units of a released loop that ends later."""
    model, units = long_video(), 16
    got = clip(stream(tmp_path, model), latents, units)
    _, weights = load_model(tmp_path)
    rows = [Rows(model).tensor("a")] * (units + 3)
    network = released(model, weights, model.geometry.capacity)
    expected = rolling(network, rows, 3, warped([1000, 750, 500, 250]), philox(model), nothing(model))
    assert (got - expected[: units * 3]).abs().max() < CLOSE


@pytest.mark.parametrize("fps", ["max", 10_000.0])
def test_a_change_of_text_starts_the_window_anew(fps: Any, tmp_path: Path, latents: dict[int, Tensor]) -> None:
    """What comes from unit 4 on is what the released loop makes of the new text, given the units before it."""
    model, change, units = long_video(), 4, 9
    with stream(tmp_path, model, fps=fps) as live:
        list(live.frames(model.first_frame(change)))
        assert live.prompt("b").unit == change
        list(live.frames(model.first_frame(units) - model.first_frame(change)))
    _, weights = load_model(tmp_path)
    got = joined(latents, units)
    rows = [Rows(model).tensor(text) for text in "a" * change + "b" * (units + 3 - change)]
    network = released(model, weights, model.geometry.capacity)
    given = got[: change * 3]
    expected = rolling(network, rows, 3, warped([1000, 750, 500, 250]), philox(model), given)
    assert (got - expected[: units * 3]).abs().max() < CLOSE


def test_units_of_two_texts_share_a_window(tmp_path: Path, latents: dict[int, Tensor]) -> None:
    """A cross-fade gives each unit a text of its own, and units of several are in one pass."""
    model, change, units, blend = long_video(), 2, 7, 3
    with stream(tmp_path, model) as live:
        list(live.frames(model.first_frame(change)))
        live.prompt("b", blend_units=blend)
        list(live.frames(model.first_frame(units) - model.first_frame(change)))
    _, weights = load_model(tmp_path)
    got = joined(latents, units)
    a, b = (Rows(model).tensor(text) for text in "ab")
    mixed = [a + min(1, max(0, unit - change + 1) / (blend + 1)) * (b - a) for unit in range(units + 3)]
    network = released(model, weights, model.geometry.capacity)
    expected = rolling(network, mixed, 3, warped([1000, 750, 500, 250]), philox(model), got[: change * 3])
    assert (got - expected[: units * 3]).abs().max() < 1e-6, "rows are mixed in fp32"


def test_one_step_rolls_as_it_goes(tmp_path: Path, latents: dict[int, Tensor]) -> None:
    """A window of one unit is the ordinary loop, as long as both see the whole past."""
    model = config(1, 21, 0, steps=(1.0,), first_steps=None)
    one = clip(stream(tmp_path / "a", model), latents, 6)
    latents.clear()
    assert torch.allclose(one, clip(stream(tmp_path / "b", model, schedule="rolling"), latents, 6), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("at", [1, 4])
def test_a_rolling_snapshot_goes_on_exactly(at: int, tmp_path: Path, latents: dict[int, Tensor]) -> None:
    with stream(tmp_path, long_video()) as live:
        list(live.frames(live.config.first_frame(at)))
        saved = live.snapshot()
        list(live.frames(40))
        expected = joined(latents, at + 3)
        latents.update({unit: torch.zeros_like(x) for unit, x in latents.items() if unit > at})
        live.restore(saved)
        list(live.frames(40))
        assert torch.equal(joined(latents, at + 3), expected)
        with pytest.raises(cfrt.SnapshotError, match="half made"):
            live.snapshot(portable=True)
    other = stream(tmp_path, live.config, schedule="sequential")
    with other, pytest.raises(cfrt.SnapshotError, match="with config"):
        other.restore(saved)


def test_a_rolling_stream_goes_back_exactly(tmp_path: Path, latents: dict[int, Tensor]) -> None:
    """Half-made units come back with the rest; other noise then starts them anew."""
    with stream(tmp_path, long_video()) as live:
        list(live.frames(live.config.first_frame(8)))
        expected = joined(latents, 8)
        assert live.rewind(4) == 4
        list(live.frames(live.config.first_frame(8) - live.config.first_frame(4)))
        assert torch.equal(joined(latents, 8), expected)
        assert live.rewind(4) == 4
        assert live.reseed(SEED + 1).unit == 4
        list(live.frames(live.config.first_frame(8) - live.config.first_frame(4)))
        changed = (joined(latents, 8) != expected).flatten(1).any(1)
        assert changed.tolist() == [False] * 12 + [True] * 12


def test_latency_counts_from_the_first_pass(tmp_path: Path, latents: dict[int, Tensor]) -> None:
    """A unit of a whole window was begun three units before it was finished."""
    with stream(tmp_path, long_video()) as live:
        frames = list(live.frames(live.config.first_frame(10)))
        stats = live.stats
    latency = {frame.unit: frame.latency for frame in frames}
    assert latency[8] > 2 * stats.unit.p50


# ---------------------------------------------------------------------- what is refused


def test_engines_that_cannot_roll_say_so() -> None:
    model = long_video()
    spec = Spec(config=model, weights=random_weights(model))
    with pytest.raises(EngineError, match=r"cannot do a rolling schedule or sinks that stay before the window.*torch"):
        choose("native", spec)
    chosen, refusals = choose("auto", spec)
    assert (chosen.name, "native" in refusals) == ("torch", True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"solver": "euler"}, "renoise"),
        ({"first_steps": (1.0, 0.5)}, "no first_steps"),
        ({"window": 9}, "a window of 12 latent frames"),
        ({"sinks": 4}, r"sinks of at most one unit \(3\)"),
        ({"schedule": "joint"}, "schedule in"),
    ],
)
def test_models_that_cannot_roll(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        long_video(**changes)


def test_a_window_must_be_next() -> None:
    from cfrt.nn.ring import RingCache

    ring = RingCache(long_video(), 1, torch.float32, torch.device("cpu"))
    with pytest.raises(EngineError, match="from frame 0 on, the next one, got frame 3"):
        ring.look(1, 4)
