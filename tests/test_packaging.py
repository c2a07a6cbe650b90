"""The wheel: what is in it, and that it works from any folder of a machine that has never seen the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import _cfrt

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
MEGABYTE = 2**20


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `make` has just built and installed (CFRT_WHEEL), or one built now."""
    if "CFRT_WHEEL" in os.environ:
        return Path(os.environ["CFRT_WHEEL"])
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(folder))
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; dependencies are borrowed from ours, whose own cfrt stays behind it."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    pip("--python", str(folder / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.fixture(scope="session")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel and what its metadata asks for without extras, and nothing else: no torch."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    pip("--python", str(folder / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel))
    for name in needed("cfrt") - {"cfrt"}:
        for entry in {Path(str(file)).parts[0] for file in metadata.distribution(name).files or ()} - {".."}:
            if not (site / entry).exists():
                (site / entry).symlink_to(metadata.distribution(name).locate_file(entry))
    return folder


def needed(name: str) -> set[str]:
    """A distribution and all that it depends on here, without extras."""
    found, waiting = set(), {canonicalize_name(name)}
    while waiting:
        found.add(current := waiting.pop())
        required = [Requirement(text) for text in metadata.requires(current) or ()]
        asked = {canonicalize_name(r.name) for r in required if r.marker is None or r.marker.evaluate({"extra": ""})}
        waiting |= asked - found
    return found


def run(environment: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = str(environment / "bin" / command[0])
    return subprocess.run([program, *command[1:]], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["cfrt", "training", "export", "_cfrt"])
def test_the_four_names_come_from_the_wheel(elsewhere: Path, tmp_path: Path, name: str) -> None:
    done = run(elsewhere, "python", "-c", f"import {name}; print({name}.__file__)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(elsewhere)


@pytest.mark.parametrize("folder", ["anywhere", "checkout"])
@pytest.mark.parametrize(
    "command",
    [
        ("cfrt", "--help"),
        ("cfrt-train", "--help"),
        ("cfrt-export", "--help"),
        ("python", "-m", "cfrt", "--help"),
        ("python", "-m", "training", "--help"),
        ("python", "-m", "export.trt", "--help"),
        ("python", "-m", "export.onnx", "--help"),
    ],
    ids=" ".join,
)
def test_commands_run_from_any_folder(elsewhere: Path, tmp_path: Path, command: tuple[str, ...], folder: str) -> None:
    """In the checkout the source folders shadow the installed packages: that must work too."""
    done = run(elsewhere, *command, cwd=ROOT if folder == "checkout" else tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage:" in done.stdout


def test_the_plain_install_streams(bare: Path, tmp_path: Path) -> None:
    """`pip install cfrt`, no extra: the embedded student runs in C++."""
    missing = run(bare, "python", "-c", "import torch", cwd=tmp_path)
    assert "No module named 'torch'" in missing.stderr
    made = run(bare, "cfrt", "generate", "a red circle moving left", "--seconds", "1", "-o", "a.mp4", cwd=tmp_path)
    assert (made.returncode, made.stderr) == (0, "")
    assert "a.mp4: 16 frames by tiny (native, " in made.stdout
    assert (tmp_path / "a.mp4").stat().st_size > 0
    doctor = run(bare, "cfrt", "doctor", "--json", cwd=tmp_path)
    assert doctor.returncode == 0, doctor.stderr
    engines = json.loads(doctor.stdout)["engines"]
    assert engines["chosen"] == "native"
    assert "torch is not installed" in engines["refusals"]["torch"]
    export = run(bare, "python", "-m", "export.onnx", "--model", "tiny", "--out", "bundle", cwd=tmp_path)
    assert export.returncode == 1
    assert "export needs torch, onnx, onnxruntime, onnxscript: pip install 'cfrt[export]'" in export.stderr
    assert "Traceback" not in export.stderr
    training = run(bare, "python", "-m", "training", "tiny", "--dry-run", cwd=tmp_path)
    assert (training.returncode, training.stderr) == (1, "training: it needs PyTorch: pip install 'cfrt[train]'\n")


def test_an_export_needs_its_own_extra_alone() -> None:
    """`pip install 'cfrt[export]'`: none of what other extras bring is imported."""
    others = ("ftfy", "tokenizers", "transformers", "fastapi", "aiortc", "lmdb", "webdataset", "tensorrt_rtx", "cuda")
    missing = f"import sys; sys.modules.update(dict.fromkeys({others}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{missing}; import export.onnx, export.trt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["trt", "onnx"])
def test_an_export_that_cannot_be_done_says_so(elsewhere: Path, tmp_path: Path, module: str) -> None:
    command = ("python", "-m", f"export.{module}", "--weights", "student.pt", "--out", "bundle", "--model")
    done = run(elsewhere, *command, "tiny", cwd=tmp_path)
    assert done.returncode == 1
    assert "expected a checkpoint at student.pt, found no such file" in done.stderr
    assert done.stderr.count("\n") == 1
    wrong = run(elsewhere, *command, "wan-2b", cwd=tmp_path)
    assert wrong.returncode == 1
    assert "wan-1.3b-framewise-2step" in wrong.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = Parser().parsestr(archive.read(next(n for n in names if n.endswith("METADATA"))).decode())
    extension = f"_cfrt{sysconfig.get_config_var('EXT_SUFFIX')}"
    info = f"cfrt-{about['Version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"cfrt", "training", "export", "_cfrt-stubs", extension, info}
    assert {"cfrt/py.typed", "_cfrt-stubs/__init__.pyi", f"{info}/licenses/LICENSE"} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".cpp", ".cu", ".o"))]
    assert (about["Name"], about["License-Expression"]) == ("cfrt", "Apache-2.0")
    assert wheel.stat().st_size < 30 * MEGABYTE


def test_the_student_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {item.filename: item.file_size for item in archive.infolist()}
    student = {f"cfrt/students/tiny/{name}" for name in ("config.json", "model.safetensors", "card.md")}
    assert student <= set(sizes)
    assert sum(sizes[name] for name in student) <= 20 * MEGABYTE


def test_core_dependencies_are_few_and_bring_no_framework(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        about = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
    required = [line.split(": ")[1] for line in about.splitlines() if line.startswith("Requires-Dist: ")]
    core = {requirement.split(">")[0] for requirement in required if "extra ==" not in requirement}
    assert core == {"av", "numpy", "safetensors", "tqdm", "tyro"}
    extras = {line.split(": ")[1] for line in about.splitlines() if line.startswith("Provides-Extra: ")}
    assert extras == {"torch", "train", "export", "trt", "wan", "serve", "ray", "flash", "bench", "test", "dev"}


def test_version_has_one_home() -> None:
    import cfrt

    assert metadata.version("cfrt") == cfrt.__version__
    literal = f'"{cfrt.__version__}"'
    texts = [p for p in (ROOT / "cfrt").rglob("*.py") if literal in p.read_text()] + [
        ROOT / name for name in ("pyproject.toml", "CMakeLists.txt") if literal in (ROOT / name).read_text()
    ]
    assert texts == [ROOT / "cfrt" / "__init__.py"]


def test_cuda_code_for_every_architecture_or_none() -> None:
    """Read from the file itself: machine code for each architecture that build_info names, and PTX for what follows."""
    cuda, extension = _cfrt.build_info()["cuda"], Path(_cfrt.__file__)
    if cuda is None:
        assert b".nv_fatbin" not in extension.read_bytes()
        return
    asked = os.environ.get("CFRT_CUDA_ARCHS", "80,86,89,90")
    assert {int(arch) for arch in asked.split(",")} <= set(cuda["archs"])
    assert architectures("elf", extension) == {f"sm_{arch}" for arch in cuda["archs"]}
    assert architectures("ptx", extension) == {f"sm_{max(cuda['archs'])}"}


def architectures(kind: str, extension: Path) -> set[str]:
    """What cuobjdump lists, e.g. `ELF file    1: _cfrt.1.sm_80.cubin`."""
    command = (find_cuobjdump(), f"--list-{kind}", str(extension))
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\.(sm_\d+)\.", listed))


def find_cuobjdump() -> str:
    wheels = [Path(folder) / "nvidia" / "cu13" / "bin" for folder in sys.path]
    found = shutil.which("cuobjdump", path=os.pathsep.join([*map(str, wheels), os.environ["PATH"]]))
    if found is None:
        pytest.skip("cuobjdump is on no PATH; pip install nvidia-cuda-cuobjdump")
    return found


def test_the_extension_needs_no_driver_and_no_shared_cuda() -> None:
    """Only the static runtime: what the dynamic linker is asked for holds no CUDA library."""
    listed = subprocess.run(["ldd", _cfrt.__file__], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in listed
    assert "cuda" not in listed
