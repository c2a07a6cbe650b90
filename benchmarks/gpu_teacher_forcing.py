"""Teacher-forced attention of one layer of Wan 1.3B on a GPU: FlexAttention, by ranges, and under the dense mask.

    python -m benchmarks.gpu_teacher_forcing --json benchmarks/results/gpu_teacher_forcing.json

[clean | noisy] of a clip of the paper's length, bf16. Medians of CUDA events; most bytes allocated with the backward,
queries, keys and values included; the largest difference from FlexAttention's answer."""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfrt.blocks import teacher_forcing_mod
from cfrt.config import PRESETS, ModelConfig
from cfrt.nn.attention import attention, attention_by_blocks, block_mask
from cfrt.nn.attention.parts import attention_by_parts
from cfrt.nn.dit import teacher_forcing_parts

from . import machine
from .gpu import ask_card

MODEL = PRESETS["wan-1.3b-framewise-ar"]
ROUNDS = 5
BACKWARD = 2.5
"""Products of the backward pass over those of the forward one: scores again, gradients of q, k, v and the scores."""

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def ways(model: ModelConfig, frames: int, device: torch.device) -> dict[str, Way]:
    """The same attention, q, k, v [B, 2 x frames x tokens, H, D]; the dense mask is made when it is first wanted."""
    geometry, tokens = model.geometry, model.frame_tokens
    mask = geometry.teacher_forcing_mask(frames)
    blocks = block_mask(mask, tokens, teacher_forcing_mod(geometry, frames, tokens), device)
    parts = teacher_forcing_parts(geometry, frames, tokens)
    dense: list[Tensor] = []

    def by_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not dense:
            dense.append(torch.from_numpy(mask).to(device).repeat_interleave(tokens, 0).repeat_interleave(tokens, 1))
        return attention(q, k, v, mask=dense[0], backend="sdpa")

    return {
        "flex": lambda q, k, v: attention_by_blocks(q, k, v, blocks),
        "ranges": lambda q, k, v: attention_by_parts(q, k, v, parts, backend="sdpa"),
        "mask": by_mask,
    }


def pairs_seen(model: ModelConfig, frames: int) -> int:
    """Pairs of tokens that may look at each other."""
    return int(model.geometry.teacher_forcing_mask(frames).sum()) * model.frame_tokens**2


def tflops(model: ModelConfig, frames: int, seconds: float, *, backward: bool) -> float:
    """TFLOP/s of the pairs seen: what is computed and hidden again counts as nothing."""
    work = 4e-12 * pairs_seen(model, frames) * model.heads * model.head_dim
    return work * (1 + BACKWARD * backward) / seconds


def run(model: ModelConfig, frames: int) -> list[dict[str, Any]]:
    device = torch.device("cuda")
    shape = (1, 2 * frames * model.frame_tokens, model.heads, model.head_dim)
    qkv = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]
    rows, first = list[dict[str, Any]](), None
    for name, way in ways(model, frames, device).items():
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            answer = way(*qkv)
        first = answer if first is None else first
        both = median(partial(backward, way, *qkv))
        with torch.no_grad():
            forward = median(partial(way, *qkv))
        row = {"name": name, "forward": forward, "both": both, "allocated_peak": torch.cuda.max_memory_allocated()}
        rows.append(row | {"difference": float((answer.float() - first.float()).abs().max())})
        print(worded(model, frames, rows[-1]), flush=True)
    return rows


def backward(way: Way, q: Tensor, k: Tensor, v: Tensor) -> None:
    way(q, k, v).sum().backward()


def median(call: Callable[[], object]) -> float:
    """Seconds, after one call that is not counted."""
    times = []
    for _ in range(1 + ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e-3 * begin.elapsed_time(end))
    return statistics.median(times[1:])


def worded(model: ModelConfig, frames: int, row: Mapping[str, Any]) -> str:
    rates = [tflops(model, frames, row[name], backward=name == "both") for name in ("forward", "both")]
    return (
        f"{row['name']:7} {1e3 * row['forward']:.1f} ms forward, {1e3 * row['both']:.1f} with backward "
        f"({rates[0]:.0f} and {rates[1]:.0f} TFLOP/s of the pairs seen), {row['allocated_peak'] / 1e9:.1f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_teacher_forcing: expected a GPU, PyTorch sees none; bench_training.py needs none")
    about = {**machine.header(), "card": ask_card(), "model": MODEL.name, "frames": MODEL.trained_frames}
    found = about | {"rows": run(MODEL, MODEL.trained_frames)}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
