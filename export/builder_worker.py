"""The process that builds engines: `python -m export.builder_worker tensorrt_rtx`, started by `export.builder`.

TensorRT ends a process rather than raise in some cases, takes one logger for all of a process, says what went wrong
only to that logger, and what it builds depends on what the process has built before. So it gets a process of its own,
which reads a job a line and answers each with a line, JSON both; and every job a copy of that process, forked while it
has built nothing.

The module is chosen by name, because TensorRT-RTX and full TensorRT have one API. They differ in two things: RTX
compiles for named GPUs without having them, and its networks are always strongly typed.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

NOISE = ("catchCudaError", "--- Begin node", "--- End node", "Node name:", "While parsing node")
"""Lines of the log that follow an error, or frame it, and say nothing of its cause: many calls that fail for a reason
of their own go on to complain that there is no driver."""

WIDEST_HEAD = 256
"""Numbers in a head of the fused attentions that TensorRT-RTX has."""

FATAL_WARNINGS = ("Unused Input", "is unused or used only at compile-time")
"""Warnings that mean another network than the one asked for: the parser drops an input that it does not understand,
such as the length of an Attention's keys."""


class Worker:
    """One TensorRT module and its one logger."""

    def __init__(self, module: str) -> None:
        trt = import_module(module)
        said: list[tuple[Any, str]] = []

        class Logger(trt.ILogger):  # type: ignore[name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                said.append((severity, message.strip()))

        self._trt, self._said, self._logger = trt, said, Logger()
        self.version: str = trt.__version__

    def build(self, onnx: Path, out: Path, targets: list[str]) -> dict[str, Any]:
        """Writes the engine of a graph. RuntimeError with TensorRT's first real complaint."""
        begin = perf_counter()
        self._builder = self._trt.Builder(self._logger)
        network = self._parsed(onnx)
        self._make_decomposable(network)
        blob = self._builder.build_serialized_network(network, self._config(targets))
        if blob is None:
            raise RuntimeError(self._first_error())
        self._demand_every_input(onnx)
        out.write_bytes(memoryview(blob))
        return {"seconds": perf_counter() - begin, "peak_bytes": peak_bytes()}

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """`build`, its errors as words."""
        try:
            return self.build(Path(job["onnx"]), Path(job["out"]), job["targets"])
        except (RuntimeError, OSError) as error:
            return {"error": str(error)}

    def _parsed(self, onnx: Path) -> Any:
        trt = self._trt
        flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = self._builder.create_network(0 if flags is None else 1 << int(flags))
        parser = trt.OnnxParser(network, self._logger)
        if not parser.parse_from_file(str(onnx)):
            raise RuntimeError(self._parser_error(parser))
        self._parser = parser  # the network's weights live in it
        self._demand_every_input(onnx)
        return network

    def _parser_error(self, parser: Any) -> str:
        error = parser.get_error(0)
        name = error.node_name() or f"number {error.node()}"
        real = [line for line in error.desc().splitlines() if not any(part in line for part in NOISE)]
        return f"layer {name} ({error.node_operator()}): {' '.join(real)}"

    def _first_error(self) -> str:
        severity = self._trt.ILogger.Severity
        errors = [text for kind, text in self._said if kind in (severity.ERROR, severity.INTERNAL_ERROR)]
        real = [text for text in errors if not any(part in text for part in NOISE)]
        return (real or errors or ["the builder gave no engine and no reason"])[0]

    def _demand_every_input(self, onnx: Path) -> None:
        unused = [text for _, text in self._said if any(part in text for part in FATAL_WARNINGS)]
        if unused:
            raise RuntimeError(f"a graph whose inputs are all used was expected: {unused[0]}")

    def _make_decomposable(self, network: Any) -> None:
        """Where no fused kernel takes an attention, it must be allowed to fall apart: in fp32, and with wide heads, as
        in the decoder of Wan's latents."""
        trt = self._trt
        kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
        for layer in map(network.get_layer, range(network.num_layers)):
            if kind is not None and layer.type == kind:
                layer.__class__ = trt.IAttentionInputLayer
                queries = layer.attention.get_input(0)
                if queries.dtype == trt.DataType.FLOAT or queries.shape[-1] > WIDEST_HEAD:
                    layer.attention.decomposable = True

    def _config(self, targets: list[str]) -> Any:
        trt = self._trt
        config = self._builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if hasattr(config, "set_compute_capability"):
            config.num_compute_capabilities = len(targets)
            for i, target in enumerate(targets):
                if not config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), i):
                    raise RuntimeError(f"this TensorRT does not build for {target}")
        with suppress(AttributeError):  # so that a pass can be captured: no allocation while it runs
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        return config


def peak_bytes() -> int:
    """The most memory that this process has held so far. (`ru_maxrss` starts with what its parent held.)"""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def serve(module: str) -> None:
    """Answers jobs until the input ends. What C++ prints goes to stderr; the answers have stdout for themselves."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker(module)
    print(json.dumps({"version": worker.version}), file=answers)
    for line in sys.stdin:
        print(forked(partial(worker.answer, json.loads(line))), file=answers)


def forked(work: Callable[[], dict[str, Any]]) -> str:
    """What `work` gives, as JSON, out of a copy of this process; an error where the copy ends before it says."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(work()))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return said or json.dumps({"error": f"the building process ended by {ending(os.waitstatus_to_exitcode(status))}"})


def ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


if __name__ == "__main__":
    serve(sys.argv[1])
