"""Tensors that depend on a few numbers only, such as phases and masks, made once and kept."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVarTuple

import torch
from torch import Tensor

Ts = TypeVarTuple("Ts")


def kept(count: int) -> Callable[[Callable[[*Ts], Tensor]], Callable[[*Ts], Tensor]]:
    """Keeps the last `count` results of a function of hashable arguments; nobody may write to them.

    What is kept is an ordinary tensor even if it is first asked for in inference mode, where it could not be used by
    autograd later. While torch.export or torch.compile traces, nothing is kept: those tensors are fake.
    """

    def decorate(make: Callable[[*Ts], Tensor]) -> Callable[[*Ts], Tensor]:
        @lru_cache(maxsize=count)
        def keep(*args: *Ts) -> Tensor:
            with torch.inference_mode(False):
                return make(*args)

        @wraps(make)
        def get(*args: *Ts) -> Tensor:
            return make(*args) if torch.compiler.is_compiling() else keep(*args)

        return get

    return decorate
