"""Where a stream is, as its worker goes on from it; who may take it elsewhere: `cfrt.snapshot`."""

from dataclasses import dataclass
from typing import Any

from .frame import Frame
from .journal import Journal
from .maker import Past
from .timeline import Timeline


@dataclass(frozen=True, kw_only=True)
class State:
    """A stream after one of its frames: what the engine holds, what is made, what comes next."""

    engine: Any
    past: Past
    next: int
    """The first unit that is not made: the one after the last frame handed out."""
    shown: int
    """Index of that frame."""
    queue: tuple[Frame, ...]
    """The rest of its unit."""
    timeline: Timeline
    journal: Journal | None = None
