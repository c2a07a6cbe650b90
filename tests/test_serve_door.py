"""Who may come in: tokens, origins, names of the server, paths."""

import json
import re
import socket
from pathlib import Path

import pytest
import websockets.exceptions
from serve_fixture import PATIENCE, PROMPT, Served, running

from cfrt.serve.client import Client

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore::cfrt.text.PromptWarning")]

ROOT = Path(__file__).parents[1]


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
