"""Engines of TensorRT-RTX, built for real: what comes out, what is refused, and every trap that was once met."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rtx_fixture import attention, feed_forward, graph, quantised, save

from cfrt.errors import ExportError
from export import builder
from export.builder import TARGETS, Builder, refusal
from export.engine_report import read

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def rtx() -> Iterator[Builder]:
    """One process for all builds of this file."""
    with Builder() as made:
        yield made


def test_the_same_graph_gives_the_same_bytes(rtx: Builder, tmp_path: Path) -> None:
    """Again in the same process, after another graph, and in another process: so an export can go on where it stopped,
    and a hash says which engine one has. In one process TensorRT's second engine may differ from its first."""
    path = save(feed_forward(), tmp_path, "ffn")
    seconds = rtx.build(path, tmp_path / "first")
    rtx.build(save(attention(), tmp_path, "attention"), tmp_path / "other")
    rtx.build(path, tmp_path / "again")
    with Builder() as other:
        other.build(path, tmp_path / "elsewhere")
    first, again, elsewhere = ((tmp_path / name).read_bytes() for name in ("first", "again", "elsewhere"))
    assert first == again == elsewhere
    assert 0 < seconds < 60
    assert rtx.peak_bytes > 1e7


def test_two_processes_that_build_have_their_memory_at_the_same_addresses(tmp_path: Path) -> None:
    """So that the order of addresses is theirs as well, from which an engine follows."""
    path, begins = save(feed_forward(), tmp_path, "ffn"), []
    for _ in range(2):
        with Builder() as made:
            made.build(path, tmp_path / "engine")
            assert made._child is not None
            process = Path("/proc", str(made._child._process.pid))
            if not int((process / "personality").read_text(), 16):
                pytest.skip("this system does not let a process ask for fixed addresses")
            maps = (process / "maps").read_text().splitlines()
            begins.append([line.split("-")[0] for line in maps if line.endswith(("[heap]", "libc.so.6", "[stack]"))])
    assert begins[0] == begins[1] != []


def test_a_key_names_all_that_an_engine_follows_from(rtx: Builder, tmp_path: Path) -> None:
    """The graph, the targets, the tool, and how it is used."""
    path, other = save(feed_forward(), tmp_path, "ffn"), save(feed_forward(tokens=32), tmp_path, "other")
    keys = [rtx.key(path), rtx.key(other), Builder(targets=("sm86",)).key(path)]
    newer = Builder()
    newer.version = "1.8"
    assert len({*keys, newer.key(path)}) == 4
    assert Builder().key(path) == keys[0]


def test_one_engine_for_several_gpus(tmp_path: Path) -> None:
    with Builder(targets=TARGETS) as made:
        made.build(save(feed_forward(), tmp_path, "ffn"), tmp_path / "ffn.engine")
    plan = read(tmp_path / "ffn.engine")
    assert plan is not None
    assert plan.targets == TARGETS


def test_fp8_is_for_the_gpus_that_have_it(tmp_path: Path) -> None:
    with Builder(targets=("sm86",)) as made:
        path = save(quantised("float8e4m3fn"), tmp_path, "quantised")
        with pytest.raises(ExportError, match=r"Cannot compile for target\(s\) sm86.*fp8_e4m3"):
            made.build(path, tmp_path / "x")


def test_attention_in_fp32_may_fall_apart(rtx: Builder, tmp_path: Path) -> None:
    """No fused kernel takes it, so that the builder refuses it unless it is told that it may."""
    rtx.build(save(attention("float"), tmp_path, "attention"), tmp_path / "x")
    plan = read(tmp_path / "x")
    assert plan is not None
    assert plan.attentions == 0


# ---------------------------------------------------------------------- refused before TensorRT sees it

KV = "bfloat16[1,2,128,64] k, bfloat16[1,2,128,64] v"
Y = "(bfloat16[1,2,64,64] y)"
REFUSED = {
    "foreign operator": (
        graph("(float[4] x) => (float[4] y) { y = else.Where(x) }", domain=', "else" : 1'),
        r"'y' is else\.Where, which is no ONNX operator",
    ),
    "valid keys": (
        graph(f"(bfloat16[1,2,64,64] q, {KV}, int64[1] n) => {Y} {{ y = Attention(q, k, v, , , , n) }}"),
        "'n', which would be ignored",
    ),
    "cache inside": (
        graph(
            f"(bfloat16[1,2,64,64] q, {KV}, bfloat16[1,2,8,64] pk, bfloat16[1,2,8,64] pv) => {Y}"
            "{ y, ck, cv = Attention(q, k, v, , pk, pv) }"
        ),
        "an Attention with a cache inside",
    ),
    "circular": (
        graph(
            "(bfloat16[1,2,8,64] c, bfloat16[1,2,4,64] u, int64[1] at) => (bfloat16[1,2,8,64] y)"
            '{ y = TensorScatter<mode = "circular">(c, u, at) }'
        ),
        "TensorScatter that goes round",
    ),
    "lost mutation": (graph("(float[4] x, float[4] cache) => (float[4] y) { y = Relu(x) }"), "'cache' leads nowhere"),
    "dead end": (
        graph("(float[4] x, float[4] cache) => (float[4] y) { y = Relu(x)  lost = Add(cache, x) }"),
        "'cache' leads nowhere",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_graph_that_would_be_misread_is_refused(rtx: Builder, tmp_path: Path, name: str) -> None:
    model, reason = REFUSED[name]
    with pytest.raises(ExportError, match=reason):
        rtx.build(save(model, tmp_path, "graph"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_operator_with_its_body_in_the_file_is_none_of_a_stranger(rtx: Builder, tmp_path: Path) -> None:
    twice = '<domain: "own", opset_import: ["" : 24]> Twice (x) => (y) { y = Add(x, x) }'
    model = graph("(float[4] x) => (float[4] y) { y = own.Twice(x) }", domain=', "own" : 1', functions=twice)
    rtx.build(save(model, tmp_path, "graph"), tmp_path / "x")
    assert read(tmp_path / "x") is not None


def test_what_is_no_graph_is_refused(rtx: Builder, tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match="is not an ONNX graph"):
        rtx.build(tmp_path / "graph.onnx", tmp_path / "x")


# ---------------------------------------------------------------------- refused by TensorRT, or fatal to it


def test_the_first_real_error_names_its_layer(rtx: Builder, tmp_path: Path) -> None:
    """And not the complaint about a missing driver that comes after it."""
    model = graph("(bfloat16[4,5] a, float[4,5] b) => (bfloat16[4,5] y) { y = Add(a, b) }")
    model.graph.node[0].name = "the_sum"
    with pytest.raises(ExportError, match=r"layer the_sum \(Add\): .*the_sum.*must have same input types") as refused:
        rtx.build(save(model, tmp_path, "graph"), tmp_path / "x")
    assert "driver" not in str(refused.value)
    rtx.build(save(feed_forward(), tmp_path, "ffn"), tmp_path / "x")  # the process goes on


def test_an_input_that_only_the_worker_can_see_to_be_unused_is_an_error(
    rtx: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should a parser drop something that our own rules do not know of."""
    monkeypatch.setattr(builder.graph_rules, "check", lambda *_: None)
    with pytest.raises(ExportError, match="Unused Input: n"):
        rtx.build(save(REFUSED["valid keys"][0], tmp_path, "graph"), tmp_path / "x")


def test_a_build_that_aborts_is_an_error_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as it does."""
    monkeypatch.setattr(builder.builder_worker, "__name__", "tests.aborting_worker")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    path = save(feed_forward(), tmp_path, "ffn")
    with Builder() as made:
        for _ in range(2):
            with pytest.raises(ExportError, match=r"'ffn' cannot be built: the building process ended .* SIGABRT"):
                made.build(path, tmp_path / "x")


def test_a_process_that_ends_is_replaced(tmp_path: Path) -> None:
    path = save(feed_forward(), tmp_path, "ffn")
    with Builder() as made:
        made.build(path, tmp_path / "x")
        assert made._child is not None
        made._child._process.kill()
        with pytest.raises(
            ExportError, match=r"'ffn' cannot be built: the process that builds ended by signal SIGKILL"
        ):
            made.build(path, tmp_path / "x")
        made.build(path, tmp_path / "x")


# ---------------------------------------------------------------------- refused before anything starts


def test_gpus_that_rtx_does_not_build_for() -> None:
    """An H100, for one."""
    with pytest.raises(ExportError, match="expected targets among sm80, sm86, sm89, sm120, got sm90"):
        Builder(targets=("sm89", "sm90"))


def test_full_tensorrt_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module, then a driver, before anything of TensorRT is called; then another GPU than the one asked for."""
    monkeypatch.setattr(builder, "find_spec", lambda name: None)
    assert "tensorrt is not installed" in str(refusal("tensorrt", ("sm89",)))
    monkeypatch.setattr(builder, "find_spec", lambda name: object())
    monkeypatch.setattr(builder.gpu, "refusal", lambda: "there is no NVIDIA driver on this machine")
    assert "no NVIDIA driver" in str(refusal("tensorrt", ("sm89",)))
    monkeypatch.setattr(builder.gpu, "refusal", lambda: None)
    monkeypatch.setattr(builder.gpu, "capability", lambda: "sm90")
    assert "of this machine alone, which is sm90, not sm89" in str(refusal("tensorrt", ("sm89",)))
    assert refusal("tensorrt", ("sm90",)) == "expected targets among sm80, sm86, sm89, sm120, got sm90"
