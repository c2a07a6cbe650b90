"""What is read in an engine's bytes, of engines built here; and bytes that are none."""

from pathlib import Path

import pytest
from rtx_fixture import attention, feed_forward, quantised, save

from export.builder import Builder
from export.engine_report import Port, Report, read

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    graphs = {"ffn": feed_forward(), "attention": attention(), **{k: quantised(k) for k in ("float8e4m3fn", "int8")}}
    with Builder() as builder:
        for name, model in graphs.items():
            builder.build(save(model, folder, name), folder / f"{name}.engine")
    return {name: folder / f"{name}.engine" for name in graphs}


def report(path: Path) -> Report:
    found = read(path)
    assert found is not None
    return found


def test_a_feed_forward(engines: dict[str, Path]) -> None:
    found = report(engines["ffn"])
    assert found.version.startswith("1.7.")
    assert found.targets == ("sm89",)
    assert found.inputs == {"x": Port((64, 64), "bf16")}
    assert found.outputs == {"y": Port((64, 64), "bf16")}
    assert found.fused_gelu == 1
    assert found.attentions == 0
    assert found.gemm_types() == {"bf16": 2}
    assert found.stream_capturable
    assert 64 * 128 * 2 <= found.device_memory < 1 << 30


def test_an_attention(engines: dict[str, Path]) -> None:
    found = report(engines["attention"])
    assert found.attentions == 1
    assert found.inputs.keys() == {"q", "k", "v"}
    assert found.summary() | {"version": "", "device_memory": 0} == {
        "version": "",
        "targets": ["sm89"],
        "device_memory": 0,
        "stream_capturable": True,
        "fused_attentions": 1,
        "fused_gelu": 0,
        "rounded_gelu": 0,
        "scaled_gelu": 0,
        "gemms": {},
    }


@pytest.mark.parametrize(("name", "dtype"), [("float8e4m3fn", "fp8"), ("int8", "int8")])
def test_products_of_8_bits(engines: dict[str, Path], name: str, dtype: str) -> None:
    (types,) = report(engines[name]).gemms.values()
    assert types == (dtype, dtype)


def test_what_is_no_engine_has_no_plan(engines: dict[str, Path], tmp_path: Path) -> None:
    """Nor has one that was cut off, nor one whose text is not ours to read."""
    whole = engines["ffn"].read_bytes()
    for name, blob in {
        "empty": b"",
        "text": b"no engine at all, but long enough to be one",
        "cut": whole[:-1],
        "mute": whole.replace(b"header {", b"beader {"),
    }.items():
        (tmp_path / name).write_bytes(blob)
        assert read(tmp_path / name) is None, name
