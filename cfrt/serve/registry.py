"""The streams that run, by their unguessable ids, capped in number; those that nobody wants any more are closed. With a
shelf they outlive the server."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from secrets import token_hex

from ..errors import CfrtError
from ..snapshot import Snapshot
from ..stream import Stream
from .limits import Limits
from .refusal import Refusal, no_such
from .session import Make, Session
from .shelf import EVERY, Shelf

log = logging.getLogger(__name__)

SWEEP = 1.0
"""Seconds between looks for idle streams."""


class Registry:
    """All sessions of a server. Used in the event loop."""

    def __init__(self, make: Make, limits: Limits, shelf: Shelf | None = None) -> None:
        self.limits, self.made = limits, 0
        self._shelf = shelf
        self.past_sent = self.past_dropped = 0
        self._make, self._sessions = make, dict[str, Session]()
        self._coming = 0

    def __iter__(self) -> Iterator[Session]:
        return iter(tuple(self._sessions.values()))

    def get(self, name: str) -> Session:
        """Refusal 404 when there is none of that id, or no longer."""
        if name not in self._sessions:
            raise no_such("a stream", name)
        return self._sessions[name]

    async def new(self, prompt: str, seed: int, paused: bool) -> Session:
        """A session with a stream of its own."""
        async with self._place():
            stream = await asyncio.to_thread(self._make, prompt, seed=seed)
            notes = await asyncio.to_thread(stream.read, prompt)
        if paused:
            stream.pause()
            stream.step()
        return self._admit(stream, prompt, seed, notes.notes)

    async def branch(self, trunk: Session) -> Session:
        """A session that goes on from what the trunk shows, in its own way."""
        async with self._place(but=trunk):
            stream = await asyncio.to_thread(trunk.branch)
        return self._admit(stream, trunk.prompt, trunk.seed, trunk.notes)

    async def remove(self, session: Session) -> None:
        if await self._close(session) and self._shelf is not None:
            self._shelf.drop(session.id)

    async def _close(self, session: Session) -> bool:
        """Was it still to be closed?"""
        if self._sessions.pop(session.id, None) is None:
            return False
        await session.close()
        self.past_sent += session.broadcast.sent
        self.past_dropped += session.broadcast.dropped
        return True

    async def sweep(self) -> None:
        """Closes what has been idle for too long, for ever; run as a task."""
        while True:
            await asyncio.sleep(SWEEP)
            for session in self:
                if session.idle > self.limits.idle_seconds:
                    await self.remove(session)

    async def resume(self) -> None:
        """Goes on with the streams that are on the shelf."""
        for name, snapshot, paused in [] if self._shelf is None else list(self._shelf.kept()):
            if len(self._sessions) >= self.limits.streams:
                break
            try:
                self._admit(*await asyncio.to_thread(self._made_again, snapshot, paused), name=name)
            except CfrtError as error:
                log.warning("a stream cannot go on: %s", error)

    def _made_again(self, snapshot: Snapshot, paused: bool) -> tuple[Stream, str, int, list[str]]:
        """The stream of a snapshot, its prompt and seed, and what the model does not understand of that."""
        timeline, unit = snapshot.state.timeline, snapshot.state.next
        prompt, seed = timeline.at(unit).text, timeline.seed(unit)
        stream = self._make(prompt, seed=seed)
        try:
            stream.restore(snapshot)
        except CfrtError:
            stream.close()
            raise
        if paused:
            stream.pause()
            stream.step()  # shows where it is
        return stream, prompt, seed, stream.read(prompt).notes

    async def keep(self) -> None:
        """Puts what has moved on the shelf, for ever; run as a task."""
        while True:
            await asyncio.sleep(EVERY)
            await self._keep()

    async def _keep(self) -> None:
        if self._shelf is None:
            return
        for session in self:
            try:
                await asyncio.to_thread(session.keep, self._shelf)
            except Exception as error:
                log.warning("stream %s is not kept: %s", session.id, error)
            if session.id not in self._sessions:  # it was closed meanwhile
                self._shelf.drop(session.id)

    async def close(self) -> None:
        """Ends them all; those on the shelf will go on."""
        await self._keep()
        for session in self:
            await self._close(session)

    @asynccontextmanager
    async def _place(self, but: Session | None = None) -> AsyncIterator[None]:
        """A place for a stream that is being made; held meanwhile, so that many at once do not exceed the cap."""
        most = self.limits.streams
        if len(self._sessions) + self._coming >= most:
            idlest = max((one for one in self if one is not but), key=lambda session: session.idle, default=None)
            if idlest is None or idlest.idle < self.limits.spare_seconds:
                do = "close one (DELETE /streams/{id}), watch one that runs, or wait"
                raise Refusal(503, expected=f"at most {most} streams at the same time", got="one more", do=do)
            await self.remove(idlest)
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1

    def _admit(self, stream: Stream, prompt: str, seed: int, notes: list[str], name: str | None = None) -> Session:
        session = Session(name or token_hex(16), self._make, self.limits, stream, prompt, seed, notes)
        self._sessions[session.id] = session
        self.made += 1
        return session
