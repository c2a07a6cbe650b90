"""`cfrt bench`: how fast a stream is on this machine, measured, or would be on an RTX 4090, predicted. docs/bench.md
describes the JSON."""

import datetime
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from . import __version__
from .errors import CfrtError, ConfigError

if TYPE_CHECKING:
    from .config import ModelConfig
    from .stats import Timing
    from .stream import Stream
    from .text import Text

MEASURED, PREDICTED = "tiny", "wan-1.3b-framewise-2step"
CHANGES = 4
"""Changes of prompt during a measurement."""
TIMINGS = ("unit", "latency", "decode", "commit", "change_to_pixel")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure a stream on this machine, or predict one on a GPU that is not here."""

    model: str | None = None
    """An embedded model or a folder; with --predict a preset. Default: tiny; wan-1.3b-framewise-2step."""
    predict: bool = False
    """Print an interval for --gpu, from a model of the hardware. Nothing is measured."""
    gpu: str = "rtx4090"
    """The card that is predicted."""
    seconds: float = 10.0
    """How long to measure, once two units have been made."""
    engine: str = "auto"
    """How to run it (see `cfrt doctor`)."""
    device: str = "auto"
    """cpu, cuda or cuda:N. Default: what the engine can do nothing without, else the CPU."""
    precision: str | None = None
    """Default: the engine's own; int8 is what is predicted."""
    decoder: Literal["wan", "taehv"] | None = None
    """Default: the model's own; taehv is what is predicted."""
    window: int | None = None
    """Of a prediction: W, latent frames that a unit sees. Default: 9."""
    sinks: int | None = None
    """Of a prediction: K, first frames seen for ever. Default: the model's own."""
    resolution: str | None = None
    """Of a prediction: HEIGHTxWIDTH. Default: the model's own."""
    json: bool = False
    """Print it as JSON."""

    def run(self) -> None:
        print(self._predicted() if self.predict else self._measured())

    def _measured(self) -> str:
        given = {"--window": self.window, "--sinks": self.sinks, "--resolution": self.resolution}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"{', '.join(wrong)}: a model is measured as it is; only --predict can change it")
        found = measure(
            self.model or MEASURED,
            seconds=self.seconds,
            engine=self.engine,
            device=self.device,
            precision=self.precision or "auto",
            decoder=None if self.decoder == "wan" else self.decoder,
        )
        return json.dumps(found) if self.json else as_text(found)

    def _predicted(self) -> str:
        from . import predict
        from .config import PRESETS

        name = self.model or PREDICTED
        if name not in PRESETS:
            raise ConfigError(f"expected a preset to predict, out of {', '.join(PRESETS)}; got {name!r}")
        config = PRESETS[name] if self.resolution is None else predict.resized(PRESETS[name], self.resolution)
        sinks = config.sinks if self.sinks is None else self.sinks
        config = replace(config, window=9 if self.window is None else self.window, sinks=sinks)
        options = {"precision": self.precision or "int8", "decoder": self.decoder or "taehv"}
        found = predict.predict(config, gpu=self.gpu, **options)
        return json.dumps(asdict(found)) if self.json else predict.page(found)


def measure(
    model: str = MEASURED,
    *,
    seconds: float = 10.0,
    engine: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    decoder: str | None = None,
    text: "Text | None" = None,
) -> dict[str, Any]:
    """Streams at full speed and changes the prompt `CHANGES` times. Plain data, times in seconds; see docs/bench.md.
    text: what reads the prompts, if not what belongs to the model.

    CfrtError where the stream cannot be made."""
    from . import students
    from .stream import Stream
    from .weights import load_model

    if not seconds > 0:
        raise CfrtError(f"expected --seconds > 0, got {seconds:g}")
    prompts = _prompts(load_model(students.find(model))[0])
    options = {"engine": engine, "device": device, "precision": precision, "decoder": decoder, "text": text}
    with Stream(prompts[0], model=model, fps="max", **options) as stream:  # type: ignore[arg-type]
        frames, wall = _run(stream, prompts, seconds)
        return _report(stream, frames, wall, decoder)


def _prompts(config: "ModelConfig") -> tuple[str, str]:
    """Two that the model can read."""
    if config.text.kind == "table":
        words = list(config.text.vocab) or ["one", "another"]
        return words[0], words[-1]
    return "a fox walks through fresh snow", "a small boat on a calm lake at dawn"


def _run(stream: "Stream", prompts: tuple[str, str], seconds: float) -> tuple[int, float]:
    """(frames, seconds) after the first two units. The prompt changes at even distances."""
    frames = stream.frames()
    for _ in range(stream.config.first_frame(2)):
        next(frames)
    begin, count, changed = perf_counter(), 0, 0
    while (elapsed := perf_counter() - begin) < seconds or changed < CHANGES:
        if changed < CHANGES and elapsed >= seconds * (changed + 1) / (CHANGES + 1):
            changed += 1
            stream.prompt(prompts[changed % 2])
        next(frames)
        count += 1
    for _ in range(stream.config.unit_frames(1)):  # until the last change can be seen
        next(frames)
        count += 1
    return count, perf_counter() - begin


def _report(stream: "Stream", frames: int, wall: float, decoder: str | None) -> dict[str, Any]:
    config, stats = stream.config, stream.stats
    return {
        "label": "measured",
        "date": datetime.date.today().isoformat(),
        "cfrt": __version__,
        "machine": machine(),
        "model": config.name,
        "engine": stream.engine,
        "device": stream.device,
        "precision": stream.precision,
        "decoder": decoder or config.autoencoder.kind,
        "resolution": list(config.frame_size),
        "steps": len(config.unit_steps(2)),
        "window": config.window,
        "sinks": config.sinks,
        "frames": frames,
        "seconds": wall,
        "fps": frames / wall,
        "time_to_first_frame": stats.time_to_first_frame,
        "unit_duration": stats.unit_duration,
        **{name: percentiles(getattr(stats, name)) for name in TIMINGS},
        "real_time": stats.real_time,
        "sub_frame": stats.latency.p95 < 1 / config.fps,
        "memory": {"host_peak": host_peak(), "device": device_memory()},
    }


def percentiles(timing: "Timing") -> dict[str, float] | None:
    """None where nothing of the kind happened: at full speed there are no separate commits."""
    return asdict(timing) if timing.count else None


# ---------------------------------------------------------------------- the machine


def machine() -> dict[str, Any]:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"platform": platform.platform(), "processor": processor(), "cpus": cpus, "gpu": _nvidia("gpu", "name")}


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def host_peak() -> int | None:
    """Bytes that this process has had in memory at most; None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


def device_memory() -> int | None:
    """Bytes that this process has on NVIDIA GPUs now, by nvidia-smi; None where it is on none."""
    rows = [line.split(", ") for line in (_nvidia("compute-apps", "pid,used_memory") or "").splitlines()]
    own = [int(size) for pid, size in rows if pid == str(os.getpid()) and size.isdecimal()]
    return sum(own) << 20 if own else None


def _nvidia(what: str, fields: str) -> str | None:
    """What nvidia-smi says; None where it is not installed or has nothing to say."""
    command = ["nvidia-smi", f"--query-{what}={fields}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return said or None


# ---------------------------------------------------------------------- as a page


def as_text(found: dict[str, Any]) -> str:
    """`measure` for people."""
    height, width = found["resolution"]
    where = found["machine"]["gpu"] or found["machine"]["processor"]
    lines = [
        f"measured on {found['date']}: {found['model']} by {found['engine']} in {found['precision']} on {where} "
        f"({found['machine']['cpus']} CPUs), {height}x{width}, {found['steps']} steps, W = {found['window']}, "
        f"K = {found['sinks']}, {found['decoder']} decoder included",
        f"frames a second      {found['fps']:.1f} ({found['frames']} frames in {found['seconds']:.1f} s)",
        f"first frame          {found['time_to_first_frame']:.3f} s after construction, loading included",
    ]
    for name in TIMINGS:
        if (timing := found[name]) is not None:
            p50, p95, p99 = (f"{1000 * timing[p]:.2f}" for p in ("p50", "p95", "p99"))
            lines.append(f"{name.replace('_', ' '):20} p50 {p50}, p95 {p95}, p99 {p99} ms ({timing['count']})")
    answers = [f"{name.replace('_', ' ')}: {'yes' if found[name] else 'no'}" for name in ("real_time", "sub_frame")]
    lines.append(f"{', '.join(answers)} (a unit is {1000 * found['unit_duration']:.1f} ms of video)")
    sizes = [f"{name.replace('_', ' ')} {size / 1e6:.0f} MB" for name, size in found["memory"].items() if size]
    return "\n".join([*lines, f"memory               {', '.join(sizes)}"])
