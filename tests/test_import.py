"""What `import cfrt` gives, and what it does not load: the runtime starts without a framework."""

import subprocess
import sys
from pathlib import Path

import pytest

import cfrt

pytestmark = pytest.mark.cpu


def python(code: str) -> str:
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout


def test_every_public_name_is_there() -> None:
    assert set(cfrt.__all__) <= set(dir(cfrt))
    for name in cfrt.__all__:
        assert getattr(cfrt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Streem'"):
        cfrt.Streem  # noqa: B018


@pytest.mark.parametrize("names", ["cfrt", "cfrt.cli", "cfrt.stream, cfrt.text, cfrt.video, cfrt.doctor"])
def test_the_runtime_loads_no_framework(names: str) -> None:
    loaded = python(f"import {names}, sys; print(*sys.modules)").split()
    assert not {"torch", "onnxruntime", "tensorrt_rtx"} & set(loaded)


def test_the_command_loads_little() -> None:
    loaded = python("import cfrt.cli, sys; print(*sys.modules)").split()
    assert not {"numpy", "av", "tqdm"} & set(loaded)


def test_star_import() -> None:
    assert python("from cfrt import *; print(Stream.__name__, Frame.__name__)").split() == ["Stream", "Frame"]
