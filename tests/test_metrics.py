"""Each number is perfect on real clips and falls on clips that are broken in the way it is there to notice."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cfrt.config import TextConfig
from training import captions, evaluate, metrics, sources, worlds
from training.evaluate import Config, Row, measure, plain
from training.sources import Source, Task

pytestmark = pytest.mark.cpu

TEXT = TextConfig(kind="table", width=1, length=captions.LENGTH, vocab=captions.VOCABULARY, ignored=captions.FILLERS)
SMALL = Config(prompts=16, switches=8, pasts=6, futures=6, long=2, units=8, long_units=17, batch=12)


def broken(spoil: Callable[[Tensor], Tensor]) -> Source:
    return lambda task, generator: spoil(sources.real(task, generator))


def frozen(video: Tensor) -> Tensor:
    return video[:, :1].expand_as(video)


def blurred(video: Tensor) -> Tensor:
    frames = torch.nn.functional.avg_pool2d(video.flatten(0, 1), 9, 1, 4, count_include_pad=False)
    return frames.view(video.shape)


def discoloured(video: Tensor) -> Tensor:
    return video.roll(1, 2)


def vanishing(video: Tensor) -> Tensor:
    """From the second half on, noise instead of a picture."""
    half = video.shape[1] // 2
    noise = torch.rand(video[:, half:].shape, generator=torch.Generator().manual_seed(0))
    return torch.cat([video[:, :half], noise], 1)


def collapsed(task: Task, generator: torch.Generator) -> Tensor:
    """The same future whatever the noise."""
    assert task.past is not None
    firsts = torch.arange(len(task)) // SMALL.futures * SMALL.futures
    return sources.real(task, generator)[firsts]


def deaf(task: Task, generator: torch.Generator) -> Tensor:
    """A second prompt changes nothing."""
    return sources.real(replace(task, wanted=task.wanted[:, :1].expand(-1, 2, -1), switch=task.units), generator)


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return SMALL.tasks(TEXT)


@pytest.fixture(scope="module")
def real(tasks: dict[str, Task], tmp_path_factory: pytest.TempPathFactory) -> Row:
    folder = tmp_path_factory.mktemp("sheets")
    row = measure({"real": sources.real}, tasks, SMALL, folder)["real"]
    assert sorted(path.name for path in folder.iterdir()) == ["futures.png", "long.png", "start.png", "switch.png"]
    return row


def measured(source: Source, tasks: dict[str, Task], *names: str) -> Row:
    return measure({"broken": source}, {name: tasks[name] for name in names}, SMALL)["broken"]


# ---------------------------------------------------------------------------------------------------------- real clips


def test_real_clips_score_perfectly(real: Row) -> None:
    for factor in (*worlds.FACTORS, "all", "dynamic", "switch", "switch_direction"):
        assert real[factor].value == 1, factor
    assert real["valid"].value == 1
    assert real["residual"].value < 0.1
    assert real["switch_frames"].value < worlds.FADE
    assert real["switch_curve"][0].value < 0.2
    assert all(later.value == 1 for later in real["switch_curve"][worlds.FADE :])
    assert real["diversity_valid"].value == 1
    assert real["diversity"].low < 1 < real["diversity"].high
    assert real["distance"].low < 0 < real["distance"].high
    assert real["turns"].low < worlds.TURNS + 0.3
    assert len(real["drift"]) == 2
    assert all(stretch[key].value == 1 for stretch in real["drift"] for key in ("dynamic", "valid", "colour", "shape"))


def test_the_same_seed_measures_the_same(real: Row, tasks: dict[str, Task]) -> None:
    assert measured(sources.real, tasks, "switch").items() <= real.items()


# -------------------------------------------------------------------------------------------------------- broken clips


def test_a_freeze_is_not_dynamic(real: Row, tasks: dict[str, Task]) -> None:
    row = measured(broken(frozen), tasks, "start")
    assert row["dynamic"].value == 0
    assert row["turns"].value == 0
    assert row["valid"].value == 1, "what stands still is still an object"
    assert row["colour"].value == 1
    assert row["direction"].value < 0.6
    assert row["distance"].low > real["distance"].high


def test_a_blur_is_not_sharp(real: Row, tasks: dict[str, Task]) -> None:
    row = measured(broken(blurred), tasks, "start")
    assert row["residual"].low > 10 * real["residual"].high
    assert row["valid"].high < 0.9
    assert row["colour"].value > 0.5


def test_a_wrong_colour_is_seen(tasks: dict[str, Task]) -> None:
    row = measured(broken(discoloured), tasks, "start")
    assert row["colour"].high < 0.7
    assert row["all"].high < 0.7


def test_collapsed_futures_have_no_diversity(real: Row, tasks: dict[str, Task]) -> None:
    row = measured(collapsed, tasks, "futures")
    assert row["diversity"].value < 0.02
    assert row["diversity"].high < real["diversity"].low


def test_broken_frames_are_not_diversity(tasks: dict[str, Task]) -> None:
    row = measured(broken(vanishing), tasks, "futures")
    assert row["diversity_valid"].value < 0.1
    assert row["diversity"].value < 0.2


def test_a_deaf_stream_shows_no_switch(tasks: dict[str, Task]) -> None:
    row = measured(deaf, tasks, "switch")
    assert row["switch"].value == 0
    assert row["switch_frames"].value == metrics.SETTLED.stop
    assert row["switch_direction"].value < 0.7
    assert all(moment.value < 0.3 for moment in row["switch_curve"])


def test_drift_is_seen_when_it_comes(tasks: dict[str, Task]) -> None:
    row = measured(broken(vanishing), tasks, "long")
    first, second = row["drift"]
    assert first["valid"].value == 1
    assert second["valid"].value < 0.1
    assert second["dynamic"].value == 0


# ---------------------------------------------------------------------------------------------------------- the numbers


def test_wilson_interval() -> None:
    """Against the textbook: 8 of 10 is [0.490, 0.943], and no interval leaves [0, 1] or loses its width at the ends."""
    eight = metrics.share(torch.arange(10) < 8)
    assert (eight.value, round(eight.low, 3), round(eight.high, 3), eight.n) == (0.8, 0.490, 0.943, 10)
    none = metrics.share(torch.zeros(512, dtype=torch.bool))
    assert none.low == 0 < none.high < 0.01
    assert math.isnan(metrics.share(torch.zeros(0, dtype=torch.bool)).value)


def test_bootstrap_interval_covers_the_mean() -> None:
    """95 % of intervals hold the truth; a mean of 200 normals is within 3.5 sigma of that over 200 repetitions."""
    draws = torch.randn(200, 200, generator=torch.Generator().manual_seed(0)) + 5
    inside = sum(one.low < 5 < one.high for one in map(metrics.mean, draws))
    assert 178 <= inside <= 199
    assert metrics.mean(draws[0]).value == pytest.approx(draws[0].double().mean().item())


def test_median_and_ratio() -> None:
    values = torch.tensor([5.0, 1.0, 3.0, 24.0, 2.0])
    assert metrics.median(values).value == 3
    assert metrics.ratio(values, 2 * values) == metrics.Estimate(0.5, 0.5, 0.5, 5)


def test_energy_distance_is_zero_for_equals_and_grows_with_a_shift() -> None:
    source = torch.Generator().manual_seed(1)
    x, y = (torch.randn(300, 4, generator=source) for _ in range(2))
    same, near, far = (metrics.distance(x + shift, y) for shift in (0.0, 0.5, 2.0))
    assert same.low < 0 < same.high
    assert same.high < near.value < far.low
    shift = torch.tensor([[2.0], [4.0]]).double()
    apart = metrics.distance(torch.zeros(2, 1).double(), shift)  # scaled by the deviation of [2, 4], sqrt(2)
    assert apart.value == pytest.approx((2 * 3 - 0 - 2) / math.sqrt(2))


def test_spread_counts_valid_futures_only() -> None:
    position = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [90.0, 90.0]]])
    valid = torch.tensor([[True, True, False]])
    assert metrics.spread(position, valid).item() == 2
    assert metrics.spread(position, valid & torch.tensor([True, False, False])).item() == 0


def test_turns_count_changes_of_heading() -> None:
    right, down = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    steps = torch.stack([right] * 8 + [down] * 8 + [right] * 4)
    position = torch.cat([torch.zeros(1, 2), steps.cumsum(0)])[None]
    assert metrics.turns(position).item() == 2


def test_room_for_a_new_direction() -> None:
    """From the middle there is room for a slow run either way; near the wall only away from it."""
    scene = torch.tensor([1, 0, 0, 0, 0, 0])  # large, to the right, slow: 12.8 pixels in 16 frames
    wanted = torch.stack([scene, scene]).expand(3, 2, 6)
    positions = torch.tensor([[32.0, 32.0], [45.0, 32.0], [20.0, 50.0]])
    assert metrics.has_room(positions, wanted).tolist() == [True, False, True]


# ------------------------------------------------------------------------------------------------------------ the tasks


def test_prompts_are_held_out_text_in_many_wordings(tasks: dict[str, Task]) -> None:
    start, switch = tasks["start"], tasks["switch"]
    assert worlds.held_out(start.wanted).all()
    assert worlds.held_out(switch.wanted).all()
    assert len({text for text, _ in start.texts}) == len(start)
    expected = captions.rows(switch.wanted)
    assert torch.equal(switch.captions.sort(-1).values, expected.sort(-1).values)
    shows = metrics.changed(switch.wanted)[:, [worlds.COLOUR, worlds.SHAPE]].any(1)
    assert shows.all()
    assert switch.prompts.caption.unique(dim=0).tolist() == [[0] * 6 + [1] * 6]


def test_all_held_out_scenes_come_before_one_comes_again() -> None:
    scenes = sources.held_out_scenes(512, torch.Generator().manual_seed(0))
    assert len(scenes[:256].unique(dim=0)) == len(scenes[256:].unique(dim=0)) == 256


def test_futures_share_their_past(tasks: dict[str, Task]) -> None:
    task = tasks["futures"]
    scene = sources.play(task, torch.Generator().manual_seed(0))
    pasts = scene.position.view(SMALL.pasts, SMALL.futures, task.frames, 2)[:, :, :9]
    assert scene.frames == task.frames == 29
    assert torch.equal(pasts, pasts[:, :1].expand_as(pasts))
    assert len(pasts[:, 0].flatten(1).unique(dim=0)) == SMALL.pasts


def test_rows_become_json(real: Row, tmp_path: Path) -> None:
    text = json.dumps(plain({"real": real, "nothing": metrics.NOTHING}), allow_nan=False)
    back = json.loads(text)
    assert back["nothing"]["value"] is None
    assert back["real"]["switch_curve"][-1]["value"] == 1
    assert set(evaluate.MEASURES) == set(Config().tasks(TEXT))
