"""Runs g++ and nvcc, and keeps what they made under build/ptxsim, by a hash of everything that went in."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("PTXSIM_CACHE", ROOT / "build" / "ptxsim"))
ENGINE = Path(__file__).parent / "engine"
_CXX = ("-std=c++20", "-march=native", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra")


class MissingTool(RuntimeError):
    """A compiler that is not there. The message says which, and how to get it."""


@cache
def tool(name: str, how: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise MissingTool(f"expected {name} on PATH; {how}")
    return path


def cxx() -> str:
    return tool(os.environ.get("CXX", "g++"), "install a C++20 compiler, or name one in CXX")


def nvcc() -> str:
    return tool("nvcc", "install a CUDA toolkit, or the wheels that CFRT_CUDA=ON brings (pyproject.toml)")


def cached(key: Iterable[str | bytes], make: Callable[[Path], None]) -> Path:
    """The folder that `make` filled for this key, now or earlier."""
    digest = hashlib.sha256()
    for part in key:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    done = CACHE / digest.hexdigest()[:24]
    if not done.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=CACHE, prefix="making-"))
        try:
            make(folder)
            os.replace(folder, done)  # whole or not at all, also with two processes
        except OSError:
            if not done.exists():
                raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return done


def run(*command: str | Path) -> str:
    """The command's output; what it said, if it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(str(c) for c in command)}\n{done.stdout}{done.stderr}")
    return done.stdout


@cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith("flags")), platform.machine())


def engine() -> Path:
    """The executor as a shared library. Objects are kept one by one, so that an edit compiles what it touches."""
    sources = sorted(ENGINE.glob("*.cpp"))
    headers = [path.read_bytes() for path in sorted(ENGINE.glob("*.h"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _object(source, headers), sources))

    def link(folder: Path) -> None:
        run(cxx(), "-shared", *objects, "-o", folder / "libptxsim.so")

    return cached([cxx(), *map(str, objects)], link) / "libptxsim.so"


def _object(source: Path, headers: list[bytes]) -> Path:
    # conversions.cpp has hundreds of small loops, none of them hot: optimising it takes most of the build.
    flags = (*_CXX, "-O1" if source.name == "conversions.cpp" else "-O2")

    def compile_(folder: Path) -> None:
        run(cxx(), *flags, "-c", source, "-o", folder / "object.o")

    return cached([cxx(), *flags, _cpu(), source.read_bytes(), *headers], compile_) / "object.o"
