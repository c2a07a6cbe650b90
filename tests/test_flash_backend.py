"""cfrt.nn.attention(backend="flash") without flash-attn: its calls, by a stand-in with the package's signature."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from cfrt import doctor
from cfrt.errors import EngineError
from cfrt.nn import attention as backends
from cfrt.nn.attention import attention, fastest, flash, flash_refusal

pytestmark = pytest.mark.cpu

GPU = torch.device("cuda", 0)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, return_attn_probs: bool = False):
    """flash_attn 2.8: [B, N, H, D]; with return_attn_probs also the logarithms [B, H, N]."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * q.shape[-1] ** -0.5
    out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(dim=-1), v.double()).to(q.dtype)
    return (out, scores.logsumexp(dim=-1).float(), None) if return_attn_probs else out


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash, "flash_refusal", lambda *_: None)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("sinks", [0, 7, 30, 60])
def test_it_is_the_reference(sinks: int) -> None:
    """Over two ranges; sinks none, some, up to the end of a range, all."""
    generator = torch.Generator().manual_seed(sinks)
    q, q_sink, k, v = (torch.randn(2, n, 2, 16, generator=generator) for n in (5, 5, 90, 90))
    how = {"ranges": [(50, 80), (0, 30)], "q_sink": q_sink, "sink_tokens": sinks}
    torch.testing.assert_close(attention(q, k, v, backend="flash", **how), attention(q, k, v, **how))
    torch.testing.assert_close(attention(q, k, v, backend="flash"), attention(q, k, v))


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        (torch.device("cpu"), torch.bfloat16, 128, "runs on an NVIDIA GPU, not on cpu"),
        (GPU, torch.float32, 128, "takes bfloat16 or float16, not float32"),
        (GPU, torch.bfloat16, 260, "up to 256 numbers, not 260"),
    ],
)
def test_what_it_cannot_do_has_a_reason(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, dtype: torch.dtype, head_dim: int, reason: str
) -> None:
    monkeypatch.setattr(flash, "find_spec", lambda _: object())
    flash_refusal.cache_clear()
    assert reason in str(flash_refusal(device, dtype, head_dim))
    flash_refusal.cache_clear()


def test_a_call_that_is_refused_says_why() -> None:
    q = torch.zeros(1, 4, 2, 64)
    with pytest.raises(EngineError, match="not on cpu"):
        attention(q, q, q, backend="flash")
    with pytest.raises(EngineError, match="takes no mask"):
        attention(q, q, q, mask=torch.ones(4, 4, dtype=torch.bool), backend="flash")


def test_the_fastest_that_can_run_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    given = (GPU, torch.bfloat16, 128)
    for cuda, flash_, wanted in ((None, None, "cuda"), ("no", None, "flash"), ("no", "no", "sdpa")):
        monkeypatch.setattr(backends, "cuda_refusal", lambda *_, said=cuda: said)
        monkeypatch.setattr(backends, "flash_refusal", lambda *_, said=flash_: said)
        assert fastest(*given) == wanted
    monkeypatch.undo()
    assert fastest(torch.device("cpu"), torch.float32, 64) == "sdpa"


def test_the_doctor_says_which_and_why() -> None:
    line = doctor._attention_line({"cuda": "there is no NVIDIA driver here", "flash": None, "sdpa": None})
    assert line == "on a GPU the torch engine would use flash (not cuda: there is no NVIDIA driver here)"
    report = doctor.examine(probe=False)
    assert list(report["attention"]) == ["cuda", "flash", "sdpa"]
    assert "attention  on a GPU the torch engine would use " in doctor.as_text(report)
