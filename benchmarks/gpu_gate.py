"""What the gates of benchmarks/gate.py measure on a GPU.

`gpu_attention`: time of PyTorch's fused attention over that of our ring attention, in turns, at a shape of Wan 1.3B. An
answer that is further from fp64 than bf16 explains gives no ratio. `gpu_stream`: what a unit of the torch engine's
stream costs over its passes alone (S steps and a commit, from an idle GPU on); Wan 1.3B at 480 x 832 with a third of
its layers, random weights, TAEHV."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _cfrt

from .gpu_checks import LIMITS
from .gpu_timing import COPIES, HEADS, Call, Clock, RingCall, medians
from .ring_stream import DeviceMemory

if TYPE_CHECKING:
    from .gate import Gate

LAYERS, WINDOW, SECONDS = 10, 9, 4.0
REPEATS = 21


def refusal() -> str | None:
    """Why no gate can be measured on a GPU here, or None."""
    if (reason := _cfrt.cuda.refusal(0)) is not None:
        return str(reason)
    import torch

    return None if torch.cuda.is_available() else f"PyTorch {torch.__version__} sees no CUDA device"


def attention(gates: Sequence["Gate"]) -> dict[str, float]:
    from .gpu import Events, TorchMemory, fused_calls

    shapes = {gate.name: (gate.tokens, gate.keys) for gate in gates}
    return ratios(_cfrt.cuda, TorchMemory(), Events(), fused_calls, shapes)


def ratios(
    cuda: Any, memory: DeviceMemory, clock: Clock, peer: Callable[[int, int], Sequence[Call]],
    shapes: Mapping[str, tuple[int, int]], *, heads: int = HEADS, repeats: int = REPEATS, **ring: int,
) -> dict[str, float]:  # fmt: skip
    """Time of the peer over ours, by name; none where ours is wrong."""
    found, processors = {}, cuda.processors(0)
    for name, (queries, keys) in shapes.items():
        options = {"heads": heads, "processors": processors, **ring}
        calls = [RingCall(cuda, memory, "bf16", "fp32", queries, keys, **options) for _ in range(COPIES)]
        theirs, ours = medians(clock, [peer(queries, keys), calls], repeats)
        if calls[0].error() <= LIMITS["bf16"]:
            found[name] = theirs / ours
    return found


def stream(gates: Sequence["Gate"]) -> dict[str, float]:
    """One measurement, for every gate of the kind."""
    from .full_size_gpu import MODEL, measured, random_model
    from .gpu_unit import engine_on, run

    config = replace(MODEL, depth=LAYERS, window=WINDOW)
    with tempfile.TemporaryDirectory() as temporary:
        folder = random_model(config, Path(temporary) / "model")
        unit = measured(config, folder, "taehv", SECONDS)["unit"]["p50"]
        one_pass = run(engine_on(folder, "cuda"), folder)["stages"]["pass"]["done"]
    passes = len(config.unit_steps(1)) + 1
    return {gate.name: unit / (passes * one_pass) for gate in gates}
