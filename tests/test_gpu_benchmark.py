"""benchmarks/gpu.py without a GPU: its checks and its timing loop over the executor, its report, its refusal."""

import json
from typing import Any

import numpy as np
import pytest
from ptxsim import Memory
from simulated_cuda import SimulatedMemory, simulated

from benchmarks import gpu, gpu_checks, gpu_timing

pytestmark = pytest.mark.cpu

RTX_4090 = gpu_timing.Card("NVIDIA GeForce RTX 4090", 89, 128, 2.52)
SAID = {"name": "NVIDIA GeForce RTX 4090", "driver_version": "580.65", "clocks.sm": "2520"}


class Counted:
    """A clock on which each call takes 1 ms more than the one before."""

    def __init__(self) -> None:
        self.count = 0

    def milliseconds(self, call: Any) -> float:
        call()
        self.count += 1
        return float(self.count)


@pytest.mark.usefixtures("nvcc")
def test_every_kernel_is_checked_and_right() -> None:
    memory = SimulatedMemory()
    with simulated(memory.memory) as cuda:
        checks = list(gpu_checks.check_all(cuda, memory, full_size=False))
    assert [check for check in checks if not check.passed] == []
    launched = " ".join(cuda.report.launches)
    for kernel in ("append_rows", "quantise_granule", "attention_bf16", "attention_int8_fp8", "attention_merge",
                   "renoise_kernel", "combine_kernel", "pixels_kernel", "quantise_rows", "value_scales"):  # fmt: skip
        assert kernel in launched


@pytest.mark.usefixtures("nvcc")
@pytest.mark.parametrize("kernel", ["attention", "append", "renoise", "combine", "pixels", "quantise_rows"])
def test_a_kernel_that_does_nothing_is_found(kernel: str) -> None:
    """By a check, or by the executor, where the next kernel reads what was never written."""
    memory = SimulatedMemory()
    with simulated(memory.memory) as cuda:
        setattr(cuda, kernel, lambda *_, **__: None)
        try:
            checks = [gpu_checks.check_stream(cuda, memory, gpu_checks.streams(False)[0])]
            rest = (gpu_checks.check_renoise, gpu_checks.check_combine, gpu_checks.check_pixels, gpu_checks.check_rows)
            checks += [check(cuda, memory) for check in rest]
        except RuntimeError:
            assert cuda.report.kinds() == {"uninitialised"}
            return
    assert not all(check.passed for check in checks)


@pytest.mark.usefixtures("nvcc")
def test_timings_are_medians_over_rotated_inputs() -> None:
    memory, clock, addresses = SimulatedMemory(), Counted(), []
    with simulated(memory.memory) as cuda:
        attention = cuda.attention
        cuda.attention = lambda **kw: (addresses.append(kw["k"]), attention(**kw))
        rows = list(gpu_timing.attention_timings(cuda, memory, clock, RTX_4090, [(40, 80)], heads=1, frame_tokens=40,
                                                 repeats=5))  # fmt: skip
    assert [row.name for row in rows] == ["cfrt bf16", "cfrt int8, fp32 sums", "cfrt int8, fp16 sums"]
    assert [row.milliseconds for row in rows] == [3, 8, 13]
    assert len(set(addresses)) == 3 * gpu_timing.COPIES
    assert rows[0].tflops == pytest.approx(4 * 40 * 80 * 128 / 3e-3 / 1e12)
    assert rows[0].share_of_peak == pytest.approx(rows[0].tflops / 165.15, rel=1e-4)


def test_a_storage_that_the_device_cannot_do_is_noted() -> None:
    class Old:
        def refusal(self, device: int, storage: str) -> str:
            return f"no {storage} here"

    rows = list(gpu_timing.attention_timings(Old(), SimulatedMemory(), Counted(), RTX_4090))
    assert {row.note for row in rows} == {"no bf16 here", "no int8 here"}
    assert all(row.milliseconds is None for row in rows)


def test_peaks_are_the_data_sheets() -> None:
    assert gpu_timing.peak(89, 128, 2.52, "bf16", "fp32") == pytest.approx(165.2, rel=1e-3)
    assert gpu_timing.peak(89, 128, 2.52, "int8", "fp16") == pytest.approx(660.6, rel=1e-3)
    assert gpu_timing.peak(80, 108, 1.41, "bf16", "fp32") == pytest.approx(312, rel=1e-2)
    assert gpu_timing.peak(90, 132, 1.83, "bf16", "fp32") == pytest.approx(989, rel=1e-2)
    assert gpu_timing.peak(80, 108, 1.41, "int8", "fp32") is None


def test_the_report_says_on_what_and_when() -> None:
    checks = [gpu_checks.Check("renoise", 1.0, 2.0), gpu_checks.Check("pixels", np.nan, 0.0)]
    timings = [
        gpu_timing.Timing("cfrt bf16", 1560, 14040, 0.9, 149.0, 0.9),
        gpu_timing.Timing("SageAttention", 1560, 14040, None, note="not installed: x"),
    ]
    found = json.loads(json.dumps(gpu.report(checks, timings, SAID)))
    assert found["card"]["driver_version"] == "580.65"
    assert [check["passed"] for check in found["checks"]] == [True, False]
    text = gpu.as_text(found)
    assert "RTX 4090, driver 580.65" in text
    assert "WRONG  pixels" in text
    assert "0.900 ms, 149 TFLOP/s, 90% of peak" in text
    assert "not installed: x" in text
    assert gpu.card_of(SAID, (8, 9), 128) == RTX_4090


def test_without_a_gpu_it_says_why() -> None:
    with pytest.raises(SystemExit, match=r"expected a GPU that the CUDA kernels run on: .*(driver|CUDA)"):
        gpu.main([])


@pytest.mark.usefixtures("nvcc")
def test_the_memory_of_the_test_is_watched() -> None:
    """A call past an array's end fails: the executor's checks are on in all of the above."""
    memory = Memory()
    with simulated(memory) as cuda, pytest.raises(RuntimeError, match="CUDA refused to write pixels"):
        cuda.pixels(out=memory.empty(12, np.uint8).address, x=4096, dtype="float32", frames=1, plane=4, gain=1.0,
                    offset=0.0, stream=0)  # fmt: skip
    assert cuda.report.kinds() == {"bounds"}
