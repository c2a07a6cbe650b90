"""`python -m training prepare`: a folder of videos and captions becomes shards of latents and text that the recipes
train on.

First a selection: which files can be used, where their clips begin. Then the shards, one after the other. A shard
depends on the selection and its number alone, so a run that is killed goes on where it was and ends in the same
bytes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    from training.encoding import ModelTools
    from training.selection import Selection
    from training.shards import Manifest

NAMED = 5
"""Files, or words, that the summary names before it counts the rest."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Make shards of latents and text from your own videos.

    Run the same command again to go on after an interruption. OUT gets the shards (webdataset .tar files),
    manifest.json, rejected.csv (every file that cannot be used, and why) and preview.png (a few clips, each above what
    the autoencoder makes of it)."""

    out: Path
    """Folder for the shards."""
    videos: Path | None = None
    """Folder of videos, each with its caption beside it: NAME.mp4, NAME.txt."""
    csv: Path | None = None
    """A table instead of .txt files: columns path (below VIDEOS) and caption; start and end, in seconds, where a
    caption is about a part of its video."""
    model: str = "tiny"
    """Whose frame size and rate, autoencoder and text encoder: an embedded student, or the folder of a model."""
    frames: int | None = None
    """Latent frames of a clip; default: those of the model's training clips. n of them are 1 + 4 (n - 1) pictures."""
    stride: float | None = None
    """Seconds from one clip of a video to its next; default: a clip's own length."""
    clips_per_video: int | None = None
    """At most so many clips of one video, spread evenly."""
    min_fps: float | None = None
    """Reject slower footage; default: nine tenths of the model's frame rate."""
    enlarge: bool = False
    """Take footage that is smaller than the model's frames."""
    vocabulary: Literal["model", "captions"] = "model"
    """For a model that reads a closed vocabulary: its own, or one made from these captions, to train from nothing."""
    negative: str | None = None
    """Prompt of the unconditional branch, for a model with a text encoder; default: none, zeros."""
    shard_clips: int | None = None
    """Clips of a shard; default: as many as make 256 MiB of latents, at most 1000."""
    workers: int | None = None
    """Processes; default: one for every core, one on a GPU. How many there are does not change a byte."""
    device: str = "cpu"
    """Where the autoencoder runs."""
    dry_run: bool = False
    """Say what can be used and what would be made, and stop."""
    verify: bool = False
    """Compare the shards in OUT with the hashes in their manifest, and stop."""


def main(arguments: list[str]) -> None:
    """The command. Exits with 1 when nothing can be used, or something is wrong with what was asked."""
    asked = tyro.cli(Arguments, prog="python -m training prepare", args=arguments, config=(tyro.conf.DisallowNone,))
    from cfrt.errors import CfrtError  # after the command line, so that --help is quick

    try:
        if asked.verify:
            _verify(asked.out)
        else:
            _prepare(asked)
    except CfrtError as error:
        print(f"training: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("training: stopped; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None


def _verify(out: Path) -> None:
    from training.shards import Shards

    data = Shards(out, seed=0)
    data.verify()
    shards = _count(len(data.manifest.shards), "shard")
    print(f"{out}: {_count(len(data), 'clip')} in {shards}, every byte as it was written")


def _prepare(asked: Arguments) -> None:
    from training import encoding
    from training.workers import cores

    selection, tools = _selected(asked)
    print("\n".join(_found(selection)), flush=True)
    if asked.dry_run:
        return
    crew = asked.workers or (cores() if asked.device == "cpu" else 1)
    fresh = encoding.describe(selection, tools, negative=asked.negative, shard_clips=asked.shard_clips)
    manifest = encoding.run(selection, tools, asked.out, fresh, crew=crew)
    print("\n".join(_made(manifest, asked.out)))
    for name, start, psnr in encoding.look(selection, tools.codec, asked.out, asked.device):
        print(f"  {name} from {start:g} s, through the autoencoder: {psnr:.1f} dB")


def _selected(asked: Arguments) -> tuple[Selection, ModelTools]:
    from cfrt import students
    from cfrt.config import ModelConfig
    from cfrt.errors import ConfigError
    from training import footage, selection
    from training.encoding import ModelTools

    if asked.videos is None:
        raise ConfigError("expected --videos, the folder that the videos are in")
    folder = students.find(asked.model)
    config = ModelConfig.load(folder / students.CONFIG)
    videos, rejected = footage.tabled(asked.csv, asked.videos) if asked.csv else footage.listed(asked.videos)
    settings = selection.Settings(**{field.name: getattr(asked, field.name) for field in fields(selection.Settings)})
    found = selection.select(videos, rejected, config, settings)
    return found, ModelTools(folder, found.model.text, asked.device)


def _found(selection: Selection) -> list[str]:
    """What can be used, what cannot, and which words mean nothing to the model."""
    cut, refused = selection.cut, selection.rejected
    lines = [
        f"{_count(len(selection.sources), 'video')}, {_count(selection.clips, 'clip')} of {selection.frames} latent "
        f"frames = {cut.frames} frames of {cut.size[1]} x {cut.size[0]} pixels at {cut.fps:g} fps; "
        f"{_count(len(refused), 'file')} rejected"
    ]
    lines += [f"  {rejected.file}: {rejected.reason}" for rejected in refused[:NAMED]]
    if len(refused) > NAMED:
        lines.append(f"  and {len(refused) - NAMED} more")
    if selection.unread:
        words = [f"{word!r} ({count})" for word, count in list(selection.unread.items())[:NAMED]]
        more = f" and {len(selection.unread) - NAMED} more" if len(selection.unread) > NAMED else ""
        lines.append(
            f"words that {selection.model.name!r} does not read, with the number of videos: {', '.join(words)}{more}; "
            "--vocabulary captions makes a vocabulary of your captions"
        )
    return lines


def _made(manifest: Manifest, out: Path) -> list[str]:
    size = sum(shard.bytes for shard in manifest.shards) / 2**20
    lines = [f"{out}: {_count(manifest.clips, 'clip')} in {_count(len(manifest.shards), 'shard')}, {size:.1f} MiB"]
    if manifest.failed:
        lines.append(f"  {_count(len(manifest.failed), 'clip')} could not be made; rejected.csv says why")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    main(sys.argv[1:])
