"""`python -m training evaluate`: lists of prompts, VBench's file names, resuming, the table, and VBench itself, played
by a program of that name."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from student_fixture import BLUE, RED, save_student

from cfrt.errors import ConfigError, PromptError
from training import evaluate, leaderboard, prompts, report, vbench
from training.leaderboard import Result
from training.vbench import Arguments

pytestmark = pytest.mark.cpu

INFO = [
    {"prompt_en": RED, "dimension": ["color", "temporal_flickering"], "auxiliary_info": {"color": {"color": "red"}}},
    {"prompt_en": BLUE, "dimension": ["object_class"]},
    {"prompt_en": RED, "dimension": ["imaging_quality"]},
]


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# -------------------------------------------------------------------------------------------------------------- prompts


def test_a_list_is_a_line_a_prompt(tmp_path: Path) -> None:
    found = prompts.read(written(tmp_path / "p.txt", f"\ufeff# ours\n{RED}\n\n  {BLUE}  \n{RED}\n"))
    assert [(p.name, p.text) for p in found] == [(RED, RED), (BLUE, BLUE)]
    assert found.repeated == 1


def test_extended_prompts_keep_the_plain_name(tmp_path: Path) -> None:
    columns = prompts.read(written(tmp_path / "p.tsv", f"{RED}\ta long story of {RED}\n{BLUE}\n"))
    assert [(p.name, p.text) for p in columns] == [(RED, f"a long story of {RED}"), (BLUE, BLUE)]
    plain = written(tmp_path / "p.txt", f"{RED}\n{BLUE}\n")
    longer = written(tmp_path / "long.txt", f"# by a language model\na long story of {RED}\nanother of {BLUE}\n")
    assert [p.text for p in prompts.read(plain, longer)] == [f"a long story of {RED}", f"another of {BLUE}"]


def test_vbench_own_list(tmp_path: Path) -> None:
    found = prompts.read(written(tmp_path / "info.json", json.dumps(INFO)))
    assert [p.name for p in found] == [RED, BLUE]
    assert found.prompts[0].dimensions == ("color", "temporal_flickering", "imaging_quality")
    assert found.info == tuple(INFO)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.txt", "# nothing\n\n", "it holds none"),
        ("p.txt", "a\tb\tc\n", "line 1: expected PROMPT"),
        ("p.txt", "x" * 1001, "at most 1000 characters"),
        ("p.json", "[]", "to be like VBench_full_info.json"),
        ("p.json", "{", "cannot read the prompts"),
        ("none.txt", None, "cannot read the prompts"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path: Path, name: str, text: str | None, expected: str) -> None:
    path = tmp_path / name if text is None else written(tmp_path / name, text)
    with pytest.raises((ConfigError, PromptError), match=expected):
        prompts.read(path)


def test_extensions_must_fit(tmp_path: Path) -> None:
    plain, one = written(tmp_path / "p.txt", f"{RED}\n{BLUE}\n"), written(tmp_path / "one.txt", f"{RED}\n")
    with pytest.raises(ConfigError, match=r"as many prompts in .* as the 2 in"):
        prompts.read(plain, one)
    with pytest.raises(ConfigError, match="second column already"):
        prompts.read(written(tmp_path / "p.tsv", f"{RED}\t{BLUE}\n"), one)


def test_file_names_never_collide(tmp_path: Path) -> None:
    """Two prompts may share hundreds of characters, and a prompt may be anything but a file name."""
    long = "a fox " * 60
    names = [
        "plain",
        long + "runs",
        long + "sleeps",
        "either/or",
        "either_or",
        "line\nbreak",
        "ünïcode " * 20,
        "x-1",
        "x",
    ]
    found = prompts.stems(names, 5, tmp_path / "videos")
    files = {prompts.video_name(stem, index) for stem in found.values() for index in range(5)}
    assert len(files) == 5 * len(names)
    assert found["plain"] == "plain"
    for file in files:
        (tmp_path / file).touch()
    assert found == prompts.stems(names, 5, tmp_path / "videos"), "the same prompts get the same files"


def test_cases_collide_only_where_the_file_system_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    assert prompts.stems(["A fox", "a fox"], 5, folder) == {"A fox": "A fox", "a fox": "a fox"}
    (tmp_path / "VIDEOS").mkdir()  # what a file system that does not tell cases apart would show
    assert prompts.stems(["A fox", "a fox"], 5, folder)["a fox"].startswith("a fox~")


def test_seeds_depend_on_the_prompt_alone() -> None:
    seeds = {vbench.film_seed(seed, name, index) for seed in (0, 1) for name in (RED, BLUE) for index in range(5)}
    assert len(seeds) == 20
    assert vbench.film_seed(0, RED, 3) == vbench.film_seed(0, RED, 3)


# ---------------------------------------------------------------------------------------------------------------- films


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture
def no_vbench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


def asked(student: Path, tmp_path: Path, text: str = f"{RED}\n{BLUE}\n", **changes: Any) -> Arguments:
    suffix = ".json" if text.startswith("[") else ".txt"
    path = written(tmp_path / f"list{suffix}", text)
    values = {"model": str(student), "prompts": path, "out": tmp_path / "out", "seeds": 2, "seconds": 0.5, "threads": 1}
    return Arguments(**(values | changes))


def file_times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.usefixtures("no_vbench")
def test_films_rows_and_table(student: Path, tmp_path: Path) -> None:
    results = vbench.evaluate(asked(student, tmp_path))
    out = tmp_path / "out"
    expected = {f"{prompt}-{index}.mp4" for prompt in (RED, BLUE) for index in (0, 1)}
    assert {path.name for path in (out / "videos").iterdir()} == expected
    assert json.loads((out / "prompts.json").read_text()).keys() == expected
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert {row["file"] for row in rows} == expected
    assert len({row["seed"] for row in rows}) == 4
    assert all(row["speed"]["fps"] > 0 and row["measures"]["sharpness"] > 0 for row in rows)
    assert results["measures"]["sharpness"]["n"] == 2, "prompts are what is drawn"
    assert results["measures"]["diversity"]["value"] > 0
    text = (out / "RESULTS.md").read_text()
    assert "4 films of 2 prompts" in text
    assert "not run (pip install vbench)" in text
    assert json.loads((out / "results.json").read_text()) == results


@pytest.mark.usefixtures("no_vbench")
def test_what_is_finished_is_not_redone(student: Path, tmp_path: Path) -> None:
    """Stopped in the middle of its second film and of writing a row, it goes on to the same numbers."""
    arguments = asked(student, tmp_path)
    whole = vbench.evaluate(arguments)
    out, before = tmp_path / "out", file_times(tmp_path / "out" / "videos")
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    (out / "rows.jsonl").write_text("".join(lines[:3]) + lines[3][:40])  # killed while it wrote the fourth row
    first = json.loads(lines[0])["file"]
    (out / "videos" / first).unlink()  # and somebody has taken the first film away
    again = vbench.evaluate(arguments)
    after = file_times(out / "videos")
    redone = {name for name in after if after[name] != before.get(name)}
    assert redone == {first, json.loads(lines[3])["file"]}
    assert again["measures"] == whole["measures"]
    more = vbench.evaluate(asked(student, tmp_path, seeds=3))
    assert more["films"] == 6
    assert {name: time for name, time in file_times(out / "videos").items() if name in after} == after


@pytest.mark.usefixtures("no_vbench")
def test_films_made_otherwise_are_not_mixed(student: Path, tmp_path: Path) -> None:
    vbench.evaluate(asked(student, tmp_path, seeds=1, limit=1))
    with pytest.raises(ConfigError, match=r"made otherwise \(frames was 8, is 4\); give another --out"):
        vbench.evaluate(asked(student, tmp_path, seeds=1, limit=1, seconds=0.25))
    other = save_student(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="weights was"):
        vbench.evaluate(asked(other, tmp_path, seeds=1, limit=1))


@pytest.mark.usefixtures("no_vbench")
def test_an_extended_prompt_is_played_under_the_plain_name(student: Path, tmp_path: Path) -> None:
    vbench.evaluate(asked(student, tmp_path, f"a fox\t{RED}\n", seeds=1))
    row = json.loads((tmp_path / "out" / "rows.jsonl").read_text())
    assert (row["file"], row["prompt"], row["text"]) == ("a fox-0.mp4", "a fox", RED)


@pytest.mark.usefixtures("no_vbench")
def test_the_command(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = written(tmp_path / "p.txt", f"{RED}\n"), tmp_path / "out"
    command = ["--model", str(student), "--prompts", str(path), "--out", str(out), "--seeds", "1", "--seconds", "0.25"]
    evaluate.main(command)
    assert "# small: 1 film of 1 prompt\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate.main([*command, "--flicker-seeds", "0"])
    assert "expected 1 <= seeds <= flicker_seeds, got 1 and 0" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="knows no word of 'nothing'"):
        evaluate.main([*command[:2], "--prompts", str(written(tmp_path / "q.txt", "nothing\n")), *command[4:]])
    with pytest.raises(SystemExit, match="there is no model 'nobody'"):
        evaluate.main(["--student", "nobody"])  # the exact evaluation, under the same name


# ---------------------------------------------------------------------------------------------------------------- table


def row(prompt: str, **changes: float | None) -> dict[str, Any]:
    numbers = dict.fromkeys([line.key for line in report.LINES], 1.0)
    ends = {f"{name}_{end}": 1.0 for name in report.DRIFTS for end in ("first", "last")}
    thumbnail = report.packed(np.zeros((4, 16, 16, 3), "uint8"))
    speed = dict.fromkeys([line.key for line in report.SPEED], 1.0)
    measured = numbers | ends | changes
    return {"prompt": prompt, "engine": "torch", "measures": measured, "speed": speed, "thumbnails": thumbnail}


def test_intervals_are_over_prompts() -> None:
    """Seeds that repeat each other add nothing: the interval is that of one seed a prompt."""
    values = [float(index % 5) for index in range(20)]
    single = report.summarise([row(str(index), motion=value) for index, value in enumerate(values)])
    thrice = report.summarise([row(str(index), motion=value) for index, value in enumerate(values) for _ in range(3)])
    assert single["measures"]["motion"] == thrice["measures"]["motion"]
    motion = single["measures"]["motion"]
    assert motion["value"] == pytest.approx(2.0)
    deviation = math.sqrt(2.0 / 20)
    assert motion["low"] == pytest.approx(2 - 1.96 * deviation, abs=0.15)
    assert motion["high"] == pytest.approx(2 + 1.96 * deviation, abs=0.15)


def test_a_single_prompt_has_the_interval_of_its_films() -> None:
    several = report.summarise([row("one", motion=value) for value in (1.0, 2.0, 3.0)])["measures"]["motion"]
    assert several["n"] == 3
    assert several["low"] < 2 < several["high"]
    alone = report.summarise([row("one", motion=1.0)])["measures"]["motion"]
    assert (alone["value"], alone["low"], alone["n"]) == (1.0, None, 1)


def test_what_a_film_cannot_tell_is_left_out() -> None:
    rows = [row("a", flicker=None), row("a", flicker=4.0), row("b", flicker=2.0), row("c", flicker=None)]
    flicker = report.summarise(rows)["measures"]["flicker"]
    assert (flicker["value"], flicker["n"]) == (3.0, 2)
    none = report.summarise([row("a", flicker=None)])["measures"]["flicker"]
    assert (none["value"], none["n"]) == (None, 0)


def test_drift_is_a_ratio_of_means() -> None:
    rows = [row("a", sharpness_first=100.0, sharpness_last=50.0), row("b", sharpness_first=300.0, sharpness_last=250.0)]
    assert report.summarise(rows)["measures"]["sharpness_drift"]["value"] == pytest.approx(-25.0)


# --------------------------------------------------------------------------------------------------------------- VBench

# Stands for the command of vbench 0.1.5: its options, its file names, its result file, its exit code of 0 whatever
# happens. Scores: 0.5 for a prompt's first video and 0.7 for its second; a dimension may fail.
FAKE = """#!{python}
import json, os, shutil, sys
from argparse import ArgumentParser
parser = ArgumentParser()
command = parser.add_subparsers(dest="command")
static = command.add_parser("static_filter")
static.add_argument("--videos_path", required=True)
static.add_argument("--result_path", required=True)
evaluate = command.add_parser("evaluate")
for name in ("output_path", "videos_path", "dimension"):
    evaluate.add_argument("--" + name, required=True)
evaluate.add_argument("--full_json_dir", default=os.environ.get("FAKE_INFO"))
evaluate.add_argument("--mode", choices=["custom_input", "vbench_standard"], default="vbench_standard")
evaluate.add_argument("--prompt_file")
args = parser.parse_args()
with open(os.environ["FAKE_CALLS"], "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
present = os.listdir(args.videos_path)
assert all(name.endswith(".mp4") for name in present), present
if args.command == "static_filter":
    target = os.path.join(args.result_path, "filtered_videos")
    os.makedirs(target)
    for name in present:
        if name.startswith("a red"):
            shutil.copy(os.path.join(args.videos_path, name), target)
    sys.exit()
if args.dimension in os.environ.get("FAKE_FAILS", "").split():
    print("CUDA is not available")
    sys.exit(0)
if args.mode == "custom_input":
    assert len(json.load(open(args.prompt_file))) >= len(present)
    videos = present
else:
    rows = [row for row in json.load(open(args.full_json_dir)) if args.dimension in row["dimension"]]
    videos = [f"{{row['prompt_en']}}-{{i}}.mp4" for row in rows for i in range(5)]
    videos = [name for name in videos if name in present]
values = [0.5 + 0.2 * (name[-5] != "0") for name in videos]
scale = 100 if args.dimension == "imaging_quality" else 1
paths = [os.path.join(args.videos_path, name) for name in videos]
listed = [{{"video_path": path, "video_results": scale * value}} for path, value in zip(paths, values)]
os.makedirs(args.output_path, exist_ok=True)
name = os.path.join(args.output_path, "results_2026-11-23-04:00:00_eval_results.json")
json.dump({{args.dimension: [sum(values) / len(values), listed]}}, open(name, "w"))
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the fake on the path; gives the file that lists its calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    written(folder / "vbench", FAKE.format(python=sys.executable)).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder) + os.pathsep + os.environ["PATH"])
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls.txt"))
    return tmp_path / "calls.txt"


def test_vbench_runs_on_its_own_prompts(student: Path, tmp_path: Path, calls: Path) -> None:
    arguments = asked(student, tmp_path, json.dumps(INFO))
    said = vbench.evaluate(arguments)["vbench"]
    assert said["state"] == "standard prompts"
    assert said["scores"].keys() == {"temporal_flickering", "imaging_quality", "object_class", "color"}
    assert all(score["value"] == pytest.approx(0.6) for score in said["scores"].values())
    assert json.loads((tmp_path / "out" / "prompts_info.json").read_text()) == INFO, "what it needs besides the prompts"
    done = len(calls.read_text().splitlines())
    vbench.evaluate(arguments)
    assert len(calls.read_text().splitlines()) == done == 4, "what is measured is not measured again"
    text = (tmp_path / "out" / "RESULTS.md").read_text()
    assert "| imaging quality | 60.00 |" in text
    assert "No quality, semantic, total: a dimension is missing" in text


def test_vbench_takes_other_prompts_as_custom_input(
    student: Path, tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "aesthetic_quality")
    said = vbench.evaluate(asked(student, tmp_path))["vbench"]
    assert said["state"] == "custom input"
    assert said["scores"].keys() == set(leaderboard.CUSTOM) - {"aesthetic_quality"}
    assert said["failed"] == {"aesthetic_quality": "failed (vbench/aesthetic_quality.log)"}
    assert "CUDA is not available" in (tmp_path / "out" / "vbench" / "aesthetic_quality.log").read_text()
    assert "--mode custom_input --prompt_file prompts.json" in calls.read_text()
    assert (
        "| aesthetic quality | failed (vbench/aesthetic_quality.log) |" in (tmp_path / "out" / "RESULTS.md").read_text()
    )
    fewer = vbench.evaluate(asked(student, tmp_path, limit=1))["vbench"]
    assert fewer["state"].startswith("not run: it would also count 2 other films")


def test_vbench_filters_still_films_for_flicker(student: Path, tmp_path: Path, calls: Path) -> None:
    arguments = asked(
        student, tmp_path, json.dumps(INFO), seeds=1, flicker_seeds=2, dimensions=("temporal_flickering",)
    )
    results = vbench.evaluate(arguments)
    assert results["films"] == 3, "two of the prompt that serves flicker, one of the other"
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["static_filter", "evaluate"]
    assert "--videos_path vbench/static/filtered_videos" in calls.read_text()
    with pytest.raises(ConfigError, match="VBench's JSON says which do"):
        vbench.films(prompts.read(written(tmp_path / "p.txt", RED)), arguments)


def test_vbench_can_be_left_out(student: Path, tmp_path: Path, calls: Path) -> None:
    assert vbench.evaluate(asked(student, tmp_path, seeds=1, limit=1, vbench="off"))["vbench"] == {
        "state": "not run (--vbench off)"
    }
    assert not calls.exists()


# LaVie's row of VBench's public leaderboard, in percent: the constants must turn it into the quality, semantic and
# total score that stand beside it there.
LAVIE = {
    "subject_consistency": 91.41,
    "background_consistency": 97.47,
    "temporal_flickering": 98.30,
    "motion_smoothness": 96.38,
    "dynamic_degree": 49.72,
    "aesthetic_quality": 54.94,
    "imaging_quality": 61.90,
    "object_class": 91.82,
    "multiple_objects": 33.32,
    "human_action": 96.80,
    "color": 86.39,
    "spatial_relationship": 34.09,
    "scene": 52.69,
    "appearance_style": 23.56,
    "temporal_style": 25.93,
    "overall_consistency": 26.41,
}


def test_the_total_is_the_leaderboard_s() -> None:
    found = leaderboard.summary({name: Result(value / 100, {}) for name, value in LAVIE.items()})
    shown = {name: round(100 * found[name].value, 2) for name in report.PARTS}
    assert shown == {"quality": 78.78, "semantic": 70.31, "total": 77.08}
    assert math.isnan(found["total"].low), "without videos there is no interval"


def test_a_missing_dimension_is_not_zero() -> None:
    found = leaderboard.summary({name: Result(0.5, {}) for name in leaderboard.QUALITY})
    assert "quality" in found
    assert not {"semantic", "total"} & found.keys()


def test_the_total_has_the_interval_of_its_prompts() -> None:
    """All dimensions say the same of a prompt, so quality moves as one dimension does, times the mean slope."""
    values = {f"prompt {index}": 0.6 + 0.02 * (index % 5) for index in range(40)}
    score = sum(values.values()) / len(values)
    found = leaderboard.summary({name: Result(score, values) for name in leaderboard.DIMENSIONS})
    weights = sum(scale.weight for scale in leaderboard.QUALITY.values())
    slope = sum(scale.weight / (scale.high - scale.low) for scale in leaderboard.QUALITY.values()) / weights
    single, quality = found["dynamic_degree"], found["quality"]
    assert single.n == quality.n == 40
    assert quality.high - quality.low == pytest.approx(slope * (single.high - single.low), rel=1e-6)
    assert found["total"].low < found["total"].value < found["total"].high


def test_result_files_that_say_nothing(tmp_path: Path) -> None:
    assert leaderboard.read(None, "color", {}).reason == "failed (vbench/color.log)"
    bad = leaderboard.read(written(tmp_path / "x_eval_results.json", '{"scene": [0.5, []]}'), "color", {})
    assert bad.score is None
    assert "no result in x_eval_results.json" in bad.reason


def test_videos_that_do_not_add_up_give_no_interval(tmp_path: Path) -> None:
    listed = [
        {"video_path": f"videos/{name}-0.mp4", "video_results": value} for name, value in (("a", 0.2), ("b", 0.4))
    ]
    files = {"a-0.mp4": "a", "b-0.mp4": "b"}
    fits = written(tmp_path / "1_eval_results.json", json.dumps({"color": [0.3, listed]}))
    assert leaderboard.read(fits, "color", files).by_prompt == {"a": 0.2, "b": 0.4}
    other = written(tmp_path / "2_eval_results.json", json.dumps({"color": [0.9, listed]}))
    assert leaderboard.read(other, "color", files).by_prompt == {}
