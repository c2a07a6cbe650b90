"""The ring cache: the keys and values of the frames that a unit can still see, in place for ever.

One K and one V per layer, [B, capacity N, H, D], allocated once. A slot is one whole latent frame, so a write never
wraps inside a slot and nothing is ever moved. Where a frame lives and who sees it is `blocks.Geometry`; this file only
keeps the tensors and remembers which frame each slot holds.

Shapes: B batch, N tokens a frame, H heads, D numbers a head, F frames a unit.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..blocks import Geometry, Span
from ..config import ModelConfig
from ..errors import ConfigError, EngineError

EMPTY = -1


class Keys(NamedTuple):
    """What one layer of one pass attends to."""

    k: Tensor  # [B, M, H, D]
    v: Tensor  # [B, M, H, D]
    ranges: Sequence[Span] | None  # spans of tokens to read; None = all


class Memory(Protocol):
    """One layer's past during one pass of one unit."""

    def extend(self, k: Tensor, v: Tensor) -> Keys:
        """Adds the unit's own keys and values [B, F N, H, D] to what it sees."""
        ...


class RingCache:
    """State of a stream (or of a batch of rollouts): created here, exported by `state`, restored by `load_state`.

    A unit is read and written through `open`; `commit` says that what lies in its slots is its clean past.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layers: int | None = None,
    ) -> None:
        self.geometry = config.geometry
        self._rolling = config.schedule == "rolling"
        self.frame_tokens = config.frame_tokens
        shape = (batch, self.geometry.capacity * self.frame_tokens, config.heads, config.head_dim)
        count = config.depth if layers is None else layers
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(count)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(count)]
        self.frames = [EMPTY] * self.geometry.capacity
        """The clean frame that each slot holds."""
        self.next_frame = 0
        """The first frame that is not committed yet."""
        self._copies: dict[int, tuple[Sequence[Tensor], Sequence[Tensor]]] = {}
        """k and v of each layer, for the frames that the last pass with gradients has seen."""

    def __repr__(self) -> str:
        shape = tuple(self.k[0].shape)
        return f"RingCache(layers={len(self.k)}, k={shape}, next_frame={self.next_frame}, holds={self.held()})"

    # ------------------------------------------------------------------ passes

    def open(self, unit: int) -> tuple[list[Memory], int]:
        """The memories of a pass over `unit`, one per layer, and how many of the keys read first are sinks' tokens.

        Without gradients, memories write the unit into its slots and read the ring in place. In grad mode they hold a
        copy of the past and append the unit functionally: writing a slot would break autograd for every view of the
        ring, and a recomputed block (checkpointing) must find the past as it was. Units share the copies of a frame:
        the past of a whole rollout is kept once, not once for every unit. Either way the past is a constant: gradients
        flow through the unit's own tokens only.

        A unit that is opened again (a prompt change) sees the part of its visible frames that is still held.
        Raises EngineError when the units before it have not been committed, or its slots belong to later ones.
        """
        own = self._own(unit)
        self._check_order(unit, own)
        seen = [frame for frame in self._visible(unit) if frame in own or self._holds(frame)]
        if torch.is_grad_enabled():
            seen = [frame for frame in seen if frame not in own]
            self._copies = {frame: self._copies.get(frame) or self._copied(frame) for frame in seen}
            past = [self._copies[frame] for frame in seen]
            memories: list[Memory] = [
                _Copied([k[layer] for k, _ in past], [v[layer] for _, v in past]) for layer in range(len(self.k))
            ]
        else:
            slots, ranges = self._spans(own), self._spans(seen)
            memories = [_InPlace(k, v, slots, ranges) for k, v in self._layers()]
            for frame in own:
                self.frames[self.geometry.slot(frame)] = EMPTY
                self._copies.pop(frame, None)
        return memories, 0 if self._rolling else self._sink_tokens(seen)

    def look(self, unit: int, count: int) -> tuple[list[Memory], int]:
        """The memories of a pass over `count` units from `unit` on that leaves nothing behind, and how many of the keys
        read first are sinks' tokens. The units see each other whole, and what the last of them sees of the past.

        Raises EngineError when the units before `unit` have not been committed, or when it has been."""
        start = unit * self.geometry.unit
        if start != self.next_frame:
            raise EngineError(f"expected a look from frame {self.next_frame} on, the next one, got frame {start}")
        visible = chain.from_iterable(range(*span) for span in self.geometry.visible_frames(unit + count - 1))
        seen = [frame for frame in visible if frame < start and self._holds(frame)]
        ranges = self._spans(seen)
        memories: list[Memory] = [_Beside(k, v, ranges) for k, v in self._layers()]
        return memories, self._sink_tokens(seen)

    def commit(self, unit: int) -> None:
        """What lies in the unit's slots is its clean past from now on."""
        own = self._own(unit)
        for frame in own:
            self.hold(frame)

    def ranges(self, unit: int) -> list[Span]:
        """The spans of tokens that an in-place pass over `unit` reads: its visible frames, as far as they are held."""
        own = self._own(unit)
        return self._spans(frame for frame in self._visible(unit) if frame in own or self._holds(frame))

    # ------------------------------------------------------------------ frames

    def write(self, layer: int, frame: int, k: Tensor, v: Tensor) -> None:
        """Puts whole frames, k and v [B, n N, H, D], into the slots from `frame` on. `hold` makes them count."""
        count = k.shape[1] // self.frame_tokens
        spans = self._spans(range(frame, frame + count))
        self._copies.clear()
        _InPlace(self.k[layer], self.v[layer], spans, ()).extend(k, v)

    def read(self, layer: int, frame: int) -> tuple[Tensor, Tensor]:
        """A copy of one held frame, k and v [B, N, H, D]. EngineError when it is no longer held."""
        if not self._holds(frame):
            raise EngineError(f"frame {frame} is not in the ring any more; it holds {self.held()}")
        spans = self._spans([frame])
        return _copy(self.k[layer], spans), _copy(self.v[layer], spans)

    def frame(self, frame: int) -> list[Tensor]:
        """A copy of one held frame in every layer, k above v, [2, B, N, H, D] each. EngineError as for `read`."""
        return [torch.stack(self.read(layer, frame)) for layer in range(len(self.k))]

    def hold(self, frame: int) -> None:
        """Declares that every layer's slot of `frame` has been written with its clean keys and values, as a commit
        does."""
        self.frames[self.geometry.slot(frame)] = frame
        self.next_frame = max(self.next_frame, frame + 1)

    def held(self) -> list[int]:
        """The clean frames in the ring, in order."""
        return sorted(frame for frame in self.frames if frame != EMPTY)

    def rewind(self, unit: int) -> None:
        """Makes `unit` the next one. EngineError when a frame that it sees has been overwritten (restore it first)."""
        start = unit * self.geometry.unit
        lost = [frame for frame in self._visible(unit) if frame < start and not self._holds(frame)]
        if start > self.next_frame or lost:
            why = "it lies ahead" if start > self.next_frame else f"frames {lost} have left the ring"
            raise EngineError(f"cannot rewind from frame {self.next_frame} to unit {unit} (frame {start}): {why}")
        self.frames = [EMPTY if frame >= start else frame for frame in self.frames]
        self.next_frame = start

    # ------------------------------------------------------------------ snapshots

    def state(self) -> dict[str, Any]:
        """Everything, copied: exact, and for the same engine and config."""
        return {
            "k": [k.clone() for k in self.k],
            "v": [v.clone() for v in self.v],
            "frames": list(self.frames),
            "next_frame": self.next_frame,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores `state()`. ConfigError when it was taken from a ring of another shape."""
        mine, theirs = [*self.k, *self.v], [*state["k"], *state["v"]]
        expected, got = [tuple(x.shape) for x in mine], [tuple(x.shape) for x in theirs]
        if expected != got:
            raise ConfigError(f"expected keys and values of {expected}, got {got}: the state is another model's")
        for tensor, saved in zip(mine, theirs, strict=True):
            tensor.copy_(saved)
        self._copies.clear()
        self.frames = list(state["frames"])
        self.next_frame = state["next_frame"]

    # ------------------------------------------------------------------ arithmetic

    def _layers(self) -> Iterable[tuple[Tensor, Tensor]]:
        return zip(self.k, self.v, strict=True)

    def _copied(self, frame: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """k and v of each layer, as constants."""
        spans = self._spans([frame])
        return [_copy(k.detach(), spans) for k in self.k], [_copy(v.detach(), spans) for v in self.v]

    def _own(self, unit: int) -> range:
        return range(unit * self.geometry.unit, (unit + 1) * self.geometry.unit)

    def _visible(self, unit: int) -> Iterable[int]:
        """The frames that a pass over one unit sees. Under a rolling schedule that is a commit only, and the weights
        were trained with the last K + W frames there, sinks among them only as long as they are recent."""
        geometry = self.geometry
        if self._rolling:
            geometry = Geometry(unit=geometry.unit, window=geometry.sinks + geometry.window)
        return chain.from_iterable(range(*span) for span in geometry.visible_frames(unit))

    def _sink_tokens(self, seen: Iterable[int]) -> int:
        return self.frame_tokens * sum(frame < self.geometry.sinks for frame in seen)

    def _holds(self, frame: int) -> bool:
        return self.frames[self.geometry.slot(frame)] == frame

    def _check_order(self, unit: int, own: range) -> None:
        if own[0] > self.next_frame:
            raise EngineError(
                f"unit {unit} starts at frame {own[0]}, but the ring is committed up to frame {self.next_frame}: "
                "commit the units in order"
            )
        if any(self.frames[self.geometry.slot(frame)] > frame for frame in own):
            raise EngineError(f"unit {unit} has left the ring, which holds frames {self.held()}: open a later unit")

    def _spans(self, frames: Iterable[int]) -> list[Span]:
        """Token spans of frames in order; neighbours are joined, sinks and window are kept apart."""
        spans: list[Span] = []
        border = self.geometry.sinks * self.frame_tokens
        for frame in frames:
            start = self.geometry.slot(frame) * self.frame_tokens
            if spans and spans[-1][1] == start != border:
                spans[-1] = (spans[-1][0], start + self.frame_tokens)
            else:
                spans.append((start, start + self.frame_tokens))
        return spans


class _InPlace(NamedTuple):
    """Writes the unit into its slots and reads the ring as it lies."""

    ring_k: Tensor
    ring_v: Tensor
    slots: Sequence[Span]
    ranges: Sequence[Span]

    def extend(self, k: Tensor, v: Tensor) -> Keys:
        done = 0
        for start, stop in self.slots:
            part = slice(done, done + stop - start)
            self.ring_k[:, start:stop] = k[:, part]
            self.ring_v[:, start:stop] = v[:, part]
            done = part.stop
        return Keys(self.ring_k, self.ring_v, self.ranges)


class _Copied(NamedTuple):
    """Appends the unit to constant copies of the frames in its past; pure, so that a block can be run again."""

    past_k: Sequence[Tensor]
    past_v: Sequence[Tensor]

    def extend(self, k: Tensor, v: Tensor) -> Keys:
        return Keys(torch.cat([*self.past_k, k], dim=1), torch.cat([*self.past_v, v], dim=1), None)


class _Beside(NamedTuple):
    """Puts the units beside a copy of what they see of the ring."""

    ring_k: Tensor
    ring_v: Tensor
    ranges: Sequence[Span]

    def extend(self, k: Tensor, v: Tensor) -> Keys:
        past_k, past_v = _copy(self.ring_k, self.ranges), _copy(self.ring_v, self.ranges)
        return Keys(torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1), None)


def _copy(x: Tensor, spans: Sequence[Span]) -> Tensor:
    return torch.cat([x[:, start:stop] for start, stop in spans] or [x[:, :0]], dim=1)
