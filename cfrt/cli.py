"""The command `cfrt`: generate, doctor, models; bench is in `cfrt.bench`, serve in `cfrt.serve.command`; convert, pull
and plan in `cfrt.model_commands`.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 it failed, 2 wrong usage, 130
interrupted, 141 the reader of our output has gone. An error is one line that says what to do next; CFRT_LOG=debug adds
where it came from. Nothing heavy is imported before a command needs it.
"""

import json
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import (
    DisallowNone,
    FlagCreatePairsOff,
    OmitSubcommandPrefixes,
    Positional,
    UseAppendAction,
    arg,
    subcommand,
)

from . import __version__
from .bench import Bench
from .errors import CfrtError, UsageError, VideoError
from .model_commands import Convert, Plan, Pull
from .serve.command import Serve

if TYPE_CHECKING:
    import numpy as np

    from .config import ModelConfig
    from .frame import Frame
    from .stats import Stats
    from .stream import Stream
    from .text import Text
    from .trace import Trace

LONGEST_FILM = 3600.0
"""Seconds. A film that long is a typing error more often than a wish; `cfrt.Stream` has no limit."""

DEFAULT_OUTPUT = "cfrt.mp4"


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Make a video from a prompt."""

    prompt: Annotated[Positional[str], arg(metavar="PROMPT")]
    """What the video shows."""
    output: Annotated[UseAppendAction[tuple[str, ...]], arg(aliases=("-o",), metavar="FILE")] = ()
    """Where to write it: .mp4, .gif, .webp, .y4m, .png (a contact sheet) or - (raw y4m to standard output). May be
    repeated. Default: cfrt.mp4."""
    seconds: float = 4.0
    """Length of the video."""
    seed: int = 0
    """Another seed, another video; the same seed, the same video."""
    then: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar='"TIME: PROMPT"')] = ()
    """Change the prompt at that second (at the first unit that starts then or later). May be repeated."""
    image: str | None = None
    """A picture that the video starts from."""
    prefix: str | None = None
    """A film that the video goes on from: the end of it, as much as the model was trained on at once. The video begins
    with it, and so do its seconds."""
    guidance: float | None = None
    """Weight of classifier-free guidance. Default: the model's own, which is none for students."""
    negative: str | None = None
    """The prompt that guidance leads away from. Default: the model's own."""
    decoder: Literal["taehv"] | None = None
    """taehv takes the small decoder, for models that have one. Default: the model's own."""
    tile: int | None = None
    """Decode tiles of so many latent cells a side, for less memory. Default: whole frames."""
    model: str = "tiny"
    """An embedded model (see `cfrt models`) or the folder of one."""
    schedule: Literal["sequential", "rolling"] | None = None
    """rolling denoises several units together, for models that were trained so. Default: the model's own."""
    reference_compat: bool = False
    """Noise and sinks exactly as in the released inference code: one clip, no changes of prompt."""
    text_precision: Literal["bf16", "int8", "fp32"] | None = None
    """Of umT5, which reads the prompts of the official models: int8 needs half of bf16's memory. Default: bf16."""
    text_device: str | None = None
    """Where umT5 runs. Default: cpu."""
    engine: str = "auto"
    """How to run it (see `cfrt doctor`)."""
    device: str = "auto"
    """cpu, cuda or cuda:N. Default: what the engine can do nothing without, else the CPU."""
    precision: str = "auto"
    """fp32, bf16, int8, fp16 or fp64; auto takes what is fastest on this machine and good enough."""
    threads: int = 1
    """CPU threads. One is plenty for a small model. The native engine gives the same video for any number, others for
    the same number."""
    fps: float | None = None
    """Frames per second that the file plays at. Default: the model's own."""
    scale: int | None = None
    """Enlarge by this whole factor. Default: films get a shorter side of at least 256 pixels."""
    trace: str | None = None
    """Write how long every stage took into this .json file, for https://ui.perfetto.dev."""
    json: bool = False
    """Print the measurements as JSON."""
    quiet: Annotated[bool, arg(aliases=("-q",))] = False
    """Print nothing but errors and warnings."""

    def run(self) -> None:
        from .trace import Trace

        changes = self._check()
        trace = None if self.trace is None else Trace()
        with _warnings_in_one_line(), self._stream(trace) as stream:
            started = perf_counter()
            frames = self._write(stream, changes)
            wall = perf_counter() - started
            self._report(stream, frames, wall)
        if trace is not None and self.trace is not None:
            trace.save(self.trace)

    @property
    def _outputs(self) -> tuple[str, ...]:
        return self.output or (DEFAULT_OUTPUT,)

    def _check(self) -> list[tuple[float, str]]:
        """Everything that can be wrong before a model is loaded. Gives the changes of prompt, in order of time."""
        from .errors import PromptError
        from .text import check as check_prompt
        from .video import STDOUT
        from .video import check as check_output

        if not 0 < self.seconds <= LONGEST_FILM:
            raise UsageError(f"expected --seconds above 0 and at most {LONGEST_FILM:.0f}, got {self.seconds}")
        if self.json and STDOUT in self._outputs:
            raise UsageError("--json and -o - both want standard output; write the video to a file")
        if STDOUT in self._outputs and sys.stdout.isatty():
            raise UsageError("-o - would fill the terminal with raw video; send it on: cfrt ... | ffplay -")
        if len({os.path.realpath(path) for path in self._outputs}) < len(self._outputs):
            raise UsageError(f"the same file is given twice: {', '.join(self._outputs)}")
        if self.trace is not None and not self.trace.endswith(".json"):
            raise UsageError(f"expected --trace FILE.json, got {self.trace!r}")
        changes = sorted((_change(text, self.seconds) for text in self.then), key=lambda change: change[0])
        try:
            for text in (self.prompt, *(text for _, text in changes)):
                check_prompt(text)
            for path in self._outputs:
                check_output(path, 1.0 if self.fps is None else self.fps, self.scale)
        except (PromptError, VideoError) as error:
            raise UsageError(str(error)) from error
        return changes

    def _stream(self, trace: "Trace | None") -> "Stream":
        from . import students
        from .stream import Stream
        from .weights import read_config

        config = None
        if any(x is not None for x in (self.image, self.prefix, self.text_precision, self.text_device)):
            config = read_config(students.find(self.model))
        return Stream(
            self.prompt,
            model=self.model,
            engine=self.engine,
            device=self.device,
            precision=self.precision,
            threads=self.threads,
            seed=self.seed,
            fps="max",
            image=None if config is None else self._picture(config),
            prefix=None if config is None else self._film(config),
            text=None if config is None else self._text(config),
            guidance=self.guidance,
            negative=self.negative,
            decoder=self.decoder,
            schedule=self.schedule,
            reference_compat=self.reference_compat,
            tile=self.tile,
            trace=trace,
            journal_bytes=0,  # a film is not gone back in
        )

    def _text(self, config: "ModelConfig") -> "Text | None":
        """umT5 as it was asked for; None leaves it to the stream."""
        from . import students
        from .text import encoder

        if self.text_precision is None and self.text_device is None:
            return None
        if config.text.kind != "umt5":
            raise UsageError(
                f"{config.name!r} reads through its own table; leave --text-precision and --text-device out"
            )
        device, precision = self.text_device or "cpu", self.text_precision or "bf16"
        return encoder(config, {}, students.find(self.model), device=device, precision=precision)

    def _picture(self, config: "ModelConfig") -> "np.ndarray | None":
        from .video import read_picture

        return None if self.image is None else read_picture(self.image, config.frame_size)

    def _film(self, config: "ModelConfig") -> "np.ndarray | None":
        """The end of the film, in whole units."""
        from .video import read_film

        if self.prefix is None:
            return None
        longest = config.first_frame(config.trained_frames // config.unit)
        film = read_film(self.prefix, config.frame_size, config.fps, longest)
        whole = config.first_frame(config.unit_at(len(film)))
        if whole == 0:
            raise VideoError(f"expected at least {config.first_frame(1)} frames in {self.prefix}, got {len(film)}")
        return film[-whole:]

    def _write(self, stream: "Stream", changes: list[tuple[float, str]]) -> int:
        """Frames from the stream into every output; gives their number."""
        from tqdm import tqdm

        from .video import Writer

        fps = self.fps or stream.config.fps
        total = round(self.seconds * stream.config.fps)
        with ExitStack() as stack:
            writers = [stack.enter_context(Writer(path, fps=fps, scale=self.scale)) for path in self._outputs]
            frames = scripted(stream, total, changes)
            for frame in tqdm(frames, total=total, unit=" frames", disable=True if self.quiet else None, leave=False):
                for writer in writers:
                    writer.add(frame)
        return total

    def _report(self, stream: "Stream", frames: int, wall: float) -> None:
        from .video import STDOUT

        stats = stream.stats
        if self.json:
            print(json.dumps(self._measurements(stream, stats, frames, wall)))
        elif not self.quiet:
            made_by = f"{stream.config.name} ({stream.engine}, {stream.precision}, seed {self.seed})"
            parts = (
                f"{', '.join(self._outputs)}: {frames} frames by {made_by}",
                f"{frames / wall:.1f} fps with decoding and encoding",
                f"first frame after {stats.time_to_first_frame or math.nan:.2f} s with loading",
                f"unit p50 {1000 * stats.unit.p50:.1f} ms, p95 {1000 * stats.unit.p95:.1f} ms "
                f"for {1000 * stats.unit_duration:.0f} ms of video",
            )
            print("; ".join(parts), file=sys.stderr if STDOUT in self._outputs else sys.stdout)

    def _measurements(self, stream: "Stream", stats: "Stats", frames: int, wall: float) -> dict[str, Any]:
        return {
            "outputs": list(self._outputs),
            "model": stream.config.name,
            "engine": stream.engine,
            "device": stream.device,
            "precision": stream.precision,
            "threads": self.threads,
            "prompt": self.prompt,
            "seed": self.seed,
            "frames": frames,
            "fps": frames / wall,
            "time_to_first_frame": stats.time_to_first_frame,
            "unit_duration": stats.unit_duration,
            **{name: _seconds(getattr(stats, name)) for name in ("latency", "unit", "decode", "change_to_pixel")},
        }


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what is installed, which engine would run, why the others would not, and how fast a stream is here."""

    model: str = "tiny"
    """The model that the engines are asked about."""
    probe: Annotated[bool, arg(help_behavior_hint="(default: it does)")] = True
    """Do not stream for the half second that measures the speed."""
    json: bool = False
    """Print it as JSON."""

    def run(self) -> None:
        from .doctor import as_text, examine

        report = examine(self.model, probe=self.probe)
        print(json.dumps(report, indent=2) if self.json else as_text(report))


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the models of this installation."""

    json: bool = False
    """Print it as JSON."""

    def run(self) -> None:
        from .doctor import models, models_as_text

        found = models()
        print(json.dumps(found, indent=2) if self.json else models_as_text(found))


Command = (
    Annotated[Generate, subcommand("generate")]
    | Annotated[Serve, subcommand("serve")]
    | Annotated[Doctor, subcommand("doctor")]
    | Annotated[Models, subcommand("models")]
    | Annotated[Pull, subcommand("pull")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Bench, subcommand("bench")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; gives the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args in (["--version"], ["-V"]):
        print(f"cfrt {__version__}")
        return 0
    debug = os.environ.get("CFRT_LOG", "").lower() == "debug"
    if debug:
        logging.basicConfig(level=logging.DEBUG)
    try:
        return _run(args)
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"cfrt: error: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _run(args: Sequence[str]) -> int:
    """One command, its normal ends turned into exit codes."""
    try:
        command: Any = tyro.cli(
            Command,
            prog="cfrt",
            description="Real-time autoregressive video diffusion. `cfrt COMMAND --help` says more; `--version` too.",
            args=args,
            config=(OmitSubcommandPrefixes, FlagCreatePairsOff, DisallowNone),
        )
        command.run()
        sys.stdout.flush()
        return 0
    except SystemExit as end:  # tyro has printed help (0) or an error of usage (2)
        return end.code if isinstance(end.code, int) else 2
    except KeyboardInterrupt:
        print("cfrt: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it exits
        return 141


def scripted(stream: "Stream", count: int, changes: list[tuple[float, str]]) -> Iterator["Frame"]:
    """`count` frames, the prompt changed at the first unit that starts at a change's time or later."""
    left = list(changes)
    config = stream.config
    for frame in stream.frames(count):
        starts = config.first_frame(frame.unit + 1) / config.fps
        while left and left[0][0] <= starts:
            stream.prompt(left.pop(0)[1])
        yield frame


def _change(text: str, seconds: float) -> tuple[float, str]:
    """ "2.0: another prompt" as (2.0, "another prompt")."""
    time, colon, prompt = text.partition(":")
    try:
        at = float(time)
    except ValueError:
        at = math.nan
    if not colon or not 0 < at < seconds:
        raise UsageError(f'expected --then "TIME: PROMPT" with a time between 0 and {seconds} seconds, got {text!r}')
    return at, prompt.strip()


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, CfrtError):
        return message
    return f"{type(error).__name__}: {message} (this is a bug or a broken installation; CFRT_LOG=debug shows where)"


def _seconds(timing: Any) -> dict[str, float] | None:
    return {"p50": timing.p50, "p95": timing.p95, "p99": timing.p99} if timing.count else None


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """What the library warns of, on one line of standard error."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"cfrt: warning: {message}", file=sys.stderr)

    from .text import PromptWarning

    with warnings.catch_warnings():
        warnings.simplefilter("always", PromptWarning)
        warnings.showwarning = show
        yield
