"""Contact sheets: clips as rows, time to the right."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from training.worlds import UNIT_FRAMES


def sheet(video: Tensor, path: Path, every: int = UNIT_FRAMES) -> None:
    """Write [B, T, 3, H, W] in [0, 1] as one PNG, a frame in `every`."""
    rows = video[:, ::every].clamp(0, 1).mul(255).round().to(torch.uint8)
    write(rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2), path)  # [B H, T W, 3]


def write(picture: Tensor, path: Path) -> None:
    """Write [H, W, 3] uint8 as a PNG (ISO/IEC 15948), each line as its difference from the one above."""
    height, width, _ = picture.shape
    above = torch.cat([torch.zeros_like(picture[:1]), picture[:-1]])
    lines = torch.cat([torch.full((height, 1), 2, dtype=torch.uint8), (picture - above).flatten(1)], 1)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(lines.numpy().tobytes(), 9)), (b"IEND", b""))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def read(path: Path) -> Tensor:
    """[H, W, 3] uint8 of a picture."""
    import av  # training itself needs no codecs

    with av.open(str(path)) as container:
        return torch.from_numpy(next(container.decode(video=0)).to_ndarray(format="rgb24"))
