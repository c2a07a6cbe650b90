"""ptxsim's stand-in for the CUDA runtime, and its mutants, on a kernel that a block's worth of lines explains."""

import ctypes
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from ptxsim import EVERY_SCHEDULE, Built, Device, Memory, Options, PtxError, Report, Runtime, build, compiler
from ptxsim.edits import Edit, edited
from ptxsim.mutants.framework import Subject, bug, judge

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("nvcc")]

SOURCE = r"""
#include <cuda_runtime.h>

__constant__ int kAdd = 5;

// Each block turns its row of blockDim.x numbers around.
template <class T>
__global__ void reverse(T* out, const T* in, int count) {
    extern __shared__ __align__(16) unsigned char memory[];
    T* row = reinterpret_cast<T*>(memory);
    const int at = blockIdx.x * blockDim.x + threadIdx.x;
    row[threadIdx.x] = at < count ? in[at] : T(0);
    __syncthreads();
    if (at < count) out[at] = row[blockDim.x - 1 - threadIdx.x] + T(kAdd);
}

__global__ void unheard_of() {
    asm volatile("frobnicate.b32;");
}

extern "C" int turn(float* out, const float* in, int count, int threads, int shared, int allowed) {
    if (allowed) {
        const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
        const cudaError_t error = cudaFuncSetAttribute(reverse<float>, attribute, allowed);
        if (error != cudaSuccess) return error;
    }
    reverse<float><<<(count + threads - 1) / (threads ? threads : 1), threads, shared>>>(out, in, count);
    return cudaGetLastError();
}

extern "C" int unknown() {
    unheard_of<<<1, 32>>>();
    return cudaPeekAtLastError();
}

extern "C" int processors() {
    int device = -1, count = 0;
    if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)) return -1;
    return count;
}
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("csrc") / "cuda" / "reverse.cu"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="module")
def built(source: Path) -> Built:
    return build(source)


def turn(
    built: Built, count: int = 100, threads: int = 64, shared: int = 256, allowed: int = 0,
    options: Options = Options(),  # noqa: B008
) -> tuple[int, np.ndarray, Report]:  # fmt: skip
    memory = Memory()
    x, out = memory.put(np.arange(count, dtype=np.float32)), memory.empty(count, np.float32)
    with Runtime(built, memory, options) as run:
        pointers = (ctypes.c_void_p(out.address), ctypes.c_void_p(x.address))
        code = run.library.turn(*pointers, count, threads, shared, allowed)
    return code, out.array, run.report


@pytest.mark.parametrize("options", EVERY_SCHEDULE, ids=lambda o: f"{o.schedule}-{o.copies}")
def test_a_launch_runs_here(built: Built, options: Options) -> None:
    """Template, constant, dynamic shared memory, a last block that is not full."""
    code, out, report = turn(built, options=options)
    padded = np.r_[np.arange(100), np.zeros(28)].reshape(2, 64)[:, ::-1].reshape(-1)[:100]
    assert code == 0
    assert report.clean, report
    np.testing.assert_array_equal(out, padded + 5)
    assert "<<<(2, 1, 1), (64, 1, 1), 256>>>" in report.launches[0]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"threads": 1025}, 9),  # cudaErrorInvalidConfiguration
        ({"threads": 0}, 9),
        ({"shared": 49153}, 1),  # cudaErrorInvalidValue: more than 48 KiB want the attribute
        ({"shared": 65536, "allowed": 65536}, 0),
        ({"shared": 65537, "allowed": 65536}, 1),
        ({"allowed": 102400}, 1),  # and Ada has 99 KiB of it
        ({"shared": 0}, 719),  # cudaErrorLaunchFailure: the kernel writes where nothing is
        ({"shared": 252}, 719),
    ],
    ids=str,
)
def test_limits_are_cudas(source: Path, changes: dict, code: int) -> None:
    # What the attribute allows stays with a library: take a new one.
    with edited(Edit("reverse.cu", "// Each", f"// {changes}\n// Each")):
        fresh = build(source)
    assert turn(fresh, **changes)[0] == code


def test_what_the_kernel_did_wrong_has_its_line(built: Built) -> None:
    _, _, report = turn(built, shared=128)
    line = 1 + SOURCE.splitlines().index("    row[threadIdx.x] = at < count ? in[at] : T(0);")
    assert report.findings[0].source == f"reverse.cu:{line}"
    assert report.findings[0].thread == 32


def test_the_device_is_as_said(built: Built) -> None:
    with Runtime(built, Memory(), device=Device(multiprocessors=21)) as run:
        assert run.library.processors() == 21


def test_an_opcode_nobody_knows_is_raised_where_it_is_launched(built: Built) -> None:
    with pytest.raises(PtxError, match=r"unknown opcode 'frobnicate\.b32'"), Runtime(built, Memory()) as run:
        assert run.library.unknown() == 719


def test_outside_of_a_runtime_there_is_no_device(built: Built) -> None:
    library = Runtime(built, Memory()).library
    assert library.unknown() == 101  # cudaErrorInvalidDevice


FOREIGN = """
int cudaGetDevice(int* device) { return 100; }
int cudaLaunchKernel() { return 100; }
int __cudaLaunchKernel() { return 100; }
int cudaGetLastError() { return 100; }
"""
AFTER_IT = """
import ctypes, sys
from pathlib import Path
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
from ptxsim import Built, Memory
from test_ptxsim_runtime import Runtime, turn
built = Built(Path(sys.argv[2]), tuple(map(Path, sys.argv[3:])))
with Runtime(built, Memory()) as run:
    assert run.library.processors() == 128
code, out, report = turn(built)
assert (code, out[0], len(report.launches)) == (0, 68, 1), (code, out, report)
"""


def test_a_libcudart_that_is_there_already_is_not_called(built: Built, tmp_path: Path) -> None:
    """PyTorch for CUDA makes its own visible to all that is loaded later, and a GPU would get the host's addresses."""
    (tmp_path / "foreign.c").write_text(FOREIGN)
    foreign = tmp_path / "libcudart.so"
    compiler.run(compiler.cxx(), "-x", "c", "-shared", "-fPIC", tmp_path / "foreign.c", "-o", foreign)
    command = [sys.executable, "-c", AFTER_IT, foreign, built.library, *built.ptx]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    compiler.tool.cache_clear()
    with pytest.raises(compiler.MissingTool, match="expected nvcc on PATH; install a CUDA toolkit"):
        compiler.nvcc()
    compiler.tool.cache_clear()


# -------------------------------------------------------------------------------------------------------------- mutants


def subject(source: Path, *mutants: tuple) -> Subject:
    @cache
    def compiled() -> Built:
        return build(source)

    def case() -> None:
        code, out, report = turn(compiled(), count=128)
        report.check()
        assert code == 0
        assert (out == np.arange(128).reshape(2, 64)[:, ::-1].reshape(-1) + 5).all()

    return Subject("reverse", {"whole rows": case}, [bug(*m) for m in mutants], compiled.cache_clear)


BARRIER = ("race", "no barrier", "reverse.cu", "__syncthreads();", "")
PTX = ("race", "no barrier in the PTX", "reverse.ptx", "bar.sync", "// bar.sync")
NUMBER = ("value", "another constant", "reverse.cu", "kAdd = 5", "kAdd = 6")
SAME = ("any", "nothing changes", "reverse.cu", "T(kAdd)", "T(+kAdd)")
WRONG_CHECK = ("bounds", "a barrier is no bound", "reverse.cu", "__syncthreads();", "")


def test_mutants_are_caught_by_their_check(source: Path) -> None:
    verdicts = {v.mutant.name: v for v in judge(subject(source, BARRIER, PTX, NUMBER, SAME, WRONG_CHECK))}
    caught = [name for name, verdict in verdicts.items() if verdict.caught]
    assert caught == ["no barrier", "no barrier in the PTX", "another constant"]
    assert verdicts["no barrier"].found["race"] == "whole rows"
    assert "SURVIVED  reverse: nothing changes (any): nothing" in str(verdicts["nothing changes"])


def test_a_kernel_that_is_wrong_has_no_mutants(source: Path) -> None:
    with (
        edited(Edit("reverse.cu", "kAdd = 5", "kAdd = 7")),
        pytest.raises(RuntimeError, match="expected the unchanged"),
    ):
        list(judge(subject(source, BARRIER)))


@pytest.mark.parametrize("edit", [Edit("a.cu", "x", "y"), Edit("a.cu", "a", "y"), Edit("a.cu", "a", "y", 2)])
def test_an_edit_that_does_not_fit_is_an_error(edit: Edit) -> None:
    with pytest.raises(ValueError, match=r"a.cu: expected (one occurrence|more than 2 occurrences)"):
        edit.apply("aa b")


def test_an_edit_is_of_one_place() -> None:
    assert Edit("a.cu", "a", "y", 1).apply("aa b") == "ay b"


@pytest.mark.slow
def test_no_mutant_of_our_kernels_survives(tmp_path: Path) -> None:
    result = tmp_path / "mutants.json"
    command = [sys.executable, "-m", "tests.ptxsim.mutants", "--json", str(result)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
