"""What every test gets: a place it runs (cpu or gpu) and sees nothing beyond, one thread, its own random state, and no
silent skip in CI."""

import os
import random
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for `benchmarks`; last, so that the installed cfrt is what is tested

# Before anything imports numpy or torch, here or in a child process: results at a fixed thread count are comparable.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import settings

CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")
GPU_RUNNER = os.environ.get("CFRT_GPU") == "1"
RAY_RUNNER = os.environ.get("CFRT_RAY") == "1"
BESIDE_A_GPU = "host code of CUDA run by ptxsim dies beside a GPU's own CUDA; there the gpu tests run its kernels"

settings.register_profile("cfrt", deadline=None, derandomize=CI, max_examples=50, print_blob=True)
settings.load_profile("cfrt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test says where it runs: exactly one of the markers cpu and gpu."""
    lost = [item.nodeid for item in items if sum(item.get_closest_marker(m) is not None for m in ("cpu", "gpu")) != 1]
    if lost:
        expected = "expected exactly one of the markers cpu and gpu on each test, not so:"
        raise pytest.UsageError("\n".join([expected, *lost]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a runner does not have is skipped there, and fails when the runner is said to have it."""
    if item.get_closest_marker("gpu") is not None and not gpu_present():
        if GPU_RUNNER:
            pytest.fail("CFRT_GPU=1, but torch sees no CUDA device", pytrace=False)
        pytest.skip("no GPU")
    if item.get_closest_marker("ray") is not None and find_spec("ray") is None:
        if RAY_RUNNER:
            pytest.fail("CFRT_RAY=1, but there is no Ray; pip install 'cfrt[ray]'", pytrace=False)
        pytest.skip("no Ray; make test-ray")


@cache  # asked before anything is hidden
def gpu_present() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator:
    """A cpu test, with its fixtures of any scope, sees no GPU: it is the same test on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("cpu") and gpu_present():
            hide_gpu(patch)
        return (yield)


def hide_gpu(patch: pytest.MonkeyPatch) -> None:
    """From all that asks for one. CUDA itself, which this process has asked already, would go on showing it."""
    import _cfrt

    patch.setenv("CUDA_VISIBLE_DEVICES", "")  # child processes
    patch.setattr("torch.cuda.is_available", lambda: False)
    patch.setattr("torch.cuda.device_count", lambda: 0)
    patch.setattr(_cfrt.cuda, "refusal", lambda *_: "the driver shows no GPU (it is hidden from tests that need none)")
    if find_spec("cuda") is not None:
        from cuda.bindings import runtime

        patch.setattr(runtime, "cudaGetDeviceCount", lambda: (runtime.cudaError_t.cudaErrorNoDevice, 0))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator:
    """In CI a test that runs on any machine is not skipped: a missing oracle is a failure."""
    report = yield
    lent = any(item.get_closest_marker(name) is not None for name in ("gpu", "ray"))
    meant = hasattr(report, "wasxfail") or BESIDE_A_GPU in str(report.longrepr)
    if CI and report.skipped and not meant and not lent:
        report.outcome, report.longrepr = "failed", f"skipped in CI: {call.excinfo and call.excinfo.value}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator:
    """The same for a whole file (`pytest.importorskip` at its top)."""
    report = yield
    if CI and report.skipped:
        report.outcome, report.longrepr = "failed", f"skipped in CI: {collector.nodeid}: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def _random_state() -> Iterator[None]:
    """Each test leaves the global random states and torch's threads as it found them, so that order does not matter."""
    torch = sys.modules.get("torch")
    python, numpy = random.getstate(), np.random.get_state()
    of_torch = torch.get_rng_state() if torch else None
    yield
    random.setstate(python)
    np.random.set_state(numpy)
    if of_torch is not None:
        torch.set_rng_state(of_torch)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # a command's --threads; two of them on busy cores wait for each other


# ---------------------------------------------------------------------- streams, servers


@pytest.fixture(scope="module")
def folders() -> Iterator:
    """The folder of each of `stream_fixture.CONFIGS`."""
    from stream_fixture import saved

    with saved() as folder_of:
        yield folder_of


@pytest.fixture
def open_stream(folders: Callable[[int], Path]) -> Iterator:
    """Makes streams that end with the test."""
    from stream_fixture import opening

    with opening(folders) as make:
        yield make


@pytest.fixture(scope="module")
def served() -> Iterator:
    """A server in this process with limits that no test reaches."""
    from serve_fixture import GENEROUS, running

    with running(limits=GENEROUS) as server:
        yield server


@pytest.fixture
def name(served: Any) -> Iterator[str]:
    """A stream on it."""
    name = served.new()
    yield name
    served.http.delete(f"/streams/{name}")


@pytest.fixture
def client(served: Any) -> Any:
    from cfrt.serve.client import Client

    return Client(served.url)


# ---------------------------------------------------------------------- tools


@pytest.fixture(scope="session")
def cxx() -> str:
    """The C++ compiler that ptxsim's engine is built with; the test is skipped where there is none."""
    return _tool("cxx")


@pytest.fixture(scope="session")
def nvcc(cxx: str) -> str:
    """The CUDA compiler whose PTX ptxsim runs."""
    return _tool("nvcc")


@pytest.fixture(scope="session")
def executor(request: pytest.FixtureRequest) -> None:
    """Launchers as nvcc compiles them, which ptxsim runs over its own libcudart (`ptxsim.Runtime`).

    On an H200, under PyTorch for CUDA, such a process was killed (SIGSEGV) in whatever call came, a refused one too;
    with that libcudart loaded and no GPU it is not, and the cause has not been found."""
    if gpu_present():
        pytest.skip(BESIDE_A_GPU)
    request.getfixturevalue("nvcc")


def _tool(name: str) -> str:
    from ptxsim import compiler

    try:
        return getattr(compiler, name)()
    except compiler.MissingTool as missing:
        pytest.skip(str(missing))
