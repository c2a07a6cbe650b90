"""A server of `cfrt serve` in a thread of the test process, on a free port of this machine."""

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
import websockets.sync.client as ws

from cfrt.serve.app import create_app, listen, settings
from cfrt.serve.making import streams

PROMPT = "a large red circle moving left"
OTHER = "a large blue square moving up"
HOSTS = frozenset({"127.0.0.1", "localhost"})
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
    socket = listen(config)
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
def process(port: int = 0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`cfrt serve` as a process of its own, and its address."""
    command = [sys.executable, "-m", "cfrt", "serve", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().split()[-1], server
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=PATIENCE)
