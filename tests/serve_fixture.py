"""A server of `cfrt serve` in a thread of the test process, on a free port of this machine."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
import websockets.sync.client as ws

from cfrt.serve.app import create_app, listen, settings
from cfrt.serve.limits import Limits
from cfrt.serve.making import streams

PROMPT = "a large red circle moving left"
OTHER = "a large blue square moving up"
HOSTS = frozenset({"127.0.0.1", "localhost"})
GENEROUS = Limits(streams=64, creations_per_minute=6000, messages_per_second=1000)
PATIENCE = 60
"""Seconds that tests wait for what takes none on an idle machine."""


class Served:
    """Where it is, and short ways to ask it."""

    def __init__(self, port: int, token: str | None) -> None:
        self.port, self.token, self.url = port, token, f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def new(self, prompt: str = PROMPT, **fields: Any) -> str:
        answer = self.http.post("/streams", json={"prompt": prompt, **fields})
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    def state(self, name: str) -> dict[str, Any]:
        return self.http.get(f"/streams/{name}").json()

    def patch(self, name: str, **wish: Any) -> dict[str, Any]:
        answer = self.http.patch(f"/streams/{name}", json=wish)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def live(self, name: str, **options: Any) -> ws.ClientConnection:
        return ws.connect(f"ws://127.0.0.1:{self.port}/streams/{name}/live", **options)


@contextmanager
def running(*, token: str | None = None, **options: Any) -> Iterator[Served]:
    make, card = streams(threads=1)
    app = create_app(make, card, token=token, hosts=HOSTS, addresses=["127.0.0.1"], **options)
    config = settings(app, "127.0.0.1", 0)
    socket = listen("127.0.0.1", 0)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    served = Served(socket.getsockname()[1], token)
    try:
        yield served
    finally:
        served.http.close()
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def tool(*names: str) -> str:
    """A program of the system's; the test is skipped where there is none, and fails in CI."""
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no {names[0]}; apt-get install {names[0]}")
    return found


@contextmanager
def process(*options: str, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`cfrt serve` as a process of its own, and its address."""
    command = [sys.executable, "-m", "cfrt", "serve", "--port", str(port), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().split()[-1], server
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=PATIENCE)


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


def texts(socket: Any, count: int) -> list[str]:
    return [message for _ in range(count) if isinstance(message := socket.recv(timeout=PATIENCE), str)]


def answer_to(socket: Any, number: int | None) -> dict[str, Any]:
    """The answer to the message of that number, whatever comes before it."""
    while True:
        message = socket.recv(timeout=PATIENCE)
        if (
            isinstance(message, str)
            and (told := json.loads(message))["type"] in ("done", "error")
            and told["id"] == number
        ):
            return told
