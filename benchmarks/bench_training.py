"""How fast training is: every stage of the tiny recipe, teacher forcing by mask and by ranges, attention alone, and the
generation of ODE pairs against a ring and under the mask.

    pytest benchmarks/bench_training.py --benchmark-json build/training.json
    python tools/training_speed.py build/training.json        keeps the numbers and writes docs/training-speed.md

(or in pieces, with `-k stage` and so on: the tool takes several files). Under three minutes on one core, once
`-k attention` has filled torch.compile's cache.

What is compared takes turns within one round, and the fastest of the rounds counts: what else the machine does can only
add. On a CPU one thread and its processor time, which is the time it would take alone (CFRT_BENCH_THREADS for more, and
the time on the wall), on a GPU where there is one. The data is noise: only its shape matters for speed. Peak means the
fastest fp32 matrix product of the same run, on the same threads."""

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from time import perf_counter, process_time
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cfrt import flow
from cfrt.blocks import teacher_forcing_mod, to_tokens
from cfrt.config import ModelConfig
from cfrt.nn.attention import attention
from cfrt.nn.attention.parts import attention_by_parts
from cfrt.nn.dit import teacher_forcing_parts
from training import bidirectional, captions, cd, dmd, loop, ode, recipes, teacher
from training.data import Batch, Prompts
from training.network import Network

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
THREADS = int(os.environ.get("CFRT_BENCH_THREADS", "1"))
RECIPE = recipes.tiny()
CLOCK = process_time if THREADS == 1 and not GPU else perf_counter
ROUNDS = 3
CLIPS = {4: 4, 16: 2, 64: 1}  # of a step, by tokens a frame
PIECE = {4: 16, 16: 4}  # clips whose pairs are made together: units of a ring are small, so many share its calls
GRIDS = {4: (4, 4), 16: (8, 8), 64: (16, 16)}  # tokens a frame: latent grid
FRAMES = {4: (5, 10, 20, 40, 80), 16: (5, 10, 20, 40), 64: (5, 10, 20)}
LENGTHS = [(tokens, frames) for tokens, lengths in FRAMES.items() for frames in lengths]
EULER_STEPS = 8  # of the recipe's 48: each costs as much, but the ring's one commit a unit weighs six times more
PRODUCT = 1024  # sides of the matrices whose product is the peak


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------------ the tests


@pytest.mark.parametrize("name", ["bidirectional", "teacher", "ode", "cd", "dmd"])
def test_stage(name: str, benchmark: BenchmarkFixture) -> None:
    """Whole steps with the optimiser, as the loop takes them. A step of DMD is one update of the student and five of
    the critic; the pairs of the ODE stage are made already."""
    stage = STAGES[name]()
    optimisers, step = stage.optimisers(), iter(range(1000))
    seconds = turns(benchmark, {name: lambda: loop.take(stage, optimisers, next(step), seed=1)})
    keep(benchmark, "stage", name, seconds, clips=stage.batch, frames=RECIPE.data.units, tokens=4)


@pytest.mark.parametrize(("tokens", "frames"), LENGTHS)
def test_teacher_forced_step(tokens: int, frames: int, benchmark: BenchmarkFixture) -> None:
    """Forward and backward of [clean | noisy], without the optimiser."""
    model = shaped(tokens, frames)
    network, batch = Network(model).to(DEVICE), Noise(model, frames).batch(0, CLIPS[tokens])
    x, s = torch.randn_like(batch.latents), torch.rand(CLIPS[tokens], frames, device=DEVICE)

    def step(layout: str) -> None:
        kv = network.text_kv(batch.captions)
        t = flow.TIME_SCALE * s
        v = network.dit.teacher_forced(batch.latents, x, t, kv, batch.caption, layout=layout)  # type: ignore[arg-type]
        v.square().mean().backward()

    seconds = turns(benchmark, {layout: partial(step, layout) for layout in ("mask", "ranges")}, peak=True)
    seen, all_pairs = pairs_seen(model, frames), (2 * frames * tokens) ** 2
    work = {"mask": step_flops(model, frames, all_pairs), "ranges": step_flops(model, frames, seen)}
    keep(benchmark, "teacher-forced step", "", seconds, clips=CLIPS[tokens], frames=frames, tokens=tokens, gflop=work)


@pytest.mark.filterwarnings("ignore")  # the compiler of flex attention has much to say
@pytest.mark.parametrize(("tokens", "frames"), [(4, 20), (16, 20), (64, 20)])
def test_attention(tokens: int, frames: int, benchmark: BenchmarkFixture) -> None:
    """Attention of one layer under the teacher-forcing mask, four ways to the same numbers. FlexAttention is compiled
    with the mask of `cfrt.blocks`; it has no backward on a CPU."""
    model = shaped(tokens, frames)
    shape = (CLIPS[tokens], 2 * frames * tokens, model.heads, model.head_dim)
    q, k, v = (torch.randn(shape, device=DEVICE, requires_grad=GPU) for _ in range(3))
    ways = attention_ways(model, frames, tokens)
    results = [way(q, k, v).detach() for way in ways.values()]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-4, rtol=1e-4)
    seconds = turns(benchmark, {name: partial(forward, way, q, k, v) for name, way in ways.items()})
    if GPU:
        both = {f"{name}, with backward": partial(backward, way, q, k, v) for name, way in ways.items()}
        seconds |= turns(None, both)
    keep(benchmark, "attention", "forward", seconds, clips=CLIPS[tokens], frames=frames, tokens=tokens)


@pytest.mark.parametrize(("tokens", "frames"), [(4, 10), (4, 20), (4, 40), (16, 10)])
def test_pairs(tokens: int, frames: int, benchmark: BenchmarkFixture) -> None:
    """Guided trajectories of the AR teacher on real pasts: unit by unit against a ring, and all at once under the
    mask or by ranges. The same numbers, which is checked."""
    model = shaped(tokens, frames)
    network, batch = Network(model).to(DEVICE).eval(), Noise(model, frames).batch(0, PIECE[tokens])
    for parameter in network.parameters():  # a fresh network says v = 0
        torch.nn.init.normal_(parameter, std=0.05)
    config = ode.Config(euler_steps=EULER_STEPS)

    def make(how: Callable[..., ode.Pairs], layout: str) -> Tensor:
        network.dit.teacher_forced = partial(type(network.dit).teacher_forced, network.dit, layout=layout)  # type: ignore[method-assign]
        return how(network, model, config, batch, torch.Generator().manual_seed(0)).end

    ways = {
        "ring": partial(make, ode.causal_pairs, "auto"),
        "mask": partial(make, ode.forced_pairs, "mask"),
        "ranges": partial(make, ode.forced_pairs, "ranges"),
    }
    ends = [way() for way in ways.values()]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], atol=1e-2, rtol=1e-2)
    seconds = turns(benchmark, ways, rounds=1, warm=True)
    keep(benchmark, "pairs", f"{EULER_STEPS} steps", seconds, clips=PIECE[tokens], frames=frames, tokens=tokens)


# ----------------------------------------------------------------------------------------------------------- the timing


def turns(
    benchmark: BenchmarkFixture | None,
    ways: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = ROUNDS,
    warm: bool = False,
    peak: bool = False,
) -> dict[str, float]:
    """Seconds of the fastest round of each way, after one that does not count unless they are `warm`. peak: time the
    matrix product beside them."""
    a = torch.randn(PRODUCT, PRODUCT, device=DEVICE)
    contenders = dict(ways) | ({"peak": lambda: a @ a} if peak else {})
    best = dict.fromkeys(contenders, float("inf"))

    def round_() -> None:
        for name, way in contenders.items():
            synchronise()
            begin = CLOCK()
            way()
            synchronise()
            best[name] = min(best[name], CLOCK() - begin)

    if not warm:
        round_()
        best = dict.fromkeys(contenders, float("inf"))
    if benchmark is None:
        for _ in range(rounds):
            round_()
    else:
        benchmark.pedantic(round_, rounds=rounds)
    return best


def synchronise() -> None:
    if GPU:
        torch.cuda.synchronize()


def forward(way: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> None:
    with torch.no_grad():
        way(q, k, v)


def backward(way: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> None:
    way(q, k, v).sum().backward()


def keep(benchmark: BenchmarkFixture, what: str, note: str, seconds: dict[str, float], **facts: Any) -> None:
    """What tools/training_speed.py reads, and a line for whoever watches."""
    peak = seconds.pop("peak", None)
    where = torch.cuda.get_device_name() if GPU else platform.processor() or platform.machine()
    row = {
        "what": what,
        "note": note,
        "seconds": seconds,
        **facts,
        "device": where,
        "threads": THREADS,
        "clock": CLOCK.__name__,
    }
    if peak is not None:
        row["peak_gflops"] = 2e-9 * PRODUCT**3 / peak
    benchmark.extra_info |= row
    rates = ", ".join(f"{name} {facts['clips'] / value:.4g} clips/s" for name, value in seconds.items())
    print(f"\n{what} {note}, {facts['frames']} frames of {facts['tokens']} tokens: {rates}")


# ------------------------------------------------------------------------------------------------------------ the work


def pairs_seen(model: ModelConfig, frames: int) -> int:
    """Pairs of tokens that may look at each other, over [clean | noisy]."""
    return int(model.geometry.teacher_forcing_mask(frames).sum()) * model.frame_tokens**2


def step_flops(model: ModelConfig, frames: int, pairs: int) -> float:
    """GFLOP of a teacher-forced step of all its clips, forward and backward: products of matrices only, two for a
    multiplication and an addition, the backward pass as two forward ones.

    The last layer answers for the noisy half alone: only its keys and values are made of both."""
    d, layers, rows = model.width, model.depth, 2 * model.text.length
    tokens, answered = 2 * frames * model.frame_tokens, frames * model.frame_tokens
    keys, rest = 4 * d * d, 8 * d * d + 4 * d * model.ffn  # a token: k and v; q, o, the cross q and o, the feed-forward
    cross = 4 * d * rows  # a token: scores and sums over both captions' rows
    linear = layers * tokens * keys + ((layers - 1) * tokens + answered) * (rest + cross)
    mixing = 4 * d * pairs * (layers - 0.5)  # half the queries of the last layer, and half of what they see
    time = 2 * frames * (2 * model.time_width * d + 2 * d * d + 12 * d * d)
    text = rows * (2 * model.text.width * d + 2 * d * d + layers * 4 * d * d)
    patch = 2 * d * model.patch_width * (tokens + answered)
    return 3e-9 * CLIPS[model.frame_tokens] * (linear + mixing + time + text + patch)


# ------------------------------------------------------------------------------------------------------ what is timed


def shaped(tokens: int, frames: int) -> ModelConfig:
    """The embedded student's network for another picture size; its window and training length cover the clip."""
    return replace(RECIPE.model, latent_grid=GRIDS[tokens], window=frames, trained_frames=frames)


class Noise:
    """A data set of nothing in particular."""

    def __init__(self, model: ModelConfig, frames: int) -> None:
        self.shape, self.length = (frames, model.latent_channels, *model.latent_grid), model.text.length

    def __len__(self) -> int:
        return 1000

    def batch(self, index: int, size: int) -> Batch:
        generator = torch.Generator().manual_seed(index)
        latents = torch.randn(size, *self.shape, generator=generator).to(DEVICE)
        return Batch.of(latents, self.prompts(size, generator).to(DEVICE))

    def prompts(self, size: int, generator: torch.Generator) -> Prompts:
        rows = torch.randint(captions.ROWS, (size, 2, self.length), generator=generator)
        return Prompts(captions=rows, caption=(torch.arange(self.shape[0]) >= 6).long().expand(size, -1))


def tiny() -> tuple[ModelConfig, Noise, Network]:
    model = RECIPE.model
    return model, Noise(model, RECIPE.data.units), Network(model).to(DEVICE)


def bidirectional_stage() -> loop.Stage:
    model, data, network = tiny()
    return bidirectional.Stage(RECIPE.bidirectional, model, data, network)


def teacher_stage() -> loop.Stage:
    model, data, network = tiny()
    return teacher.Stage(RECIPE.teacher, model, data, network)


def ode_stage() -> loop.Stage:
    model, data, network = tiny()
    config, batch = ode.Config(), data.batch(0, 64)
    states = torch.randn(64, len(config.levels), *batch.latents.shape[1:], device=DEVICE)
    pairs = ode.Pairs(
        states=states, end=batch.latents, clean=batch.latents, captions=batch.captions, caption=batch.caption
    )
    return ode.Stage(config, model, pairs, network)


def cd_stage() -> loop.Stage:
    model, data, network = tiny()
    return cd.Stage(cd.Config(), model, data, network)


def dmd_stage() -> loop.Stage:
    model, data, network = tiny()
    config = replace(RECIPE.dmd, critic_warmup=0)
    return dmd.Stage(config, model, data.prompts, network, Network(model).to(DEVICE))


STAGES = {
    "bidirectional": bidirectional_stage,
    "teacher": teacher_stage,
    "ode": ode_stage,
    "cd": cd_stage,
    "dmd": dmd_stage,
}


def attention_ways(model: ModelConfig, frames: int, tokens: int) -> dict[str, Callable[..., Tensor]]:
    """The same attention under the teacher-forcing mask of one geometry, four ways; q, k, v [B, N, H, D]."""
    geometry, count = model.geometry, 2 * frames * tokens
    mask = torch.from_numpy(to_tokens(geometry.teacher_forcing_mask(frames), tokens)).to(DEVICE)
    parts = teacher_forcing_parts(geometry, frames, tokens)
    mod = teacher_forcing_mod(geometry, frames, tokens)
    blocks = create_block_mask(mod, None, None, count, count, device=DEVICE.type)
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=blocks).transpose(1, 2)

    def flex_forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():  # there is no backward on a CPU, and none is to be compiled
            return flex(q, k, v)

    return {
        "mask": lambda q, k, v: attention(q, k, v, mask=mask, backend="sdpa"),
        "ranges": lambda q, k, v: attention_by_parts(q, k, v, parts, backend="sdpa"),
        "flex": flex if GPU else flex_forward,
    }
