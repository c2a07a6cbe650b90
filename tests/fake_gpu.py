"""A GPU without a GPU: CUDA's runtime and TensorRT as far as cfrt calls them, which record the schedule and execute it.

What is put on a stream waits there as long as the `policy` lets it, and is then done for real: copies in the host's
memory, our kernels by their PTX (ptxsim), engines by ONNX Runtime from the graph that each was built from. So a copy
whose pinned source was written again too early, a stream that should have waited for another, memory that is used after
it was freed: each gives wrong numbers or an error here, as it might on a GPU.

    with FakeGpu(bundle).installed(monkeypatch) as gpu: ...
"""

import ctypes
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from types import SimpleNamespace
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from ptxsim import Memory
from simulated_cuda import simulated
from trt_fixture import BUILDER

from cfrt.bundle import OUT, Bundle
from cfrt.engines import rtx, trt
from cfrt.engines.twin import fp32_twin

DTYPES: dict[str, Any] = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}
TENSORRT = {"fp32": "FLOAT", "bf16": "BF16", "fp16": "HALF"}
Policy = Literal["lazy", "eager"]
Work = Callable[[], None]


@dataclass
class Queue:
    """A stream: what waits on it, and where it captures to instead."""

    work: deque[tuple[str, Work]] = field(default_factory=deque)
    capture: list[tuple[str, Work]] | None = None
    turn: int = 0


@dataclass
class Mark:
    """An event: how often it was recorded, and how many of these have been passed."""

    recorded: int = 0
    passed: int = 0


class FakeGpu:
    """One RTX 4090, or what the arguments say. `done` counts everything that was executed, by kind."""

    def __init__(
        self,
        bundle: Bundle | None = None,
        *,
        policy: Policy = "lazy",
        driver: int = 13000,
        devices: int = 1,
        capability: tuple[int, int] = (8, 9),
        room: int = 1 << 30,
    ) -> None:
        from cuda.bindings import runtime

        self.real = runtime
        self.bundle, self.policy, self.room = bundle, policy, room
        self.driver, self.devices, self.capability = driver, devices, capability
        self.touched: set[str] = set()  # what was asked of the GPU beyond whether it is there
        self.fail: dict[str, str] = {}  # functions that give an error, and which
        self.memory = Memory()
        self.blocks: dict[int, Any] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.queues: dict[int, Queue] = {}
        self.marks: dict[int, Mark] = {}
        self.graphs: dict[int, list[tuple[str, Work]]] = {}
        self.done: Counter[str] = Counter()
        self.compiled: set[str] = set()
        self._next = 1

    # ------------------------------------------------------------------ the schedule

    def put(self, stream: int, kind: str, work: Work) -> None:
        queue = self.queues[stream]
        if queue.capture is not None:
            queue.capture.append((kind, work))
            return
        queue.work.append((kind, work))
        if self.policy == "eager":
            self.drain(stream)

    def drain(self, stream: int) -> None:
        """Does what is on a stream, and of others only what it waits for."""
        queue = self.queues[stream]
        while queue.work:
            self._do_next(queue)

    def _do_next(self, queue: Queue) -> None:
        kind, work = queue.work.popleft()
        work()
        self.done[kind.split()[0]] += 1

    def drain_all(self) -> None:
        """In the order of the newest stream first: the one that is most likely to wait for another."""
        for stream in sorted(self.queues, reverse=True):
            self.drain(stream)

    def reach(self, event: int, count: int) -> None:
        """Does other streams' work until the event has been passed so often."""
        mark = self.marks[event]
        for queue in self.queues.values():
            while mark.passed < count and any(kind == f"mark {event}" for kind, _ in queue.work):
                self._do_next(queue)
        assert mark.passed >= count, f"event {event} is waited for and on no stream"

    def number(self) -> int:
        self._next += 1
        return self._next

    # ------------------------------------------------------------------ memory

    def bytes(self, address: int, size: int, *, written: bool) -> np.ndarray:
        """Bytes to write (they count as written from now on), or to read: an error where nobody has written them."""
        for start, block in self.blocks.items():
            if start <= address and address + size <= start + block.nbytes:
                part = slice(address - start, address - start + size)
                if written:
                    block.written[part] = 1
                assert block.written[part].all(), "memory is read that nobody has written"
                return block.array.view(np.uint8)[part]
        return np.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype=np.uint8)  # of the host

    # ------------------------------------------------------------------ installing

    @contextmanager
    def installed(self, patch: pytest.MonkeyPatch) -> Iterator["FakeGpu"]:
        """In place of cuda-python's runtime, of TensorRT and of the machine's kernels."""
        patch.setattr("cuda.bindings.runtime", FakeRuntime(self))
        patch.setattr(rtx, "import_module", lambda name: fake_tensorrt(self))
        patch.setattr(rtx, "_logs", {})
        module, version = BUILDER.split()
        patch.setattr(trt, "find_spec", lambda name: name == module or None)
        patch.setattr(trt, "metadata", SimpleNamespace(version=lambda distribution: version))
        with simulated(self.memory) as kernels:
            patch.setattr(trt, "cuda", Kernels(self, kernels))
            yield self
        assert kernels.report.clean, kernels.report


class Kernels:
    """`_cfrt.cuda` whose launches wait on the fake's streams."""

    LAUNCHES = ("append", "attention", "combine", "pixels", "renoise", "value_scales")

    def __init__(self, gpu: FakeGpu, cuda: Any) -> None:
        self._gpu, self._cuda = gpu, cuda

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._cuda, name)
        if name not in self.LAUNCHES:
            return function

        def launch(*arguments: Any, stream: int, **named: Any) -> None:
            self._gpu.put(stream, name, lambda: function(*arguments, stream=0, **named))

        return launch


# ---------------------------------------------------------------------- CUDA's runtime

HARMLESS = ("cudaDriverGetVersion", "cudaGetDeviceCount", "cudaDeviceGetAttribute", "cudaGetErrorString")
"""What may be called before it is known that a GPU will be used."""


class FakeRuntime:
    """`cuda.bindings.runtime`: every function gives its error code first."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cuda") and name in FakeRuntime.__dict__:
            gpu = self._gpu
            if name not in HARMLESS:
                gpu.touched.add(name)
            if name in gpu.fail:
                return lambda *_: self._no(gpu.fail[name])
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        """Enumerations and constants are CUDA's own."""
        return getattr(self._gpu.real, name)

    def _ok(self, *results: Any) -> tuple[Any, ...]:
        return (self._gpu.real.cudaError_t.cudaSuccess, *results)

    def _no(self, name: str) -> tuple[Any, ...]:
        return (getattr(self._gpu.real.cudaError_t, name), None)

    def cudaDriverGetVersion(self):
        return self._ok(self._gpu.driver)

    def cudaGetDeviceCount(self):
        return self._ok(self._gpu.devices) if self._gpu.devices else self._no("cudaErrorNoDevice")

    def cudaDeviceGetAttribute(self, name, device):
        major = self._gpu.real.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor
        return self._ok(self._gpu.capability[0 if name == major else 1])

    def cudaSetDevice(self, index):
        return self._ok()

    def cudaMemGetInfo(self):
        return self._ok(self._gpu.room, 24 << 30)

    def cudaGetErrorString(self, code):
        return self._gpu.real.cudaGetErrorString(code)

    def cudaMalloc(self, size):
        if any(queue.capture is not None for queue in self._gpu.queues.values()):
            return self._no("cudaErrorStreamCaptureUnsupported")
        if size > self._gpu.room:
            return self._no("cudaErrorMemoryAllocation")
        self._gpu.room -= size
        block = self._gpu.memory.empty(size, np.uint8)
        self._gpu.blocks[block.address] = block
        return self._ok(block.address)

    def cudaFree(self, address):
        self._gpu.drain_all()
        block = self._gpu.blocks.pop(address)
        self._gpu.room += block.nbytes
        buffers = self._gpu.memory.buffers
        del buffers[next(i for i, buffer in enumerate(buffers) if buffer is block)]
        return self._ok()

    def cudaMallocHost(self, size):
        array = np.full(size, 0xFF, dtype=np.uint8)
        self._gpu.pinned[array.ctypes.data] = array
        return self._ok(array.ctypes.data)

    def cudaFreeHost(self, address):
        self._gpu.drain_all()
        self._gpu.pinned.pop(address)[...] = 0xFF
        return self._ok()

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        def copy() -> None:
            self._gpu.bytes(to, size, written=True)[...] = self._gpu.bytes(source, size, written=False)

        self._gpu.put(int(stream), "copy", copy)
        return self._ok()

    def cudaMemsetAsync(self, address, value, size, stream):
        def fill() -> None:
            self._gpu.bytes(address, size, written=True)[...] = value

        self._gpu.put(int(stream), "fill", fill)
        return self._ok()

    # ------------------------------------------------------------------ streams and events

    def cudaStreamCreateWithFlags(self, flags):
        stream = self._gpu.number()
        self._gpu.queues[stream] = Queue()
        return self._ok(stream)

    def cudaStreamDestroy(self, stream):
        self._gpu.drain(stream)
        del self._gpu.queues[stream]
        return self._ok()

    def cudaStreamSynchronize(self, stream):
        if self._gpu.queues[stream].capture is not None:
            return self._no("cudaErrorStreamCaptureUnsupported")
        self._gpu.drain(stream)
        return self._ok()

    def cudaEventCreateWithFlags(self, flags):
        event = self._gpu.number()
        self._gpu.marks[event] = Mark()
        return self._ok(event)

    def cudaEventDestroy(self, event):
        del self._gpu.marks[event]
        return self._ok()

    def cudaEventRecord(self, event, stream):
        mark = self._gpu.marks[event]
        mark.recorded += 1

        def passed() -> None:
            mark.passed += 1

        self._gpu.put(int(stream), f"mark {event}", passed)
        return self._ok()

    def cudaStreamWaitEvent(self, stream, event, flags):
        count = self._gpu.marks[event].recorded
        self._gpu.put(int(stream), "wait", lambda: self._gpu.reach(event, count))
        return self._ok()

    def cudaEventSynchronize(self, event):
        self._gpu.reach(event, self._gpu.marks[event].recorded)
        return self._ok()

    # ------------------------------------------------------------------ graphs

    def cudaStreamBeginCapture(self, stream, mode):
        self._gpu.queues[stream].capture = []
        return self._ok()

    def cudaStreamEndCapture(self, stream):
        queue, graph = self._gpu.queues[stream], self._gpu.number()
        self._gpu.graphs[graph], queue.capture = queue.capture or [], None
        return self._ok(graph)

    def cudaGraphInstantiate(self, graph, flags):
        executable = self._gpu.number()
        self._gpu.graphs[executable] = list(self._gpu.graphs[graph])
        return self._ok(executable)

    def cudaGraphDestroy(self, graph):
        del self._gpu.graphs[graph]
        return self._ok()

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph, stream):
        work = self._gpu.graphs[graph]

        def launch() -> None:
            for kind, node in work:
                node()
                self._gpu.done[kind] += 1

        self._gpu.put(int(stream), "graph", launch)
        return self._ok()


# ---------------------------------------------------------------------- TensorRT


def fake_tensorrt(gpu: FakeGpu) -> Any:
    """`tensorrt_rtx`, whose engines are run by ONNX Runtime."""
    severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)

    class ILogger:
        Severity = severity

    class Runtime:
        def __init__(self, logger: Any) -> None:
            gpu.touched.add("Runtime")
            self.logger = logger

        def get_engine_validity(self, header: bytes) -> tuple[str, int]:
            return ("VALID", 0) if header[:4] == b"vtrt" else ("INVALID", 32)

        def deserialize_cuda_engine(self, blob: bytes) -> Any:
            assert gpu.bundle is not None
            files = gpu.bundle.manifest.files
            for plan in gpu.bundle.manifest.plans:
                if files[plan.file].sha256 == sha256(blob).hexdigest():
                    return Engine(gpu, plan.segment, self.logger)
            self.logger.log(severity.ERROR, "IRuntime::deserializeCudaEngine: an engine of nobody")
            return None

    return SimpleNamespace(
        ILogger=ILogger,
        Runtime=Runtime,
        EngineValidity=SimpleNamespace(INVALID="INVALID", VALID="VALID"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
    )


class Engine:
    """One segment: what its ports are, and a context that runs its graph."""

    device_memory_size_v2 = 1 << 12

    def __init__(self, gpu: FakeGpu, segment: str, logger: Any) -> None:
        assert gpu.bundle is not None
        self.gpu, self.logger = gpu, logger
        self.segment = gpu.bundle.manifest.segment(segment)
        self.ports = {p.name: p for p in self.segment.inputs} | {OUT + p.name: p for p in self.segment.outputs}
        graph = fp32_twin(gpu.bundle.folder / self.segment.onnx)
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])

    @property
    def num_io_tensors(self) -> int:
        return len(self.ports)

    def get_tensor_name(self, i: int) -> str:
        return list(self.ports)[i]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.ports[name].shape

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=TENSORRT[self.ports[name].dtype])

    def create_runtime_config(self) -> Any:
        return RuntimeConfig(self.gpu)

    def create_execution_context(self, config: Any) -> "Context":
        assert config.strategy == "user"
        return Context(self)


class RuntimeConfig:
    """The runtime cache holds the names of the segments that have been compiled."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.strategy = gpu, ""

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        def deserialize(blob: bytes) -> bool:
            self.gpu.compiled |= set(blob.decode().split())
            return True

        return SimpleNamespace(serialize=lambda: " ".join(sorted(self.gpu.compiled)).encode(), deserialize=deserialize)

    def set_runtime_cache(self, cache: Any) -> None: ...


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.addresses = engine, dict[str, int]()
        self.ran = False

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address % 256 == 0 or self.engine.ports[name].row is not None

    def execute_async_v3(self, stream: int) -> bool:
        gpu, addresses = self.engine.gpu, dict(self.addresses)
        captured = gpu.queues[stream].capture is not None
        if captured and not self.ran:
            self.engine.logger.log(1, "it compiles at its first run, which cannot be captured")
            return False
        self.ran = True
        gpu.compiled.add(self.engine.segment.name)
        written = {address for name, address in addresses.items() if name.startswith(OUT)}
        read = {address for name, address in addresses.items() if not name.startswith(OUT)}
        assert not written & read, "an engine would write where it reads"
        gpu.put(stream, "engine", lambda: self._run(addresses))
        return True

    def _run(self, addresses: dict[str, int]) -> None:
        engine = self.engine
        inputs, outputs = engine.segment.inputs, engine.segment.outputs
        fed = {p.name: self._view(p, addresses[p.name], written=False).astype(np.float32) for p in inputs}
        results = engine.session.run([OUT + port.name for port in outputs], fed)
        for port, value in zip(outputs, results, strict=True):
            self._view(port, addresses[OUT + port.name], written=True)[...] = value.astype(DTYPES[port.dtype])

    def _view(self, port: Any, address: int, *, written: bool) -> np.ndarray:
        dtype = np.dtype(DTYPES[port.dtype])
        size = int(np.prod(port.shape)) * dtype.itemsize
        return self.engine.gpu.bytes(address, size, written=written).view(dtype).reshape(port.shape)
