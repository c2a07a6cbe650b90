"""An NVIDIA GPU through cuda-python: memory, streams, events and graphs, with CUDA's error codes as `EngineError`.

Nothing here computes. Addresses are plain integers, which is what the kernels (`_cfrt.cuda`) and TensorRT take. Whether
there is a GPU is asked first (`refusal`), without touching it: several libraries crash where there is no driver.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import c_ubyte
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..errors import EngineError

ALIGNMENT = 256
"""Of all device memory, by CUDA's word."""


def refusal(device: int = 0) -> str | None:
    """Why there is no GPU of that number to use, or None. Never raises, and creates no context."""
    if find_spec("cuda") is None:
        return "cuda-python is not installed: pip install 'cfrt[trt]'"
    from cuda.bindings import runtime

    code, version = runtime.cudaDriverGetVersion()
    if code != runtime.cudaError_t.cudaSuccess or not version:  # 0 where there is no driver
        return "there is no NVIDIA driver on this machine"
    code, count = runtime.cudaGetDeviceCount()
    if code != runtime.cudaError_t.cudaSuccess or not count:
        return f"the NVIDIA driver shows no GPU ({code.name})"
    if device >= count:
        return f"the NVIDIA driver shows {count} GPU{'s' if count > 1 else ''}, so there is no number {device}"
    return None


def capability(device: int = 0) -> str:
    """Architecture of a GPU that is there: "sm89"."""
    from cuda.bindings import runtime

    names = runtime.cudaDeviceAttr
    major, minor = (
        runtime.cudaDeviceGetAttribute(name, device)[1]
        for name in (names.cudaDevAttrComputeCapabilityMajor, names.cudaDevAttrComputeCapabilityMinor)
    )
    return f"sm{major}{minor}"


class Block:
    """Bytes on the GPU, or pinned on the host (`array` then shows them); freed when nobody holds it any more."""

    def __init__(self, gpu: "Gpu", size: int, pinned: bool) -> None:
        self._gpu, self._pinned, self.bytes = gpu, pinned, size
        allocate = "cudaMallocHost" if pinned else "cudaMalloc"
        self.address = int(gpu.call(allocate, max(size, 1)))
        gpu.allocated += size

    @property
    def array(self) -> np.ndarray:
        """uint8 [bytes] of pinned memory. It must not outlive this object."""
        assert self._pinned
        return np.ctypeslib.as_array((c_ubyte * self.bytes).from_address(self.address))

    def free(self) -> None:
        """Gives the memory back, once; waits for the GPU, as CUDA does."""
        if self.address:
            address, self.address = self.address, 0
            self._gpu.allocated -= self.bytes
            self._gpu.call("cudaFreeHost" if self._pinned else "cudaFree", address)

    def __del__(self) -> None:
        with suppress(Exception):  # at the end of a process CUDA may be gone before us
            self.free()


class Event:
    """A point on a stream."""

    def __init__(self, gpu: "Gpu") -> None:
        self._gpu = gpu
        self.event = gpu.call("cudaEventCreateWithFlags", gpu.runtime.cudaEventDisableTiming)

    def wait(self) -> None:
        """Until it was passed; at once where it never was on a stream."""
        self._gpu.call("cudaEventSynchronize", self.event)

    def close(self) -> None:
        self._gpu.call("cudaEventDestroy", self.event)


class Stream:
    """Work in order; `handle` is what kernels take."""

    def __init__(self, gpu: "Gpu") -> None:
        self._gpu = gpu
        self._stream = gpu.call("cudaStreamCreateWithFlags", gpu.runtime.cudaStreamNonBlocking)
        self._now = gpu.event()
        self.handle = int(self._stream)

    def copy(self, to: int, source: int, size: int) -> None:
        """Bytes from anywhere to anywhere; host memory must be pinned and stay as it is until they have gone."""
        if size:
            kind = self._gpu.runtime.cudaMemcpyKind.cudaMemcpyDefault
            self._gpu.call("cudaMemcpyAsync", to, source, size, kind, self._stream)

    def zero(self, address: int, size: int) -> None:
        self._gpu.call("cudaMemsetAsync", address, 0, size, self._stream)

    def follow(self, other: "Stream") -> None:
        """What comes next here waits for all that is on the other stream now."""
        other.mark(other._now)
        self._gpu.call("cudaStreamWaitEvent", self._stream, other._now.event, 0)

    def mark(self, event: Event) -> None:
        """Puts the event behind what is on the stream now."""
        self._gpu.call("cudaEventRecord", event.event, self._stream)

    def wait(self) -> None:
        """Until everything on it is done."""
        self._gpu.call("cudaStreamSynchronize", self._stream)

    def fetch(self, address: int, size: int) -> np.ndarray:
        """uint8 bytes of the GPU, once all that is on the stream is done."""
        out = np.empty(size, dtype=np.uint8)
        self.copy(out.ctypes.data, address, size)
        self.wait()
        return out

    @contextmanager
    def captured(self) -> Iterator["Graph"]:
        """What is put on the stream meanwhile goes into a graph and is not done."""
        runtime, graph = self._gpu.runtime, Graph(self._gpu)
        self._gpu.call(
            "cudaStreamBeginCapture", self._stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )
        try:
            yield graph
        except BaseException:
            with suppress(EngineError):  # a capture that broke has nothing to end with
                self._gpu.call("cudaGraphDestroy", self._gpu.call("cudaStreamEndCapture", self._stream))
            raise
        graph.set(self._gpu.call("cudaStreamEndCapture", self._stream))

    def launch(self, graph: "Graph") -> None:
        self._gpu.call("cudaGraphLaunch", graph.executable, self._stream)

    def close(self) -> None:
        self._now.close()
        self._gpu.call("cudaStreamDestroy", self._stream)


class Graph:
    """A captured piece of work."""

    def __init__(self, gpu: "Gpu") -> None:
        self._gpu = gpu
        self.executable: Any = None

    def set(self, graph: Any) -> None:
        self.executable = self._gpu.call("cudaGraphInstantiate", graph, 0)
        self._gpu.call("cudaGraphDestroy", graph)

    def close(self) -> None:
        if self.executable is not None:
            self._gpu.call("cudaGraphExecDestroy", self.executable)
            self.executable = None


class Upload:
    """Pinned memory that goes to one place on the GPU again and again; some turns, so that the host runs ahead."""

    def __init__(self, gpu: "Gpu", size: int, turns: int = 4) -> None:
        self._slots: list[tuple[Block, Event]] = [(gpu.pinned(size), gpu.event()) for _ in range(turns)]
        self._turn = 0

    def send(self, stream: Stream, to: int, data: np.ndarray) -> None:
        """uint8 bytes to an address, in the stream's order. They are copied at once, so `data` may change."""
        memory, sent = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        sent.wait()
        memory.array[: data.size] = data
        stream.copy(to, memory.address, data.size)
        stream.mark(sent)

    def close(self) -> None:
        for memory, sent in self._slots:
            sent.wait()
            memory.free()
            sent.close()


class Gpu:
    """One GPU. Any thread may use it, one at a time.

    EngineError when there is none of that number."""

    def __init__(self, index: int = 0) -> None:
        reason = refusal(index)
        if reason is not None:
            raise EngineError(reason)
        from cuda.bindings import runtime

        self.runtime: Any = runtime
        self.index, self.allocated = index, 0
        self._thread: int | None = None
        self.capability = capability(index)

    def memory(self, size: int) -> Block:
        """On the GPU, at least `ALIGNMENT` aligned, not cleared."""
        return Block(self, size, pinned=False)

    def pinned(self, size: int) -> Block:
        """On the host, where the GPU can read and write it while the host goes on."""
        return Block(self, size, pinned=True)

    def stream(self) -> Stream:
        return Stream(self)

    def event(self) -> Event:
        return Event(self)

    def call(self, name: str, *arguments: Any) -> Any:
        """A function of CUDA's runtime, with this GPU as the thread's own: its result, or EngineError."""
        thread = threading.get_ident()
        if self._thread != thread:
            self._thread = thread
            self._checked("cudaSetDevice", (self.index,))
        return self._checked(name, arguments)

    def _checked(self, name: str, arguments: tuple[Any, ...]) -> Any:
        code, *results = getattr(self.runtime, name)(*arguments)
        if code != self.runtime.cudaError_t.cudaSuccess:
            raise EngineError(self._reason(name, code, arguments))
        return results[0] if results else None

    def _reason(self, name: str, code: Any, arguments: tuple[Any, ...]) -> str:
        if code == self.runtime.cudaError_t.cudaErrorMemoryAllocation and name.startswith("cudaMalloc"):
            free = self.runtime.cudaMemGetInfo()[1] or 0
            return (
                f"the GPU has no room for {arguments[0] / 1e9:.2f} GB more: {self.allocated / 1e9:.2f} GB are taken by "
                f"this stream and {free / 1e9:.2f} GB free; a shorter window (--window) or the small decoder need less"
            )
        words = self.runtime.cudaGetErrorString(code)[1]
        said = words.decode() if isinstance(words, bytes) else code.name
        return f"CUDA refused {name}: {said} ({code.name})"


def as_bytes(array: np.ndarray) -> np.ndarray:
    """uint8 [n], of an array of anything."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
