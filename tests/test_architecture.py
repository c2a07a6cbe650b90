"""The shape of the project: who imports whom, and where the constants of a model may stand."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
PACKAGES = ("cfrt", "training", "export")
MODEL_CONSTANTS = {1536, 1560, 4680, 5120, 8960, 13824, 32760}
"""Widths and token counts of Wan: they belong to a preset."""


def test_import_contracts() -> None:
    """The arrows of the packages (pyproject.toml, tool.importlinter)."""
    lint = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    done = subprocess.run([sys.executable, "-c", lint], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_constants_of_a_model_stand_in_its_preset_only() -> None:
    found = []
    for path in (p for package in PACKAGES for p in (ROOT / package).rglob("*.py") if p != ROOT / "cfrt" / "config.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and type(node.value) is int and node.value in MODEL_CONSTANTS:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}")
    number = re.compile(r"\b(" + "|".join(map(str, MODEL_CONSTANTS)) + r")\b")
    for path in (p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}):
        lines = enumerate(path.read_text().splitlines(), 1)
        found += [f"{path.relative_to(ROOT)}:{n}: {line.strip()}" for n, line in lines if number.search(line)]
    assert found == []


def test_native_code_knows_neither_torch_nor_python() -> None:
    """Kernels take pointers; the binding speaks Python, nothing speaks torch."""
    found = []
    for path in (p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}):
        includes = re.findall(r'#include\s+[<"]([^>"]+)', path.read_text())
        foreign = [name for name in includes if re.match(r"torch|ATen|c10|Python|pybind11|numpy", name)]
        if path.name.startswith("bindings"):
            foreign = [name for name in foreign if not name.startswith("pybind11")]
        found += [f"{path.relative_to(ROOT)}: {name}" for name in foreign]
    assert found == []
