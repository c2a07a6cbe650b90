"""A stream at one moment, to go on from: exact, for the same engine, or portable, for any engine and for a file.

A portable snapshot holds keys and values in fp32 by frame, the decoder's state, the latents of the window, the frames
that were made and not handed out, the timeline and the position. Its file is safetensors; docs/control.md describes it.
Nothing in it is ever executed, and a file that was changed by a byte is refused.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as from_safetensors
from safetensors.numpy import save as to_safetensors

from .config import ModelConfig
from .engines import Memory
from .errors import SnapshotError
from .frame import Frame
from .maker import Past
from .state import State
from .timeline import BLENDS, Timeline
from .weights import replacing

FORMAT, VERSION = "cfrt-snapshot", 1

BUNDLE = "bundle "
"""Before the fingerprint of what a bundle holds beside its graphs: it says nothing about the model's own weights."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a snapshot was taken from."""

    COMMON: ClassVar[tuple[str, ...]] = ("model", "config", "weights", "decoder", "tile")
    """What has to be the same for a portable one as well."""
    model: str
    config: str
    """`ModelConfig.to_dict` as JSON, keys sorted."""
    weights: str
    """`cfrt.weights.fingerprint`."""
    decoder: str | None
    tile: int | None
    engine: str
    device: str
    precision: str

    def differences(self, other: "Origin", *, portable: bool) -> list[str]:
        """The names of what is not the same."""
        asked = self.COMMON if portable else tuple(field.name for field in fields(self))
        if self.weights.startswith(BUNDLE) != other.weights.startswith(BUNDLE):
            asked = tuple(name for name in asked if name != "weights")
        return [name for name in asked if getattr(self, name) != getattr(other, name)]

    def say(self, name: str) -> str:
        """A value as a message shows it; long ones by their digest."""
        value = getattr(self, name)
        return hashlib.sha256(value.encode()).hexdigest()[:12] if name in ("config", "weights") else repr(value)


@dataclass(frozen=True, repr=False)
class Snapshot:
    """The state of a stream after one of its frames. Give it to `Stream.restore`, as often as you like."""

    origin: Origin
    state: State

    @property
    def portable(self) -> bool:
        """Does it fit every engine, and a file?"""
        return isinstance(self.state.engine, Memory)

    @property
    def unit(self) -> int:
        """The unit of the last frame that was handed out; -1 before the first."""
        return ModelConfig.from_dict(json.loads(self.origin.config)).unit_at(self.state.shown)

    @property
    def nbytes(self) -> int | None:
        """Bytes of the tensors in it; None for an exact one, whose content is its engine's business."""
        return sum(array.nbytes for array in _tensors(self.state).values()) if self.portable else None

    def __repr__(self) -> str:
        kind = "portable" if self.portable else f"engine={self.origin.engine!r}"
        return f"Snapshot(model={self.origin.model!r}, {kind}, unit={self.unit})"

    def check(self, here: Origin) -> None:
        """SnapshotError unless a stream of `here` can go on from it."""
        wrong = here.differences(self.origin, portable=self.portable)
        if not wrong:
            return
        expected, got = (", ".join(f"{name} {origin.say(name)}" for name in wrong) for origin in (here, self.origin))
        cure = "" if set(wrong) & set(Origin.COMMON) else "; snapshot(portable=True) fits every engine"
        raise SnapshotError(f"expected a snapshot of a stream with {expected}, got one with {got}{cure}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a portable snapshot, whole or not at all. SnapshotError for an exact one; OSError where it cannot."""
        if not self.portable:
            raise SnapshotError("only a portable snapshot goes into a file: take it with snapshot(portable=True)")
        tensors = {name: np.ascontiguousarray(array) for name, array in _tensors(self.state).items()}
        header = json.dumps(_header(self), sort_keys=True)
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "header": header,
            "sha256": _digest(header, tensors),
        }
        with replacing(Path(path)) as draft:
            draft.write_bytes(to_safetensors(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Snapshot":
        """Reads what `save` wrote. SnapshotError for anything else, and for a file that has changed since."""
        try:
            content = Path(path).read_bytes()
            tensors, metadata = from_safetensors(content), _metadata(content)
        except FileNotFoundError as error:
            raise SnapshotError(f"expected a snapshot at {os.fspath(path)}, found no such file") from error
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise SnapshotError(f"{os.fspath(path)} is no snapshot, or a damaged one ({error})") from error
        if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
            got = f"{metadata.get('format')!r} {metadata.get('version')!r}"
            raise SnapshotError(f"expected a {FORMAT} of version {VERSION} at {os.fspath(path)}, got {got}")
        header = metadata.get("header", "")
        if _digest(header, tensors) != metadata.get("sha256"):
            raise SnapshotError(f"{os.fspath(path)} is damaged: its SHA-256 is not the one it was saved with")
        try:
            return _snapshot(json.loads(header), tensors)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise SnapshotError(f"{os.fspath(path)} does not describe a stream ({error!r})") from error


def in_fp32(state: State) -> State:
    """A portable state with its keys and values in fp32."""
    keys = {frame: kv.astype(np.float32, copy=False) for frame, kv in state.engine.keys.items()}
    return replace(state, engine=replace(state.engine, keys=keys))


# ---------------------------------------------------------------------- files


def _tensors(state: State) -> dict[str, np.ndarray]:
    memory: Memory = state.engine
    tensors = {f"decoder.{i}": array for i, array in enumerate(memory.decoder)}
    tensors |= {f"past.{unit}": latents for unit, latents in state.past.latents}
    tensors |= {f"given.{i}": latents for i, latents in enumerate(state.past.given)}
    tensors |= {f"timeline.{name}": array for name, array in state.timeline.to_file()[1].items()}
    if memory.keys:
        tensors["keys"] = np.stack([memory.keys[frame] for frame in sorted(memory.keys)])
    if state.queue:
        tensors["queue"] = np.stack([frame.pixels for frame in state.queue])
    return tensors


def _header(snapshot: Snapshot) -> dict[str, Any]:
    state = snapshot.state
    return {
        "origin": asdict(snapshot.origin),
        "unit": state.next,
        "shown": state.shown,
        "frames": sorted(state.engine.keys),
        "recached": state.past.recached,
        "queue": [[frame.index, frame.latency, frame.prompt] for frame in state.queue],
        "timeline": state.timeline.to_file()[0],
    }


def _snapshot(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Snapshot:
    origin = Origin(**header["origin"])
    config = ModelConfig.from_dict(json.loads(origin.config))
    unit, shown = int(header["unit"]), int(header["shown"])
    keys = {int(frame): tensors["keys"][i] for i, frame in enumerate(header["frames"])}
    timeline = _below(tensors, "timeline")
    state = State(
        engine=Memory(unit=unit, keys=keys, decoder=_numbered(tensors, "decoder")),
        past=Past(
            tuple(sorted((int(name), array) for name, array in _below(tensors, "past").items())),
            _numbered(tensors, "given"),
            header["recached"],
        ),
        next=unit,
        shown=shown,
        queue=tuple(
            Frame(tensors["queue"][i], index, index / config.fps, config.unit_at(index), latency, prompt)
            for i, (index, latency, prompt) in enumerate(header["queue"])
        ),
        timeline=Timeline.from_file(header["timeline"], timeline),
    )
    _check_shapes(config, state, header["timeline"])
    return Snapshot(origin, state)


def _check_shapes(config: ModelConfig, state: State, timeline: Mapping[str, Any]) -> None:
    """ValueError where a file with the right checksum holds what no stream of its model would have written."""
    latents = (1, config.unit, config.latent_channels, *config.latent_grid)
    rows = (config.text.length, config.text.width)
    keys = (config.depth, 2, 2 if config.guided else 1, config.frame_tokens, config.heads, config.head_dim)
    end, g = state.next * config.unit, config.geometry
    live = [*range(min(g.sinks, end)), *range(max(g.sinks, end - g.window), end)]
    kept = [unit for unit, _ in state.past.latents]
    checks = {
        "frames": sorted(state.engine.keys) == live and all(kv.shape == keys for kv in state.engine.keys.values()),
        "latents": all(x.shape == latents for x in (*state.past.given, *(x for _, x in state.past.latents)))
        and kept == list(range(state.next - len(kept), state.next)),
        "frames on their way": [frame.index for frame in state.queue]
        == list(range(state.shown + 1, config.first_frame(state.next)))
        and all(frame.pixels.shape == (*config.frame_size, 3) for frame in state.queue),
        "texts": all(x.shape == rows for x in state.timeline.to_file()[1].values())
        and all(entry["blend"] in BLENDS for entry in timeline["texts"]),
        "decoder": bool(state.engine.decoder) == (state.next > 0),
    }
    if wrong := [name for name, right in checks.items() if not right]:
        raise ValueError(f"{', '.join(wrong)} of a stream at unit {state.next} look otherwise")


def _below(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{prefix}."): x for name, x in tensors.items() if name.startswith(f"{prefix}.")}


def _numbered(tensors: Mapping[str, np.ndarray], prefix: str) -> tuple[np.ndarray, ...]:
    found = _below(tensors, prefix)
    return tuple(found[str(i)] for i in range(len(found)))


def _metadata(content: bytes) -> dict[str, str]:
    """What a safetensors file says of itself; its header is known to be sound."""
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return metadata


def _digest(header: str, tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the header and then, in the order of their names, of name, type, shape and bytes of every tensor."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype.str} {list(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()
