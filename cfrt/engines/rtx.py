"""TensorRT at run time: engines from a bundle's files, ready to be put on a stream.

Contexts have no scratch memory of their own: those of one stream share a piece, since they run one after the other.
What TensorRT-RTX compiles for the GPU at the first run is kept on disk, so that only the first start of a bundle on a
machine takes long.

The module is chosen by the name that the bundle gives, `tensorrt_rtx` or `tensorrt`; the two have one API but for the
cache, which full TensorRT does not need. A driver must be there before any of this is called.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import BundleError, EngineError

HEADER = 64
"""Bytes of an engine that say whether it can run here."""

INVALID = {
    1: "it was built by another version of TensorRT",
    2: "it was built for other GPUs",
    4: "it needs a newer NVIDIA driver",
    8: "it needs a newer CUDA runtime",
    16: "the GPU has too little memory",
    32: "it is damaged: copy the bundle again",
    64: "CUDA failed when it was asked about the GPU",
}
"""What the bits of TensorRT's diagnosis mean."""


class Log:
    """What TensorRT has said, errors apart; it takes one logger for all of a process."""

    def __init__(self, trt: Any) -> None:
        log = self
        self.errors: list[str] = []

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    log.errors.append(message.strip())

        self.logger = Logger()

    def first(self) -> str:
        """The first complaint since the last call."""
        said, self.errors[:] = list(self.errors), []
        return said[0] if said else "TensorRT gave no reason"


_logs: dict[str, Log] = {}


class Runtime:
    """One TensorRT module on the current GPU, and what it has compiled so far.

    cache: the file of the runtime cache."""

    def __init__(self, module: str, cache: Path) -> None:
        self._trt = trt = import_module(module)
        self._log = _logs.setdefault(module, Log(trt))
        self._runtime = trt.Runtime(self._log.logger)
        self._file = cache
        self._cache: Any = None
        self.warm = False
        """Was there anything in the cache that fits this GPU, driver and version?"""

    def load(self, path: Path) -> "Context":
        """BundleError when the engine cannot run here, with the reason."""
        blob = path.read_bytes()
        validity, bits = self._runtime.get_engine_validity(blob[:HEADER])
        if validity == self._trt.EngineValidity.INVALID:
            reasons = [words for bit, words in INVALID.items() if int(bits) & bit]
            raise BundleError(f"{path} cannot run here: {'; '.join(reasons) or self._log.first()}")
        engine = self._runtime.deserialize_cuda_engine(blob)
        if engine is None:
            raise BundleError(f"{path} cannot be loaded: {self._log.first()}")
        return Context(self._log, engine, self._config(engine), path.stem)

    def _config(self, engine: Any) -> Any:
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(config, "create_runtime_cache"):
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                with suppress(OSError):  # there is none yet
                    self.warm = bool(self._cache.deserialize(self._file.read_bytes()))
            config.set_runtime_cache(self._cache)
        return config

    def save(self) -> None:
        """Keeps on disk what has been compiled. A cache that cannot be written only costs time at the next start."""
        if self._cache is None:
            return
        part = self._file.with_name(f"{self._file.name}.{os.getpid()}.part")
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(memoryview(self._cache.serialize()))
            part.replace(self._file)


class Context:
    """An engine that can be run. `name` is its file's."""

    def __init__(self, log: Log, engine: Any, config: Any, name: str) -> None:
        self._made_of = (log, engine, config, name)
        self._log, self._engine, self.name = log, engine, name
        self._context = engine.create_execution_context(config)
        if self._context is None:
            raise EngineError(f"TensorRT makes no context for {name}: {log.first()}")
        self.scratch_bytes = int(engine.device_memory_size_v2)
        self.tensors: Sequence[str] = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]

    def twin(self) -> "Context":
        """Another context of the same engine, and so of the same weights."""
        return Context(*self._made_of)

    def ports(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Name, shape and format of every input and output, the format as TensorRT calls it."""
        for tensor in self.tensors:
            engine = self._engine
            yield tensor, tuple(engine.get_tensor_shape(tensor)), engine.get_tensor_dtype(tensor).name

    def set_scratch(self, address: int, size: int) -> None:
        self._context.set_device_memory(address, size)

    def enqueue(self, addresses: Mapping[str, int], stream: int) -> None:
        """Puts one run on a stream, every input and output at its address."""
        for tensor in self.tensors:
            if not self._context.set_tensor_address(tensor, addresses[tensor]):
                raise EngineError(f"TensorRT does not take {tensor} of {self.name}: {self._log.first()}")
        if not self._context.execute_async_v3(stream):
            raise EngineError(f"TensorRT cannot run {self.name}: {self._log.first()}")
