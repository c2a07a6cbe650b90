"""A loss and its gradient as one CUDA graph.

A small network's step is a thousand kernels of a few microseconds each, which take longer to launch than to run.
Captured once, they are launched as one. What the graph reads must stay where it lay: batches are copied into the
tensors of the first, and randomness comes from a generator on the GPU that the graph knows and that is seeded for every
micro-batch, so that a step is still a function of (seed, number) alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from training.data import Batch, DataSet, Prompts
    from training.loop import Loss, Micro, Report

WARM_UP = 3
"""Runs before the capture, in which libraries choose their kernels and constants are made."""


@runtime_checkable
class Capturable(Protocol):
    """A stage whose loss is the same kernels on every step, and draws from the micro-batch's generator alone."""

    @property
    def capturable(self) -> bool: ...


@runtime_checkable
class Fed(Capturable, Protocol):
    """One that asks a data set for batches. Others draw theirs from what lies on the GPU."""

    clips: DataSet


class Feed:
    """A data set whose batches keep their place: those that one loss asks for, filled anew for the next."""

    def __init__(self, clips: DataSet, device: torch.device) -> None:
        self.clips, self.device, self.index = clips, device, 0
        self.held: dict[tuple[int, int], Batch] = {}

    def __len__(self) -> int:
        return len(self.clips)

    def batch(self, index: int, size: int) -> Batch:
        """As the data set's, on the device; the same tensors for the same distance from the micro-batch's own."""
        ahead = index - self.index
        if (ahead, size) not in self.held:
            self.held[ahead, size] = self.clips.batch(index, size).to(self.device)
        return self.held[ahead, size]

    def prompts(self, size: int, generator: torch.Generator) -> Prompts:
        return self.clips.prompts(size, generator)

    def fill(self, index: int) -> None:
        """Put the batches of micro-batch `index` where those before it were."""
        self.index = index
        for (ahead, size), held in self.held.items():
            fresh = self.clips.batch(index + ahead, size)
            for name in ("latents", "captions", "caption"):
                getattr(held, name).copy_(getattr(fresh, name), non_blocking=True)


class Captured:
    """The gradient of one loss of `stage` with respect to `network`, by replay."""

    def __init__(self, stage: Capturable, network: nn.Module, compute: Callable[[], AbstractContextManager[object]]):
        self.network, self.compute = network, compute
        device = next(network.parameters()).device
        self.generator, self.feed = torch.Generator(device), None
        if isinstance(stage, Fed):
            stage.clips = self.feed = Feed(stage.clips, device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss = torch.empty(())
        self.report: Report = {}
        self.gradients = list[tuple[nn.Parameter, Tensor | None]]()

    def __call__(self, loss: Loss, micro: Micro) -> tuple[Tensor, Report]:
        """Leaves the gradient of `loss` in the network, in place of what was there; returns what `loss` does, good
        until the next call."""
        if self.graph is None:
            self.graph = self._capture(loss, replace(micro, generator=self.generator))
        self._fill(micro.index)
        self.generator.manual_seed(micro.generator.initial_seed())
        self.graph.replay()
        for parameter, gradient in self.gradients:  # an optimiser may have let go of them
            parameter.grad = gradient
        return self.loss, self.report

    def _capture(self, loss: Loss, micro: Micro) -> torch.cuda.CUDAGraph:
        self._fill(micro.index)
        aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._descend(loss, micro)
        torch.cuda.current_stream().wait_stream(aside)
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            self._descend(loss, micro)
        self.gradients = [(parameter, parameter.grad) for parameter in self.network.parameters()]
        return graph

    def _fill(self, index: int) -> None:
        if self.feed is not None:
            self.feed.fill(index)

    def _descend(self, loss: Loss, micro: Micro) -> None:
        self.network.zero_grad(set_to_none=True)
        with self.compute():
            found, report = loss(micro)
        found.backward()
        # without their graph, which would keep this stream's gradients tied to the next capture's
        self.loss = found.detach()
        self.report = {name: x.detach() if isinstance(x, Tensor) else x for name, x in report.items()}
