"""Which text each unit of a stream is made from: a text holds from its unit on, cross-faded from the one before."""

from dataclasses import dataclass

import numpy as np

KEPT = 8
"""Changes remembered. A stream asks about its next unit, and goes back by one at most."""


@dataclass(frozen=True, eq=False)
class Context:
    """What one unit reads."""

    text: str
    rows: np.ndarray
    """float32 [L, width]; the same object as long as nothing changes."""


@dataclass(frozen=True, eq=False)
class _Entry:
    unit: int
    source: np.ndarray
    context: Context
    blend_units: int

    def at(self, unit: int) -> Context:
        """Row by row from source to target: weights 1/(n+1), ..., n/(n+1) over the n blend units, 1 after them."""
        step = unit - self.unit + 1
        if step > self.blend_units:
            return self.context
        weight = np.float32(step / (self.blend_units + 1))
        return Context(self.context.text, self.source + weight * (self.context.rows - self.source))


class Timeline:
    """The texts of a stream, by unit. The latest change wins: it removes all that would start with it or later."""

    def __init__(self, text: str, rows: np.ndarray) -> None:
        self._entries = [_Entry(0, rows, Context(text, rows), 0)]

    def change(self, unit: int, text: str, rows: np.ndarray, blend_units: int = 0) -> None:
        """`text` from `unit` on, blended over that many units with what the unit before it reads."""
        source = self.at(unit - 1).rows if unit > 0 else rows
        kept = [entry for entry in self._entries if entry.unit < unit][-KEPT:]
        self._entries = [*kept, _Entry(unit, source, Context(text, rows), blend_units)]

    def at(self, unit: int) -> Context:
        """What a unit reads."""
        return next(entry for entry in reversed(self._entries) if entry.unit <= unit).at(unit)

    def copy(self) -> "Timeline":
        """A timeline that goes its own way from here."""
        twin = object.__new__(Timeline)
        twin._entries = list(self._entries)
        return twin
