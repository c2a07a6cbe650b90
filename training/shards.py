"""A data set in files: webdataset shards of latents and captions, and the walk of training through them.

A shard is a tar. A clip in it is four members, KEY.latents.npy (fp16 [n, C, h, w], normalised), KEY.text.npy (what the
network reads of its caption: int32 rows [L] of the small table, or fp16 embeddings [l, D]), KEY.caption.txt, and
KEY.json (where it comes from). manifest.json says which model they were made for and the SHA-256 of every shard. Any
reader of webdataset can stream them; training reads clips in the order of a permutation, so it looks up where in its
tar each one lies, once, and reads only what a batch asks for.

Shapes: B clips, n latent frames, C x h x w a latent frame, L rows of a caption, D the width of an embedding."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cfrt.config import ModelConfig
from cfrt.errors import CfrtError, ConfigError
from training.data import Batch, Prompts
from training.loop import write_tensors
from training.wording import stored, whole

MANIFEST, INDEX, NULL = "manifest.json", "index.safetensors", "null.npy"
VERSION = 1
LATENTS, TEXT, CAPTION, ABOUT = MEMBERS = ("latents.npy", "text.npy", "caption.txt", "json")
SHOWN = 4  # differences that an error names


class DataError(CfrtError):
    """A data set that is missing, unfinished, damaged, or made for another model."""


# ---------------------------------------------------------------------- what a folder holds


@dataclass(frozen=True, kw_only=True)
class Shard:
    name: str
    clips: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What was made, for which model, and how."""

    model: ModelConfig
    frames: int
    """n: latent frames of a clip."""
    autoencoder: str
    """Fingerprint of the autoencoder's weights: latents mean nothing to another."""
    settings: Mapping[str, Any]
    """What the clips depend on besides; the same settings give the same bytes."""
    shards: tuple[Shard, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()
    """Files that could not be used and why, found while clips were made."""
    complete: bool = False
    version: int = field(default=VERSION)

    @property
    def clips(self) -> int:
        return sum(shard.clips for shard in self.shards)

    @property
    def latents(self) -> tuple[int, ...]:
        """[n, C, h, w]."""
        return (self.frames, self.model.latent_channels, *self.model.latent_grid)

    @property
    def text(self) -> tuple[int, ...]:
        """[L] rows or [L, D] embeddings."""
        text = self.model.text
        return (text.length,) if text.kind == "table" else (text.length, text.width)

    def with_shard(self, number: int, shard: Shard, failed: Iterable[tuple[str, str]]) -> Manifest:
        """The same with one more shard, or with another in its place, and what it cost."""
        known = dict.fromkeys([*self.failed, *failed])
        return replace(self, shards=(*self.shards[:number], shard, *self.shards[number + 1 :]), failed=tuple(known))

    def save(self, folder: Path) -> None:
        content = asdict(self) | {
            "model": self.model.to_dict(),
            "geometry": {"latents": self.latents, "text": self.text, "clips": self.clips},  # for people; derived
        }
        replace_file(folder / MANIFEST, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())

    @staticmethod
    def load(folder: Path) -> Manifest:
        """DataError when there is none, or none that this version reads."""
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content.pop("geometry", None)
            content |= {
                "model": ModelConfig.from_dict(content["model"]),
                "shards": tuple(Shard(**shard) for shard in content["shards"]),
                "failed": tuple((file, reason) for file, reason in content["failed"]),
            }
            found = Manifest(**content)
        except FileNotFoundError:
            raise DataError(
                f"expected a data set in {folder}, found no {MANIFEST}; `python -m training prepare` makes one"
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
            raise DataError(f"{path} is damaged, or of another version of cfrt: {error!r}") from error
        if found.version != VERSION:
            raise DataError(f"expected version {VERSION} of {path}, got {found.version}; make the data set anew")
        return found

    def differences(self, model: ModelConfig) -> list[str]:
        """Why `model` cannot be trained on these clips; nothing when it can."""
        names = ("latent_channels", "latent_grid", "autoencoder", "text", "fps")
        made, wanted = ({name: getattr(m, name) for name in names} for m in (self.model, model))
        found = [
            f"{n}: the clips have {_short(made[n])}, it has {_short(wanted[n])}" for n in names if made[n] != wanted[n]
        ]
        if self.frames % model.unit:
            found.append(f"unit: {self.frames} latent frames do not make units of {model.unit}")
        return found


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 100 else f"{text[:97]}..."


def fingerprint(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names and values: which autoencoder it was."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + np.ascontiguousarray(weights[name]).tobytes())
    return digest.hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.part")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


# ---------------------------------------------------------------------- writing


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One clip on its way into a shard."""

    key: str
    latents: np.ndarray  # [n, C, h, w] fp16
    text: np.ndarray  # as `training.wording.stored` has it
    caption: str
    about: Mapping[str, Any]

    def members(self) -> dict[str, Any]:
        contents = (_npy(self.latents), _npy(self.text), self.caption.encode(), _json(self.about))
        return {"__key__": self.key, **dict(zip(MEMBERS, contents, strict=True))}


def _npy(array: np.ndarray) -> bytes:
    with io.BytesIO() as file:
        np.save(file, array, allow_pickle=False)
        return file.getvalue()


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, ensure_ascii=False).encode()


def write(path: Path, samples: Iterable[Sample]) -> Shard:
    """A shard, whole or not at all; the same samples give the same bytes."""
    from webdataset import TarWriter

    draft, clips = path.with_name(f".{path.name}.part"), 0
    try:
        with draft.open("wb") as file:
            with TarWriter(file, encoder=False, mtime=0.0, user="cfrt", group="cfrt") as tar:
                for sample in samples:
                    tar.write(sample.members())
                    clips += 1
            file.flush()
            os.fsync(file.fileno())
        digest, size = _sha256(draft), draft.stat().st_size
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return Shard(name=path.name, clips=clips, bytes=size, sha256=digest)


def save_null(folder: Path, said: np.ndarray) -> None:
    """Keep the unconditional prompt, embeddings [L, D]."""
    replace_file(folder / NULL, _npy(stored(said)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------- reading


class Shards:
    """The data set that training walks through. Sizes are checked when it is opened, hashes by `verify`.

    model: what is to be trained on it; DataError when the clips are not for it. Nothing is kept in memory but where
    each clip lies, 72 bytes a clip."""

    def __init__(self, folder: str | os.PathLike[str], seed: int, model: ModelConfig | None = None) -> None:
        self.folder, self.seed = Path(folder), seed
        self.manifest = Manifest.load(self.folder)
        if not self.manifest.complete or not self.manifest.clips:
            raise DataError(f"the data set in {self.folder} is not finished; run its `prepare` command again to go on")
        differences = [] if model is None else self.manifest.differences(model)
        if model is not None and differences:
            raise DataError(f"{self.folder} was not made for {model.name!r}; {'; '.join(differences[:SHOWN])}")
        self._check_sizes()
        self._places = _index(self.folder, self.manifest)
        self.null = self._read_null()

    def __len__(self) -> int:
        return len(self._places)

    @property
    def model(self) -> ModelConfig:
        """The model that the clips were made for, with the table that its captions are rows of."""
        return self.manifest.model

    def batch(self, index: int, size: int) -> Batch:
        """Batch `index` of an endless walk through permutations of the data set, one permutation an epoch."""
        clips = walk(index, size, len(self), self.seed)
        latents = torch.from_numpy(np.stack([self._array(clip, LATENTS) for clip in clips])).float()
        return Batch.of(latents, self._prompts(clips))

    def prompts(self, size: int, generator: torch.Generator) -> Prompts:
        """Captions of clips drawn at random."""
        return self._prompts(torch.randint(len(self), (size,), generator=generator).tolist())

    def about(self, clip: int) -> dict[str, Any]:
        """Where clip number `clip` comes from, and its caption."""
        return json.loads(self._member(clip, ABOUT)) | {"caption": self._member(clip, CAPTION).decode()}

    def latents(self, clip: int) -> Tensor:
        """[n, C, h, w] of clip number `clip`, fp32."""
        return torch.from_numpy(self._array(clip, LATENTS)).float()

    def verify(self) -> None:
        """DataError that names every shard whose bytes are not those that were written."""
        changed = [s.name for s in self.manifest.shards if _sha256(self.folder / s.name) != s.sha256]
        if changed:
            raise DataError(
                f"{len(changed)} of {len(self.manifest.shards)} shards in {self.folder} are damaged: "
                f"{', '.join(changed[:SHOWN])}; delete those and run their `prepare` command again"
            )

    def _prompts(self, clips: Sequence[int]) -> Prompts:
        said = np.stack([whole(self._array(clip, TEXT), self.manifest.text) for clip in clips])
        both = torch.from_numpy(said)[:, None]
        captions = both.expand(-1, 2, *[-1] * (both.dim() - 2))  # the same caption before and after
        return Prompts(
            captions=captions, caption=torch.zeros(len(clips), self.manifest.frames, dtype=torch.long), null=self.null
        )

    def _array(self, clip: int, member: str) -> np.ndarray:
        try:
            return np.load(io.BytesIO(self._member(clip, member)), allow_pickle=False)
        except ValueError as error:
            raise DataError(f"clip {clip} of {self.folder} is damaged; `prepare --verify` says where") from error

    def _member(self, clip: int, member: str) -> bytes:
        place = self._places[clip]
        shard, (offset, size) = int(place[0]), place[1:].view(-1, 2)[MEMBERS.index(member)].tolist()
        with (self.folder / self.manifest.shards[shard].name).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def _check_sizes(self) -> None:
        for shard in self.manifest.shards:
            path = self.folder / shard.name
            size = path.stat().st_size if path.exists() else None
            if size != shard.bytes:
                found = "nothing" if size is None else f"{size} bytes"
                raise DataError(
                    f"expected {shard.bytes} bytes at {path}, found {found}; copy it again, or make it anew"
                )

    def _read_null(self) -> Tensor | None:
        """[L, D], if the data set has an unconditional prompt of its own."""
        path = self.folder / NULL
        return torch.from_numpy(whole(np.load(path), self.manifest.text)) if path.exists() else None


def walk(index: int, size: int, clips: int, seed: int) -> list[int]:
    """Which clips make batch `index`: a stretch of an endless row of permutations."""
    positions = range(index * size, (index + 1) * size)
    return [int(_permutation(clips, seed, position // clips)[position % clips]) for position in positions]


@lru_cache(maxsize=4)
def _permutation(clips: int, seed: int, epoch: int) -> Tensor:
    mixed = int.from_bytes(hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest()) >> 1
    return torch.randperm(clips, generator=torch.Generator().manual_seed(mixed))


# ---------------------------------------------------------------------- where clips lie


def _index(folder: Path, manifest: Manifest) -> Tensor:
    """[N, 9] int64 for every clip: its shard, then offset and size of each of MEMBERS. Kept in `folder` if it can be
    written to."""
    digest = hashlib.sha256(" ".join(shard.sha256 for shard in manifest.shards).encode()).hexdigest()
    path = folder / INDEX
    with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("shards") == digest:
            return file.get_tensor("places")
    places = torch.tensor([place for n, shard in enumerate(manifest.shards) for place in _places(folder, n, shard)])
    with suppress(OSError):
        write_tensors(path, {"places": places}, {"shards": digest})
    return places


def _places(folder: Path, number: int, shard: Shard) -> list[list[int]]:
    found: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(folder / shard.name) as tar:
        for member in tar:
            key, _, name = member.name.partition(".")
            found.setdefault(key, {})[name] = (member.offset_data, member.size)
    whole_clips = [clip for clip in found.values() if clip.keys() >= set(MEMBERS)]
    if len(whole_clips) != shard.clips:
        raise DataError(
            f"expected {shard.clips} clips in {folder / shard.name}, found {len(whole_clips)}; make it anew"
        )
    return [[number, *(value for name in MEMBERS for value in clip[name])] for clip in whole_clips]
