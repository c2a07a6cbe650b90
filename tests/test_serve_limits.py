"""What one server gives away at most, and how it refuses what it cannot read."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from serve_fixture import PATIENCE, PROMPT, Served, eventually, running

from cfrt.picture import png
from cfrt.serve.client import Client
from cfrt.serve.limits import Bucket, Limits

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore::cfrt.text.PromptWarning")]

ROOT = Path(__file__).parents[1]


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
    assert all(error[part] for part in ("expected", "got", "do"))
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
