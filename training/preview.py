"""Contact sheets: clips as rows, time to the right."""

from __future__ import annotations

from pathlib import Path

import av
import torch
from torch import Tensor

from cfrt.picture import png
from training.worlds import UNIT_FRAMES


def sheet(video: Tensor, path: Path, every: int = UNIT_FRAMES) -> None:
    """Write [B, T, 3, H, W] in [0, 1] as one PNG, a frame in `every`."""
    rows = video[:, ::every].clamp(0, 1).mul(255).round().to(torch.uint8)
    write(rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2), path)  # [B H, T W, 3]


def write(picture: Tensor, path: Path) -> None:
    """Write [H, W, 3] uint8 as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(picture.numpy()))


def read(path: Path) -> Tensor:
    """[H, W, 3] uint8 of a picture."""
    with av.open(str(path)) as container:
        return torch.from_numpy(next(container.decode(video=0)).to_ndarray(format="rgb24"))
