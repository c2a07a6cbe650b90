"""The CUDA kernels of `_cfrt` against their CPU twins. Runs where there is a GPU and a torch that sees it."""

import numpy as np
import pytest

import _cfrt

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
    _cfrt.renoise_cuda(out[inside].data_ptr(), x0[inside].data_ptr(), count, dtype, S, _cfrt.Noise(*KEY), stream)

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
        _cfrt.renoise_cuda(x.data_ptr(), x.data_ptr(), 2**35, "float32", S, _cfrt.Noise(*KEY))
