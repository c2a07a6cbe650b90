"""What the backends share: the keys that ranges name, and a mask beside heads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...blocks import Span


def read(x: Tensor, ranges: Sequence[Span] | None) -> Tensor:
    """The keys (or values) of the given spans, [B, keys read, H, D]; a view where there is only one."""
    if ranges is None:
        return x
    parts = [x[:, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def per_head(mask: Tensor) -> Tensor:
    return mask if mask.dim() == 2 else mask.unsqueeze(1)
