"""The rules of tests/conftest.py, each shown on a small suite of its own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
WITHOUT_RAY = "import conftest\nconftest.find_spec = lambda name: None\n"


Suite = Callable[..., tuple[int, str]]


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """Runs pytest over one file in a folder with our conftest and pytest's settings; gives exit code and output."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def run(source: str, **environment: str) -> tuple[int, str]:
        (tmp_path / "test_it.py").write_text("import pytest\n" + source)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_it.py")]
        inherited = {name: value for name, value in os.environ.items() if name not in ("CI", "CFRT_GPU", "CFRT_RAY")}
        inherited["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is needed, and they are most of a start's seconds
        done = subprocess.run(command, cwd=tmp_path, env=inherited | environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.parametrize("marks", ["", "@pytest.mark.cpu\n@pytest.mark.gpu\n"])
def test_each_test_says_where_it_runs(suite: Suite, marks: str) -> None:
    code, output = suite(f"{marks}def test_lost(): pass")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "exactly one of the markers cpu and gpu" in output
    assert "test_lost" in output


@pytest.mark.parametrize("environment", [{}, {"CI": "true"}], ids=["home", "ci"])
@pytest.mark.parametrize(
    "source",
    [
        "@pytest.mark.cpu\ndef test_oracle(): pytest.importorskip('no_such_module')",
        "pytest.importorskip('no_such_module')\n@pytest.mark.cpu\ndef test_oracle(): pass",
    ],
    ids=["test", "file"],
)
def test_a_missing_oracle_is_a_skip_at_home_and_a_failure_in_ci(suite: Suite, source: str, environment: dict) -> None:
    code, output = suite(source, **environment)
    failed = code in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)  # in a test, in collecting a file
    assert failed == bool(environment), output
    assert "no_such_module" in output


@pytest.mark.parametrize(("environment", "code"), [({}, 0), ({"CI": "true"}, 0), ({"CFRT_GPU": "1"}, 1)])
def test_a_missing_gpu_is_a_failure_on_a_gpu_runner_only(suite: Suite, environment: dict, code: int) -> None:
    found, output = suite("@pytest.mark.gpu\ndef test_kernel(): raise RuntimeError", **environment, **NO_GPU)
    assert found == code, output


@pytest.mark.parametrize(("environment", "code"), [({}, 0), ({"CI": "true"}, 0), ({"CFRT_RAY": "1"}, 1)])
def test_a_missing_ray_is_a_failure_on_a_runner_that_has_it(suite: Suite, environment: dict, code: int) -> None:
    found, output = suite(
        WITHOUT_RAY + "@pytest.mark.cpu\n@pytest.mark.ray\ndef test_it(): raise RuntimeError", **environment
    )
    assert found == code, output


WITH_A_GPU = """
import os, torch, _cfrt
from cfrt.engines import gpu
torch.cuda.is_available = lambda: True

@pytest.fixture(scope="module", autouse=True)
def seen(): return torch.cuda.is_available()

@pytest.mark.cpu
def test_anywhere(seen):
    assert not seen and not torch.cuda.is_available() and torch.cuda.device_count() == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert "is hidden" in _cfrt.cuda.refusal(0)
    assert gpu.refusal() is not None

@pytest.mark.gpu
def test_there():
    assert torch.cuda.is_available() and "is hidden" not in str(_cfrt.cuda.refusal(0))
"""


def test_a_cpu_test_sees_no_gpu(suite: Suite) -> None:
    code, output = suite(WITH_A_GPU)
    assert code == 0, output
    assert "2 passed" in output


ON_THE_EXECUTOR = """
import torch
torch.cuda.is_available = lambda: True

@pytest.mark.cpu
@pytest.mark.usefixtures("executor")
def test_launch(): raise RuntimeError

@pytest.mark.cpu
def test_another(): pass
"""


@pytest.mark.parametrize("environment", [{}, {"CI": "true"}], ids=["home", "ci"])
def test_ptxsim_runs_no_host_code_where_a_gpu_is(suite: Suite, environment: dict) -> None:
    code, output = suite(ON_THE_EXECUTOR, **environment)
    assert code == 0, output
    assert "1 passed, 1 skipped" in output
    assert "dies beside a GPU's own CUDA" in output


def test_a_warning_is_an_error(suite: Suite) -> None:
    code, _ = suite("import warnings\n@pytest.mark.cpu\ndef test_loud(): warnings.warn('look')")
    assert code == 1


def test_random_state_is_restored(suite: Suite) -> None:
    source = """
import random, numpy
SEEN = set()
@pytest.mark.cpu
@pytest.mark.parametrize("again", range(3))
def test_draw(again):
    SEEN.add((random.random(), numpy.random.random()))
    assert len(SEEN) == 1
"""
    code, output = suite(source)
    assert code == 0, output
