"""The official data sets of Causal Forcing and its kin: LMDB rows of latents and prompts, read as they are.

Layout (CausVid, Self Forcing and Causal Forcing write the same): an environment holds `latents_shape`, the shape of all
rows in decimal, the first number their count; `latents_I_data`, row I as raw fp16, little end first; and
`prompts_I_data`, its prompt in UTF-8. A data set is one environment, or a folder of them, shards by name.

A row of latents is [E, n, C, h, w], Wan-normalised: an ODE trajectory from pure noise down, or [n, C, h, w], a clip
alone. In Causal Forcing's ODE rows E = S + 2: S states (for 4 steps, t = 1000, 937.5, 833.3, 625), the ODE's end
point, and the real clip that was the teacher's past. In Self Forcing's, E = S + 1: there was no real clip. So the last
entry is always the clip to train on, and what a network reads of a prompt is left to the `Wording` given.

Shapes: B clips, S states, n latent frames."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cfrt.config import ModelConfig
from training.data import Batch, Prompts
from training.ode import Pairs
from training.shards import DataError, walk
from training.wording import Wording

if TYPE_CHECKING:
    from lmdb import Environment

FILE = "data.mdb"
NUMBER = np.dtype("<f2")


class Rows:
    """Rows as they lie in their environments, for one model. DataError when they are not for it."""

    def __init__(self, folder: str | Path, model: ModelConfig, frames: int | None = None) -> None:
        self.folder, self.model = Path(folder), model
        self.clip = (frames or model.trained_frames, model.latent_channels, *model.latent_grid)
        self._shards = [(_environment(path), _shape(path)) for path in _paths(self.folder)]
        for _, shape in self._shards:
            if shape[-4:] != self.clip or len(shape) not in (5, 6):
                raise DataError(
                    f"expected rows of {[*self.clip]} or [E, {', '.join(map(str, self.clip))}] in {self.folder} for "
                    f"{model.name!r}, found {[*shape[1:]]}"
                )
        entries = sorted({shape[1] if len(shape) == 6 else 1 for _, shape in self._shards})
        if len(entries) > 1:
            raise DataError(f"expected the same number of entries in all rows of {self.folder}, found {entries}")
        self.entries = entries[0]
        self._last = np.cumsum([shape[0] for _, shape in self._shards])

    def __len__(self) -> int:
        return int(self._last[-1])

    def latents(self, row: int) -> np.ndarray:
        """[E, n, C, h, w] fp16."""
        shard, number = self._find(row)
        data, shape = self._get(shard, f"latents_{number}_data"), (self.entries, *self.clip)
        if len(data) != NUMBER.itemsize * int(np.prod(shape)):
            raise DataError(
                f"row {row} of {self.folder} is damaged: {len(data)} bytes of latents do not make {[*shape]}"
            )
        return np.frombuffer(data, NUMBER).reshape(shape)

    def prompt(self, row: int) -> str:
        shard, number = self._find(row)
        return self._get(shard, f"prompts_{number}_data").decode()

    def _find(self, row: int) -> tuple[int, int]:
        """(shard, number in it) of a row."""
        shard = int(np.searchsorted(self._last, row, side="right"))
        return shard, row - (int(self._last[shard - 1]) if shard else 0)

    def _get(self, shard: int, key: str) -> bytes:
        with self._shards[shard][0].begin() as reading:
            value = reading.get(key.encode())
        if value is None:
            raise DataError(f"expected {key} in shard {shard} of {self.folder}, found no such key; is it cut off?")
        return bytes(value)


class Clips:
    """The clips of official rows as a data set; of ODE rows, the real clip that each ends in."""

    def __init__(
        self,
        folder: str | Path,
        model: ModelConfig,
        wording: Wording,
        seed: int,
        *,
        frames: int | None = None,
        null: Tensor | None = None,
    ) -> None:
        self.rows, self.wording, self.seed, self.null = Rows(folder, model, frames), wording, seed, null
        self._check()

    def _check(self) -> None:
        """What a kind of row must be besides."""

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: int, size: int) -> Batch:
        """Batch `index` of an endless walk through permutations of the data set, one permutation an epoch."""
        picks = walk(index, size, len(self), self.seed)
        latents = np.stack([self.rows.latents(row)[-1] for row in picks])
        return Batch.of(torch.from_numpy(latents).float(), self._prompts(picks))

    def prompts(self, size: int, generator: torch.Generator) -> Prompts:
        """Prompts of rows drawn at random."""
        return self._prompts(torch.randint(len(self), (size,), generator=generator).tolist())

    def _prompts(self, picks: list[int]) -> Prompts:
        said = torch.from_numpy(np.stack([self.wording.encode(self.rows.prompt(row)) for row in picks]))[:, None]
        captions = said.expand(-1, 2, *[-1] * (said.dim() - 2))
        caption = torch.zeros(len(picks), self.rows.clip[0], dtype=torch.long)
        return Prompts(captions=captions, caption=caption, null=self.null)


class Trajectories(Clips):
    """ODE rows, also as the pairs that `training.ode` learns from: index it with row numbers [B].

    DataError when a row does not hold as many states as the model has steps."""

    @property
    def states(self) -> int:
        """S."""
        return len(self.rows.model.steps)

    def _check(self) -> None:
        if self.rows.entries not in (self.states + 1, self.states + 2):
            raise DataError(
                f"expected ODE rows of {self.states} states and an end, with or without a real clip, in "
                f"{self.rows.folder} for {self.rows.model.name!r}; found {self.rows.entries} entries a row"
            )

    def __getitem__(self, picks: Tensor) -> Pairs:
        tracks = torch.from_numpy(np.stack([self.rows.latents(row) for row in picks.tolist()])).float()
        prompts = self._prompts(picks.tolist())
        return Pairs(
            states=tracks[:, : self.states],
            end=tracks[:, self.states],
            clean=tracks[:, -1],
            captions=prompts.captions,
            caption=prompts.caption,
            null=prompts.null,
        )


def _paths(folder: Path) -> list[Path]:
    found = [folder] if (folder / FILE).is_file() else sorted(path.parent for path in folder.glob(f"*/{FILE}"))
    if not found:
        raise DataError(f"expected LMDB environments in {folder}: {FILE}, or folders with a {FILE} each; found none")
    return found


def _shape(path: Path) -> tuple[int, ...]:
    """Rows, and the shape of one."""
    with _environment(path).begin() as reading:
        text = reading.get(b"latents_shape")
    words = [] if text is None else bytes(text).decode(errors="replace").split()
    if not words or not all(word.isdecimal() for word in words):
        raise DataError(f"expected the shape of its rows under latents_shape in {path}, found {text!r}")
    return tuple(map(int, words))


def _environment(path: Path) -> Environment:
    return _opened(path.resolve())


@cache
def _opened(path: Path) -> Environment:
    """One environment a path and process, which is what LMDB allows; it stays open. Nothing is written, not even the
    lock, so that data sets on read-only disks can be read."""
    import lmdb

    try:
        return lmdb.open(str(path), readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise DataError(f"{path} is no LMDB environment, or damaged: {error}") from error
