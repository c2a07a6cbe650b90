"""One stream's frames to many viewers. A slow viewer loses frames of its own and never makes anybody wait.

The stream's thread hands each frame to the event loop; there it goes into the small buffer of every viewer, the oldest
frame out when that is full. What costs time per frame and not per viewer (JPEG, VP8) is done once, by the stream's
thread.
"""

import asyncio
from collections import deque
from functools import cached_property
from typing import Literal

from ..frame import Frame
from .film import Coded
from .formats import jpeg

Codec = Literal["jpeg", "vp8", "vp8 stamped"]

BUFFER = 4
"""Frames that wait for a viewer: a quarter of a second at 16 fps. A longer queue would show an old prompt."""


class Shot:
    """A frame on its way to the viewers. `tick` counts what was shown, whatever was rewound meanwhile."""

    def __init__(self, frame: Frame, tick: int) -> None:
        self.frame, self.tick = frame, tick
        self.vp8: dict[Codec, Coded] = {}

    @cached_property
    def jpeg(self) -> bytes:
        return jpeg(self.frame.pixels)


class Viewer:
    """What one viewer has yet to see. Used in the event loop alone."""

    def __init__(self, kind: str, *, codec: Codec | None = None, shows: bool = True, buffer: int = BUFFER) -> None:
        """codec: as what frames are wanted, None as pixels. shows: are they counted as sent and dropped here?"""
        self.kind, self.codec, self.shows = kind, codec, shows
        self.sent, self.dropped = 0, 0
        self._shots: deque[Shot] = deque(maxlen=buffer)
        self._news = False
        self._closed = False
        self._wake = asyncio.Event()

    def push(self, shot: Shot) -> None:
        self.dropped += self.shows and len(self._shots) == self._shots.maxlen
        self._shots.append(shot)
        self._wake.set()

    def forget(self) -> None:
        """What waits is not to be shown any more."""
        self._shots.clear()

    def tell(self) -> None:
        """The state of the stream has changed."""
        self._news = True
        self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    async def next(self) -> tuple[Shot | None, bool]:
        """The next frame, if one is there, and whether the state has changed. (None, False): there is no more."""
        while not (self._shots or self._news or self._closed):
            self._wake.clear()
            await self._wake.wait()
        if self._closed:
            return None, False
        news, self._news = self._news, False
        shot = self._shots.popleft() if self._shots else None
        self.sent += self.shows and shot is not None
        return shot, news

    async def shot(self) -> Shot | None:
        """The next frame, for a viewer that does not care about the state; None when there is no more."""
        while True:
            shot, news = await self.next()
            if shot is not None or not news:
                return shot


class Broadcast:
    """The viewers of one stream."""

    def __init__(self) -> None:
        self.viewers: set[Viewer] = set()
        self.last: Shot | None = None
        self._sent = self._dropped = 0

    def push(self, shot: Shot) -> None:
        self.last = shot
        for viewer in self.viewers:
            viewer.push(shot)

    def forget(self) -> None:
        """What was shown is no longer the stream's past: it has been started anew."""
        self.last = None
        for viewer in self.viewers:
            viewer.forget()

    def tell(self) -> None:
        for viewer in self.viewers:
            viewer.tell()

    def add(self, viewer: Viewer) -> None:
        """From now on; the last frame first, so that a paused stream has a picture."""
        self.viewers.add(viewer)
        viewer.tell()
        if self.last is not None:
            viewer.push(self.last)

    def remove(self, viewer: Viewer) -> None:
        if viewer in self.viewers:
            self.viewers.remove(viewer)
            self._sent, self._dropped = self._sent + viewer.sent, self._dropped + viewer.dropped

    def close(self) -> None:
        for viewer in self.viewers:
            viewer.close()

    @property
    def wanted(self) -> set[Codec | None]:
        """Asked from the stream's thread: `viewers` may change size meanwhile, so a copy is read."""
        return {viewer.codec for viewer in tuple(self.viewers)}

    @property
    def sent(self) -> int:
        return self._sent + sum(viewer.sent for viewer in self.viewers)

    @property
    def dropped(self) -> int:
        return self._dropped + sum(viewer.dropped for viewer in self.viewers)
