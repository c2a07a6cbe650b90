"""The server as programs use it: its API, its caps, its door, its errors, and viewers who never wait for others."""

import asyncio
import base64
import importlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
import websockets.exceptions
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from prometheus_client.parser import text_string_to_metric_families
from serve_fixture import OTHER, PATIENCE, PROMPT, Served, process, running, tool

from cfrt.errors import EngineError
from cfrt.picture import png
from cfrt.serve import film, formats
from cfrt.serve.client import Client, ServerError
from cfrt.serve.limits import Bucket, Limits

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore::cfrt.text.PromptWarning")]

ROOT = Path(__file__).parents[1]
GENEROUS = Limits(streams=64, creations_per_minute=6000, messages_per_second=1000)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with running(limits=GENEROUS) as server:
        yield server


@pytest.fixture
def name(served: Served) -> Iterator[str]:
    name = served.new()
    yield name
    served.http.delete(f"/streams/{name}")


@pytest.fixture
def client(served: Served) -> Client:
    return Client(served.url)


def eventually(true: Any, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def colour(pixels: np.ndarray) -> str:
    """Which of red, green and blue stands out most from the others in some pixel."""
    values = pixels.astype(int)
    lead = [(values[..., i] - np.delete(values, i, axis=-1).max(-1)).max() for i in range(3)]
    return ("red", "green", "blue")[int(np.argmax(lead))]


# ---------------------------------------------------------------------- streams


def test_a_stream_from_its_first_frame_to_its_end(client: Client) -> None:
    with client.stream(PROMPT, seed=7) as stream:
        frames = list(stream.frames(n=9))
        assert frames[0].pixels.shape == (64, 64, 3)
        assert [frame.index for frame in frames] == list(range(9))
        assert {frame.prompt for frame in frames} == {PROMPT}
        assert colour(frames[-1].pixels) == "red"
        change = stream.prompt(OTHER)
        later = list(stream.frames(n=16))
        assert all((frame.prompt == OTHER) == (frame.unit >= change.unit) for frame in later)
        assert colour(later[-1].pixels) == "blue"
        assert stream.state()["timeline"] == [{"unit": 0, "prompt": PROMPT}, {"unit": change.unit, "prompt": OTHER}]
    with pytest.raises(ServerError, match="id of a stream that runs") as caught:
        stream.state()
    assert caught.value.status == 404


def test_it_is_the_stream_that_the_library_gives(client: Client) -> None:
    """Same prompt and seed: the pixels of `cfrt.Stream`, but for JPEG's rounding."""
    from cfrt import Stream

    with client.stream(PROMPT, seed=3) as remote, Stream(PROMPT, seed=3, threads=1) as local:
        for theirs, ours in zip(remote.frames(n=6), local.frames(n=6), strict=True):
            assert np.abs(theirs.pixels.astype(int) - ours.pixels).mean() < 2


def test_pause_step_and_resume(client: Client) -> None:
    with client.stream(PROMPT) as stream:
        frames = stream.frames()
        shown = [next(frames) for _ in range(5)]
        stream.pause()
        assert stream.state()["paused"]
        eventually(lambda: stream.state()["stats"]["frames"] == stream.state()["stats"]["frames"])
        before = stream.state()["unit"]
        stream.step(2)
        eventually(lambda: stream.state()["unit"] >= before + 1)
        stream.resume()
        while shown[-1].unit < before + 3:
            shown.append(next(frames))
        assert [frame.index for frame in shown] == list(range(len(shown)))
        frames.close()


def test_rewind_plays_the_same_pictures_again(client: Client) -> None:
    with client.stream(PROMPT, seed=5) as stream, closing(stream.frames()) as frames:
        seen = {}
        for frame in frames:
            seen[frame.index] = frame.pixels
            if frame.unit == 6:
                break
        assert stream.state()["reach"] >= 3
        stream.rewind(3)
        again = next(frame for frame in frames if frame.unit < 6)
        np.testing.assert_array_equal(again.pixels, seen[again.index])
        with pytest.raises(ServerError, match="cannot go back 5000 units"):
            stream.rewind(5000)


def test_a_branch_shares_the_past_and_not_the_future(client: Client) -> None:
    with client.stream(PROMPT) as trunk:
        list(trunk.frames(n=9))
        with trunk.branch() as twin:
            assert twin.id != trunk.id
            twin.prompt(OTHER)
            assert colour(list(twin.frames(n=20))[-1].pixels) == "blue"
            assert trunk.state()["prompt"] == PROMPT
            assert colour(list(trunk.frames(n=4))[-1].pixels) == "red"


def test_restart_begins_again_with_the_same_pictures(client: Client) -> None:
    with client.stream(PROMPT, seed=2) as stream:
        first = [frame.pixels for frame in stream.frames(n=3)]
        stream.restart()
        frames = stream.frames()
        for expected in first:
            frame = next(frames)
            np.testing.assert_array_equal(frame.pixels, expected)
        frames.close()


def test_words_that_the_model_does_not_know_are_told(served: Served) -> None:
    name = served.new("a red sqare")
    assert served.state(name)["notes"] == ["the model does not know 'sqare' (did you mean 'square'?)"]
    assert served.patch(name, prompt=OTHER)["notes"] == []
    served.http.delete(f"/streams/{name}")


def test_a_stream_from_a_picture(client: Client) -> None:
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[:, :, 1] = 180
    with client.stream(PROMPT) as stream:
        stream.start_from(png(picture))
        first = next(stream.frames(n=1))
        assert first.index == 0
        assert colour(first.pixels) == "green"


def test_nobody_watching_means_no_work(served: Served, name: str) -> None:
    eventually(lambda: served.state(name)["stats"]["frames"] >= 1)
    time.sleep(0.4)
    assert served.state(name)["stats"]["frames"] == 1


# ---------------------------------------------------------------------- formats


@pytest.mark.parametrize(("query", "options", "side"), [("mp4&scale=2", [], 128), ("mjpeg", ["-f", "mpjpeg"], 64)])
def test_ffmpeg_reads_the_stream(served: Served, name: str, query: str, options: list[str], side: int) -> None:
    source = [*options, "-i", f"{served.url}/streams/{name}/frames?format={query}"]
    sink = ["-frames:v", "12", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run([tool("ffmpeg"), "-v", "error", *source, *sink], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    film = np.frombuffer(done.stdout, dtype=np.uint8).reshape(-1, side, side, 3)
    assert len(film) == 12
    assert colour(film[-1]) == "red"


def test_a_jpeg_keeps_the_edges_of_colours() -> None:
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[8:21, 8:21] = (230, 30, 20)
    worst = np.abs(formats.read_jpeg(formats.jpeg(pixels)).astype(int) - pixels).max()
    assert worst < 24  # with half the chroma it is about 100


def test_a_viewer_may_leave_while_his_frame_is_encoded() -> None:
    """FFmpeg's objects are not for two threads at once; without the lock this ends the process."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for _ in range(5):
        film = formats.Fragments(16, 8)
        film.add(pixels, 0)
        with ThreadPoolExecutor(1) as pool:
            pieces = [pool.submit(film.add, pixels, tick) for tick in range(1, 6)]
            pieces[0].result()
            film.finish()
        assert all(piece.exception() is None for piece in pieces)
        assert film.add(pixels, 6) == b""


def test_a_recording_is_what_was_shown(served: Served, name: str) -> None:
    path = f"/streams/{name}/recording"
    assert served.http.get(path).status_code == 404
    assert served.http.post(path).json()["running"]
    assert served.http.post(path).status_code == 409
    assert served.http.get(path).status_code == 409
    eventually(lambda: served.state(name)["recording"]["seconds"] >= 0.75)
    ended = served.http.post(f"{path}/stop").json()
    with av.open(BytesIO(served.http.get(path).content)) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) == round(16 * ended["seconds"]) >= 12
    assert colour(frames[-1]) == "red"


def test_a_recording_stops_at_its_limit() -> None:
    with running(limits=Limits(recording_seconds=0.25)) as served:
        name = served.new()
        served.http.post(f"/streams/{name}/recording")
        eventually(lambda: not served.state(name)["recording"]["running"])
        assert served.state(name)["recording"]["seconds"] == 0.25
        assert served.state(name)["viewers"] == 0


# ---------------------------------------------------------------------- viewers


def test_two_viewers_see_the_same_frames(served: Served, name: str) -> None:
    with served.live(name) as one, served.live(name) as other:
        pictures: list[dict[int, bytes]] = [{}, {}]
        for socket in (one, other):
            socket.send(json.dumps({"type": "video", "format": "jpeg"}))
        for seen, socket in zip(pictures, (one, other), strict=True):
            while len(seen) < 8:
                if isinstance(message := socket.recv(timeout=PATIENCE), bytes):
                    seen[int.from_bytes(message[8:12], "little")] = message
        shared = pictures[0].keys() & pictures[1].keys()
        assert len(shared) >= 6
        assert all(pictures[0][tick] == pictures[1][tick] for tick in shared)


def test_a_slow_reader_loses_frames_and_stalls_nobody(served: Served, client: Client, name: str) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.sendall(f"GET /streams/{name}/frames?format=mp4&scale=16 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        fast = client.join(name)
        indices = []
        for frame in fast.frames(seconds=60):
            indices.append(frame.index)
            if len(indices) % 16 == 0 and fast.state()["stats"]["dropped"] >= 8:
                break
        assert np.all(np.diff(indices) == 1), "the fast viewer missed a frame"
        assert fast.state()["stats"]["dropped"] >= 8


def test_a_reload_finds_the_same_stream(served: Served, name: str) -> None:
    with served.live(name) as socket:
        units = [json.loads(message)["unit"] for message in _texts(socket, 8) if '"type":"unit"' in message]
    with served.live(name) as socket:
        state = json.loads(socket.recv(timeout=PATIENCE))
        assert state["type"] == "state"
        assert state["id"] == name
        assert state["unit"] >= max(units)
    eventually(lambda: served.state(name)["viewers"] == 0)


def test_control_over_the_websocket(served: Served, name: str) -> None:
    with served.live(name) as socket:
        socket.send(json.dumps({"type": "control", "id": 5, "prompt": OTHER}))
        done = _answer(socket, 5)
        assert done["type"] == "done"
        assert done["change"]["unit"] >= 1
        socket.send(json.dumps({"type": "control", "id": 6, "rewind": 100_000}))
        assert _answer(socket, 6)["type"] == "error"
        socket.send(b"\x00\xff")
        assert _answer(socket, None)["expected"] == "text"
    assert served.state(name)["prompt"] == OTHER


def test_the_end_of_a_stream_reaches_its_viewers(served: Served) -> None:
    name = served.new()
    with served.live(name) as socket:
        socket.recv(timeout=PATIENCE)
        served.http.delete(f"/streams/{name}")
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            _texts(socket, 1000)
        assert socket.close_code == 4410
    with served.live(name) as socket:
        assert json.loads(socket.recv(timeout=PATIENCE))["status"] == 404


def test_aiortc_sees_the_stream_on_this_machine_alone(served: Served, name: str) -> None:
    async def watch() -> tuple[str, list[np.ndarray]]:
        peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        tracks: asyncio.Queue[Any] = asyncio.Queue()
        peer.on("track", tracks.put_nowait)
        peer.addTransceiver("video", direction="recvonly")
        await peer.setLocalDescription(await peer.createOffer())
        offer = {"sdp": peer.localDescription.sdp, "type": "offer", "stamped": True}
        async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE) as http:
            answer = (await http.post(f"/streams/{name}/webrtc", json=offer)).json()
        await peer.setRemoteDescription(RTCSessionDescription(answer["sdp"], answer["type"]))
        async with asyncio.timeout(PATIENCE):
            track = await tracks.get()
            frames = [(await track.recv()).to_ndarray(format="rgb24") for _ in range(10)]
        await peer.close()
        return answer["sdp"], frames

    sdp, frames = asyncio.run(watch())
    assert {line.split()[4] for line in re.findall(r"(?m)^a=(candidate:.*)$", sdp)} == {"127.0.0.1"}
    assert frames[-1].shape == (128 + film.CELL, 128, 3)
    assert colour(frames[-1][:128]) == "red"
    ticks = [int(((frame[-4, 4 :: film.CELL, 0] > 127) << np.arange(film.BITS)).sum()) for frame in frames]
    assert np.all(np.diff(ticks) > 0)
    eventually(lambda: served.state(name)["viewers"] == 0)


# ---------------------------------------------------------------------- the door


def test_a_token_is_asked_for() -> None:
    with running(token="a secret") as served:
        assert served.http.get("/").status_code == 200
        assert served.http.get("/healthz").status_code == 200
        assert served.http.get("/page/app.js").status_code == 200
        for path in ("/model", "/metrics", "/streams/x", "/streams/x/frames?token=another"):
            refused = served.http.get(path)
            assert refused.status_code == 401, path
            assert "Authorization: Bearer" in refused.json()["error"]["do"]
        assert served.http.get("/model?token=a+secret").status_code == 200
        with Client(served.url, token="a secret").stream(PROMPT) as stream:
            assert next(stream.frames(n=1)).index == 0
            with pytest.raises(websockets.exceptions.InvalidStatus):
                served.live(stream.id)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://[", "file://"])
def test_other_pages_are_turned_away(served: Served, name: str, origin: str) -> None:
    refused = served.http.patch(f"/streams/{name}", json={"paused": True}, headers={"Origin": origin})
    assert refused.status_code == 403
    assert served.http.post("/streams", json={"prompt": PROMPT}, headers={"Origin": origin}).status_code == 403
    with pytest.raises(websockets.exceptions.InvalidStatus):
        served.live(name, origin=origin)
    assert not served.state(name)["paused"]


def test_our_own_page_may_come_in(served: Served, name: str) -> None:
    assert (
        served.http.patch(f"/streams/{name}", json={"paused": True}, headers={"Origin": served.url}).status_code == 200
    )
    with served.live(name, origin=served.url) as socket:
        assert json.loads(socket.recv(timeout=PATIENCE))["paused"]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "", "127.0.0.1.evil.example", "[", "127.0.0.1@evil"]
)
def test_a_name_that_is_not_ours_is_not_answered(served: Served, host: str) -> None:
    """DNS rebinding: a page elsewhere whose name leads to this machine."""
    assert served.http.get("/model", headers={"Host": host}).status_code in (400, 421)


@pytest.mark.parametrize(
    "path", ["/page/../app.py", "/page/%2e%2e/app.py", "/page//etc/passwd", "/page/..%2f..%2fcli.py"]
)
def test_no_file_but_the_pages_own(served: Served, path: str) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as raw:  # httpx would tidy the path
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert b" 404 " in answer.split(b"\r\n")[0]


def test_the_page_allows_no_script_but_its_own(served: Served) -> None:
    for path in ("/", "/docs"):
        page = served.http.get(path)
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|<style", page.text)
        assert not re.search(r"(?:src|href)=[\"'](?:https?:)?//", page.text)


# ---------------------------------------------------------------------- caps


def test_streams_are_counted() -> None:
    with running(limits=Limits(streams=2)) as served:
        first, _ = served.new(), served.new()
        refused = served.http.post("/streams", json={"prompt": PROMPT})
        assert refused.status_code == 503
        assert "at most 2 streams" in refused.json()["error"]["message"]
        assert served.http.post(f"/streams/{first}/branch").status_code == 503
        served.http.delete(f"/streams/{first}")
        served.new()


def test_a_forgotten_stream_makes_room_and_a_watched_one_does_not() -> None:
    with running(limits=Limits(streams=2, spare_seconds=0.2)) as served:
        watched, forgotten = served.new(), served.new()
        with served.live(watched) as socket:
            socket.recv(timeout=PATIENCE)
            eventually(lambda: served.http.post("/streams", json={"prompt": PROMPT}).status_code == 201)
            assert served.http.get(f"/streams/{forgotten}").status_code == 404
            assert served.http.get(f"/streams/{watched}").status_code == 200


def test_viewers_are_counted(client: Client) -> None:
    with running(limits=Limits(viewers=1)) as served:
        name = served.new()
        with served.live(name) as socket:
            socket.recv(timeout=PATIENCE)
            assert served.http.get(f"/streams/{name}/frames").status_code == 503
            with served.live(name) as other:
                assert json.loads(other.recv(timeout=PATIENCE))["status"] == 503
        eventually(lambda: served.state(name)["viewers"] == 0)


def test_an_idle_stream_is_closed() -> None:
    with running(limits=Limits(idle_seconds=0.2)) as served:
        name = served.new()
        eventually(lambda: served.http.get("/healthz").json()["streams"] == 0)
        assert served.http.get(f"/streams/{name}").status_code == 404


def test_requests_are_rationed() -> None:
    with running(limits=Limits(messages_per_second=2, creations_per_minute=6)) as served:
        name = served.new()
        answers = [served.http.patch(f"/streams/{name}", json={"paused": True}) for _ in range(16)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) >= 3
        assert int(refused[0].headers["retry-after"]) >= 1
        assert [served.http.post("/streams", json={"prompt": PROMPT}).status_code for _ in range(3)][-1] == 429


def test_a_bucket_refills() -> None:
    now = [0.0]
    bucket = Bucket(rate=2, burst=3, now=lambda: now[0])
    assert [bucket.take() for _ in range(3)] == [0, 0, 0]
    assert bucket.take() == pytest.approx(0.5)
    now[0] = 0.5
    assert bucket.take() == 0
    assert not bucket.full
    now[0] = 10
    assert bucket.full


BAD = {
    "no prompt": ({}, "body.prompt"),
    "an empty prompt": ({"prompt": "  "}, "prompt"),
    "a number": ({"prompt": 5}, "body.prompt"),
    "a misspelt field": ({"prompt": PROMPT, "sede": 1}, "body.sede"),
    "a negative seed": ({"prompt": PROMPT, "seed": -1}, "body.seed"),
    "a seed beyond a page's integers": ({"prompt": PROMPT, "seed": 2**53}, "body.seed"),
    "a seed that is none": ({"prompt": PROMPT, "seed": True}, "body.seed"),
    "a long prompt": ({"prompt": "red " * 300}, "at most 1000 characters"),
    "words that mean nothing": ({"prompt": "xyzzy"}, "knows no word"),
    "half a character": ({"prompt": "red \ud800"}, "body.prompt"),
    "NUL": ({"prompt": "red\0circle"}, "body.prompt"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_wish_is_explained(served: Served, case: str) -> None:
    body, words = BAD[case]
    answer = served.http.post("/streams", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["do"] in error["message"]
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "content", [b"{", b"", b"\xff\xfe", b"[1]", b"null", b"[" * 5000, b'{"prompt": ' + b"1" * 5000 + b"}"]
)
def test_what_is_no_json_is_refused(served: Served, content: bytes) -> None:
    answer = served.http.post("/streams", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["message"]


def test_a_large_body_is_cut_off_announced_or_not(served: Served) -> None:
    assert served.http.post("/streams", content=b" " * 40_000).status_code == 413
    assert served.http.post("/streams", content=(b" " * 1000 for _ in range(100))).status_code == 413


GIF = base64.b64decode("R0lGODlhAQABAAAAACwAAAAAAQABAAA=")
BOMB = png(np.zeros((4, 4, 3), dtype=np.uint8)).replace(b"\0\0\0\4\0\0\0\4", b"\0\0\xff\xff\0\0\xff\xff")
PICTURES = {
    "a playlist": (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", 415),
    "a script of FFmpeg's": (b"ffconcat version 1.0\nfile /etc/passwd\n", 415),
    "a GIF": (GIF, 415),
    "nothing": (b"", 415),
    "half a PNG": (png(np.zeros((64, 64, 3), dtype=np.uint8))[:60], 422),
    "a bomb": (BOMB, 422),
    "JPEG in name only": (b"\xff\xd8\xff" + b"\0" * 100, 422),
}


@pytest.mark.parametrize("case", PICTURES)
def test_what_is_no_picture_is_refused(served: Served, name: str, case: str) -> None:
    data, status = PICTURES[case]
    answer = served.http.post(f"/streams/{name}/image", content=data)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["expected"]


# ---------------------------------------------------------------------- the server itself


def test_metrics_count_what_happens(served: Served, client: Client, name: str) -> None:
    def read() -> dict[str, float]:
        families = text_string_to_metric_families(served.http.get("/metrics").text)
        return {f"{one.name}{one.labels or ''}": one.value for family in families for one in family.samples}

    before = read()["cfrt_frames_sent_total"]
    list(client.join(name).frames(n=5))
    metrics = read()
    assert metrics["cfrt_frames_sent_total"] >= before + 5
    assert metrics["cfrt_streams"] >= 1
    assert metrics["cfrt_unit_seconds{'quantile': '0.99'}"] > 0
    assert name not in served.http.get("/metrics").text


def test_the_api_documents_itself(served: Served) -> None:
    api = served.http.get("/openapi.json").json()
    for path in ("/streams", "/streams/{name}", "/streams/{name}/frames", "/streams/{name}/image", "/metrics"):
        for operation in api["paths"][path].values():
            assert operation["description"]
    assert {"prompt", "blend_units", "recache", "paused", "seed", "rewind"} <= set(
        api["components"]["schemas"]["Control"]["properties"]
    )


def test_a_failure_of_our_own_shows_no_traceback(served: Served, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("a secret path")

    monkeypatch.setattr("cfrt.serve.session.Session.state", broken)
    answer = served.http.get(f"/streams/{name}")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "the server's log" in answer.json()["error"]["do"]


def test_a_stream_that_fails_says_so(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise EngineError("the device is gone; plug it in")

    monkeypatch.setattr("cfrt.serve.session.Shot", broken)
    name = served.new()
    eventually(lambda: served.state(name)["error"] == "the device is gone; plug it in")
    with served.live(name) as socket:
        assert json.loads(socket.recv(timeout=PATIENCE))["error"] == "the device is gone; plug it in"
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            socket.recv(timeout=PATIENCE)
    refused = served.http.patch(f"/streams/{name}", json={"paused": True})
    assert refused.status_code == 410
    assert "the device is gone" in refused.json()["error"]["got"]


def test_the_command_serves_and_ends() -> None:
    with process() as (url, server):
        client = Client(url)
        with closing(client.stream(PROMPT).frames()) as frames:
            next(frames)
            server.send_signal(signal.SIGINT)
            assert server.wait(20) in (0, 130)
    with pytest.raises(ServerError, match="start it with: cfrt serve"):
        client.model()


def test_an_open_server_has_a_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from cfrt.cli import main

    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: [one.close() for one in sockets])
    assert main(["serve", "--host", "0.0.0.0", "--port", "0"]) == 0
    assert re.fullmatch(r"cfrt serve: http://localhost:\d+/#token=[\w-]{20,}\n", capsys.readouterr().out)
    assert main(["serve", "--port", "0"]) == 0
    assert re.fullmatch(r"cfrt serve: http://127\.0\.0\.1:\d+/\n", capsys.readouterr().out)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from cfrt.cli import main

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 1
    assert "pip install 'cfrt[serve]'" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    from cfrt.cli import main

    assert main(["serve", "--port", str(served.port)]) == 1
    assert f"cannot listen at 127.0.0.1:{served.port}" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--port", "70000"], ["--streams", "0"], ["--idle", "0"], ["--token", "\n"]])
def test_a_bad_option_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from cfrt.cli import main

    assert main(["serve", *arguments]) == 1
    assert arguments[0].lstrip("-") in capsys.readouterr().err


def test_the_docs_say_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python tools/serving.py` would change nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tables = importlib.import_module("serving")
    kept = json.loads(tables.KEPT.read_text(encoding="utf-8"))
    assert tables.section(kept) in tables.PAGE.read_text(encoding="utf-8")
    assert max(row["overhead_p50_ms"] for rows in kept["viewers"].values() for row in rows) < 3


def _texts(socket: Any, count: int) -> list[str]:
    return [message for _ in range(count) if isinstance(message := socket.recv(timeout=PATIENCE), str)]


def _answer(socket: Any, number: int | None) -> dict[str, Any]:
    """The answer to the message of that number, whatever comes before it."""
    while True:
        message = socket.recv(timeout=PATIENCE)
        if (
            isinstance(message, str)
            and (told := json.loads(message))["type"] in ("done", "error")
            and told["id"] == number
        ):
            return told
