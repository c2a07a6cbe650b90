"""Evaluation of any model that `cfrt.Stream` can load: prompts become films in VBench's layout, films become a table.

    python -m training evaluate --model M --prompts FILE --seeds 5 --out DIR

DIR/videos/{prompt}-{index}.mp4   the films, as VBench's standard mode looks for them (`training.prompts`)
DIR/prompts.json                  which prompt each file shows; also VBench's --prompt_file
DIR/rows.jsonl                    one line of numbers a film (`training.measures`), with the stream's own timings
DIR/results.json, DIR/RESULTS.md  the table, written anew from the rows each time

A film is finished when its row is written, which happens after the file has got its name; run the same command again to
go on after an interruption. What is measured here needs no network, and is measured on the stream's own pixels before
they are coded. VBench itself is run when it is installed (`training.leaderboard`)."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, Literal

import tyro
from tqdm.auto import tqdm

import cfrt
from cfrt import students
from cfrt.config import ModelConfig
from cfrt.errors import CfrtError, ConfigError, PromptError
from cfrt.text import PromptWarning
from cfrt.video import Writer
from training import leaderboard, measures, prompts, report
from training.measures import Meter
from training.prompts import Prompt, PromptList
from training.report import Row

HELD = 2 << 30
"""Bytes of frames kept until the stream is done, so that measuring doesn't slow what is being timed."""
SAMPLED = 1 << 20  # bytes at each end of a weight file that tell one from another


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Stream every prompt with several seeds, leave the films in VBench's layout and a table of what can be measured
    without a network; run VBench on them where it is installed.

    The embedded student's exact evaluation asks for a student instead: python -m training evaluate --student FOLDER."""

    model: str
    """Folder of a model, or the name of an embedded student."""
    prompts: Path
    """One prompt a line (or prompt<tab>what the model is given), or VBench's VBench_full_info.json."""
    out: Path
    """Folder for films, rows and tables."""
    extended: Path | None = None
    """Longer forms of the prompts, line by line, that the model is given instead; files keep the short names."""
    seeds: int = 5
    """Films of each prompt."""
    flicker_seeds: int | None = None
    """Films of the prompts that serve VBench's temporal flickering; its own protocol takes 25 and filters them."""
    seconds: float | None = None
    """Length of a film; default: as long as the clips that the model was trained on."""
    seed: int = 0
    """Each film's seed follows from this one, its prompt and its index."""
    limit: int | None = None
    """Only so many prompts, from the top."""
    engine: str = "auto"
    device: str = "cpu"
    precision: str = "fp32"
    threads: int | None = None
    vbench: Literal["auto", "standard", "custom", "off"] = "auto"
    """How VBench reads the films; auto: standard for its own prompts, custom for others, where it is installed."""
    dimensions: tuple[str, ...] = ()
    """Of VBench; default: all that apply."""

    def __post_init__(self) -> None:
        if self.seeds < 1 or (self.flicker_seeds is not None and self.flicker_seeds < self.seeds):
            raise ConfigError(f"expected 1 <= seeds <= flicker_seeds, got {self.seeds} and {self.flicker_seeds}")
        if self.seconds is not None and not 0 < self.seconds <= 3600:
            raise ConfigError(f"expected --seconds above 0 and at most 3600, got {self.seconds}")
        if unknown := set(self.dimensions) - set(leaderboard.DIMENSIONS):
            known = ", ".join(leaderboard.DIMENSIONS)
            raise ConfigError(f"expected VBench's dimensions ({known}), got {', '.join(sorted(unknown))}")


@dataclass(frozen=True)
class Film:
    """A video to be made."""

    file: str
    prompt: Prompt
    index: int
    seed: int


# -------------------------------------------------------------------------------------------------------- making films


def evaluate(arguments: Arguments) -> dict[str, Any]:
    """Everything the command does; gives what is in results.json."""
    asked = prompts.read(arguments.prompts, arguments.extended)
    if arguments.limit is not None:
        asked = PromptList(asked.prompts[: arguments.limit], asked.repeated, asked.info)
    out = arguments.out
    (out / "videos").mkdir(parents=True, exist_ok=True)
    wanted = films(asked, arguments)
    settings = _settings(arguments)
    _agree(out / "settings.json", settings)
    _write(out / "prompts.json", {film.file: film.prompt.name for film in wanted})
    rows = make(wanted, out, arguments, settings["frames"])
    about = {"settings": settings, "prompts": len(asked), "repeated_prompts": asked.repeated}
    results = about | report.summarise(rows) | {"vbench": _vbench(asked, wanted, arguments)}
    _write(out / "results.json", results)
    _replace(out / "RESULTS.md", report.as_markdown(results))
    return results


def films(asked: PromptList, arguments: Arguments) -> list[Film]:
    """All the films, seed by seed, so that an interrupted run has seen every prompt before it repeats one."""
    most = max(arguments.seeds, arguments.flicker_seeds or 0)
    if arguments.flicker_seeds and not any(leaderboard.FLICKER in prompt.dimensions for prompt in asked):
        raise ConfigError(
            f"--flicker-seeds needs prompts that serve {leaderboard.FLICKER}: VBench's JSON says which do"
        )
    stems = prompts.stems([prompt.name for prompt in asked], most, arguments.out / "videos")
    found = []
    for index in range(most):
        for prompt in asked:
            flickers = leaderboard.FLICKER in prompt.dimensions and arguments.flicker_seeds is not None
            if index < arguments.seeds or flickers:
                file = prompts.video_name(stems[prompt.name], index)
                found.append(Film(file, prompt, index, film_seed(arguments.seed, prompt.name, index)))
    return found


def film_seed(seed: int, name: str, index: int) -> int:
    """32 bits that depend on nothing else: neither on the other prompts nor on their order."""
    return int.from_bytes(blake2b(f"{seed}\0{name}\0{index}".encode(), digest_size=4).digest())


def make(wanted: Sequence[Film], out: Path, arguments: Arguments, frames: int) -> list[Row]:
    """The rows of all films; those that are missing are made."""
    path, videos = out / "rows.jsonl", out / "videos"
    known = {row["file"]: row for row in _rows(path)}
    done = {film.file: known[film.file] for film in wanted if _finished(film, known, videos)}
    with tqdm(total=len(wanted), initial=len(done), unit="film", desc="evaluate", disable=None) as bar:
        for film in wanted:
            if film.file not in done:
                row = done[film.file] = make_one(film, out, arguments, frames)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                bar.update()
    return [done[film.file] for film in wanted]


def make_one(film: Film, out: Path, arguments: Arguments, frames: int) -> Row:
    """One film under its name, and its numbers."""
    try:
        stream = cfrt.Stream(
            film.prompt.text,
            model=arguments.model,
            engine=arguments.engine,
            seed=film.seed,
            fps="max",
            device=arguments.device,
            precision=arguments.precision,
            threads=arguments.threads,
        )
    except PromptError as error:
        raise PromptError(f"{film.prompt.name!r}: {error}") from None
    with stream:
        config = stream.config
        meter = Meter(config.fps, frames)
        held = 3 * frames * math.prod(config.frame_size) <= HELD
        pictures: Iterable[cfrt.Frame] = stream.frames(frames)
        pictures = list(pictures) if held else pictures
        making = out / "making.mp4"  # not in videos/, where VBench takes every file for a film
        with Writer(making, fps=config.fps) as writer:
            for frame in pictures:
                writer.add(frame)
                meter.add(frame.pixels, frame.unit)
        speed = _speed(stream) if held else None
        engine = stream.engine
    os.replace(making, out / "videos" / film.file)
    return {
        "file": film.file,
        "prompt": film.prompt.name,
        "text": film.prompt.text,
        "index": film.index,
        "seed": film.seed,
        "engine": engine,
        "measures": _known(meter.read()),
        "speed": speed,
        "thumbnails": report.packed(meter.thumbnails()),
    }


def _speed(stream: cfrt.Stream) -> dict[str, float | None]:
    """The stream's own account. fps: frames of a unit over the median time that all its work takes."""
    stats = stream.stats
    return _known(
        {
            "latency_ms": 1000 * stats.latency.p50,
            "unit_ms": 1000 * stats.unit.p50,
            "fps": stream.config.unit_frames(1) / stats.unit.p50,
            "first_frame_s": math.nan if stats.time_to_first_frame is None else stats.time_to_first_frame,
            "real_time": float(stats.real_time),
        }
    )


def _known(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """As JSON: what is not a number is null."""
    return {name: None if math.isnan(number) else round(number, 6) for name, number in numbers.items()}


def _finished(film: Film, known: Mapping[str, Row], videos: Path) -> bool:
    row = known.get(film.file)
    same = row is not None and (row["text"], row["seed"]) == (film.prompt.text, film.seed)
    return same and (videos / film.file).is_file()


# ------------------------------------------------------------------------------------------------------------ the files


def _settings(arguments: Arguments) -> dict[str, Any]:
    """What every film of a folder shares."""
    folder = students.find(arguments.model)
    config = ModelConfig.load(folder / students.CONFIG)
    seconds = arguments.seconds
    trained = config.first_frame(config.trained_frames // config.unit)
    return {
        "model": config.name,
        "weights": _fingerprint(folder),
        "frames": trained if seconds is None else round(seconds * config.fps),
        "fps": config.fps,
        "size": list(config.frame_size),
        "engine": arguments.engine,
        "device": arguments.device,
        "precision": arguments.precision,
        "threads": arguments.threads,
        "seed": arguments.seed,
        "measures": measures.VERSION,
    }


def _fingerprint(folder: Path) -> str:
    """Of the files of a model: their names, sizes and both ends; other weights have another one."""
    mark = sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"):
        size = path.stat().st_size
        mark.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        with path.open("rb") as file:
            mark.update(file.read(SAMPLED))
            file.seek(max(0, size - SAMPLED))
            mark.update(file.read())
    return mark.hexdigest()[:16]


def _agree(path: Path, settings: Mapping[str, Any]) -> None:
    """Films of one folder must be alike. ConfigError where an earlier run's were made otherwise."""
    if not path.exists():
        _write(path, settings)
        return
    before = json.loads(path.read_text())
    other = [
        f"{key} was {before.get(key)!r}, is {settings[key]!r}" for key in settings if before.get(key) != settings[key]
    ]
    if other:
        raise ConfigError(f"{path.parent} holds films made otherwise ({'; '.join(other)}); give another --out")


def _rows(path: Path) -> Iterator[Row]:
    """What was finished; a last line cut short by a kill is taken out of the file."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        _replace(path, whole)
    for line in whole.splitlines():
        yield json.loads(line)


def _write(path: Path, content: object) -> None:
    _replace(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    """Whole or not at all."""
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


# --------------------------------------------------------------------------------------------------------------- VBench


def _vbench(asked: PromptList, wanted: Sequence[Film], arguments: Arguments) -> dict[str, Any]:
    """What VBench says, or why it was not asked."""
    if arguments.vbench == "off":
        return {"state": "not run (--vbench off)"}
    if not leaderboard.installed():
        return {"state": f"not run ({leaderboard.INSTALL})"}
    names = {prompt.name for prompt in asked}
    standard = arguments.vbench == "standard" or (
        arguments.vbench == "auto" and (bool(asked.info) or names <= leaderboard.own_prompts())
    )
    if asked.info:
        _write(arguments.out / "prompts_info.json", [row for row in asked.info if row["prompt_en"] in names])
    others = {path.name for path in (arguments.out / "videos").iterdir()} - {film.file for film in wanted}
    if others and not standard:
        return {"state": f"not run: it would also count {len(others)} other films in videos/; give another --out"}
    results = leaderboard.run(
        arguments.out,
        arguments.dimensions or _applicable(asked, standard),
        {film.file: film.prompt.name for film in wanted},
        standard=standard,
        static=arguments.flicker_seeds is not None,
        said=tqdm.write,
    )
    return {
        "state": "standard prompts" if standard else "custom input",
        "flicker_filtered": arguments.flicker_seeds is not None,
        "scores": {name: report.plain(estimate) for name, estimate in leaderboard.summary(results).items()},
        "failed": {name: result.reason for name, result in results.items() if result.score is None},
    }


def _applicable(asked: PromptList, standard: bool) -> Sequence[str]:
    if not standard:
        return leaderboard.CUSTOM
    served = {dimension for prompt in asked for dimension in prompt.dimensions}
    return [name for name in leaderboard.DIMENSIONS if not served or name in served]


# -------------------------------------------------------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        asked = tyro.cli(
            Arguments, prog="python -m training evaluate", args=arguments, config=(tyro.conf.DisallowNone,)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("once", PromptWarning)  # a list of prompts has hundreds of words it does not know
            results = evaluate(asked)
    except CfrtError as error:
        raise SystemExit(f"training evaluate: {error}") from None
    except KeyboardInterrupt:
        print("training evaluate: stopped; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    print(report.as_markdown(results))


if __name__ == "__main__":
    main()
