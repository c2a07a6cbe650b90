"""Building the checkout: what must fail does, and the other two ways to install work."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "cmake", "csrc", "cfrt", "training", "export")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the checkout as far as a build reads it, to be broken."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for source in (ROOT / name for name in BUILT_FROM):
        if source.is_dir():
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
        else:
            shutil.copy(source, folder)
    return folder


def build(folder: Path, kind: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Ask the build backend, as pip does, for a wheel, an sdist or an editable wheel of a folder."""
    code = f"from scikit_build_core.build import build_{kind} as build; build({str(out)!r})"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | environment)


def test_a_broken_source_breaks_the_build(checkout: Path, tmp_path: Path) -> None:
    """No silent fallback to a pure Python wheel. All of them, so that the compiler is not kept busy with the others."""
    for source in (checkout / "csrc").rglob("*.cpp"):
        source.write_text('#error "broken on purpose"\n')
    done = build(checkout, "wheel", tmp_path, CFRT_CUDA="OFF")
    assert done.returncode != 0
    assert "broken on purpose" in done.stdout + done.stderr
    assert list(tmp_path.glob("*.whl")) == []


def test_an_unknown_cuda_setting_is_refused(checkout: Path, tmp_path: Path) -> None:
    done = build(checkout, "wheel", tmp_path, CFRT_CUDA="maybe")
    assert done.returncode != 0
    assert "expected CFRT_CUDA to be AUTO, ON or OFF, got 'maybe'" in done.stdout + done.stderr


def test_the_sdist_carries_tests_and_no_build_output(tmp_path: Path) -> None:
    done = build(ROOT, "sdist", tmp_path)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("cfrt-*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"tests/test_build.py", "csrc/bindings.cpp", "cmake/cuda.cmake", "Makefile", "constraints.txt"} <= names
    assert {name.split("/")[0] for name in names} & {"build", ".venv", "runs", "dist", ".ci"} == set()


@pytest.mark.slow
def test_editable_install(checkout: Path, tmp_path: Path) -> None:
    """Sources run from the checkout, the extension from the environment, whatever the current folder."""
    done = build(checkout, "editable", tmp_path, CFRT_CUDA="OFF")
    assert done.returncode == 0, done.stderr
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    python = str(environment / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(next(tmp_path.glob("*.whl")))], check=True, capture_output=True)
    show = "import cfrt, training, export, _cfrt; print(*(m.__file__ for m in (cfrt, training, export, _cfrt)))"
    done = subprocess.run([python, "-c", show], cwd=tmp_path, capture_output=True, text=True, check=True)
    found = done.stdout.split()
    assert [Path(file).is_relative_to(checkout) for file in found] == [True, True, True, False]
    assert Path(found[3]).is_relative_to(environment)
