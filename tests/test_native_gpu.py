"""The CUDA kernels of `_cfrt` against their CPU twins. Runs where there is a GPU and a torch that sees it."""

from pathlib import Path

import numpy as np
import pytest

import _cfrt
from cfrt.nn.attention import attention, cuda_refusal

pytestmark = pytest.mark.gpu

KEY = (2**63 + 5, 7, 2, 0)
S = 0.8125


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 1021, 1024, 4_000_001])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
def test_renoise_equals_its_cpu_twin(dtype: str, count: int, offset: int) -> None:
    """Both take ln, sin and cos in fp64, so that only the last bit of `dtype` may differ. Nothing else is touched."""
    import torch

    kind = getattr(torch, dtype)
    x0 = torch.randn(count + offset + 1, generator=torch.Generator().manual_seed(count)).to("cuda", kind)
    out = torch.full_like(x0, 77.0)
    stream = torch.cuda.current_stream().cuda_stream
    inside = slice(offset, offset + count)
    _cfrt.cuda.renoise(out[inside].data_ptr(), x0[inside].data_ptr(), count, dtype, S, _cfrt.Noise(*KEY), stream=stream)

    expected = np.empty(count, dtype=np.float32)
    _cfrt.renoise(x0[inside].float().cpu().numpy(), S, _cfrt.Noise(*KEY), expected)
    rounded = torch.from_numpy(expected).to(kind).float()
    torch.testing.assert_close(out[inside].float().cpu(), rounded, rtol=torch.finfo(kind).eps, atol=1e-6)
    assert (out[:offset] == 77).all()
    assert (out[offset + count :] == 77).all()


def test_more_elements_than_a_counter_has_is_an_error() -> None:
    import torch

    x = torch.zeros(4, device="cuda")
    with pytest.raises(RuntimeError, match="CUDA refused to re-noise"):
        _cfrt.cuda.renoise(x.data_ptr(), x.data_ptr(), 2**35, "float32", S, _cfrt.Noise(*KEY))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("ranges", [[(0, 700)], [(650, 700), (0, 333), (400, 401)]], ids=["whole", "ranges"])
def test_attention_is_the_formula(dim: int, ranges: list[tuple[int, int]]) -> None:
    """At most twice the error of PyTorch's plain formula in bf16; sinks end within a range; compiled as one node."""
    import torch

    generator = torch.Generator().manual_seed(0)
    q, q_sink, k, v = (torch.randn(2, n, 3, dim, generator=generator).bfloat16() for n in (300, 300, 700, 700))
    how = {"ranges": ranges, "sink_tokens": 70}
    exact = attention(q.double(), k.double(), v.double(), q_sink=q_sink.double(), **how)
    eager = attention(q, k, v, q_sink=q_sink, backend="sdpa", **how)
    q, q_sink, k, v = (x.cuda() for x in (q, q_sink, k, v))
    assert cuda_refusal(q.device, q.dtype, dim) is None
    out = attention(q, k, v, q_sink=q_sink, backend="cuda", **how)
    assert (out.cpu() - exact).abs().max() <= 2 * (eager - exact).abs().max()
    compiled = torch.compile(attention, fullgraph=True)(q, k, v, q_sink=q_sink, backend="cuda", **how)
    assert (compiled == out).all()


def test_attention_goes_into_a_graph() -> None:
    """Nothing is waited for: a captured call computes what the call does, from the inputs of the moment."""
    import torch

    q, k, v = (torch.randn(1, n, 2, 128, device="cuda").bfloat16() for n in (200, 320, 320))
    attention(q, k, v, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, backend="cuda")
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert (out == attention(q, k, v, backend="cuda")).all()


def test_the_gates_of_a_gpu_measure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Attention at a shape of the 1.3B model, where a wrong answer gives no ratio, and a small model's stream."""
    from benchmarks import full_size_gpu, gate, gpu, gpu_gate

    assert gpu_gate.refusal() is None
    shapes = {"near": (1560, 14040), "chunk": (4680, 14040)}
    found = gpu_gate.ratios(_cfrt.cuda, gpu.TorchMemory(), gpu.Events(), gpu.fused_calls, shapes, repeats=2)
    assert set(found) == set(shapes)
    monkeypatch.setenv("CFRT_CACHE", str(tmp_path))
    monkeypatch.setattr(full_size_gpu, "MODEL", full_size_gpu.smoke(full_size_gpu.MODEL))
    monkeypatch.setattr(gpu_gate, "SECONDS", 0.5)
    (stream,) = (g for g in gate.load()[0] if g.kind == "gpu_stream")
    assert gpu_gate.stream([stream])[stream.name] > 0
