"""The command line: what it prints, what it exits with, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from student_fixture import BLUE, RED, save_student, small_config

import cfrt
from cfrt.cli import main, scripted
from cfrt.engines.native import NativeEngine
from cfrt.video import read_picture

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CFRT_LOG", raising=False)


def generate(*arguments: str, student: Path, prompt: str = RED) -> int:
    return main(["generate", prompt, "--model", str(student), "--seconds", "1", *arguments])


def command(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "cfrt", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def frames_of(path: str) -> int:
    with av.open(path) as container:
        return sum(1 for _ in container.decode(video=0))


# ---------------------------------------------------------------------- generate


def test_generate_writes_what_it_says(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-o", "x.mp4", "-o", "x.png", student=student) == 0
    assert frames_of("x.mp4") == 16
    assert sorted(os.listdir()) == ["x.mp4", "x.png"]
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    for part in ("x.mp4, x.png: 16 frames by small (native, ", " fps ", "first frame after", "unit p50", "p95"):
        assert part in out


def test_generate_has_a_default_output_and_can_be_quiet(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-q", student=student) == 0
    assert os.listdir() == ["cfrt.mp4"]
    assert capsys.readouterr() == ("", "")


def test_generate_measures_as_json(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--json", "--seed", "5", "-o", "x.gif", "--then", f"0.5: {BLUE}", student=student) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["frames"] == 16
    assert said["seed"] == 5
    assert said["outputs"] == ["x.gif"]
    assert (said["engine"], said["precision"] in ("fp32", "bf16", "int8")) == ("native", True)
    assert said["time_to_first_frame"] > 0
    assert said["unit"]["p50"] <= said["unit"]["p95"] <= said["unit"]["p99"]
    assert said["change_to_pixel"]["p50"] > 0


@pytest.mark.parametrize("suffix", ["mp4", "gif", "webp", "y4m", "png"])
def test_the_same_seed_gives_the_same_file(suffix: str, student: Path) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert generate("-q", "-o", f"{name}.{suffix}", "--seed", seed, student=student) == 0
    a, b, c = (Path(f"{name}.{suffix}").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_then_changes_the_prompt_at_the_next_unit(student: Path) -> None:
    """At 16 fps, units of 4 frames start at frame 1, 5, 9, 13: second 0.3 is frame 4.8, so the change is at frame 5."""
    with cfrt.Stream(RED, model=student, fps="max") as stream:
        frames = list(scripted(stream, 16, [(0.3, BLUE), (0.5625, "a red square"), (0.8, BLUE)]))
    assert [frame.prompt for frame in frames] == [RED] * 5 + [BLUE] * 4 + ["a red square"] * 4 + [BLUE] * 3


def test_generate_starts_from_a_picture(student: Path) -> None:
    assert generate("-q", "-o", "x.png", student=student) == 0
    assert generate("-q", "-o", "y.y4m", "--image", "x.png", student=student) == 0
    assert frames_of("y.y4m") == 16
    config = small_config()
    picture = read_picture("x.png", config.frame_size)
    with cfrt.Stream(RED, model=student, fps="max", image=picture) as stream:
        first = next(stream.frames()).pixels
    assert abs(read_picture("y.y4m", config.frame_size).astype(int) - first).max() <= 2


def test_unknown_words_are_named_on_one_line(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-q", prompt="a red zebra", student=student) == 0
    assert capsys.readouterr().err == "cfrt: warning: the model does not know 'zebra'\n"


def test_dash_is_raw_video_on_standard_output(student: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert generate("-o", "-", student=student) == 0
    out, err = capsysbinary.readouterr()
    header = b"YUV4MPEG2 W32 H32 F16:1 Ip A1:1 C444\n"
    assert out.startswith(header + b"FRAME\n")
    assert len(out) == len(header) + 16 * (len(b"FRAME\n") + 3 * 32 * 32)
    assert b"-: 16 frames by small" in err


# ---------------------------------------------------------------------- what goes wrong


USAGE = [
    (("generate", ""), "expected a prompt in words"),
    (("generate", "   "), "expected a prompt in words"),
    (("generate", "red " * 300), "at most 1000 characters, got 1200"),
    (("generate", RED, "--seconds", "0"), "--seconds above 0"),
    (("generate", RED, "--seconds", "-1"), "--seconds above 0"),
    (("generate", RED, "--seconds", "nan"), "--seconds above 0"),
    (("generate", RED, "--seconds", "1e9"), "at most 3600"),
    (("generate", RED, "-o", "x.avi"), "ending in .mp4"),
    (("generate", RED, "-o", "x"), "ending in .mp4"),
    (("generate", RED, "-o", "x.mp4", "-o", "./x.mp4"), "given twice"),
    (("generate", RED, "-o", "-", "--json"), "both want standard output"),
    (("generate", RED, "--fps", "0"), "0 < fps"),
    (("generate", RED, "--scale", "0"), "scale from 1"),
    (("generate", RED, "--then", "soon: blue"), '--then "TIME: PROMPT"'),
    (("generate", RED, "--then", "2.0 blue"), '--then "TIME: PROMPT"'),
    (("generate", RED, "--then", "9: blue"), "between 0 and 4.0 seconds"),
    (("generate", RED, "--then", "1:"), "expected a prompt in words"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=[message for _, message in USAGE])
def test_wrong_usage_is_two(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.startswith("cfrt: error: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert os.listdir() == []


UNREADABLE = [[], ["paint"], ["generate"], ["generate", RED, "--secnds", "3"], ["generate", RED, "--seed", "x"]]


@pytest.mark.parametrize("arguments", UNREADABLE, ids=str)
def test_what_cannot_be_parsed_is_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "--help" in capsys.readouterr().err


def damage(folder: Path, how: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    data = weights.read_bytes()
    if how == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif how == "garbage":
        weights.write_bytes(b"\xff" * 1000)
    elif how == "missing":
        weights.unlink()
    elif how == "not JSON":
        config.write_text("{")
    elif how == "another config":
        config.write_text(config.read_text().replace('"depth": 2', '"depth": 3'))
    elif how == "unknown key":
        config.write_text(config.read_text().replace('"depth"', '"deepness"'))
    elif how == "nonsense":
        config.write_text(config.read_text().replace('"heads": 2', '"heads": 5'))


DAMAGE = {
    "truncated": "truncated or damaged",
    "garbage": "truncated or damaged",
    "missing": "found no such file",
    "not JSON": "is not JSON",
    "another config": "is not the config of its weights: depth",
    "unknown key": "unknown keys ['deepness'], missing keys ['depth']",
    "nonsense": "multiple of 2 * heads",
}


def test_raw_video_does_not_go_to_a_terminal(
    student: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert generate("-o", "-", student=student) == 2
    assert "raw video" in capsys.readouterr().err


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_model_is_one(how: str, student: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = save_student(tmp_path / "student")
    damage(folder, how)
    assert generate("-o", "x.mp4", student=folder) == 1
    err = capsys.readouterr().err
    assert DAMAGE[how] in err
    assert err.count("\n") == 1
    assert os.listdir() == ["student"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nothing"), "there is no model 'nothing'"),
        (("--model", "wan-1.3b-framewise-2step"), "is a preset"),
        (("--model", "."), "no model folder: expected config.json"),
        (("--engine", "warp"), "no engine 'warp'"),
        (("--precision", "fp12"), "expected a precision among"),
        (("--device", "tpu"), "not on 'tpu'"),
        (("--seed", "-1"), "expected a whole-number seed"),
        (("--threads", "0"), "expected at least one thread"),
        (("-o", "none/x.mp4"), "make it first"),
        (("-o", "x.mp4", "-o", "none/x.png"), "make it first"),
        (("--image", "none.png"), "cannot read a picture from none.png"),
    ],
    ids=str,
)
def test_what_fails_is_one(
    arguments: tuple[str, ...], message: str, student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(*arguments, student=student) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert os.listdir() == []


def test_a_prompt_of_unknown_words_is_one(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(prompt="zebra", student=student) == 1
    assert "knows no word of 'zebra'; it knows, for instance: red, blue" in capsys.readouterr().err
    assert os.listdir() == []


def test_a_bug_is_one_line_and_a_traceback_for_those_who_ask(
    student: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(NativeEngine, "decode", broken)
    assert generate("-o", "x.mp4", student=student) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "MemoryError: no room" in err
    assert "CFRT_LOG=debug" in err
    monkeypatch.setenv("CFRT_LOG", "debug")
    assert generate("-o", "x.mp4", student=student) == 1
    assert "Traceback" in capsys.readouterr().err
    assert os.listdir() == []


# ---------------------------------------------------------------------- signals and pipes


def wait_for_a_draft() -> None:
    for _ in range(600):
        if any(path.suffix == ".part" and path.stat().st_size > 1000 for path in Path().iterdir()):
            return
        time.sleep(0.05)
    raise AssertionError("nothing was begun")


def test_an_interrupt_leaves_nothing(student: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it, for all
    process = command("generate", RED, "--model", str(student), "--seconds", "3000", "-o", "x.y4m")
    signal.signal(signal.SIGINT, before)
    with process:
        wait_for_a_draft()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == (b"", b"cfrt: interrupted\n")
    assert os.listdir() == []


def test_a_kill_leaves_no_film_and_the_next_run_tidies_up(student: Path) -> None:
    with command("generate", RED, "--model", str(student), "--seconds", "3000", "-o", "x.y4m") as process:
        wait_for_a_draft()
        process.kill()
    assert not Path("x.y4m").exists()
    assert len(os.listdir()) == 1
    assert generate("-q", "-o", "x.y4m", student=student) == 0
    assert os.listdir() == ["x.y4m"]


def test_a_reader_that_leaves_ends_it_quietly(student: Path) -> None:
    with command("generate", RED, "--model", str(student), "--seconds", "3000", "-o", "-") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10_000)
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == b""


# ---------------------------------------------------------------------- the other commands


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cfrt {cfrt.__version__}\n"
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("generate", "doctor", "models"))
    assert main(["generate", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("--seconds", "--seed", "--then", "-o FILE", "--engine", "--json", "-q"))
    assert "{None}" not in out


def test_doctor(student: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor", "--model", str(student), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cfrt"] == cfrt.__version__
    engines = report["engines"]
    assert (engines["model"], engines["chosen"]) == (str(student), "native")
    assert [name for name, reason in engines["refusals"].items() if reason is None] == ["native", "torch"]
    assert report["packages"]["numpy"] == np.__version__
    assert report["processor"]["isa"] in report["processor"]["levels"]
    assert report["processor"]["precision"] in ("bf16", "fp32")
    assert report["processor"]["threads"] >= 1
    assert report["speed"]["engine"] == "native"
    assert report["speed"]["fps"] > 0
    assert report["cuda"] is None or report["cuda"]["driver"] >= 525
    assert main(["doctor", "--model", str(student)]) == 0
    out = capsys.readouterr().out
    assert ("CPU only; CFRT_CUDA=ON pip install" in out) == (report["cuda"] is None)
    assert ("wants NVIDIA driver" in out) == (report["cuda"] is not None)
    monkeypatch.setattr("cfrt.engines.find_spec", lambda name: None)
    assert main(["doctor", "--model", str(student)]) == 0
    out = capsys.readouterr().out
    assert "native: would not run: _cfrt is not installed: pip install cfrt" in out
    assert "torch: would not run: torch is not installed: pip install 'cfrt[torch]'" in out
    assert "none can run" in out
    assert main(["doctor", "--model", "nothing"]) == 0
    assert "cannot be asked: there is no model 'nothing'" in capsys.readouterr().out


def test_doctor_without_a_probe_streams_nothing(
    student: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cfrt.stream.Stream", None)
    assert main(["doctor", "--model", str(student), "--no-probe", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["speed"] is None
    assert main(["doctor", "--model", str(student), "--no-probe"]) == 0
    assert "speed" not in capsys.readouterr().out


def test_doctor_says_which_instructions_are_forced(
    student: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CFRT_ISA", "plain")
    assert main(["doctor", "--model", str(student)]) == 0
    out = capsys.readouterr().out
    assert "plain, forced by CFRT_ISA (it has plain" in out
    assert "by default fp32" in out
    monkeypatch.setenv("CFRT_ISA", "mmx")
    assert main(["doctor", "--model", str(student)]) == 0
    assert "expected the environment variable CFRT_ISA to be one of plain" in capsys.readouterr().out


def test_models(student: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfrt.students.embedded", lambda: {"small": student, "broken": Path("nowhere")})
    assert main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    small, broken = found["embedded"]
    assert (small["name"], small["size"], small["fps"], small["steps"]) == ("small", [32, 32], 16.0, 2)
    assert small["parameters"] > 10_000
    assert "cannot read the model config" in broken["error"]
    assert "wan-1.3b-framewise-2step" in found["presets"]
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "small: 32 x 32 at 16 fps, 2 steps (4 for the first unit)" in out
    assert "broken: broken (" in out


# ---------------------------------------------------------------------- trace


def test_a_trace_is_written(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-o", "out.gif", "--trace", "out.json", student=student) == 0
    events = json.loads(Path("out.json").read_text())["traceEvents"]
    assert {"unit", "denoise 0", "decode"} <= {event["name"] for event in events}
    assert generate("-o", "out.gif", "--trace", "nowhere/out.json", student=student) == 1
    assert "cannot write the trace to nowhere/out.json" in capsys.readouterr().err
    assert generate("-o", "out.gif", "--trace", "out.txt", student=student) == 2
