"""Two replicas on one machine: a room stays with one of them, rooms spread, and each serves what one server serves."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from socket import socket
from typing import Any

import httpx
import pytest
from serve_fixture import OTHER, PATIENCE, PROMPT
from websockets.sync.client import connect

from cfrt.serve.client import Client

pytestmark = [pytest.mark.cpu, pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own


@pytest.fixture(scope="module")
def url(monkeypatch_module: pytest.MonkeyPatch) -> Iterator[str]:
    import ray
    from ray import serve

    from cfrt.serve.ray import HEADER, deployment

    monkeypatch_module.setenv(HEADER, "cookie")
    monkeypatch_module.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch_module.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")  # a busy machine is slow to start Python
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=4, _node_ip_address="127.0.0.1", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(deployment(replicas=2, cpus=0.5, addresses=["127.0.0.1"], threads=1))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def visitor(url: str, room: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Cookie": f"room={room}"}, timeout=PATIENCE)


def test_a_room_stays_with_its_replica(url: str) -> None:
    """Every request of a room finds its stream; from other rooms, some do not: they are with the other replica."""
    with visitor(url, "one") as one:
        name = one.post("/streams", json={"prompt": PROMPT}).json()["id"]
        assert {one.get(f"/streams/{name}").status_code for _ in range(20)} == {200}
        assert one.patch(f"/streams/{name}", json={"prompt": OTHER}).json()["prompt"] in (PROMPT, OTHER)
        address = url.replace("http", "ws")
        with connect(f"{address}/streams/{name}/live", additional_headers={"Cookie": "room=one"}) as live:
            assert json.loads(live.recv(timeout=PATIENCE))["id"] == name

    def elsewhere(room: int) -> int:
        with visitor(url, f"room{room}") as other:
            return other.get(f"/streams/{name}").status_code

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(elsewhere, range(24))) == {200, 404}


def test_the_client_watches_in_a_room(url: str) -> None:
    with Client(url, room="two").stream(PROMPT) as stream:
        frames = list(stream.frames(n=8))
    assert [frame.index for frame in frames] == list(range(8))


def test_a_visitor_is_given_a_room_and_a_link_leads_to_it(url: str) -> None:
    with httpx.Client(base_url=url, timeout=PATIENCE) as visitor:
        given = visitor.get("/", follow_redirects=True)
        room = given.url.params["room"]
        assert visitor.cookies["room"] == room
        assert "<title>cfrt live</title>" in given.text
        assert visitor.get("/").headers["location"] == f"/?room={room}"
        invited = httpx.get(given.url)
        assert invited.cookies["room"] == room
        refused: Any = httpx.get(f"{url}/?room=a;b%0d%0a", follow_redirects=False)
        assert refused.status_code == 307
        assert "a;b" not in refused.headers["location"]


def test_the_command_line_of_ray_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    from cfrt.serve.ray import HEADER, app

    monkeypatch.delenv(HEADER, raising=False)
    with pytest.raises(ValueError, match=f"expected {HEADER}=cookie"):
        app({"replicas": "2"})
    monkeypatch.setenv(HEADER, "cookie")
    assert isinstance(app({"replicas": "2", "gpus": "1", "model": "tiny", "engine": "native"}), serve.Application)
