"""Whatever is sent to the server: an answer with words, never a failure of its own, and it lives on."""

import json
import re
import string
from collections.abc import Iterator
from socket import create_connection
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from serve_fixture import PATIENCE, PROMPT, Served, running

from cfrt.serve.limits import Limits
from cfrt.serve.messages import Control

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore::cfrt.text.PromptWarning")]

ENDLESS = Limits(streams=3, viewers=4, creations_per_minute=1e6, messages_per_second=1e6)
QUICK = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])

ATTACKS = [
    "'; DROP TABLE streams; --",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{7*7}} ${7*7} #{7*7} %{7*7}",
    "../../../../etc/passwd",
    "..\\..\\windows\\win.ini",
    "file:///etc/passwd",
    "http://169.254.169.254/latest/meta-data/",
    "$(touch /tmp/owned)",
    "`id`",
    "; cat /etc/passwd |",
    "%00%0a%0d",
    "\r\nSet-Cookie: a=b",
    "%s%s%s%n%x",
    "\u202ered\u202c circle",
    "red \U0001f534 \u0301\u0301\u0301",
    "A" * 1000,
    "𝓻𝓮𝓭 circle",
    "-1",
    "NaN",
    "1e309",
    "__proto__",
]

CONTROL = {"prompt": PROMPT, "blend_units": 1, "recache": True, "paused": False, "seed": 1, "rewind": 1, "step": 1}
CONTROL |= {"restart": True}

HEADERS = ("Host", "Origin", "Authorization", "Cookie", "Content-Type", "Content-Length", "Upgrade", "X-Forwarded-For")

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40) | st.sampled_from(ATTACKS)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
FIELDS = [*Control.model_fields, "type", "id", "format", "sdp", "stamped", "__class__"]
WISHES = st.dictionaries(
    st.sampled_from(FIELDS), JSON | st.sampled_from(["control", "video", "jpeg", PROMPT, 1]), max_size=5
)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with running(limits=ENDLESS) as server:
        yield server


@pytest.fixture(scope="module")
def name(served: Served) -> str:
    return served.new()


def check(answer: Any) -> None:
    """Done, or refused with words."""
    assert answer.status_code < 500 or answer.status_code == 503, answer.text
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "expected", "got", "do"}
        assert all(answer.json()["error"].values())
        assert "Traceback" not in answer.text


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


@QUICK
@given(wish=WISHES)
def test_patch(served: Served, name: str, wish: Any) -> None:
    check(served.http.patch(f"/streams/{name}", content=encoded(wish), headers={"Content-Type": "application/json"}))


@QUICK
@given(
    method=st.sampled_from(["POST", "PATCH"]),
    path=st.sampled_from(["", "/recording", "/webrtc", "/branch", "/image"]),
    body=JSON,
)
@example(method="POST", path="", body="")
def test_any_json_anywhere(served: Served, name: str, method: str, path: str, body: Any) -> None:
    where = "/streams" if method == "POST" and not path else f"/streams/{name}{path}"
    answer = served.http.request(method, where, content=encoded(body), headers={"Content-Type": "application/json"})
    check(answer)
    if answer.status_code == 201 and "id" in answer.json():
        served.http.delete(f"/streams/{answer.json()['id']}")


@QUICK
@given(data=st.binary(max_size=200), kind=st.sampled_from(["application/json", "text/plain", "image/png", ""]))
def test_any_bytes(served: Served, name: str, data: bytes, kind: str) -> None:
    for path in (f"/streams/{name}", f"/streams/{name}/image", f"/streams/{name}/webrtc"):
        method = "PATCH" if path.endswith(name) else "POST"
        answer = served.http.request(method, path, content=data, headers={"Content-Type": kind} if kind else {})
        check(answer)


@QUICK
@given(text=st.sampled_from(ATTACKS) | st.text(string.printable, min_size=1, max_size=30))
def test_any_name_and_query(served: Served, name: str, text: str) -> None:
    check(served.http.get(f"/streams/{quote(text, safe='')}x", params={"token": text}))
    check(served.http.get(f"/streams/{name}/frames", params={"format": text, "scale": text}))


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_as_a_prompt_is_text(served: Served, name: str, attack: str) -> None:
    """Words in it may be known to the model; what comes back is the text itself, as JSON. Not as the state's "prompt":
    the fifth change before the same unit waits for a later one."""
    text = f"red {attack}"[:1000]
    answer = served.http.patch(f"/streams/{name}", json={"prompt": text})
    check(answer)
    if answer.status_code == 200:
        state = answer.json()
        assert {"unit": state["change"]["unit"], "prompt": text} in state["timeline"]
        assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_in_every_field(served: Served, name: str, attack: str) -> None:
    """One field at a time, the others as they should be."""
    bodies = {
        f"/streams/{name}": ("PATCH", CONTROL),
        "/streams": ("POST", {"prompt": PROMPT, "seed": 1, "paused": True}),
        f"/streams/{name}/webrtc": ("POST", {"sdp": "v=0", "type": "offer", "stamped": True}),
    }
    for path, (method, fields) in bodies.items():
        for field in fields:
            answer = served.http.request(method, path, json=fields | {field: attack})
            check(answer)
            if answer.status_code == 201:
                served.http.delete(f"/streams/{answer.json()['id']}")
    for part in ("image", "recording", "recording/stop", "branch"):
        check(served.http.post(f"/streams/{quote(attack, safe='')}/{part}", content=attack.encode()))


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_in_every_header(served: Served, name: str, attack: str) -> None:
    """Line ends are put in as they are: a second header, or an end of the first, is not ours to read."""
    for header in HEADERS:
        head = {"Host": "127.0.0.1", "Connection": "close", header: attack}
        lines = "".join(f"{key}: {value}\r\n" for key, value in head.items())
        with create_connection(("127.0.0.1", served.port), timeout=PATIENCE) as raw:
            raw.sendall(f"GET /streams/{name} HTTP/1.1\r\n{lines}\r\n".encode())
            status = raw.makefile("rb").readline()
        assert re.match(rb"HTTP/1.1 (200|4\d\d) ", status), (header, status)
    assert served.http.get("/healthz").json()["status"] == "ok"


@settings(QUICK, max_examples=8)
@given(
    messages=st.lists(
        WISHES.map(encoded) | JSON.map(encoded) | st.text(max_size=60).map(str.encode), min_size=8, max_size=8
    )
)
def test_the_websocket(served: Served, name: str, messages: list[bytes]) -> None:
    """Every message has its answer, in turn, and the connection lives on."""
    with served.live(name) as socket:
        for message in messages:
            socket.send(message.decode(), text=True)
            assert answer(socket)["type"] in ("done", "error")
        socket.send(json.dumps({"type": "control", "id": 77, "prompt": PROMPT}))
        assert answer(socket)["id"] == 77
    assert served.http.get("/healthz").json()["status"] == "ok"


def answer(socket: Any) -> dict[str, Any]:
    while True:
        message = socket.recv(timeout=PATIENCE)
        if isinstance(message, str) and (told := json.loads(message))["type"] in ("done", "error"):
            return told
