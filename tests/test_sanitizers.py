"""The native code under the sanitizers: tests/native is compiled and run with ASan + UBSan and with TSan.

The kernels of all levels run on arrays that end at a guard page, and streams run side by side. Each sanitizer must also
catch a mistake made on purpose, or its silence would mean nothing.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

SOURCE = Path(__file__).parent / "native"
Run = Callable[[str], subprocess.CompletedProcess[str]]

# Where a report goes and what it holds is the same everywhere; leaks are looked for at exit.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1"}


def tool(name: str) -> str:
    """From the environment that pip filled, or the system's."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert found, f"expected {name}, which builds the extension, on the PATH"
    return found


def build(folder: Path, sanitize: str) -> Run:
    options = ["-S", SOURCE, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    for command in ([*options, f"-DCFRT_SANITIZE={sanitize}"], ["--build", folder, "-j", str(os.cpu_count())]):
        done = subprocess.run([tool("cmake"), *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(part: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "CFRT_ISA"} | OPTIONS
        return subprocess.run([folder / "cfrt_native", part], env=environment, capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return build(tmp_path_factory.mktemp("address"), "address,undefined")


@pytest.fixture(scope="module")
def thread(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return build(tmp_path_factory.mktemp("thread"), "thread")


@pytest.mark.parametrize("part", ["memory", "streams"])
def test_memory(address: Run, part: str) -> None:
    done = address(part)
    assert (done.returncode, done.stdout) == (0, f"{part}: done\n"), done.stderr


@pytest.mark.slow  # another build of everything: `make test-all`
def test_threads(thread: Run) -> None:
    done = thread("streams")
    assert (done.returncode, done.stdout) == (0, "streams: done\n"), done.stderr


@pytest.mark.parametrize(
    ("mutant", "report"),
    [
        ("heap", "AddressSanitizer: heap-buffer-overflow"),
        ("guard", "AddressSanitizer: SEGV"),
        ("signed", "runtime error: signed integer overflow"),
    ],
)
def test_a_wrong_access_is_caught(address: Run, mutant: str, report: str) -> None:
    done = address(f"mutant-{mutant}")
    assert done.returncode != 0, done.stdout
    assert report in done.stderr


@pytest.mark.slow
def test_a_race_is_caught(thread: Run) -> None:
    done = thread("mutant-race")
    assert done.returncode != 0, done.stdout
    assert "ThreadSanitizer: data race" in done.stderr
