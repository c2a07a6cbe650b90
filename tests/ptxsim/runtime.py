"""A CUDA runtime without a GPU: the production launchers, as nvcc compiles them, with kernels run by the executor.

`build` compiles .cu files once, for the host and to PTX, and links the host objects against cudart/cudart.cpp in place
of libcudart. Inside `Runtime`, a launch with <<<>>> runs here and its report is kept.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from . import compiler, edits
from .memory import Memory
from .module import Module, pack
from .report import Report
from .schedule import Options

LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure
INVALID_FUNCTION = 98
_SOURCES = (".h", ".cuh", ".cu", ".hpp")
_CUDART = Path(__file__).parent / "cudart" / "cudart.cpp"


@dataclass(frozen=True)
class Device:
    """The limits that a launcher asks for or runs into. Default: an RTX 4090."""

    multiprocessors: int = 128
    major: int = 8
    minor: int = 9
    max_threads: int = 1024
    max_shared: int = 48 << 10
    max_shared_optin: int = 99 << 10


class _Device(ctypes.Structure):
    _fields_ = tuple((f.name, ctypes.c_int) for f in fields(Device))


class _Dim3(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))

    def __iter__(self):
        return iter((self.x, self.y, self.z))


_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_Dim3), ctypes.POINTER(_Dim3), ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
)  # fmt: skip


def linked(objects: Sequence[Path], file: Path, *options: str | Path) -> None:
    """A shared library of what nvcc compiled, with a CUDA runtime of its own in place of libcudart: whatever else has
    been loaded, a GPU's own libcudart by PyTorch for one, its calls stay within it. The runtime comes first: nvcc's
    constructors call it."""
    compiler.run(compiler.cxx(), "-shared", _cudart(), *options, *objects, "-Wl,-Bsymbolic", "-o", file)


def _cudart() -> Path:
    command = (compiler.cxx(), "-std=c++20", "-O1", "-Wall", "-Wextra", "-fPIC", "-c")

    def make(folder: Path) -> None:
        compiler.run(*command, _CUDART, "-o", folder / "cudart.o")

    return compiler.cached([*command, _CUDART.read_bytes()], make) / "cudart.o"


@dataclass(frozen=True)
class Built:
    """What `build` made: host code with the launchers, and the PTX of each source."""

    library: Path
    ptx: tuple[Path, ...]

    def modules(self) -> list[Module]:
        return [Module(edits.read(path)) for path in self.ptx]


def build(
    *sources: Path, arch: int = 89, include: Sequence[Path] = (), flags: Sequence[str] = ("--fmad=false",),
) -> Built:  # fmt: skip
    """Compiles .cu files for compute_<arch>, anew where one of them, a header beside them, in the folder above or in
    `include` has changed. `flags`: the project's own for nvcc."""
    sources = tuple(Path(s).resolve() for s in sources)
    folders = sorted({f for s in sources for f in (s.parent, s.parents[1])} | {Path(i).resolve() for i in include})
    files = sorted({f for folder in folders for f in folder.iterdir() if f.suffix in _SOURCES})
    options = ["-std=c++20", "-lineinfo", "-cudart", "none", "-Xcompiler", "-fPIC", *flags]
    options += [f"-arch=compute_{arch}", f"-code=compute_{arch}", *(f"-I{i}" for i in include)]
    nvcc = compiler.nvcc()

    def make(folder: Path) -> None:
        for source in sources:
            kept = folder / source.stem
            kept.mkdir()
            compiled = _with_edits(source, files, folder)
            compiler.run(nvcc, *options, "--keep", "--keep-dir", kept, "-c", compiled, "-o", kept / "host.o")
        linked([folder / s.stem / "host.o" for s in sources], folder / "library.so")

    contents = [text for f in files for text in (str(f), edits.read(f))]
    key = [nvcc, compiler.run(nvcc, "--version"), *options, *map(str, sources), *contents, str(_cudart())]
    folder = compiler.cached(key, make)
    return Built(folder / "library.so", tuple(folder / s.stem / f"{s.stem}.ptx" for s in sources))


def _with_edits(source: Path, files: list[Path], folder: Path) -> Path:
    """The source, or where files are edited its copy beside copies of all of them, in the same folders."""
    if not edits.active(files):
        return source
    root = folder / "edited"
    for file in files:
        copy = root / file.relative_to(file.anchor)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(edits.read(file))
    return root / source.relative_to(source.anchor)


class Runtime:
    """`with Runtime(built, memory) as run:` - `run.library` is the host code; `run.report` what its launches did."""

    def __init__(
        self, built: Built, memory: Memory, options: Options = Options(), device: Device = Device(),  # noqa: B008
        modules: list[Module] | None = None,
    ) -> None:  # fmt: skip
        self.memory, self.options, self.device = memory, options, device
        self.modules = built.modules() if modules is None else modules
        self.report = Report()
        self._error: BaseException | None = None
        self._callback = _LAUNCH(self._launch)
        self.library = ctypes.CDLL(str(built.library))

    def __enter__(self) -> "Runtime":
        device = _Device(*(getattr(self.device, f.name) for f in fields(Device)))
        self.library.ptxsim_cudart_connect(self._callback, ctypes.byref(device))
        return self

    def __exit__(self, *raised: object) -> None:
        device = _Device(*(getattr(self.device, f.name) for f in fields(Device)))
        self.library.ptxsim_cudart_connect(_LAUNCH(), ctypes.byref(device))
        if self._error is not None and raised[0] is None:
            raise self._error

    def _launch(self, name: bytes, grid: "ctypes._Pointer", block: "ctypes._Pointer", arguments, shared: int) -> int:
        """Called by the runtime, so it may not raise: an exception is kept for __exit__."""
        try:
            module = next((m for m in self.modules if name.decode() in m.entries), None)
            if module is None:
                return INVALID_FUNCTION
            program = module.program(name.decode())
            sizes = [size for _, size in sorted(program.kernel.parameters.values())]
            values = [ctypes.string_at(arguments[i], size) for i, size in enumerate(sizes)]
            packed = pack(program.kernel.parameters, values)
            memory = [self.memory, module.memory]
            report = program.launch(tuple(grid[0]), tuple(block[0]), packed, memory, shared, self.options)
        except BaseException as error:
            self._error = error
            return LAUNCH_FAILURE
        self.report += report
        return LAUNCH_FAILURE if report.findings else 0
