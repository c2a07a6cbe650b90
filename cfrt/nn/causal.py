"""Causal convolution over time with its state outside: what a video network must remember between two pieces of a clip.

A causal convolution with a kernel of k frames needs the k - 1 frames before those it is given; where a clip starts they
are zeros. A `Memory` carries them through one call of a network, in the order in which its layers run: the list that it
was made from goes in, the list `left` comes out, and the two lists are the whole streaming state. Plain tensors, no
attributes that change: a network that is called this way can be exported.

Shapes: B clips, C channels, T frames, H x W pixels or cells; time is axis 2 of [B, C, T, H, W] or 1 of [B, T, C, H, W].
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]
"""The frames that the layers of a network still need, k - 1 of them each, in the order in which the layers run."""


class Memory:
    """The state of one call: `past` from the call before, None where the clip starts; `time` is the axis of frames."""

    def __init__(self, past: Sequence[Tensor] | None, time: int = 2) -> None:
        self.starts = past is None
        self.left: list[Tensor] = []
        self._past = iter(past or ())
        self._time = time

    def extend(self, x: Tensor, frames: int) -> Tensor:
        """x of T frames after the `frames` frames that came before it: frames + T of them."""
        before = self._zeros(x, frames) if self.starts else next(self._past)
        joined = torch.cat([before, x], dim=self._time)
        self.keep(joined.narrow(self._time, x.shape[self._time], frames))
        return joined

    def keep(self, frames: Tensor) -> None:
        """What this layer will need next time; copied, so that it does not hold on to the tensor it is a part of."""
        self.left.append(frames.clone())

    def start_later(self, x: Tensor, frames: int) -> None:
        """The layer is left out of this call, and begins with the next one as at the start of a clip."""
        self.left.append(self._zeros(x, frames))

    def _zeros(self, x: Tensor, frames: int) -> Tensor:
        shape = list(x.shape)
        shape[self._time] = frames
        return x.new_zeros(shape)


class CausalConv3d(nn.Conv3d):
    """Convolution over [B, C, T, H, W] that looks `kernel - 1` frames back and none ahead; zeros around the picture."""

    def __init__(self, channels: int, out: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        super().__init__(channels, out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.back = kernel[0] - 1

    def forward(self, x: Tensor, memory: Memory) -> Tensor:  # type: ignore[override]
        """[B, out, T, H, W] of x [B, C, T, H, W], after the frames in the memory."""
        return super().forward(memory.extend(x, self.back))
