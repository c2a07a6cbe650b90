"""`_cfrt.cuda` without a GPU: the production binding and launchers, over ptxsim in place of libcudart.

memory = Memory()
with simulated(memory) as cuda:  # what `_cfrt.cuda` offers, on the addresses of memory's buffers
    cuda.attention(...)
cuda.report.check()
"""

import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pybind11
from cuda_fixture import CSRC, compiled
from ptxsim import Built, Device, Memory, Module, Options, Report, Runtime, compiler
from ptxsim.memory import Buffer
from ptxsim.runtime import linked

import _cfrt

KERNELS = ("append", "attention_bf16", "attention_int8_fp8", "combine", "pixels", "quantise", "query", "renoise")
_SOURCES = ("bindings_cuda.cpp", "build_info.cpp")
_NAME = "_cfrt_simulated"


class Simulated:
    """`_cfrt.cuda` with calls that run in ptxsim; `report` is what their launches did."""

    def __init__(self, module: ModuleType, run: Runtime) -> None:
        self._module, self._run = module, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module if hasattr(self._module, name) else _cfrt.cuda, name)

    @property
    def report(self) -> Report:
        return self._run.report


class SimulatedBuffer:
    """A buffer as benchmarks/ring_stream.py wants it."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer, self.address = buffer, buffer.address

    def get(self) -> np.ndarray:
        return self._buffer.array.copy()

    def set(self, values: np.ndarray) -> None:
        self._buffer.array[...] = values


class SimulatedMemory:
    def __init__(self) -> None:
        self.memory = Memory()

    def put(self, values: np.ndarray) -> SimulatedBuffer:
        return SimulatedBuffer(self.memory.put(values))

    def empty(self, shape: tuple[int, ...], dtype: type) -> SimulatedBuffer:
        return SimulatedBuffer(self.memory.empty(shape, dtype))


@contextmanager
def simulated(memory: Memory, options: Options = Options(), **device: int) -> Iterator[Simulated]:  # noqa: B008
    """Launches run in ptxsim and may touch `memory` alone; a finding is a launch that fails."""
    library, modules = _built()
    with Runtime(Built(library, ()), memory, options, Device(**device), list(modules)) as run:
        yield Simulated(_module(), run)


@cache
def _built() -> tuple[Path, tuple[Module, ...]]:
    kernels = {name: compiled(name) for name in KERNELS}
    objects = [built.library.parent / name / "host.o" for name, (built, _) in kernels.items()]
    root = CSRC.parent
    sources = [Path(__file__).parent / "simulated.cpp", *(root / name for name in _SOURCES)]
    headers = sorted([*root.glob("*.h"), *CSRC.glob("*.h")])
    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", f"-I{root}"]
    flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags += ["-DCFRT_HAS_CUDA", '-DCFRT_CUDA_VERSION="13.0"', '-DCFRT_CUDA_ARCHS="89"']

    def link(folder: Path) -> None:
        file = folder / f"{_NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
        linked(objects, file, *flags, *sources)

    key = [compiler.cxx(), *flags, *map(str, objects), *(p.read_bytes() for p in (*sources, *headers))]
    folder = compiler.cached(key, link)
    modules = [module for _, found in kernels.values() for module in found]
    return next(folder.glob("*.so")), tuple(modules)


@cache
def _module() -> ModuleType:
    path = str(_built()[0])
    spec = spec_from_file_location(_NAME, path, loader=ExtensionFileLoader(_NAME, path))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
