"""What this installation can do: packages, models, engines and why some would not run, and how fast a stream is."""

import json
import os
import platform
import struct
from importlib import metadata
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

from . import __version__, students
from .bundle import Bundle, is_bundle
from .config import PRESETS, ModelConfig
from .errors import CfrtError
from .weights import WEIGHTS_FILE, read_config

PACKAGES = ("numpy", "av", "safetensors", "tqdm", "tyro", "torch", "onnxruntime", "cuda-python", "tensorrt-rtx")
VARIABLES = ("CFRT_ENGINE", "CFRT_ISA", "CFRT_CACHE", "CFRT_LOG", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")

PROBED = 0.5
"""Seconds of streaming that a probe measures."""


def examine(model: str = "tiny", *, probe: bool = True) -> dict[str, Any]:
    """Everything worth knowing in a bug report, as plain data. probe: stream for half a second, to say how fast."""
    return {
        "cfrt": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "models": models()["embedded"],
        "processor": _processor(),
        "engines": _engines(model),
        "speed": _speed(model) if probe else None,
        "cuda": _cuda(),
        "attention": _attention(),
    }


def models() -> dict[str, Any]:
    """The students in this installation, and the names of presets whose weights one has to bring."""
    return {
        "embedded": [_describe(name, folder) for name, folder in students.embedded().items()],
        "presets": [name for name in PRESETS if name not in students.embedded()],
    }


def as_text(report: dict[str, Any]) -> str:
    """`examine` for people."""
    lines = [
        f"cfrt {report['cfrt']}, Python {report['python']}, {report['platform']}, {report['cpus']} CPUs",
        "",
        "packages   " + ", ".join(f"{name} {version or '(none)'}" for name, version in report["packages"].items()),
        *(f"           {name}={value}" for name, value in report["environment"].items()),
        "",
        *(_model_line(model) for model in report["models"]),
        "",
    ]
    lines.append(f"processor  {_processor_line(report['processor'])}")
    lines.append(f"kernels    {_cuda_line(report['cuda'])}")
    lines.append(f"attention  {_attention_line(report['attention'])}")
    engines = report["engines"]
    if "error" in engines:
        return "\n".join([*lines, f"engines    cannot be asked: {engines['error']}"])
    for name, reason in engines["refusals"].items():
        lines.append(f"engine     {name}: {'runs' if reason is None else f'would not run: {reason}'}")
    chosen = engines["chosen"]
    lines.append(f"engine     auto would choose {chosen}" if chosen else f"engine     none can run {engines['model']}")
    if report["speed"] is not None:
        lines.append(f"speed      {_speed_line(report['speed'])}")
    return "\n".join(lines)


def models_as_text(found: dict[str, Any]) -> str:
    """`models` for people."""
    embedded = [_model_line(model) for model in found["embedded"]] or ["model      none in this installation"]
    return "\n".join([*embedded, "", "presets    (bring the weights) " + ", ".join(found["presets"])])


def _engines(model: str) -> dict[str, Any]:
    from .engines import Spec, choose, names, refusal

    try:
        folder = students.find(model)
        bundle = Bundle.open(folder) if is_bundle(folder) else None
        spec = Spec(config=read_config(folder), weights={}, bundle=bundle)
        refusals = {name: refusal(name, spec) for name in names()}
    except CfrtError as error:
        return {"model": model, "error": str(error)}
    try:
        chosen = choose("auto", spec)[0].name
    except CfrtError:
        chosen = None
    return {"model": model, "refusals": refusals, "chosen": chosen}


def _processor() -> dict[str, Any]:
    """What the native engine finds, and whether CFRT_ISA has forced its level."""
    try:
        from .engines.native import processor

        return processor() | {"forced": "CFRT_ISA" in os.environ}
    except (CfrtError, ImportError) as error:
        return {"error": str(error)}


def _processor_line(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"unknown: {found['error']}"
    level = f"{found['isa']}, forced by CFRT_ISA" if found["forced"] else found["isa"]
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    return f"{level} (it has {', '.join(found['levels'])}); by default {found['precision']} and {threads}"


def _speed(model: str) -> dict[str, Any]:
    """Frames a second of a stream with the engine's own choices, without a beat; the start is left out."""
    from .stream import Stream

    try:
        config = read_config(students.find(model))
        with Stream(next(iter(config.text.vocab), model), model=model, fps="max") as stream:
            frames = stream.frames()
            for _ in range(config.first_frame(2)):
                next(frames)
            begin, count = perf_counter(), 0
            while (elapsed := perf_counter() - begin) < PROBED:
                count += next(frames) is not None
            return {
                "engine": stream.engine,
                "precision": stream.precision,
                "fps": count / elapsed,
                "latency_p50": stream.stats.latency.p50,
                "needed": config.fps,
            }
    except CfrtError as error:
        return {"error": str(error)}


def _speed_line(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"not measured: {found['error']}"
    return (
        f"{found['fps']:.0f} fps by {found['engine']} in {found['precision']}, decoding included, where "
        f"{found['needed']:g} are needed; latency p50 {1000 * found['latency_p50']:.1f} ms (half a second measured)"
    )


def _attention() -> dict[str, str | None]:
    from .engines import gpu_attention

    return gpu_attention()


def _cuda() -> dict[str, Any] | None:
    from .engines import cuda_build

    return cuda_build()


def _cuda_line(cuda: dict[str, Any] | None) -> str:
    if cuda is None:
        return (
            "CPU only; CFRT_CUDA=ON pip install --force-reinstall --no-deps --no-cache-dir cfrt builds CUDA's too, "
            "with NVIDIA's compiler wheels of CUDA 13, whose kernels want driver 580 or newer"
        )
    archs = ", ".join(f"sm_{arch}" for arch in cuda["archs"])
    return f"CUDA {cuda['version']} for {archs}; wants NVIDIA driver {cuda['driver']} or newer"


def _attention_line(refusals: dict[str, str | None]) -> str:
    """Which attention the torch engine would ask for on a GPU, and why not the ones before it."""
    chosen = next((name for name, reason in refusals.items() if reason is None), "none")
    before = list(refusals)[: list(refusals).index(chosen)] if chosen in refusals else list(refusals)
    reasons = "; ".join(f"not {name}: {refusals[name]}" for name in before)
    return f"on a GPU the torch engine would use {chosen}" + (f" ({reasons})" if reasons else "")


def _describe(name: str, folder: Path) -> dict[str, Any]:
    try:
        config = ModelConfig.load(folder / students.CONFIG)
        size = (folder / WEIGHTS_FILE).stat().st_size
        parameters = _parameters(folder / WEIGHTS_FILE)
    except (CfrtError, OSError, ValueError, struct.error) as error:
        return {"name": name, "folder": str(folder), "error": str(error)}
    height, width = config.frame_size
    return {
        "name": name,
        "folder": str(folder),
        "size": [width, height],
        "fps": config.fps,
        "steps": len(config.steps),
        "first_steps": len(config.unit_steps(0)),
        "unit": config.unit,
        "window": config.window,
        "sinks": config.sinks,
        "parameters": parameters,
        "bytes": size,
    }


def _model_line(model: dict[str, Any]) -> str:
    if "error" in model:
        return f"model      {model['name']}: broken ({model['error']})"
    width, height = model["size"]
    return (
        f"model      {model['name']}: {width} x {height} at {model['fps']:g} fps, {model['steps']} steps "
        f"({model['first_steps']} for the first unit), {model['parameters'] / 1e6:.2f} M parameters, "
        f"{model['bytes'] / 1e6:.1f} MB in {model['folder']}"
    )


def _parameters(path: Path) -> int:
    """Numbers in a safetensors file, from its header alone: 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
