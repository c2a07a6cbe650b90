"""The server: HTTP, WebSocket and WebRTC over the same sessions. What a visitor sends is checked before it is used, and
every error is an answer (`cfrt.serve.refusal`), never a traceback."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from http import HTTPStatus
from secrets import token_hex
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from .. import __version__
from ..errors import CfrtError
from . import messages
from .guard import Guard, answer
from .limits import Limits, Meter
from .refusal import Refusal, of_library
from .registry import Registry
from .routes import PAGE, ROUTERS, Server
from .rtc import Peers
from .session import Make
from .shelf import Shelf

log = logging.getLogger(__name__)

SEND_BUFFER = 64 << 10
"""Bytes that the kernel keeps for a connection; left to itself it keeps megabytes, minutes of a small video: a slow
viewer would see the distant past, and what it misses would never be dropped."""

BACKLOG = 2048
"""Connections that may wait to be taken, as uvicorn has it."""

ABOUT = """
A prompt becomes a live video stream; every stream here can be watched by many and steered while it plays.

Ids of streams cannot be guessed: whoever has one may watch and steer that stream. A server that was started with a
token wants it as `Authorization: Bearer TOKEN` or `?token=TOKEN`. Errors are
`{"error": {"message", "expected", "got", "do"}}`. The page's WebSocket, `/streams/{id}/live`, is described in
docs/serve.md, as are all limits.
"""

ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": messages.ErrorBody, "description": HTTPStatus(code).phrase}
    for code in (401, 404, 410, 413, 422, 429, 503)
}


def create_app(
    make: Make,
    card: dict[str, Any],
    *,
    limits: Limits | None = None,
    token: str | None = None,
    hosts: frozenset[str] | None = None,
    addresses: list[str] | None = None,
    shelf: Shelf | None = None,
) -> FastAPI:
    """An ASGI application.

    make: (prompt, seed=, image=) -> Stream.
    card: what `GET /model` answers (`messages.ModelCard` without its limits).
    token: what visitors must show; None lets everybody in.
    hosts: names that the server may be called by, None for any.
    addresses: where WebRTC's media is sent from, None for every interface.
    shelf: where streams are kept for the next server, None where they end with this one.
    """
    limits = limits or Limits()
    app = FastAPI(
        title="cfrt serve",
        version=__version__,
        description=ABOUT,
        lifespan=_lifespan,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere; ours is page/api.html
        redoc_url=None,
        responses=ERRORS,
    )
    app.state.server = Server(
        sessions=Registry(make, limits, shelf),
        peers=Peers(addresses),
        limits=limits,
        card=messages.ModelCard(**card, limits=asdict(limits)),
        making=Meter(limits.creations_per_minute / 60, burst=limits.creations_per_minute / 3),
        steering=Meter(limits.messages_per_second, burst=2 * limits.messages_per_second),
    )
    _answer_errors(app)
    for router in ROUTERS:
        app.include_router(router)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    app.add_middleware(Guard, limits=limits, token=token, hosts=hosts)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """What runs beside the requests, from the first to the last."""
    server: Server = app.state.server
    await server.sessions.resume()
    tasks = [asyncio.create_task(job) for job in (server.sessions.sweep(), server.sessions.keep())]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await server.peers.close()
    await server.sessions.close()


def settings(app: FastAPI, host: str, port: int) -> uvicorn.Config:
    """How uvicorn runs it."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,  # addresses may hold tokens
        server_header=False,
        timeout_graceful_shutdown=2,
        ws_max_size=2 * Limits.message_bytes,  # ours is the one with words
        ws_per_message_deflate=False,  # JPEG does not shrink
    )


def listen(host: str, port: int) -> socket.socket:
    """The socket that uvicorn serves, taking connections from now on. CfrtError when it cannot be had."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    try:
        bound.bind((host, port))
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        do = "choose another --port, or 0 for a free one"
        raise CfrtError(f"expected to listen at {host}:{port}, got {error.strerror or error}; {do}") from error
    return bound


# ---------------------------------------------------------------------- errors


def _answer_errors(app: FastAPI) -> None:
    """Whatever goes wrong is answered in one shape."""

    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> JSONResponse:
        return answer(error)

    @app.exception_handler(CfrtError)
    async def failed(_: Request, error: CfrtError) -> JSONResponse:
        return answer(of_library(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        return answer(invalid(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        do = "see /docs for what there is"
        return answer(Refusal(error.status_code, expected="a request of this API", got=error.detail, do=do))

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        mark = token_hex(4)
        log.error("error %s", mark, exc_info=error)
        do = f"the server's log has the reason, marked {mark}"
        return answer(Refusal(500, expected="no failure", got="one of the server's own", do=do))


def invalid(first: Any) -> Refusal:
    """pydantic's first complaint."""
    place = ".".join(str(step) for step in first["loc"]) or "the body"
    return Refusal(422, expected=f"{place}: {first['msg']}", got=first.get("input"), do="see /docs")
