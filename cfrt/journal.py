"""What a stream must remember to go back: before each unit, what that unit is about to overwrite.

A unit takes the slots of the frames that left the window with the unit before it, and the decoder goes on by one. An
entry holds both, so that going back to unit u is undoing the units after it, the last one first: the ring is then as it
was, number for number, in everything that u or a unit after it will ever look at. (A commit does not count: it writes
into the unit's own slots.)

The other exact design, a whole snapshot per unit, needs nothing from the engine but costs the whole ring. Measured on
the embedded student: 12.3 kB of evicted keys in bf16, kept as 24.6 kB of fp32, against a ring of 110.6 kB. For
wan-1.3b-framewise, computed: 288 MB a unit in bf16 against 6.3 GB. Keeping only latents and replaying them would be
smaller still, but keys and values depend on those of the unit before, back to the start of the stream.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .config import ModelConfig
from .engines import Latents, Memory


@dataclass(frozen=True, eq=False)
class Entry:
    """A stream as it was before one unit, as far as that unit and the ones after it change it."""

    memory: Memory
    """Frames that the unit overwrites, and the decoder's state."""
    past: tuple[tuple[int, Latents], ...]
    """The latents of the window, for a recache; each is shared by the entries that hold it."""
    begun: Any = None
    """What the schedule had begun; shared with the next entries likewise, and small."""

    @property
    def unit(self) -> int:
        return self.memory.unit

    @property
    def nbytes(self) -> int:
        """Of the memory that only this entry holds: of the shared latents, those of the unit before."""
        return self.memory.nbytes + (int(self.past[-1][1].nbytes) if self.past else 0)


def evicted_bytes(config: ModelConfig) -> int:
    """Keys and values that a unit overwrites once the window is full, as fp32: the least that an entry holds."""
    tokens = config.unit * config.frame_tokens * (2 if config.guided else 1)
    return tokens * config.depth * 2 * config.width * 4


class Journal:
    """Entries of consecutive units under a cap of bytes; the oldest go first. One thread writes, any may read `oldest`.

    Where a single entry is above the cap there is no journal and, where that is known before, no work for one."""

    def __init__(self, cap: int, *, least: int = 0) -> None:
        """least: what an entry will have at the least, once the window is full."""
        self._entries: deque[Entry] = deque()
        self.cap = cap
        self.nbytes = 0
        self.largest = least
        """Bytes of the largest entry that there was, or is sure to come."""

    @property
    def off(self) -> bool:
        """Is one entry more than the cap allows?"""
        return self.largest > self.cap or self.cap == 0

    @property
    def oldest(self) -> int | None:
        """The first unit that can be made again."""
        try:
            return self._entries[0].unit
        except IndexError:
            return None

    def holds(self, unit: int) -> bool:
        """Is there an entry for `unit`?"""
        return bool(self._entries) and self._entries[0].unit <= unit <= self._entries[-1].unit

    def add(self, entry: Entry) -> None:
        """The entry of the unit that comes next, before it is begun."""
        if self._entries and entry.unit != self._entries[-1].unit + 1:
            raise ValueError(f"expected the entry of unit {self._entries[-1].unit + 1}, got that of {entry.unit}")
        self.largest = max(self.largest, entry.nbytes)
        self._append(entry)

    def overwrites(self, unit: int, keys: Mapping[int, np.ndarray]) -> None:
        """Adds to the last entry, that of `unit`: these frames are about to be written as well, by a recache. What the
        entry has already is older, and stays."""
        if not self.holds(unit):
            return
        last = self._entries.pop()
        self.nbytes -= last.nbytes
        self._append(replace(last, memory=replace(last.memory, keys={**keys, **last.memory.keys})))

    def drop_after(self, unit: int) -> None:
        """Forgets the entries of the units after `unit`; its own still holds."""
        while self._entries and self._entries[-1].unit > unit:
            self.nbytes -= self._entries.pop().nbytes

    def back_to(self, unit: int, start: int) -> Entry:
        """What to put back so that `unit`, whose first frame is `start`, comes next. Drops what lies after it."""
        keys: dict[int, np.ndarray] = {}
        for entry in reversed(self._entries):
            if entry.unit < unit:
                break
            keys.update((frame, kv) for frame, kv in entry.memory.keys.items() if frame < start)
        self.drop_after(unit)
        own = self._entries[-1]
        return replace(own, memory=replace(own.memory, keys=keys))

    def clear(self) -> None:
        """Forgets everything: the stream is elsewhere now."""
        self._entries.clear()
        self.nbytes = 0

    def copy(self) -> "Journal":
        """A journal of the same past that goes its own way; entries are shared."""
        twin = Journal(self.cap, least=self.largest)
        twin._entries, twin.nbytes = deque(self._entries), self.nbytes
        return twin

    def _append(self, entry: Entry) -> None:
        self._entries.append(entry)
        self.nbytes += entry.nbytes
        while self.nbytes > self.cap:
            self.nbytes -= self._entries.popleft().nbytes
