"""The server itself: its command, its documents, its metrics, its own failures."""

import importlib
import json
import re
import signal
import sys
from contextlib import closing
from pathlib import Path

import pytest
import websockets.exceptions
from prometheus_client.parser import text_string_to_metric_families
from serve_fixture import PATIENCE, PROMPT, Served, eventually, process

from cfrt.errors import EngineError
from cfrt.serve.client import Client, ServerError

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore::cfrt.text.PromptWarning")]

ROOT = Path(__file__).parents[1]


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
    assert answer.headers["connection"] == "close"


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
    assert f"expected to listen at 127.0.0.1:{served.port}, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--port", "99999"],
        ["--streams", "0"],
        ["--viewers", "-1"],
        ["--threads", "0"],
        ["--idle", "0"],
        ["--token", "\n"],
        ["--forget", "--state", "somewhere"],
    ],
)
def test_a_bad_option_is_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from cfrt.cli import main

    assert main(["serve", *arguments]) == 2
    assert re.fullmatch(rf"cfrt: error: expected .*{arguments[0]}.*, got .+[;:,(] .+\n", capsys.readouterr().err)


def test_the_docs_say_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python tools/serving.py` would change nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tables = importlib.import_module("serving")
    kept = json.loads(tables.KEPT.read_text(encoding="utf-8"))
    assert tables.section(kept) in tables.PAGE.read_text(encoding="utf-8")
    assert max(row["overhead_p50_ms"] for rows in kept["viewers"].values() for row in rows) < 3
