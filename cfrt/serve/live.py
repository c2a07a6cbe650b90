"""The WebSocket of a page: what happens in a stream, its frames as JPEG where WebRTC does not work, and control.

To the page: {"type": "state", ...} when something has changed, {"type": "unit", ...} when another unit is on show,
{"type": "stats", ...} twice a second, {"type": "done" | "error", "id": ...} for each of its own messages; and frames,
in binary: index, unit, tick and latency in microseconds as four little-endian uint32, then the JPEG.
"""

import asyncio
import logging
import struct
from contextlib import suppress
from dataclasses import asdict
from time import monotonic
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect
from pydantic import ValidationError

from ..errors import CfrtError
from . import messages
from .broadcast import Shot, Viewer
from .limits import Meter
from .refusal import Refusal, clipped, of_library
from .registry import Registry
from .session import Session

log = logging.getLogger(__name__)

STATS_EVERY = 0.5
"""Seconds."""

STUCK = 30.0
"""Seconds after which a viewer that takes nothing is let go."""

GONE = (WebSocketDisconnect, TimeoutError, ConnectionError)
"""How a viewer's leaving looks from here."""

HEADER = struct.Struct("<4I")

ENDED = 4000
"""Close code 4000 + the status that HTTP would have given; 4410 when the stream has ended."""


class Live:
    """One page's connection."""

    def __init__(self, socket: WebSocket, sessions: Registry, steering: Meter, making: Meter) -> None:
        self._socket, self._sessions, self._steering, self._making = socket, sessions, steering, making
        at_once = socket.query_params.get("video") == "jpeg"
        self._viewer = Viewer("websocket", codec="jpeg" if at_once else None, shows=at_once)
        self._sending = asyncio.Lock()
        self._unit, self._prompt, self._told = -1, "", 0.0

    async def run(self, name: str) -> None:
        await self._socket.accept()
        try:
            session = self._sessions.get(name)
            session.enter(self._viewer)
        except Refusal as refusal:
            await self._say({"type": "error", "id": None, "status": refusal.status, **refusal.body()["error"]})
            await self._socket.close(ENDED + refusal.status)
            return
        tasks = [asyncio.create_task(self._show(session)), asyncio.create_task(self._listen(session))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            session.leave(self._viewer)
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, Exception) and not isinstance(outcome, GONE):
                    log.error("a viewer's connection failed", exc_info=outcome)
            with suppress(RuntimeError, WebSocketDisconnect):  # it may be closed already, from either side
                await self._socket.close(ENDED + 410)

    # ------------------------------------------------------------------ to the page

    async def _show(self, session: Session) -> None:
        while True:
            shot, news = await self._viewer.next()
            if shot is None and not news:
                return
            if news:
                await self._say({"type": "state", **session.common_state()})
            if session.error is not None:
                return
            if shot is not None:
                await self._frame(shot, session)

    async def _frame(self, shot: Shot, session: Session) -> None:
        frame = shot.frame
        if frame.unit != self._unit:
            self._unit = frame.unit
            told = {"unit": frame.unit, "tick": shot.tick, "latency": 1000 * frame.latency, "prompt": frame.prompt}
            await self._say({"type": "unit", **told})
        if frame.prompt != self._prompt:
            self._prompt = frame.prompt
            await self._say({"type": "state", **session.common_state()})
        if self._viewer.codec == "jpeg":
            head = HEADER.pack(
                frame.index, frame.unit, shot.tick & 0xFFFFFFFF, min(round(1e6 * frame.latency), 2**32 - 1)
            )
            await self._send(head + shot.jpeg)
        if monotonic() - self._told >= STATS_EVERY:
            self._told = monotonic()
            state = session.common_state()
            await self._say({"type": "stats", "reach": state["reach"], **state["stats"]})

    async def _say(self, message: dict[str, Any]) -> None:
        async with self._sending, asyncio.timeout(STUCK):
            await self._socket.send_json(message)

    async def _send(self, data: bytes) -> None:
        async with self._sending, asyncio.timeout(STUCK):
            await self._socket.send_bytes(data)

    # ------------------------------------------------------------------ from the page

    async def _listen(self, session: Session) -> None:
        while True:
            received = await self._socket.receive()
            if received["type"] == "websocket.disconnect":
                return
            number: int | None = None
            try:
                wish = self._read(received)
                number = getattr(wish, "id", None)
                answer = await self._do(session, wish)
            except CfrtError as error:
                refusal = error if isinstance(error, Refusal) else of_library(error)
                answer = {"type": "error", "status": refusal.status, **refusal.body()["error"]}
            await self._say({**answer, "id": number})

    def _read(self, received: Any) -> messages.ControlMessage | messages.VideoMessage:
        do = 'send JSON like {"type": "control", "id": 1, "prompt": "..."}; docs/serve.md has all'
        self._steering.pay(self._socket)
        text = received.get("text")
        if text is None:
            raise Refusal(422, expected="text", got="binary", do=do)
        if len(text) > self._sessions.limits.message_bytes:
            raise Refusal(413, expected="a shorter message", got=f"{len(text)} characters", do=do)
        try:
            return messages.MESSAGE.validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(step) for step in first["loc"]) or "the message"
            raise Refusal(422, expected=f"{place}: {first['msg']}", got=clipped(first["input"]), do=do) from error

    async def _do(self, session: Session, wish: messages.ControlMessage | messages.VideoMessage) -> dict[str, Any]:
        if isinstance(wish, messages.VideoMessage):
            self._viewer.shows = wish.format == "jpeg"
            self._viewer.codec = "jpeg" if self._viewer.shows else None
            return {"type": "done", "change": None}
        if wish.restart:
            self._making.pay(self._socket)
        change = await asyncio.to_thread(session.control, wish)
        return {"type": "done", "change": None if change is None else asdict(change)}
