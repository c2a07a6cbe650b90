"""cfrt.nn.attention(backend="cuda") without a GPU: what it asks of the kernel, run by ptxsim, and what it refuses."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cuda_fixture import RawAttention, RawPiece, fill, launch
from ptxsim import Memory
from ptxsim.memory import Buffer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import _cfrt
from cfrt.blocks import Span
from cfrt.errors import EngineError
from cfrt.nn.attention import attention, cuda_refusal
from cfrt.nn.attention.cuda import _call, _pieces

pytestmark = pytest.mark.cpu

GPU = torch.device("cuda", 0)
SPLITS = 2


def plan(queries: int, heads: int, dim: int, pieces: list[Span], processors: int) -> tuple[int, int]:
    return SPLITS, SPLITS * queries * heads * (dim + 1)


def visible(x: Tensor) -> Buffer:
    """All of a tensor's memory."""
    size = x.untyped_storage().nbytes()
    return Buffer(np.frombuffer((ctypes.c_byte * size).from_address(x.untyped_storage().data_ptr()), np.uint8), None)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch, nvcc: str) -> list[Tensor]:
    """`_cfrt.cuda` runs in ptxsim, where a kernel may touch the tensors of this list and what it is given to write."""
    tensors: list[Tensor] = []

    def run(*, out: int, q_sink: int, pieces: list[Span], stream: int, **fields) -> None:
        memory = Memory()
        memory.buffers += [visible(x) for x in tensors]
        answer = memory.empty(fields["queries"] * fields["out_stride"], np.uint16)
        scratch = memory.empty(SPLITS * fields["queries"] * fields["heads"] * (fields["dim"] + 1), np.float32)
        fields |= {"out": answer, "scratch": scratch, "q_sink": q_sink or None}
        raw = fill(RawAttention(), piece_count=len(pieces), pieces=[RawPiece(*p) for p in pieces], **fields)
        launch("attention_bf16", "cfrt_attention_bf16", memory, raw)
        ctypes.memmove(out, answer.address, answer.nbytes)

    monkeypatch.setattr(_cfrt.cuda, "plan", plan)
    monkeypatch.setattr(_cfrt.cuda, "attention", run)
    return tensors


@pytest.mark.parametrize("fused", [False, True], ids=["contiguous", "out of one projection"])
def test_it_is_the_reference_over_ranges(simulated: list[Tensor], fused: bool) -> None:
    """A batch of two, keys in three ranges of which the second is half sinks', queries at two positions."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 90, 2, 64)
    both = torch.randn(2, 90, 2 * 2 * 64, generator=generator).bfloat16()
    k, v = both.split(128, dim=-1) if fused else (x.contiguous() for x in both.split(128, dim=-1))
    k, v = k.unflatten(-1, (2, 64)), v.unflatten(-1, (2, 64))
    assert k.shape == shape
    q, q_sink = (torch.randn(2, 33, 2, 64, generator=generator).bfloat16() for _ in range(2))
    ranges = [(70, 90), (0, 40), (45, 61)]
    simulated += [q, q_sink, k, v]
    out = _call(q, k, v, [bound for span in ranges for bound in span], q_sink, 35, 128, 0)
    options = {"ranges": ranges, "sink_tokens": 35}
    exact = attention(*(x.double() for x in (q, k, v)), q_sink=q_sink.double(), **options)
    eager = attention(q, k, v, q_sink=q_sink, **options, backend="sdpa")
    assert (out - exact).abs().max() <= 2 * (eager - exact).abs().max()


def test_sinks_that_end_within_a_range_cut_it() -> None:
    assert _pieces([(0, 40), (50, 90)], 60) == ([(0, 40), (50, 20), (70, 20)], 2)
    assert _pieces([(3, 9)], 0) == ([(3, 6)], 0)
    assert _pieces([(3, 9)], 6) == ([(3, 6)], 1)


def test_memory_that_the_kernel_cannot_read_is_refused(simulated: list[Tensor]) -> None:
    q, k = torch.zeros(1, 4, 2, 64).bfloat16(), torch.zeros(1, 2, 4, 64).bfloat16().transpose(1, 2)
    with pytest.raises(EngineError, match="heads of a row side by side"):
        _call(q, k, k, [0, 4], None, 0, 128, 0)
    odd = torch.zeros(1 * 4 * 2 * 64 + 1).bfloat16()[1:].view(1, 4, 2, 64)
    with pytest.raises(EngineError, match="start on 16 bytes"):
        _call(odd, q, q, [0, 4], None, 0, 128, 0)
    with pytest.raises(EngineError, match="laid out like v"):
        _call(q, q, torch.zeros(1, 4, 4, 64).bfloat16()[:, :, :2], [0, 4], None, 0, 128, 0)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        (torch.device("cpu"), torch.bfloat16, 128, "runs on an NVIDIA GPU, not on cpu"),
        (GPU, torch.float16, 128, "takes bfloat16, not float16"),
        (GPU, torch.bfloat16, 96, "heads of 64 or 128 numbers, not 96"),
    ],
)
def test_what_it_cannot_do_has_a_reason(device: torch.device, dtype: torch.dtype, head_dim: int, reason: str) -> None:
    assert reason in str(cuda_refusal(device, dtype, head_dim))


NO_GPU = """
import torch
from cfrt.nn.attention import cuda_refusal
print(cuda_refusal(torch.device("cuda", 0), torch.bfloat16, 128))
"""


def test_no_gpu_is_a_reason() -> None:
    """And it names what would help: the build, or the driver that the build wants. In a process that sees no GPU."""
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    reason = subprocess.run([sys.executable, "-c", NO_GPU], env=hidden, capture_output=True, text=True).stdout
    if _cfrt.build_info()["cuda"] is None:
        assert "reinstall cfrt with CFRT_CUDA=ON" in reason
    else:
        assert f"driver of {_cfrt.cuda.least_driver()} or newer" in reason
        assert _cfrt.cuda.least_driver() >= 525


def test_a_call_that_is_refused_says_why() -> None:
    q = torch.zeros(1, 4, 2, 64)
    with pytest.raises(EngineError, match="runs on an NVIDIA GPU, not on cpu"):
        attention(q, q, q, backend="cuda")
    with pytest.raises(EngineError, match="takes no mask"):
        attention(q, q, q, mask=torch.ones(4, 4, dtype=torch.bool), backend="cuda")


def test_a_compiler_sees_one_node() -> None:
    """Its shapes are known without running it."""
    with FakeTensorMode():
        q, k = torch.empty(2, 5, 3, 64, device=GPU), torch.empty(2, 70, 3, 64, device=GPU)
        out = torch.ops.cfrt.attention_cuda(q, k, k, [0, 70], None, 0)
    assert (out.shape, out.device) == (q.shape, GPU)
