"""A selection of clips into shards: decoded, encoded, written, from where an earlier run was stopped."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from cfrt import weights
from cfrt.config import ModelConfig, TextConfig
from cfrt.errors import ConfigError, EngineError, PromptError, VideoError
from cfrt.nn import codec
from training import footage, preview, shards, wording, workers
from training.footage import Cut, Rejected
from training.selection import Job, Selection
from training.shards import DataError, Manifest, Sample, Shards
from training.wording import Wording

REJECTED, PREVIEW = "rejected.csv", "preview.png"
SHARD_BYTES, SHARD_CLIPS = 2**28, 1000
"""A shard holds about so many bytes of latents, and at most so many clips: the most that a kill can cost."""
PREVIEWED, PREVIEW_WIDTH = 4, 2000
"""Clips and pixels of a preview."""


class Codec(Protocol):
    """An autoencoder with Wan's time law."""

    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents [B, n, C, h, w] of clips [B, 1 + 4 (n - 1), 3, H, W] in [0, 1]."""

    def decode(self, latents: Tensor) -> tuple[Tensor, Any]:
        """The clips, not clamped; and a state that is not needed here."""


class Tools(Protocol):
    """What turns clips into numbers. Pickled on its way to every worker, so it should load what is large when asked."""

    @property
    def device(self) -> str: ...

    @property
    def codec(self) -> Codec: ...

    @property
    def wording(self) -> Wording: ...


@dataclass(frozen=True)
class ModelTools:
    """The autoencoder and the text encoder of a model's folder; the text config may be another than the folder's."""

    folder: Path
    text: TextConfig
    device: str = "cpu"

    @cached_property
    def codec(self) -> Codec:
        config, tensors = self._read()
        network: Any = codec.codec(config.autoencoder, weights.part(tensors, "autoencoder"))
        made: Codec = network.eval().requires_grad_(False).to(self.device)
        return made

    @cached_property
    def wording(self) -> Wording:
        config, tensors = self._read()
        return wording.wording(replace(config, text=self.text), tensors, self.folder)

    @property
    def fingerprint(self) -> str:
        """Which autoencoder it is."""
        return shards.fingerprint(weights.part(self._read()[1], "autoencoder"))

    def _read(self) -> tuple[ModelConfig, weights.Arrays]:
        """EngineError when the model only decodes."""
        config, tensors = weights.load_model(self.folder)
        if config.autoencoder.kind == "taehv":
            raise EngineError(f"{config.name!r} decodes through TAEHV, which cannot encode; use a model with Wan's own")
        return config, tensors

    def __reduce__(self) -> tuple[type[ModelTools], tuple[Path, TextConfig, str]]:
        """Without what has been loaded: whoever gets it loads its own."""
        return ModelTools, (self.folder, self.text, self.device)


# ---------------------------------------------------------------------- one clip


class Encoder:
    """From a job to a sample, or to the reason why there is none."""

    def __init__(self, tools: Tools, cut: Cut) -> None:
        self._codec, self._device, self._cut = tools.codec, tools.device, cut
        words = tools.wording
        self._say = lru_cache(maxsize=8)(lambda caption: wording.stored(words.encode(caption)))

    def __call__(self, job: Job) -> Sample | Rejected:
        video, film = job.source.video, job.source.film
        try:
            latents = encode(self._codec, footage.read(video.path, job.start, self._cut), self._device)
            said = self._say(video.caption)
        except (VideoError, PromptError) as error:
            return Rejected(file=video.name, reason=f"the clip from {job.start:g} s: {error}")
        about = {"path": video.name, "start": job.start, "fps": film.fps, "size": film.size}
        return Sample(key=f"{job.number:08d}", latents=latents, text=said, caption=video.caption, about=about)


@torch.no_grad()
def encode(codec: Codec, pixels: np.ndarray, device: str = "cpu") -> np.ndarray:
    """Latents [n, C, h, w] fp16 of a clip uint8 [T, H, W, 3]. VideoError when they do not fit fp16."""
    video = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)[None].float() / 255
    latents = codec.encode(video)[0].half().cpu()
    if not latents.isfinite().all():
        raise VideoError("its latents are not finite or beyond fp16")
    return latents.numpy()


# ---------------------------------------------------------------------- all of them


def describe(
    selection: Selection, tools: ModelTools, *, negative: str | None = None, shard_clips: int | None = None
) -> Manifest:
    """The data set to be made. ConfigError when a model that reads a table is given a negative prompt."""
    if negative is not None and selection.model.text.kind == "table":
        raise ConfigError(
            f"{selection.model.name!r} reads a table, whose unconditional prompt is empty: drop --negative"
        )
    if shard_clips is not None and shard_clips < 1:
        raise ConfigError(f"expected shards of at least one clip, got {shard_clips}")
    latents = (selection.frames, selection.model.latent_channels, *selection.model.latent_grid)
    size = max(1, min(SHARD_CLIPS, SHARD_BYTES // (2 * int(np.prod(latents)))))
    settings = asdict(selection.settings) | {"footage": selection.fingerprint, "negative": negative}
    return Manifest(
        model=selection.model,
        frames=selection.frames,
        autoencoder=tools.fingerprint,
        settings=settings | {"shard_clips": shard_clips or size},
    )


def run(selection: Selection, tools: Tools, out: Path, fresh: Manifest, *, crew: int = 1) -> Manifest:
    """Make what `out` lacks of the data set that `fresh` describes, with `crew` processes.

    DataError when `out` holds another data set, or when not one clip could be made."""
    out.mkdir(parents=True, exist_ok=True)
    manifest, size = _begun(out, fresh), fresh.settings["shard_clips"]
    missing = [n for n in range(-(-selection.clips // size)) if not _there(out, manifest, n)]
    if manifest.complete and not missing:
        return manifest
    report(out, selection, manifest)
    if (negative := manifest.settings["negative"]) is not None:
        shards.save_null(out, tools.wording.encode(negative))
    shares: dict[int, list[Job]] = {number: [] for number in missing}
    for job in selection.jobs():
        shares.get(job.number // size, []).append(job)
    jobs, left = chain.from_iterable(shares.values()), sum(map(len, shares.values()))
    make = partial(Encoder, tools, selection.cut)
    results = workers.ordered(make, jobs, min(crew, left), "run the same command again to go on")
    with closing(results), _bar(selection.clips, left) as bar:
        for number, share in shares.items():
            failed: list[Rejected] = []
            samples = _kept(islice(results, len(share)), manifest, failed, bar)
            shard = shards.write(out / _name(number), samples)
            manifest = manifest.with_shard(number, shard, ((r.file, r.reason) for r in failed))
            manifest.save(out)
    report(out, selection, manifest)
    if not manifest.clips:
        raise DataError(f"none of the files could be used; {out / REJECTED} says why")
    manifest = replace(manifest, complete=True)
    manifest.save(out)
    return manifest


def _name(number: int) -> str:
    return f"{number:05d}.tar"


def _there(out: Path, manifest: Manifest, number: int) -> bool:
    """Is a shard finished, and still as long as it was?"""
    path = out / _name(number)
    return number < len(manifest.shards) and path.exists() and path.stat().st_size == manifest.shards[number].bytes


def _begun(out: Path, fresh: Manifest) -> Manifest:
    """What an earlier run left in `out`, if it was making the same data set."""
    if not (out / shards.MANIFEST).exists():
        if others := sorted(out.glob("*.tar")):
            raise DataError(f"{out} holds {others[0].name} and no {shards.MANIFEST}; give an empty folder")
        fresh.save(out)
        return fresh
    old = Manifest.load(out)
    names = ("model", "frames", "autoencoder", "settings")
    differing = [name for name in names if getattr(old, name) != getattr(fresh, name)]
    if differing:
        raise DataError(
            f"{out} was begun with other footage or settings ({_changes(old, fresh)}); give another folder, or the "
            "footage and the settings that it was begun with"
        )
    return old


def _changes(old: Manifest, fresh: Manifest) -> str:
    names = [name for name in ("model", "frames", "autoencoder") if getattr(old, name) != getattr(fresh, name)]
    settings = sorted(old.settings.keys() | fresh.settings.keys())
    return ", ".join([*names, *(name for name in settings if old.settings.get(name) != fresh.settings.get(name))])


def _kept(
    results: Iterator[Sample | Rejected], manifest: Manifest, failed: list[Rejected], bar: tqdm[Any]
) -> Iterator[Sample]:
    for result in results:
        bar.update()
        if isinstance(result, Rejected):
            failed.append(result)
        elif result.latents.shape != manifest.latents:
            raise DataError(
                f"expected latents {manifest.latents} of a clip, the autoencoder made {result.latents.shape}"
            )
        else:
            yield result


def _bar(total: int, left: int) -> tqdm[Any]:
    return tqdm(total=total, initial=total - left, desc="clips", unit="clip", disable=not sys.stderr.isatty())


def report(out: Path, selection: Selection, manifest: Manifest) -> list[Rejected]:
    """Write rejected.csv: every file that cannot be used, or not everywhere, and why."""
    late = [Rejected(file=file, reason=reason) for file, reason in manifest.failed]
    rejected = sorted([*selection.rejected, *late], key=lambda r: (r.file, r.reason))
    with io.StringIO(newline="") as text:
        table = csv.writer(text, lineterminator="\n")
        table.writerows([("file", "reason"), *((r.file, r.reason) for r in rejected)])
        shards.replace_file(out / REJECTED, text.getvalue().encode())
    return rejected


# ---------------------------------------------------------------------- a look at them


@torch.no_grad()
def look(selection: Selection, codec: Codec, out: Path, device: str = "cpu") -> list[tuple[str, float, float]]:
    """Decode a few clips of finished shards beside their footage: (file, start, PSNR in dB) of each, and preview.png,
    in which each clip stands above its reconstruction."""
    data = Shards(out, seed=0)
    sources = {source.video.name: source.video.path for source in selection.sources}
    rows, found = [], []
    for clip in (k * len(data) // min(PREVIEWED, len(data)) for k in range(min(PREVIEWED, len(data)))):
        about = data.about(clip)
        pixels = footage.read(sources[about["path"]], about["start"], selection.cut)
        video = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        decoded = codec.decode(data.latents(clip)[None].to(device))[0][0].clamp(0, 1).cpu()
        psnr = -10 * (decoded - video).square().mean().log10().item()
        found.append((about["path"], about["start"], psnr))
        rows += [video, decoded]
    columns = max(2, PREVIEW_WIDTH // selection.cut.size[1])
    every = max(selection.model.autoencoder.temporal, -(-selection.cut.frames // columns))
    preview.sheet(torch.stack(rows), out / PREVIEW, every)
    return found
