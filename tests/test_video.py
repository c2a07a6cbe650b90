"""Files of frames: what is in them, and that there never is half of one."""

import os
import signal
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from cfrt.errors import VideoError
from cfrt.font import HEIGHT, WIDTH, render
from cfrt.frame import Frame
from cfrt.picture import enlarge, png, read_film, read_picture
from cfrt.sheet import CELLS, Sheet
from cfrt.video import Writer, write

pytestmark = pytest.mark.cpu


def film(count: int = 20, height: int = 64, width: int = 64) -> list[np.ndarray]:
    """A bright square moves over a gradient."""
    y, x = np.mgrid[:height, :width]
    frames = []
    for i in range(count):
        pixels = np.stack([x * 2, y * 2, np.full_like(x, 60)], axis=2).astype(np.uint8)
        pixels[20:36, i : i + 16] = (230, 200, 40)
        frames.append(pixels)
    return frames


def read(path: Path) -> tuple[np.ndarray, Fraction]:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        rate = container.streams.video[0].average_rate
        assert rate is not None
        return np.stack(frames), rate


@pytest.mark.parametrize(
    ("name", "scale", "worst"),
    [("x.mp4", 4, 40), ("x.gif", 4, 20), ("x.y4m", 1, 2), ("X.Y4M", 1, 2)],
)
def test_a_film_holds_the_frames(name: str, scale: int, worst: int, tmp_path: Path) -> None:
    path = tmp_path / name
    write(iter(film()), path, fps=16)
    got, rate = read(path)
    expected = np.stack([enlarge(pixels, scale) for pixels in film()]).astype(int)
    assert got.shape == expected.shape
    assert abs(got - expected).max() <= worst
    assert abs(got - expected).mean() < 2
    assert name.endswith("gif") or rate == 16  # gif counts in hundredths of a second
    assert os.listdir(tmp_path) == [name]


def test_a_gif_keeps_the_time(tmp_path: Path) -> None:
    write(film(33), tmp_path / "x.gif", fps=16)
    data = (tmp_path / "x.gif").read_bytes()
    control = b"\x21\xf9\x04"
    at = [i for i in range(len(data)) if data.startswith(control, i)]
    delays = [struct.unpack("<H", data[i + 4 : i + 6])[0] for i in at]
    assert sum(delays[:32]) == pytest.approx(200, abs=1)


def test_a_webp_is_animated_and_loops(tmp_path: Path) -> None:
    write(film(8), tmp_path / "x.webp", fps=20)
    data = (tmp_path / "x.webp").read_bytes()
    assert data[:4] + data[8:12] == b"RIFFWEBP"
    durations, loops, at = [], None, 12
    while at < len(data):
        kind, size = data[at : at + 4], struct.unpack("<I", data[at + 4 : at + 8])[0]
        if kind == b"ANIM":
            loops = struct.unpack("<H", data[at + 12 : at + 14])[0]
        if kind == b"ANMF":
            durations.append(int.from_bytes(data[at + 20 : at + 23], "little"))
        at += 8 + size + size % 2
    assert loops == 0
    assert sum(durations) == pytest.approx(400, abs=2)
    assert len(durations) == 8


def test_mp4_can_start_before_it_has_arrived(tmp_path: Path) -> None:
    write(film(), tmp_path / "x.mp4")
    data = (tmp_path / "x.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(
    ("shape", "scale", "size"), [((64, 64), None, 256), ((480, 832), None, 480), ((64, 64), 2, 128)], ids=str
)
def test_scale(shape: tuple[int, int], scale: int | None, size: int, tmp_path: Path) -> None:
    write(film(2, *shape), tmp_path / "x.mp4", scale=scale)
    assert read(tmp_path / "x.mp4")[0].shape[1] == size


def test_a_sheet_shows_time_and_prompts(tmp_path: Path) -> None:
    prompts = ["a red circle"] * 10 + ["a blue one"] * 10
    frames = [Frame(p, i, i / 16, i // 4, 0.01, prompts[i]) for i, p in enumerate(film())]
    write(frames, tmp_path / "x.png")
    sheet = read_picture(tmp_path / "x.png", read(tmp_path / "x.png")[0].shape[1:3])
    np.testing.assert_array_equal(sheet[30 : 30 + 128 : 2, 8 : 8 + 128 : 2], film()[0])
    caption = render("a red circle", 2)
    np.testing.assert_array_equal((sheet[8 : 8 + 18, 8 : 8 + caption.shape[1]] < 128).all(axis=2), caption)


def test_a_sheet_keeps_a_bounded_number_of_frames() -> None:
    sheet = Sheet()
    pixels = np.zeros((8, 8, 3), np.uint8)
    for i in range(1000):
        sheet.add(pixels, i / 16)
    assert CELLS <= len(sheet._kept) < 2 * CELLS
    steps = np.diff([time for _, time, _ in sheet._kept])
    assert steps.min() == steps.max()
    assert sheet.draw().dtype == np.uint8


def test_the_font_prints_everything() -> None:
    printable = [chr(code) for code in range(33, 127)]
    glyphs = {render(character, 1).tobytes() for character in [*printable, "é"]}
    assert len(glyphs) == len(printable) + 1
    assert render("ab", 2).shape == (2 * HEIGHT, 4 * WIDTH)
    assert render("", 2).shape == (2 * HEIGHT, 0)


def test_png_is_lossless(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(film()[0]))
    np.testing.assert_array_equal(read_picture(tmp_path / "x.png", (64, 64)), film()[0])


def test_a_picture_is_cut_about_its_centre(tmp_path: Path) -> None:
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = 200
    (tmp_path / "x.png").write_bytes(png(wide))
    assert read_picture(tmp_path / "x.png", (32, 32)).min() > 190
    for wrong in (tmp_path / "none.png", tmp_path):
        with pytest.raises(VideoError, match="cannot read a picture from"):
            read_picture(wrong, (32, 32))
    (tmp_path / "x.txt").write_text("no picture")
    with pytest.raises(VideoError, match=r"cannot read a picture from .*x\.txt"):
        read_picture(tmp_path / "x.txt", (32, 32))


# ---------------------------------------------------------------------- nothing or all


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("x.avi", {}, r"ending in .mp4, .gif, .webp, .y4m, .png \(or - for raw y4m\), got"),
        ("x", {}, "expected a file name ending in"),
        ("none/x.mp4", {}, "there is no folder .*none; make it first"),
        ("file/x.mp4", {}, "there is no folder"),
        ("folder.mp4", {}, "it is a folder"),
        ("x.mp4", {"fps": 0}, "0 < fps <= 1000"),
        ("x.mp4", {"fps": float("nan")}, "0 < fps <= 1000"),
        ("x.mp4", {"scale": 0}, "scale from 1 to 64"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_frame(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(VideoError, match=message):
        Writer(tmp_path / name, **{"fps": 16, **options})
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.mp4"]


@pytest.mark.parametrize("suffix", ["mp4", "gif", "webp", "y4m", "png"])
def test_a_failure_leaves_the_old_file_and_nothing_else(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_text("the old one")

    def broken() -> Any:
        yield from film(3)
        raise RuntimeError("the source dried up")

    with pytest.raises(RuntimeError, match="dried up"):
        write(broken(), path)
    with pytest.raises(VideoError, match="there were no frames"):
        write([], path)
    with pytest.raises(VideoError, match="expected every frame to be"):
        write([*film(2), np.zeros((32, 32, 3), np.uint8)], path)
    with pytest.raises(VideoError, match=r"\(H, W, 3\) uint8"):
        write([np.zeros((64, 64, 3))], path)
    assert path.read_text() == "the old one"
    assert os.listdir(tmp_path) == [path.name]
    write(film(3), path)
    assert path.stat().st_size > 100


def test_odd_sides_are_explained(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"even sides .* scale 2"):
        write(film(2, 65, 65), tmp_path / "x.mp4", scale=1)
    assert os.listdir(tmp_path) == []


def test_a_link_keeps_pointing(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to("real.png")
    write(film(2), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "real.png").stat().st_size > 100


KILLED = """
import sys, numpy as np
from cfrt.video import Writer
with Writer(sys.argv[1], fps=16) as writer:
    while True:
        writer.add(np.zeros((64, 64, 3), np.uint8))
        print("frame", flush=True)
"""


@pytest.mark.parametrize("suffix", ["mp4", "y4m"])
def test_a_killed_writer_leaves_nothing_that_looks_like_a_film(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    root = str(Path(__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
    ) as process:
        assert process.stdout is not None
        for _ in range(5):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    left = os.listdir(tmp_path)
    assert len(left) == 1
    assert left[0].startswith(f".x.{suffix}.")
    other = tmp_path / f".x.{suffix}.{os.getpid()}.cafe.part"  # a writer that is alive
    other.touch()
    write(film(3), path)
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, other.name])


def test_films_are_written_in_flat_memory(tmp_path: Path) -> None:
    import resource

    pixels = film(1)[0]
    with Writer(tmp_path / "x.mp4", fps=16, scale=1) as writer, Writer(tmp_path / "x.png", fps=16) as sheet:
        for i in range(1500):
            writer.add(pixels)
            sheet.add(pixels)
            if i == 300:
                early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - early < 20_000  # kB; all frames would take 18 MB twice


# ---------------------------------------------------------------------- reading films


@pytest.mark.parametrize(
    ("rate", "shown"), [(16.0, range(12)), (32.0, range(0, 12, 2)), (8.0, [i // 2 for i in range(23)])]
)
def test_a_film_is_read_at_the_rate_that_is_asked_for(rate: float, shown: Any, tmp_path: Path) -> None:
    """At k / 16 seconds the last frame whose time has come."""
    frames = film(12)
    write(frames, tmp_path / "film.y4m", fps=rate)
    expected, _ = read(tmp_path / "film.y4m")
    got = read_film(tmp_path / "film.y4m", (64, 64), 16.0, 100)
    kept = list(shown) if rate != 32.0 else [*shown, 11]  # the last frame, whose time is past the last k / 16, too
    np.testing.assert_array_equal(got, expected[kept])
    np.testing.assert_array_equal(read_film(tmp_path / "film.y4m", (64, 64), 16.0, 5), got[-5:])


def test_a_film_is_cut_as_a_picture_is(tmp_path: Path) -> None:
    write(film(3, 48, 96), tmp_path / "film.y4m", fps=16.0)
    first = read_picture(tmp_path / "film.y4m", (32, 32))
    got = read_film(tmp_path / "film.y4m", (32, 32), 16.0, 100)
    assert got.shape == (3, 32, 32, 3)
    np.testing.assert_array_equal(got[0], first)


def test_what_is_no_film(tmp_path: Path) -> None:
    (tmp_path / "no.mp4").write_bytes(b"nothing")
    for path in (tmp_path / "no.mp4", tmp_path / "nowhere.mp4"):
        with pytest.raises(VideoError, match="cannot read a film"):
            read_film(path, (32, 32), 16.0, 9)
