"""Attention: the reference against the formula in loops, every backend against the reference."""

import math

import pytest
import torch
from torch import Tensor

from cfrt.errors import EngineError
from cfrt.nn.attention import attention

pytestmark = pytest.mark.cpu

B, N, M, H, D = 2, 5, 11, 3, 8
BACKENDS = ["reference", "sdpa"]
"""Those that take any dtype, mask and gradient; tests/test_native_attention.py has "native"."""
SPANS = [(9, 11), (2, 6)]
CASES = {
    "plain": {},
    "mask": {"mask": "shared"},
    "mask per sample": {"mask": "own"},
    "ranges": {"ranges": SPANS},
    "one range": {"ranges": [(3, 9)]},
    "sinks": {"sink_tokens": 4},
    "sinks, ranges and mask": {"sink_tokens": 2, "ranges": SPANS, "mask": "shared"},
}


def case(name: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], dict]:
    """q, k, v (and q_sink where there are sinks) and the options."""
    torch.manual_seed(0)
    options = dict(CASES[name])
    read = sum(stop - start for start, stop in options.get("ranges", [(0, M)]))
    if "mask" in options:
        mask = torch.rand((N, read) if options["mask"] == "shared" else (B, N, read)) < 0.5
        mask[..., 0] = True
        options["mask"] = mask
    tensors = [torch.randn(B, n, H, D, dtype=dtype) for n in (N, M, M)]
    if "sink_tokens" in options:
        tensors.append(torch.randn(B, N, H, D, dtype=dtype))
    return tensors, options


def run(tensors: list[Tensor], options: dict, backend: str) -> Tensor:
    q, k, v, *sink = tensors
    return attention(q, k, v, **options, q_sink=sink[0] if sink else None, backend=backend)


def in_loops(tensors: list[Tensor], options: dict) -> Tensor:
    """The definition, one query of one head at a time."""
    q, k, v, *sink = tensors
    keys = [i for start, stop in options.get("ranges", [(0, M)]) for i in range(start, stop)]
    out = torch.zeros_like(q)
    for b in range(B):
        for n in range(N):
            for h in range(H):
                scores = []
                for place, key in enumerate(keys):
                    asker = sink[0] if place < options.get("sink_tokens", 0) else q
                    mask = options.get("mask")
                    seen = mask is None or bool(mask[n, place] if mask.dim() == 2 else mask[b, n, place])
                    score = (asker[b, n, h] @ k[b, key, h]).item() / math.sqrt(D)
                    scores.append(score if seen else -math.inf)
                weights = torch.tensor(scores, dtype=q.dtype).softmax(0)
                out[b, n, h] = sum(w * v[b, key, h] for w, key in zip(weights, keys, strict=True))
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_every_backend_is_the_formula(name, backend):
    tensors, options = case(name)
    torch.testing.assert_close(run(tensors, options, backend), in_loops(tensors, options), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_formula(name, backend):
    tensors, options = case(name)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *xs: run(list(xs), options, backend), tensors, fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "sinks, ranges and mask"])
def test_the_reference_is_a_proper_operator(name):
    """Schema, fake, autograd registration: what torch.compile and torch.export rely on."""
    (q, k, v, *sink), options = case(name, torch.float32)
    bounds = [bound for span in options.get("ranges", [(0, M)]) for bound in span]
    arguments = (q, k, v, options.get("mask"), bounds, sink[0] if sink else None, options.get("sink_tokens", 0))
    tracked = tuple(x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)
    torch.library.opcheck(torch.ops.cfrt.attention.default, tracked)


def test_export_keeps_the_reference_as_one_node():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, ranges=[(0, 4), (6, 8)])

    q, k, v = case("plain", torch.float32)[0]
    exported = torch.export.export(Layer(), (q, k, v))
    assert [node.target for node in exported.graph.nodes].count(torch.ops.cfrt.attention.default) == 1
    torch.testing.assert_close(exported.module()(q, k, v), Layer()(q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_that_are_not_contiguous(backend):
    """Keys inside a larger ring, heads apart, an expanded batch."""
    torch.manual_seed(0)
    q = torch.randn(B, H, N, D).transpose(1, 2)
    k = torch.randn(B, 2 * M, H, D)[:, ::2]
    v = torch.randn(1, M, H, D).expand(B, -1, -1, -1)
    got = attention(q, k, v, backend=backend)
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous(), backend="reference")
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_in_low_precision_is_at_most_twice_pytorch_s_own(backend, dtype):
    """Tolerance by rule: the plain formula, computed throughout in the same dtype, sets it."""
    (q, k, v), _ = case("plain")
    low = [x.to(dtype) for x in (q, k, v)]
    exact = attention(*(x.double() for x in low), backend="reference")
    scores = torch.einsum("bnhd,bmhd->bhnm", low[0], low[1]) / math.sqrt(D)
    eager = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), low[2])
    assert error(attention(*low, backend=backend), exact) <= 2 * error(eager, exact)


def test_unknown_backend():
    (q, k, v), _ = case("plain")
    with pytest.raises(EngineError, match="reference, sdpa, native, cuda, flash; got 'fast'"):
        attention(q, k, v, backend="fast")
