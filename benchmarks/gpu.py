"""The CUDA kernels on a GPU: whether each is right, then how fast it is beside what others offer.

    python -m benchmarks.gpu [--json FILE] [--checks-only] [--repeats N]

Wants a GPU, a CUDA build of cfrt and PyTorch; flash-attn and SageAttention take part where they are installed. Exit
status 1 where a kernel is wrong: then nothing is timed. The numbers are measured, on the card and date in the file.
"""

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import _cfrt

from .gpu_checks import Check, check_all
from .gpu_timing import COPIES, DIM, HEADS, SHAPES, Card, Timing, attention_timings, median, peak, rated
from .machine import header

FLUSHED = 256 << 20
"""Bytes that are written between two calls: more than any second-level cache."""
QUERY = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


class TorchBuffer:
    def __init__(self, values: np.ndarray) -> None:
        import torch

        self._kind, self._shape = values.dtype, values.shape
        self._bytes = torch.from_numpy(np.ascontiguousarray(values).reshape(-1).view(np.uint8).copy()).cuda()
        self.address = self._bytes.data_ptr()

    def get(self) -> np.ndarray:
        return self._bytes.cpu().numpy().view(self._kind).reshape(self._shape)

    def set(self, values: np.ndarray) -> None:
        import torch

        flat = np.ascontiguousarray(values, self._kind).reshape(-1).view(np.uint8).copy()
        self._bytes.copy_(torch.from_numpy(flat))


class TorchMemory:
    """Arrays on the GPU, on PyTorch's allocator. What is empty is filled with ones: NaN, as a float."""

    def put(self, values: np.ndarray) -> TorchBuffer:
        return TorchBuffer(values)

    def empty(self, shape: tuple[int, ...], dtype: type) -> TorchBuffer:
        return TorchBuffer(
            np.full(np.prod(shape) * np.dtype(dtype).itemsize, 0xFF, np.uint8).view(dtype).reshape(shape)
        )


class Events:
    """CUDA events around a call on the default stream."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._junk = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")

    def milliseconds(self, call: Callable[[], object]) -> float:
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._junk.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))


# ---------------------------------------------------------------------- what others offer


def _sdpa() -> Callable[..., object]:
    from torch.nn.functional import scaled_dot_product_attention as attention

    return lambda q, k, v: attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def _flash() -> Callable[..., object]:
    from flash_attn import flash_attn_func

    return flash_attn_func  # type: ignore[no-any-return]


def _sage() -> Callable[..., object]:
    from sageattention import sageattn

    return partial(sageattn, tensor_layout="NHD")


def attention_calls(attention: Callable[..., object], queries: int, keys: int) -> list[Callable[[], object]]:
    """On contiguous bf16 arrays [1, N, H, D] without padding."""
    import torch

    make = lambda n: torch.randn(1, n, HEADS, DIM, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    return [partial(attention, make(queries), make(keys), make(keys)) for _ in range(COPIES)]


def fused_calls(queries: int, keys: int) -> list[Callable[[], object]]:
    """PyTorch's fused attention, on a GPU."""
    return attention_calls(_sdpa(), queries, keys)


OTHERS = {"PyTorch SDPA bf16": _sdpa, "flash-attn bf16": _flash, "SageAttention": _sage}


def other_timings(clock: Events, card: Card, repeats: int) -> Iterator[Timing]:
    for name, load in OTHERS.items():
        try:
            attention = load()
        except ImportError as error:
            yield from (Timing(name, *shape, None, note=f"not installed: {error}") for shape in SHAPES)
            continue
        most = peak(card.capability, card.processors, card.gigahertz, "bf16", "fp32") if "bf16" in name else None
        for queries, keys in SHAPES:
            try:
                found = median(clock, attention_calls(attention, queries, keys), repeats)
            except RuntimeError as error:
                yield Timing(name, queries, keys, None, note=f"refuses: {error}")
                continue
            yield rated(Timing(name, queries, keys, found), HEADS, most)


# ---------------------------------------------------------------------- the card


def ask_card() -> dict[str, str]:
    """What nvidia-smi says of device 0, now."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits", "--id=0"]
    values = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    return dict(zip(QUERY, values, strict=True))


def card_of(said: dict[str, str], capability: tuple[int, int], processors: int) -> Card:
    """At the clock that it runs at: ask while it works."""
    return Card(said["name"], 10 * capability[0] + capability[1], processors, float(said["clocks.sm"]) / 1000)


# ---------------------------------------------------------------------- the report


def report(checks: list[Check], timings: list[Timing], card: dict[str, Any]) -> dict[str, Any]:
    return {
        **header(),
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "card": card,
        "build": _cfrt.build_info()["cuda"],
        "checks": [asdict(check) | {"passed": check.passed} for check in checks],
        "timings": [asdict(timing) for timing in timings],
    }


def as_text(found: dict[str, Any]) -> str:
    lines = [f"{found['card']['name']}, driver {found['card']['driver_version']}, {found['date']}: measured"]
    for check in found["checks"]:
        verdict = "right" if check["passed"] else "WRONG"
        lines.append(f"{verdict}  {check['kernel']}: {check['error']:.3g} (limit {check['limit']:g})")
    for row in found["timings"]:
        shape = f"Q {row['queries']} KV {row['keys']}"
        if row["milliseconds"] is None:
            lines.append(f"{row['name']:24} {shape:16} -  {row['note']}")
            continue
        share = "" if row["share_of_peak"] is None else f", {row['share_of_peak']:.0%} of peak"
        lines.append(f"{row['name']:24} {shape:16} {row['milliseconds']:.3f} ms, {row['tflops']:.0f} TFLOP/s{share}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the report")
    parser.add_argument("--checks-only", action="store_true", help="time nothing")
    parser.add_argument("--repeats", type=int, default=30, help="calls that a median is taken over")
    options = parser.parse_args(arguments)
    if refused := _cfrt.cuda.refusal(0):
        raise SystemExit(f"expected a GPU that the CUDA kernels run on: {refused}")
    import torch

    cuda, memory = _cfrt.cuda, TorchMemory()
    checks = list(check_all(cuda, memory, full_size=True))
    timings: list[Timing] = []
    if all(check.passed for check in checks) and not options.checks_only:
        clock = Events()
        card = card_of(ask_card(), torch.cuda.get_device_capability(0), cuda.processors(0))
        timings += attention_timings(cuda, memory, clock, card, repeats=options.repeats)
        timings += other_timings(clock, card, options.repeats)
    found = report(checks, timings, ask_card())
    print(as_text(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
