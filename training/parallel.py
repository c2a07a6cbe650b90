"""Many processes, one run: FSDP2 applied from outside the networks, which know nothing of it.

torchrun starts the processes. Each holds a share of every network, moment and average, and takes its share of a step's
micro-batches; a block's weights are whole only while it computes. bf16 is what blocks compute in and are gathered in,
fp32 what they are kept and reduced in. A single process needs no process group."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cfrt.engines import native
from cfrt.errors import TrainingError
from cfrt.nn.dit import CausalDiT

Precision = Literal["fp32", "bf16"]

CALLED = {
    "network": ("bidirectional", "teacher_forced", "noisy_prefix", "text_kv"),
    "dit": ("teacher_forced", "step", "commit", "text_kv"),
    "block": ("remember",),
    "cross_attn": ("text_kv",),  # a group of its own: the text's keys are asked for without the rest of the block
}
"""What is called beside `forward`: there, too, the weights must be whole."""


# ---------------------------------------------------------------------------------------------------------- processes


def count() -> int:
    """Processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this process writes what is written once."""
    return rank() == 0


def barrier() -> None:
    if count() > 1:
        dist.barrier()


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started with this one; alone, nothing is done."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device().type == "cuda":
        torch.cuda.set_device(device())
    dist.init_process_group("cpu:gloo,cuda:nccl" if device().type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def device(name: str = "auto") -> torch.device:
    """Where this process computes: its own GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, int(os.environ.get("LOCAL_RANK", "0"))) if name == "cuda" else torch.device(name)


def bf16_is_fast(device: torch.device) -> bool:
    """Has it products of bf16? On a CPU without them PyTorch emulates them, several times slower than fp32."""
    return device.type != "cpu" or native.bf16_is_fast()


def half(device: torch.device) -> torch.autocast:
    """bf16 compute, where that is fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16_is_fast(device))


def share(micros: int) -> range:
    """Which of a step's micro-batches this process takes."""
    if micros % count():
        raise TrainingError(
            f"expected micro-batches that {count()} processes can share evenly, got {micros} a step: "
            f"set micros to a multiple of {count()}"
        )
    own = micros // count()
    return range(rank() * own, (rank() + 1) * own)


def anywhere(flag: bool) -> bool:
    """Whether any process says so."""
    if count() == 1:
        return flag
    flags = torch.tensor([float(flag)], device=device())
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())


def mean(stats: Mapping[str, float]) -> dict[str, float]:
    """The mean over processes of numbers that all of them have."""
    if count() == 1:
        return dict(stats)
    names = sorted(stats)
    values = torch.tensor([stats[name] for name in names], dtype=torch.float64, device=device())
    dist.all_reduce(values)
    return dict(zip(names, (values / count()).tolist(), strict=True))


# ------------------------------------------------------------------------------------------------------------ placing


def place(network: nn.Module, where: torch.device, precision: Precision, constant: bool) -> None:
    """Move a network to its device and, among several processes, share it out; done already, it stays as it is.

    A network on the meta device gets memory and no values: see `fill`. `constant`: nothing updates these weights, so
    that they lose nothing by being kept in the precision of the compute."""
    if constant and precision == "bf16":
        network.to(torch.bfloat16)
    if count() > 1 and not _sharded(network):
        empty = _is_meta(network)
        _shard(network if empty else network.to(where), where, precision)
    network.to_empty(device=where) if _is_meta(network) else network.to(where)


def _sharded(network: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(network, FSDPModule)


def _is_meta(network: nn.Module) -> bool:
    return next(network.parameters()).is_meta


def _shard(network: nn.Module, where: torch.device, precision: Precision) -> None:
    """A group for each block, one for its cross-attention, and one for what is left of the transformer and around it.

    Inputs are not cast: times and latents stay fp32 until the transformer itself rounds what it computes with."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # FSDP warns that its hooks sit on views, which an operation in place would lose: the network has none
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    dit = getattr(network, "dit", None)
    if not isinstance(dit, CausalDiT):
        raise TrainingError(
            f"expected a causal DiT to share out over {count()} processes, got {type(network).__name__}: "
            "run this stage in one process"
        )
    mesh = init_device_mesh(where.type, (count(),))
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if precision == "bf16"
        else MixedPrecisionPolicy(cast_forward_inputs=False)
    )
    groups: list[tuple[str, nn.Module]] = []
    for block in dit.layers:
        groups += [("cross_attn", block.cross_attn), ("block", block)]
    for kind, module in [*groups, ("dit", dit), ("network", network)]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        for method in CALLED[kind]:
            register_fsdp_forward_method(module, method)


@torch.no_grad()
def fill(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a placed network its values, whole tensors that the first process alone needs to have."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, value in network.state_dict().items():
        if isinstance(value, DTensor):
            empty = torch.empty(value.shape, dtype=value.dtype, device=value.device)
            source = empty.copy_(tensors[name]) if first() else empty
            value.copy_(distribute_tensor(source, value.device_mesh, value.placements))
        else:
            value.copy_(tensors[name])


def _plain(x: Tensor) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


# ------------------------------------------------------------------------------------------------------------ tensors


def whole(x: Tensor) -> Tensor:
    """A tensor that processes share, put together; every process must ask."""
    together: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return together


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU of the first process; the others get nothing."""
    found = {}
    for name, value in tensors.items():
        together = whole(value)
        if first():
            found[name] = together.cpu()
    return found


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number is finite in every process."""
    return not anywhere(not all(bool(_plain(x).isfinite().all()) for x in tensors))


def norm(x: Any) -> float:
    """A gradient norm, which FSDP leaves spread over processes, as a number."""
    return float(whole(x))
