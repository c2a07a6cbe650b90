"""A server that was killed goes on with its streams: same ids, same prompts and seeds, from where they were."""

import signal
from pathlib import Path

import numpy as np
import pytest
from serve_fixture import GENEROUS, OTHER, PROMPT, eventually, process, running
from student_fixture import save_student

from cfrt import Stream
from cfrt.cli import main
from cfrt.config import PRESETS
from cfrt.errors import CfrtError
from cfrt.picture import png
from cfrt.serve import shelf as shelves
from cfrt.serve.client import Client
from cfrt.serve.shelf import Shelf

pytestmark = pytest.mark.cpu


@pytest.mark.slow
def test_a_killed_server_goes_on_with_its_streams(tmp_path: Path) -> None:
    with process("--state", str(tmp_path)) as (url, server):
        stream = Client(url).stream(PROMPT, seed=3)
        list(stream.frames(n=24))
        stream.prompt(OTHER)
        list(stream.frames(n=40))
        eventually(lambda: b"large blue square" in (tmp_path / f"{stream.id}.cfrt").read_bytes())
        before = stream.state()
        server.send_signal(signal.SIGKILL)
        server.wait()
    with process("--state", str(tmp_path)) as (url, server):
        again = Client(url).join(stream.id)
        after = again.state()
        assert (after["prompt"], after["seed"]) == (OTHER, 3)
        assert before["unit"] - 2 / 0.25 - 1 <= after["unit"] <= before["unit"]
        assert after["timeline"][-1] == before["timeline"][-1]
        first = next(again.frames(n=1))
        assert after["unit"] <= first.unit <= after["unit"] + 1, "it does not begin anew"


def test_what_is_kept_is_gone_on_with_bit_for_bit(tmp_path: Path) -> None:
    with Shelf(tmp_path) as shelf, running(limits=GENEROUS, shelf=shelf) as served:
        name = served.new(seed=5)
        frames = [frame.index for frame in Client(served.url).join(name).frames(n=30)]
    with Shelf(tmp_path) as shelf, running(limits=GENEROUS, shelf=shelf) as served:
        theirs = list(Client(served.url).join(name).frames(n=8))
    with Stream(PROMPT, seed=5, threads=1, fps="max") as local:
        ours = list(local.frames(n=frames[-1] + 32))
    assert theirs[0].index > frames[-1]
    for frame in theirs:
        assert np.abs(frame.pixels.astype(int) - ours[frame.index].pixels).mean() < 2  # JPEG's rounding


def test_a_paused_stream_is_paused_still_and_a_closed_one_is_gone(tmp_path: Path) -> None:
    with Shelf(tmp_path) as shelf, running(limits=GENEROUS, shelf=shelf) as served:
        paused, closed, begun = served.new(), served.new(), served.new("a small green circle moving up", paused=True)
        served.http.post(f"/streams/{begun}/image", content=png(np.full((64, 64, 3), 90, dtype=np.uint8)))
        served.patch(paused, paused=True)
        eventually(lambda: (tmp_path / f"{closed}.cfrt").exists())
        served.http.delete(f"/streams/{closed}")
        assert not (tmp_path / f"{closed}.cfrt").exists()
    with Shelf(tmp_path) as shelf, running(limits=GENEROUS, shelf=shelf) as served:
        assert served.state(paused)["paused"]
        assert served.state(begun)["paused"]
        assert served.http.get(f"/streams/{closed}").status_code == 404
        served.patch(paused, paused=False)
    with Shelf(tmp_path) as shelf, running(limits=GENEROUS, shelf=shelf) as served:
        assert not served.state(paused)["paused"]


def test_what_is_damaged_or_not_ours_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / f"{'a' * 32}.cfrt").write_bytes(b"no snapshot")
    (tmp_path / "..%2f.cfrt").write_bytes(b"somebody else's")
    with Shelf(tmp_path) as shelf, running(limits=GENEROUS, shelf=shelf) as served:
        assert served.http.get("/healthz").json()["streams"] == 0
    assert "a stream is lost" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"..%2f.cfrt", "lock"}


def test_a_stream_of_another_model_does_not_keep_a_server_from_starting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a student with random weights, whose words the embedded one does not all know."""
    with Stream("a crimson circle over the night sky", model=save_student(tmp_path / "other"), threads=1) as other:
        next(other.frames())
        snapshot = other.snapshot(portable=True)
    with Shelf(tmp_path / "shelf") as shelf:
        shelf.keep("b" * 32, snapshot, paused=False)
        with running(limits=GENEROUS, shelf=shelf) as served:
            assert served.http.get(f"/streams/{'b' * 32}").status_code == 404
            assert "a stream cannot go on: expected a snapshot of a stream with model 'tiny'" in caplog.text
            served.new()


def test_one_server_at_a_time_has_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with Shelf(folder):
        assert folder.stat().st_mode & 0o077 == 0
        with pytest.raises(CfrtError, match=r"this server's alone, got one that another uses; give each"):
            Shelf(folder)
    with Shelf(folder):
        pass


def test_the_default_folder_is_the_ports_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert shelves.default(8000) == tmp_path / "cfrt" / "serve-8000"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert shelves.default(80) == Path.home() / ".local" / "state" / "cfrt" / "serve-80"


def test_what_cannot_be_kept_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shelves.unfit(PRESETS["wan-1.3b-framewise-2step"]) == (
        "a snapshot of 'wan-1.3b-framewise-2step' has 11517 MiB of keys and values"
    )
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: [one.close() for one in sockets])
    (tmp_path / "file").touch()
    assert main(["serve", "--port", "0", "--state", str(tmp_path / "file" / "below")]) == 1
    assert "expected streams that can be kept in" in capsys.readouterr().err
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert main(["serve", "--port", "47218"]) == 0
    assert "streams end with this server:" in capsys.readouterr().err
