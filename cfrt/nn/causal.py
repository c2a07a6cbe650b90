"""Causal convolution over time with its state outside: what a video network must remember between two pieces of a clip.

A causal convolution with a kernel of k frames needs the k - 1 frames before those it is given; where a clip starts they
are zeros. A `Memory` carries them through one call of a network, in the order in which its layers run: the list that it
was made from goes in, the list `left` comes out, and the two lists are the whole streaming state. Plain tensors, no
attributes that change: a network that is called this way can be exported.

Shapes: B clips, C channels, T frames, H x W pixels or cells."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]
"""The frames that the layers of a network still need, [B, C, k - 1, H, W] each, in the order in which they run."""


class Memory:
    """The state of one call: `past` from the call before, None where the clip starts."""

    def __init__(self, past: Sequence[Tensor] | None) -> None:
        self.starts = past is None
        self.left: list[Tensor] = []
        self._past = iter(past or ())

    def extend(self, x: Tensor, frames: int) -> Tensor:
        """x [B, C, T, H, W] after the `frames` frames that came before it: [B, C, frames + T, H, W]."""
        before = x.new_zeros(_of_length(x, frames)) if self.starts else next(self._past)
        joined = torch.cat([before, x], dim=2)
        self.keep(joined[:, :, -frames:])
        return joined

    def keep(self, frames: Tensor) -> None:
        """What this layer will need next time; copied, so that it does not hold on to the tensor it is a part of."""
        self.left.append(frames.clone())

    def start_later(self, x: Tensor, frames: int) -> None:
        """The layer is left out of this call, and begins with the next one as at the start of a clip."""
        self.left.append(x.new_zeros(_of_length(x, frames)))


class CausalConv3d(nn.Conv3d):
    """Convolution over [B, C, T, H, W] that looks `kernel - 1` frames back and none ahead; zeros around the picture."""

    def __init__(self, channels: int, out: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        super().__init__(channels, out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.back = kernel[0] - 1

    def forward(self, x: Tensor, memory: Memory) -> Tensor:  # type: ignore[override]
        return super().forward(memory.extend(x, self.back))


def _of_length(x: Tensor, frames: int) -> list[int]:
    return [*x.shape[:2], frames, *x.shape[3:]]
