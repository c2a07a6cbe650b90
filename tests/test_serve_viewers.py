"""Viewers of every kind: what reaches them, and that they never wait for each other."""

import asyncio
import json
import re
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
import websockets.exceptions
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from serve_fixture import OTHER, PATIENCE, Served, answer_to, colour, eventually, running, texts, tool

from cfrt.serve import film, formats
from cfrt.serve.client import Client
from cfrt.serve.limits import Limits

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore::cfrt.text.PromptWarning")]

ROOT = Path(__file__).parents[1]


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
        units = [json.loads(message)["unit"] for message in texts(socket, 8) if '"type":"unit"' in message]
    with served.live(name) as socket:
        state = json.loads(socket.recv(timeout=PATIENCE))
        assert state["type"] == "state"
        assert state["id"] == name
        assert state["unit"] >= max(units)
    eventually(lambda: served.state(name)["viewers"] == 0)


def test_control_over_the_websocket(served: Served, name: str) -> None:
    with served.live(name) as socket:
        socket.send(json.dumps({"type": "control", "id": 5, "prompt": OTHER}))
        done = answer_to(socket, 5)
        assert done["type"] == "done"
        assert done["change"]["unit"] >= 1
        socket.send(json.dumps({"type": "control", "id": 6, "rewind": 100_000}))
        assert answer_to(socket, 6)["type"] == "error"
        socket.send(b"\x00\xff")
        assert answer_to(socket, None)["expected"] == "text"
    assert served.state(name)["prompt"] == OTHER


def test_the_end_of_a_stream_reaches_its_viewers(served: Served) -> None:
    name = served.new()
    with served.live(name) as socket:
        socket.recv(timeout=PATIENCE)
        served.http.delete(f"/streams/{name}")
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            texts(socket, 1000)
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
