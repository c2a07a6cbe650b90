"""What each unit of a stream is made from: a text, cross-faded from the one before, a seed, and where the window is
committed again. A timeline knows the past as well as what is to come, so a stream that goes back plays it again."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from .errors import EngineError

Blend = Literal["lerp", "slerp"]
BLENDS: tuple[Blend, ...] = ("lerp", "slerp")

PARALLEL = 1e-4
"""Sine of the angle between two rows below which their arc is a straight line, in fp32."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Context:
    """What one unit is made from."""

    text: str
    rows: np.ndarray
    """float32 [L, width]; the same object as long as nothing changes."""


@dataclass(frozen=True, eq=False)
class _Entry:
    unit: int
    source: np.ndarray
    context: Context
    blend_units: int
    blend: Blend

    def at(self, unit: int) -> Context:
        """Row by row from source to target: weights 1/(n+1), ..., n/(n+1) over the n blend units, 1 after them."""
        step = unit - self.unit + 1
        if step > self.blend_units:
            return self.context
        weight = step / (self.blend_units + 1)
        mix = slerp if self.blend == "slerp" else lerp
        return Context(self.context.text, mix(self.source, self.context.rows, weight))


class Timeline:
    """Texts, seeds and recaches of a stream, by unit. Of several changes of one kind before the same unit the latest
    wins, and it removes those of its kind that would come later."""

    def __init__(self, text: str, rows: np.ndarray, seed: int = 0) -> None:
        self._texts = [_Entry(0, rows, Context(text, rows), 0, "lerp")]
        self._seeds = [(0, seed)]
        self._recaches: dict[int, np.ndarray] = {}

    def change(
        self,
        unit: int,
        text: str,
        rows: np.ndarray,
        blend_units: int = 0,
        *,
        blend: Blend = "lerp",
        recache: bool = False,
    ) -> None:
        """`text` from `unit` on, blended over that many units with what the unit before it reads.

        recache: the window is committed again, under what `unit` reads, before that unit is made. A later change
        before the same unit does not take that back: by then it has happened."""
        source = self.at(unit - 1).rows if unit > 0 else rows
        kept = [entry for entry in self._texts if entry.unit < unit]
        self._texts = [*kept, _Entry(unit, source, Context(text, rows), blend_units, blend)]
        self._recaches = {at: read for at, read in self._recaches.items() if at <= unit}
        if recache:
            self._recaches[unit] = self.at(unit).rows

    def reseed(self, unit: int, seed: int) -> None:
        """The noise of `unit` and of those after it is that of `seed`."""
        self._seeds = [*(entry for entry in self._seeds if entry[0] < unit), (unit, seed)]

    def at(self, unit: int) -> Context:
        """What a unit reads."""
        return self._texts[_last(unit, [entry.unit for entry in self._texts])].at(unit)

    def seed(self, unit: int) -> int:
        """The seed of a unit's noise."""
        return self._seeds[_last(unit, [at for at, _ in self._seeds])][1]

    def recache(self, unit: int) -> np.ndarray | None:
        """The rows under which the window is committed again before `unit` is made; None where it is not."""
        return self._recaches.get(unit)

    def changes(self) -> list[tuple[int, str]]:
        """Unit and text of every change that is remembered, the first text included."""
        return [(entry.unit, entry.context.text) for entry in self._texts]

    def forget(self, unit: int) -> None:
        """Lets go of what only units before `unit` have been made from; nobody will ask about them again."""
        self._texts = self._texts[_last(unit, [entry.unit for entry in self._texts]) :]
        self._seeds = self._seeds[_last(unit, [at for at, _ in self._seeds]) :]
        self._recaches = {at: rows for at, rows in self._recaches.items() if at >= unit}

    def copy(self) -> "Timeline":
        """A timeline that goes its own way from here."""
        twin = object.__new__(Timeline)
        twin._texts, twin._seeds, twin._recaches = list(self._texts), list(self._seeds), dict(self._recaches)
        return twin

    # ------------------------------------------------------------------ files

    def to_file(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A description in JSON's types, and the arrays that it counts on, by name."""
        texts = [
            {"unit": e.unit, "text": e.context.text, "blend_units": e.blend_units, "blend": e.blend}
            for e in self._texts
        ]
        arrays = {f"text.{i}.rows": entry.context.rows for i, entry in enumerate(self._texts)}
        arrays |= {f"text.{i}.source": entry.source for i, entry in enumerate(self._texts) if entry.blend_units}
        arrays |= {f"recache.{unit}": rows for unit, rows in self._recaches.items()}
        return {"texts": texts, "seeds": [list(entry) for entry in self._seeds]}, arrays

    @classmethod
    def from_file(cls, description: dict[str, Any], arrays: dict[str, np.ndarray]) -> "Timeline":
        """The way back; KeyError, TypeError or ValueError for what `to_file` would not have written."""
        timeline = object.__new__(cls)
        timeline._texts = []
        for i, entry in enumerate(description["texts"]):
            rows = arrays[f"text.{i}.rows"]
            source = arrays[f"text.{i}.source"] if entry["blend_units"] else rows
            context = Context(str(entry["text"]), rows)
            timeline._texts.append(
                _Entry(int(entry["unit"]), source, context, int(entry["blend_units"]), entry["blend"])
            )
        timeline._seeds = [(int(unit), int(seed)) for unit, seed in description["seeds"]]
        prefix = "recache."
        timeline._recaches = {
            int(name.removeprefix(prefix)): rows for name, rows in arrays.items() if name.startswith(prefix)
        }
        return timeline


def lerp(a: np.ndarray, b: np.ndarray, weight: float) -> np.ndarray:
    """a + weight (b - a)."""
    return a + np.float32(weight) * (b - a)


def slerp(a: np.ndarray, b: np.ndarray, weight: float) -> np.ndarray:
    """Row by row along the arc between the two directions, lengths along a line; straight where rows are parallel,
    opposite or zero (padding)."""
    length_a, length_b = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    scale = np.where((length_a > 0) & (length_b > 0), length_a * length_b, 1)
    cosine = np.clip((a * b).sum(-1, keepdims=True) / scale, -1, 1)
    angle = np.arccos(cosine)
    sine = np.sin(angle)
    curved = (sine > PARALLEL) & (length_a > 0) & (length_b > 0)
    safe = np.where(curved, sine, 1)
    toward_a, toward_b = np.sin((1 - weight) * angle) / safe, np.sin(weight * angle) / safe
    unit_a, unit_b = (x / np.where(n > 0, n, 1) for x, n in ((a, length_a), (b, length_b)))
    arc = (length_a + weight * (length_b - length_a)) * (toward_a * unit_a + toward_b * unit_b)
    return np.where(curved, arc, lerp(a, b, weight)).astype(np.float32)


def _last(unit: int, units: list[int]) -> int:
    """Index of the last of the ascending `units` that is not after `unit`; EngineError before all of them."""
    index = bisect_right(units, unit) - 1
    if index < 0:
        raise EngineError(f"unit {unit} is not remembered any more; the timeline starts at unit {units[0]}")
    return index
