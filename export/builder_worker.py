"""The process that builds engines: `python -m export.builder_worker tensorrt_rtx sm89`, started by `export.builder`.

TensorRT ends a process rather than raise in some cases, takes one logger for all of a process, and says what went wrong
only to that logger. So it gets a process of its own. Every empty line that it reads is a job: the graph `GRAPH` in its
folder becomes the engine `ENGINE`, and a line of JSON says how that went.

Nor is an engine a function of its graph alone: the order of its outputs' records follows from the order of addresses,
and so from what the process has allocated before. So every job runs in a copy of the process, forked while that has
built nothing, and between two jobs the process does nothing that could change where the next one's memory lies. Where
memory begins is not left to chance either: a build has come out otherwise once.

The module is chosen by name, because TensorRT-RTX and full TensorRT have one API. They differ in two things: RTX
compiles for named GPUs without having them, and its networks are always strongly typed.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

GRAPH, ENGINE = Path("graph.onnx"), Path("engine")

NOISE = ("catchCudaError", "--- Begin node", "--- End node", "Node name:", "While parsing node")
"""Lines of the log that follow an error, or frame it, and say nothing of its cause: many calls that fail for a reason
of their own go on to complain that there is no driver."""

WIDEST_HEAD = 256
"""Numbers in a head of the fused attentions that TensorRT-RTX has."""

FATAL_WARNINGS = ("Unused Input", "is unused or used only at compile-time")
"""Warnings that mean another network than the one asked for: the parser drops an input that it does not understand,
such as the length of an Attention's keys."""

ASK, FIXED = 0xFFFFFFFF, 0x0040000
"""personality(2): say what is, and ADDR_NO_RANDOMIZE."""


class Worker:
    """One TensorRT module, its one logger, and the GPUs to build for."""

    def __init__(self, module: str, targets: Sequence[str]) -> None:
        trt = import_module(module)
        said: list[tuple[Any, str]] = []

        class Logger(trt.ILogger):  # type: ignore[name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                said.append((severity, message.strip()))

        self._trt, self._said, self._logger, self._targets = trt, said, Logger(), targets

    def build(self) -> dict[str, Any]:
        """Writes the engine. RuntimeError with TensorRT's first real complaint."""
        begin = perf_counter()
        self._builder = self._trt.Builder(self._logger)
        network = self._parsed()
        self._make_decomposable(network)
        blob = self._builder.build_serialized_network(network, self._config())
        if blob is None:
            raise RuntimeError(self._first_error())
        self._demand_every_input()
        ENGINE.write_bytes(memoryview(blob))
        return {"seconds": perf_counter() - begin, "peak_bytes": peak_bytes()}

    def answer(self) -> dict[str, Any]:
        """`build`, its errors as words."""
        try:
            return self.build()
        except (RuntimeError, OSError) as error:
            return {"error": str(error)}

    def _parsed(self) -> Any:
        trt = self._trt
        flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = self._builder.create_network(0 if flags is None else 1 << int(flags))
        parser = trt.OnnxParser(network, self._logger)
        if not parser.parse_from_file(str(GRAPH)):
            raise RuntimeError(self._parser_error(parser))
        self._parser = parser  # the network's weights live in it
        self._demand_every_input()
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

    def _demand_every_input(self) -> None:
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

    def _config(self) -> Any:
        trt = self._trt
        config = self._builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if hasattr(config, "set_compute_capability"):
            config.num_compute_capabilities = len(self._targets)
            for i, target in enumerate(self._targets):
                if not config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), i):
                    raise RuntimeError(f"this TensorRT does not build for {target}")
        with suppress(AttributeError):  # so that a pass can be captured: no allocation while it runs
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        return config


def peak_bytes() -> int:
    """The most memory that this process has held so far. (`ru_maxrss` starts with what its parent held.)"""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def settle() -> None:
    """Starts this process again with memory that begins at fixed addresses, where the system allows it: some containers
    do not."""
    if sys.platform != "linux":
        return
    personality = ctypes.CDLL(None).personality
    now = personality(ctypes.c_ulong(ASK))
    if now >= 0 and not now & FIXED and personality(ctypes.c_ulong(now | FIXED)) >= 0:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def serve(module: str, targets: Sequence[str]) -> None:
    """Does jobs until the input ends. What C++ prints goes to stderr; the answers have stdout for themselves."""
    answers = os.dup(1)
    os.dup2(2, 1)
    worker = Worker(module, targets)
    while os.read(0, 1):
        child = os.fork()
        if child == 0:
            os.write(answers, (json.dumps(worker.answer()) + "\n").encode())
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status:
            died = {"error": f"the building process ended by {ending(os.waitstatus_to_exitcode(status))}"}
            os.write(answers, (json.dumps(died) + "\n").encode())


def ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


if __name__ == "__main__":
    settle()
    serve(sys.argv[1], sys.argv[2:])
