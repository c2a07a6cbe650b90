"""RMS normalisation: PyTorch's own, faster in training."""

import pytest
import torch
import torch.nn.functional as F

from cfrt.nn.norms import RMSNorm

pytestmark = pytest.mark.cpu


@pytest.fixture
def norm():
    torch.manual_seed(0)
    norm = RMSNorm(12, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight)
    return norm


def test_value_with_and_without_gradients(norm):
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    expected = F.rms_norm(x, (12,), norm.weight, 1e-3)
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-14)


def test_gradient(norm):
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(norm, {"weight": w}, (x,)), (x, norm.weight)
    )


def test_low_precision_keeps_its_dtype_and_wide_statistics(norm):
    """1000 numbers of 40: their squares overflow fp16, their norm does not."""
    wide = RMSNorm(1000, eps=1e-6).half()
    x = torch.full((1, 1000), 40.0, dtype=torch.float16, requires_grad=True)
    y = wide(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, torch.ones_like(y), rtol=1e-3, atol=0)
    y.sum().backward()
    assert x.grad.dtype == torch.float16
    assert wide.weight.grad.dtype == torch.float16
