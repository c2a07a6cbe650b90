"""The door of the server: which host it is called by, from which page, with which token, and how much may come in.

Plain ASGI, before any route: what it turns away never reaches FastAPI. A browser sends a visitor's requests from any
page that the visitor has open; the checks of host and origin are what keeps those pages out of a server on loopback.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from ipaddress import ip_address
from secrets import compare_digest
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fastapi.responses import JSONResponse

from .limits import Limits
from .refusal import Refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/", "/healthz", "/docs", "/openapi.json", "/favicon.ico"})
"""Paths that need no token: nothing of anybody's stream is behind them. The page's own files are open too."""

CLOSED_POLICY = 1008
"""WebSocket's code for a visitor who may not come in (RFC 6455, 7.4.1)."""

HEADERS = {
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' blob: data:",
            "media-src 'self' blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """Wraps an ASGI application."""

    def __init__(self, app: App, *, limits: Limits, token: str | None, hosts: frozenset[str] | None) -> None:
        """hosts: names that the server may be called by; None for any, when it is open to a network."""
        self._app, self._limits, self._token, self._hosts = app, limits, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope, headers)
            body = await self._body(scope, headers, receive)
        except Refusal as refusal:
            return await _turn_away(refusal, scope, receive, send)
        await self._app(scope, body, _with_headers(send))

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            names = " or ".join(sorted(self._hosts))
            raise Refusal(421, expected=f"a request for {names}", got=host, do="use that name, or start with --host")
        origin = headers.get("origin")
        reads = scope["type"] == "http" and scope["method"] in ("GET", "HEAD", "OPTIONS")
        if origin is not None and not reads and _place(origin) != host.lower():
            raise Refusal(
                403, expected=f"a request from this server's own page ({host})", got=origin, do="open that page"
            )
        path = scope["path"]
        if self._token is None or path in OPEN or path.startswith("/page/"):
            return
        if not compare_digest(_shown(scope, headers).encode(), self._token.encode()):
            do = "send the header 'Authorization: Bearer TOKEN' or ?token=TOKEN; the server printed it when it started"
            raise Refusal(401, expected="this server's token", got="another or none", do=do)

    async def _body(self, scope: Scope, headers: dict[str, str], receive: Receive) -> Receive:
        """A `receive` that gives the whole body at once. Refusal when it is larger than it may be, announced or not."""
        if scope["type"] != "http" or not {"content-length", "transfer-encoding"} & headers.keys():
            return receive
        most = self._limits.image_bytes if scope["path"].endswith("/image") else self._limits.message_bytes
        announced = headers.get("content-length", "0")
        if not announced.isdigit() or int(announced[:20]) > most:
            raise _too_large(most, f"{announced} bytes")
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > most:
                raise _too_large(most, "more")
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> MutableMapping[str, Any]:
            return pending.pop() if pending else await receive()

        return replayed


def _too_large(most: int, got: str) -> Refusal:
    return Refusal(413, expected=f"a body of at most {most} bytes", got=got, do="send less")


def _shown(scope: Scope, headers: dict[str, str]) -> str:
    """The token that came along. In the address for those who cannot set headers: players, <img>, WebSocket."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]


def _name(host: str) -> str:
    """The host of a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _place(origin: str) -> str:
    """host:port of an Origin header; "null" and nonsense are no place."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def loopback(host: str) -> bool:
    """Is this an address that only this machine can reach?"""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _with_headers(send: Send) -> Send:
    extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return sending


def answer(refusal: Refusal) -> JSONResponse:
    """A refusal as HTTP's answer."""
    headers = {}
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    if refusal.status == 500:
        headers["connection"] = "close"  # as uvicorn will after a failure, and a next request would get no answer
    if refusal.wait:
        headers["retry-after"] = str(int(refusal.wait) + 1)
    return JSONResponse(refusal.body(), status_code=refusal.status, headers=headers)


async def _turn_away(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": CLOSED_POLICY, "reason": str(refusal)[:100]})
    else:
        await answer(refusal)(scope, receive, _with_headers(send))
