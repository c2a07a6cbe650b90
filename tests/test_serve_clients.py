"""Clients that nobody here wrote: the commands of docs/serve.md as they stand there, ffplay, and aiortc as its own
example of a receiver uses it."""

import asyncio
import os
import re
import subprocess
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
from aiortc import RTCPeerConnection, RTCSessionDescription
from aiortc.contrib.media import MediaRecorder
from serve_fixture import PATIENCE, Served, colour, eventually, tool

from cfrt.picture import png

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

PAGE = Path(__file__).parents[1] / "docs" / "serve.md"
SILENT = {"SDL_VIDEODRIVER": "dummy", "SDL_RENDER_DRIVER": "software", "SDL_AUDIODRIVER": "dummy"}


def commands() -> str:
    """The page's example for a shell, but for ffplay, which would play for ever."""
    (block,) = [block for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S) if block.startswith("URL=")]
    return "\n".join(line for line in block.splitlines() if not line.startswith("ffplay"))


def test_the_commands_of_the_page(served: Served, tmp_path: Path) -> None:
    """curl and ffmpeg."""
    for program in ("curl", "ffmpeg", "bash"):
        tool(program)
    (tmp_path / "picture.png").write_bytes(png(np.full((64, 64, 3), 90, dtype=np.uint8)))
    script = commands().replace("URL=http://127.0.0.1:8000", f"URL={served.url}") + "\necho; echo $ID"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    *answers, name = done.stdout.replace("}{", "}\n{").split("\n")[:-1]
    assert '"error":{' not in done.stdout, done.stdout
    assert sum('"timeline"' in answer for answer in answers) == 4, answers  # two changes, a picture, a branch
    with av.open(tmp_path / "circle.mp4") as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) >= 60
    assert colour(frames[-1]) == "red"
    assert (tmp_path / "frames.mjpeg").read_bytes().count(b"--cfrt-frame") >= 40
    assert served.http.get(f"/streams/{name}").status_code == 404


def test_ffplay(served: Served, name: str) -> None:
    """It plays until it is told to stop."""
    command = [tool("ffplay"), "-v", "info", f"{served.url}/streams/{name}/frames"]
    with subprocess.Popen(command, env=os.environ | SILENT, stderr=subprocess.PIPE, text=True) as player:
        try:
            eventually(lambda: served.state(name)["stats"]["frames"] >= 48)
            assert player.poll() is None
            assert served.state(name)["viewers"] == 1
        finally:
            player.terminate()
            _, said = player.communicate(timeout=PATIENCE)
    assert "Video: h264" in said, said
    assert not re.search(r"(?i)error|invalid|corrupt", said), said


def test_a_receiver_of_aiortcs_own(served: Served, name: str, tmp_path: Path) -> None:
    """As its example videostream-cli receives: a recorder behind a connection with default settings."""

    async def receive(path: Path) -> None:
        peer, recorder = RTCPeerConnection(), MediaRecorder(str(path))
        peer.on("track", recorder.addTrack)
        peer.addTransceiver("video", direction="recvonly")
        await peer.setLocalDescription(await peer.createOffer())
        offer = {"sdp": peer.localDescription.sdp, "type": peer.localDescription.type}
        async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE) as http:
            answer = (await http.post(f"/streams/{name}/webrtc", json=offer)).json()
        await peer.setRemoteDescription(RTCSessionDescription(**{key: answer[key] for key in ("sdp", "type")}))
        await recorder.start()
        await asyncio.sleep(3)
        await recorder.stop()
        await peer.close()

    asyncio.run(receive(tmp_path / "received.mp4"))
    with av.open(tmp_path / "received.mp4") as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) >= 20
    assert frames[-1].shape == (128, 128, 3)
    assert colour(frames[-1]) == "red"
