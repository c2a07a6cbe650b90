"""Rotary positions in three axes (time, height, width), computed and never looked up: a stream has no last frame.

Pair j of an axis with c pairs turns by position * theta^(-j/c); Wan2.1 gives the first pairs of a head to time, then
height, then width, and interleaves the two numbers of a pair. Angles are fp64: at frame 10,000 an fp32 angle is off by
5e-4, and bf16 would be noise.

Shapes: T latent frames, N tokens a frame, H heads, D numbers a head, D/2 pairs.
"""

import torch
from torch import Tensor

from .constants import kept

Axes = tuple[int, int, int]


def frequencies(pairs: int, theta: float) -> Tensor:
    """fp64 [pairs]: theta^(-j/pairs), turns in radians per step of position."""
    return theta ** (-torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))


@kept(32)  # passes of a unit share one; all units of a training rollout fit
def phases(
    frames: tuple[int, ...],
    grid: tuple[int, int],
    pairs: Axes,
    theta: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Complex [T N, 1, D/2]: the turn of every token; tokens run over frames, rows, columns.

    `dtype` is that of the activations: fp64 gives complex128, everything else complex64.
    """
    time, height, width = (frequencies(count, theta) for count in pairs)
    rows, columns = grid
    shape = (len(frames), rows, columns)
    angle = torch.cat(
        [
            (torch.tensor(frames, dtype=torch.float64)[:, None, None, None] * time).expand(*shape, -1),
            (torch.arange(rows, dtype=torch.float64)[None, :, None, None] * height).expand(*shape, -1),
            (torch.arange(columns, dtype=torch.float64)[None, None, :, None] * width).expand(*shape, -1),
        ],
        dim=-1,
    )
    turn = torch.polar(torch.ones_like(angle), angle).flatten(0, 2).unsqueeze(1)
    return turn.to(device, torch.complex128 if dtype == torch.float64 else torch.complex64)


def rotate(x: Tensor, phases: Tensor) -> Tensor:
    """Turns every pair (2i, 2i+1) of x [B, T N, H, D] by phases [T N, 1, D/2]; computes in at least fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * phases
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
