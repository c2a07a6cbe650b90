"""A recording of what a stream shows, as an mp4 file of the server's own, capped in length."""

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import VideoError
from ..video import Writer
from .broadcast import Viewer
from .refusal import Refusal

BUFFER = 64
"""Frames that may wait for the encoder; four seconds at 16 fps."""


class Recorder:
    """A viewer that writes what it sees. `start`, later `stop`; then `path` is a complete file."""

    def __init__(self, fps: float, longest: float, leave: Callable[[Viewer], None]) -> None:
        self.viewer = Viewer("recording", buffer=BUFFER)
        self._fps, self._most, self._leave = fps, round(longest * fps), leave
        self._folder = tempfile.TemporaryDirectory(prefix="cfrt-recording-")
        self.path = Path(self._folder.name) / "recording.mp4"
        self._frames = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        self._task = asyncio.create_task(self._write())

    async def stop(self) -> None:
        """Ends the file. VideoError when it could not be written."""
        self.viewer.close()
        if self._task is not None:
            await self._task

    def file(self) -> Path:
        """The complete file. Refusal while there is none."""
        if self.running:
            raise Refusal(
                409, expected="a finished recording", got="one under way", do="stop it: POST .../recording/stop"
            )
        if not self.path.exists():
            raise Refusal(404, expected="a recording with frames", got="one without", do="record while it plays")
        return self.path

    def discard(self) -> None:
        """The file is gone."""
        self._folder.cleanup()

    def state(self) -> dict[str, Any]:
        """`messages.RecordingState` as JSON."""
        size = self.path.stat().st_size if not self.running and self.path.exists() else 0
        return {"running": self.running, "seconds": self._frames / self._fps, "bytes": size}

    async def _write(self) -> None:
        try:
            with Writer(self.path, fps=self._fps) as writer:
                while self._frames < self._most and (shot := await self.viewer.shot()) is not None:
                    await asyncio.to_thread(writer.add, shot.frame)
                    self._frames += 1
        except VideoError:
            if self._frames:  # a recording stopped before its first frame is no failure: there is just no file
                raise
        finally:
            self._leave(self.viewer)
