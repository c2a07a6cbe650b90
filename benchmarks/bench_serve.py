"""What serving costs beside making the video: the server's own time per frame, viewers that one core carries at 16 fps,
and what a person in a browser waits for: the first frame, and the first frame after a new prompt.

    python -m benchmarks.bench_serve --json benchmarks/results/serve.json              # four minutes
    python -m benchmarks.bench_serve --json benchmarks/results/serve.json --only browser

The server is a process of its own; its processor time is the kernel's account of it (user and system, all threads). Its
viewers are another process. The browser is the system's Chromium without a screen, on the same machine as everything
else, drawing in software: on a machine with a display it waits less.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from cfrt.config import PRESETS
from cfrt.serve.client import Client

from .machine import header

PROMPTS = ("a large red circle moving left", "a small blue square moving up")
VIEWERS = {"websocket": (1, 32), "mjpeg": (1, 32), "mp4": (1, 8), "webrtc": (1, 32)}
SECONDS = 12.0
CHANGES, OPENINGS = 20, 8
OVERHEAD_LIMIT_MS = 3.0
TICKS = os.sysconf("SC_CLK_TCK")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
FLAGS += ("--disable-background-networking", "--disable-component-update")


@contextmanager
def served() -> Iterator[tuple[Client, int]]:
    """A server of its own process, its client and its process number."""
    command = [sys.executable, "-m", "cfrt", "serve", "--port", "0", "--viewers", "64", "--streams", "16"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        try:
            yield Client(server.stdout.readline().split()[-1]), server.pid
        finally:
            server.send_signal(signal.SIGINT)


def processor_time(pid: int) -> float:
    """Seconds that a process has had of any core."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


# ---------------------------------------------------------------------- viewers


def load(kind: str, viewers: int, scale: int) -> dict[str, float]:
    """One stream and its viewers for some seconds: what the server's process took, and whether every frame arrived.

    The server's own time per frame is counted while the viewers arrive and, from a restart of the stream on, while they
    watch."""
    with served() as (client, pid):
        stream = client.stream(PROMPTS[0])
        address = client.url.removeprefix("http://")
        command = [sys.executable, "-m", "benchmarks.bench_serve", "--watch", kind, address, stream.id]
        command += [str(viewers), str(SECONDS), str(scale)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as crowd:
            assert crowd.stdin is not None
            assert crowd.stdout is not None
            crowd.stdout.readline()  # they have all come
            arrival = stream.state()["stats"]["overhead"]
            stream.restart()
            time.sleep(0.5)
            print("go", file=crowd.stdin, flush=True)
            before, began = processor_time(pid), time.perf_counter()
            frames = json.loads(crowd.stdout.readline())
            used, wall = processor_time(pid) - before, time.perf_counter() - began
        stats = stream.state()["stats"]
    return {
        "viewers": viewers,
        "cores": used / wall,
        "least frames per second": min(frames) / wall,
        "dropped": stats["dropped"],
        "overhead_p50_ms": stats["overhead"]["p50"],
        "overhead_p99_ms": stats["overhead"]["p99"],
        "arrival_p99_ms": arrival["p99"],
    }


async def watch(kind: str, address: str, name: str, viewers: int, seconds: float, scale: int) -> None:
    """The viewers' process."""
    counts, come = [0] * viewers, asyncio.Barrier(viewers + 1)
    one = {"websocket": watch_socket, "webrtc": watch_webrtc}.get(kind, watch_http)
    tasks = [asyncio.create_task(one(kind, address, name, i, counts, come, scale)) for i in range(viewers)]
    await come.wait()
    print("come", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    start = counts.copy()
    await asyncio.sleep(seconds)
    print(json.dumps([now - then for now, then in zip(counts, start, strict=True)]), flush=True)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def watch_socket(
    _: str, address: str, name: str, i: int, counts: list[int], come: asyncio.Barrier, scale: int
) -> None:
    from websockets.asyncio.client import connect

    async with connect(f"ws://{address}/streams/{name}/live") as socket:
        await socket.send(json.dumps({"type": "video", "format": "jpeg"}))
        await come.wait()
        async for message in socket:
            counts[i] += isinstance(message, bytes)


async def watch_http(
    kind: str, address: str, name: str, i: int, counts: list[int], come: asyncio.Barrier, scale: int
) -> None:
    """Counts JPEGs by their boundary and frames of mp4 by their fragment."""
    host, port = address.rstrip("/").split(":")
    mark = b"--cfrt-frame" if kind == "mjpeg" else b"moof"
    reader, writer = await asyncio.open_connection(host, int(port))
    query = f"format={kind}" + (f"&scale={scale}" if kind == "mp4" else "")
    writer.write(f"GET /streams/{name}/frames?{query} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    await come.wait()
    while data := await reader.read(1 << 16):
        counts[i] += data.count(mark)


async def watch_webrtc(
    _: str, address: str, name: str, i: int, counts: list[int], come: asyncio.Barrier, scale: int
) -> None:
    from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription

    peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    tracks: asyncio.Queue[Any] = asyncio.Queue()
    peer.on("track", tracks.put_nowait)
    peer.addTransceiver("video", direction="recvonly")
    await peer.setLocalDescription(await peer.createOffer())
    offer = {"sdp": peer.localDescription.sdp, "type": "offer"}
    client = Client(f"http://{address}")
    answer = await asyncio.to_thread(client.call, "POST", f"/streams/{name}/webrtc", offer)
    await peer.setRemoteDescription(RTCSessionDescription(answer["sdp"], answer["type"]))
    track = await tracks.get()
    await track.recv()
    await come.wait()
    while True:
        await track.recv()
        counts[i] += 1


def viewers_per_core(rows: list[dict[str, float]]) -> float:
    """From the first to the last row: what each further viewer takes of a core."""
    first, last = rows[0], rows[-1]
    return (last["viewers"] - first["viewers"]) / (last["cores"] - first["cores"])


# ---------------------------------------------------------------------- in the browser


def in_browser(way: str) -> dict[str, Any]:
    """Times in milliseconds that the page measures by itself."""
    from playwright.sync_api import sync_playwright

    with served() as (client, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        script = "" if way == "WebRTC" else "delete window.RTCPeerConnection"
        opened = [_open(browser, client.url, script) for _ in range(OPENINGS)]
        context = browser.new_context()
        context.add_init_script(script)
        page = context.new_page()
        page.goto(client.url)
        page.wait_for_selector(f"#link:has-text('{way}')")
        changes = [_change(page, PROMPTS[i % 2]) for i in range(1, CHANGES + 1)]
        browser.close()
    return {
        "from request to first frame": _spread([first for first, _ in opened]),
        "from opening the page to first frame": _spread([whole for _, whole in opened]),
        "from prompt to pixel": _spread(changes),
    }


def chromium() -> str:
    """The system's."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        raise SystemExit("expected Chromium on this machine, got none; apt-get install chromium")
    return found


def _open(browser: Any, url: str, script: str) -> tuple[float, float]:
    """A first visit: since the page asked for a stream, and since it began to load."""
    context = browser.new_context()
    context.add_init_script(script)
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("canvas.picture[data-unit]")
    whole = page.evaluate("performance.now()")
    page.wait_for_selector("#t-first:has-text('ms')")
    first = _number(page.inner_text("#t-first"))
    context.close()
    return first, whole


def _change(page: Any, prompt: str) -> float:
    """A new prompt, at no particular time within a unit."""
    page.wait_for_timeout(random.uniform(600, 850))
    before = int(page.get_attribute("#t-change", "data-count") or 0)
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    page.wait_for_selector(f"#t-change[data-count='{before + 1}']")
    return float(page.get_attribute("#t-change", "data-ms"))


def _number(text: str) -> float:
    return float(text.removesuffix("ms"))


def _spread(values: list[float]) -> dict[str, float]:
    values = sorted(values)
    return {"p50": median(values), "p95": values[round(0.95 * (len(values) - 1))], "count": len(values)}


# ---------------------------------------------------------------------- the sheet


def measure(only: str | None) -> dict[str, Any]:
    what = {"model": "tiny", "steps": len(PRESETS["tiny"].unit_steps(1)), "engine": "native", "precision": "auto"}
    sheet: dict[str, Any] = {**header(), **what, "fps": 16}
    if only != "browser":
        sheet["load before viewers"], sheet["niceness"] = os.getloadavg()[0], os.nice(0)
        sheet["viewers"] = {kind: [load(kind, count, 1) for count in counts] for kind, counts in VIEWERS.items()}
        sheet["viewers per core"] = {kind: viewers_per_core(rows) for kind, rows in sheet["viewers"].items()}
    if only != "viewers":
        sheet["load before browser"] = os.getloadavg()[0]
        sheet["browser"] = {way: in_browser(way) for way in ("WebRTC", "WebSocket")}
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to keep the measurements")
    parser.add_argument("--only", choices=("viewers", "browser"), help="this part; --json keeps the other as it is")
    parser.add_argument("--watch", nargs=6, metavar="X", help=argparse.SUPPRESS)  # the viewers' process
    options = parser.parse_args()
    if options.watch:
        kind, address, name, viewers, seconds, scale = options.watch
        return asyncio.run(watch(kind, address, name, int(viewers), float(seconds), int(scale)))
    sheet = measure(options.only)
    if options.only and options.json and options.json.exists():
        sheet = json.loads(options.json.read_text(encoding="utf-8")) | sheet
    text = json.dumps(sheet, indent=2) + "\n"
    print(text)
    if options.json:
        options.json.write_text(text, encoding="utf-8")
    worst = max(row["overhead_p99_ms"] for rows in sheet["viewers"].values() for row in rows)
    if worst > OVERHEAD_LIMIT_MS:
        raise SystemExit(f"expected the server to add at most {OVERHEAD_LIMIT_MS} ms (p99), got {worst:.2f} ms")
    return None


if __name__ == "__main__":
    main()
