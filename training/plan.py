"""The resolved plan of a run, before it is run: steps, clips, parameters, memory, FLOP and predicted time.

FLOP are 2 a multiply-add, of matrix products alone; attention counts the pairs of tokens that see each other (a dense
mask pays for the others as well). Backward costs two forwards, recomputing blocks a third. Memory is what a process
keeps: `activations` follow from what autograd saves in a block, checked against it in tests/test_plan.py. Times are
*predicted* from a FLOP rate that was stated, or measured for half a second on this machine.

Shapes: T latent frames of a clip, F of a unit, N tokens a frame, d width, f feed-forward width, L text rows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Any

import torch

from cfrt.config import AutoencoderConfig, ModelConfig
from cfrt.nn.autoencoder import Autoencoder
from cfrt.nn.dit import CausalDiT
from training import autoencoder, bidirectional, cd, decoder, dmd, loop, ode, phases, recipes, rounded, teacher, worlds

CAPTIONS = 2  # of a clip
BACKWARD = 2  # forwards that a backward costs

KINDS = (
    "weights",
    "gradients",
    "moments",
    "average",
    "frozen",
    "gathered",
    "data",
    "activations",
    "activations_recomputed",
)
"""Of memory, in bytes of a process."""


# -------------------------------------------------------------------------------------------------- what forwards cost


def forward(model: ModelConfig, frames: int, pairs: int, rows: int) -> float:
    """FLOP of one forward of one clip: `frames` latent frames, of which `pairs` (one, other) see each other, and which
    read `rows` rows of text."""
    d, n, tokens = model.width, model.frame_tokens, frames * model.frame_tokens
    block = tokens * (12 * d * d + 4 * d * model.ffn) + 4 * pairs * n * n * d + 4 * tokens * rows * d
    outside = 4 * tokens * d * model.patch_width + 2 * frames * (model.time_width * d + 7 * d * d)
    return model.depth * block + outside


def text(model: ModelConfig, rows: int) -> float:
    """FLOP of the keys and values of `rows` rows of text."""
    d = model.width
    return rows * (2 * (model.text.width * d + d * d) + model.depth * 4 * d * d)


def whole_clip(model: ModelConfig, frames: int) -> float:
    """A bidirectional forward."""
    rows = CAPTIONS * model.text.length
    return forward(model, frames, frames**2, rows) + text(model, rows)


def teacher_forced(model: ModelConfig, frames: int) -> float:
    """A forward over [clean | noisy]."""
    rows, pairs = CAPTIONS * model.text.length, int(model.geometry.teacher_forcing_mask(frames).sum())
    return forward(model, 2 * frames, pairs, rows) + text(model, rows)


def unit_passes(model: ModelConfig, frames: int) -> list[float]:
    """One pass over each unit of a clip against its cached past."""
    return [
        forward(model, model.unit, model.unit * _seen(model, unit), model.text.length)
        for unit in range(frames // model.unit)
    ]


def _seen(model: ModelConfig, unit: int) -> int:
    return sum(stop - start for start, stop in model.geometry.visible_frames(unit))


@lru_cache
def parameters(model: ModelConfig | AutoencoderConfig) -> int:
    """Counted on the network itself."""
    with torch.device("meta"):
        network = CausalDiT(model) if isinstance(model, ModelConfig) else Autoencoder(model)
    count = sum(parameter.numel() for parameter in network.parameters())
    table = isinstance(model, ModelConfig) and model.text.kind == "table"
    return count + ((1 + max(model.text.vocab.values(), default=0)) * model.text.width if table else 0)  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------ what is kept


@dataclass(frozen=True, kw_only=True)
class Graph:
    """What autograd keeps of one differentiated forward of a clip, which may be made of several `calls`."""

    model: ModelConfig
    frames: int
    calls: int = 1
    past: int = 0
    """Frames of constant keys and values that calls look at, all calls together."""
    shared_past: int = 0
    """The same where blocks are recomputed: then a frame is kept once for all calls."""

    def bytes(self, width: int, recomputed: bool) -> float:
        """`width`: bytes of a number in the compute. Of a token, a block keeps 16 d numbers, 2 f, and 3 d in fp32 (the
        unit vectors of the RMS norms); of a row of text 2 d and d; the head, 3 d of a token."""
        m = self.model
        tokens, rows = self.frames * m.frame_tokens, CAPTIONS * m.text.length
        block = tokens * (16 * m.width * width + 2 * m.ffn * width + 3 * m.width * 4)
        outside = 3 * tokens * m.width * width + m.depth * rows * m.width * (2 * width + 4)
        if not recomputed:
            return m.depth * (block + self.past * _frame(m, width)) + outside
        kept = tokens * m.width * width + self.shared_past * _frame(m, width)
        return m.depth * kept + outside + block / self.calls


def _frame(model: ModelConfig, width: int) -> float:
    """Bytes of one latent frame's keys and values in a layer."""
    return 2 * model.frame_tokens * model.width * width


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage asks of each clip, and the networks that it has."""

    config: Any
    trained: Mapping[str, ModelConfig | AutoencoderConfig]
    constant: Mapping[str, ModelConfig] = field(default_factory=dict)
    learning: float
    """FLOP of forwards that are differentiated."""
    asking: float = 0.0
    """FLOP of forwards that are not."""
    graphs: Sequence[Graph] = ()
    """Never kept at the same time."""
    muon: bool = False
    data: float = 0.0
    """Bytes of what is learnt from, where every process has it in memory."""


def of_bidirectional(config: bidirectional.Config, model: ModelConfig, frames: int) -> Work:
    graph = Graph(model=model, frames=frames)
    return Work(
        config=config, trained={"student": model}, learning=whole_clip(model, frames), graphs=[graph], muon=True
    )


def of_start(model: ModelConfig) -> float:
    """FLOP of a first unit by itself."""
    return forward(model, model.unit, model.unit**2, model.text.length) + text(model, model.text.length)


def of_teacher(config: teacher.Config, model: ModelConfig, frames: int) -> Work:
    return Work(
        config=config,
        trained={"student": model},
        learning=teacher_forced(model, frames) + of_start(model) * config.starts / config.batch,
        asking=config.resampled * teacher_forced(model, frames),
        graphs=[Graph(model=model, frames=2 * frames)],
        muon=config.optimiser == "muon",
    )


def of_pairs(config: ode.Config, model: ModelConfig, frames: int) -> float:
    """FLOP of one trajectory of the AR teacher against its cache."""
    passes, guided = unit_passes(model, frames), _branches(config.guidance)
    return guided * ((config.euler_steps + 1) * sum(passes) - passes[-1] + text(model, CAPTIONS * model.text.length))


def of_ode(config: ode.Config, model: ModelConfig, frames: int) -> Work:
    graph = Graph(model=model, frames=2 * frames)
    return Work(config=config, trained={"student": model}, learning=teacher_forced(model, frames), graphs=[graph])


def of_phases(config: phases.Config, model: ModelConfig, frames: int) -> Work:
    """Each unit of the teacher is asked twice: with its caption, and without it or of the weaker teacher."""
    kept = config.trajectories(model)
    played = ((config.pairs, frames), (config.openings, model.unit))
    asking = sum(clips * of_pairs(kept, model, length) for clips, length in played) / (config.steps * config.batch)
    states = len(kept.levels) + 2  # the end and the past beside them
    latents = states * sum(clips * length for clips, length in played)
    graph = Graph(model=model, frames=2 * frames)
    return Work(
        config=config,
        trained={"student": model},
        constant={"teacher": model, "weak": model},
        learning=teacher_forced(model, frames) + of_start(model) * config.starts / config.batch,
        asking=asking,
        graphs=[graph],
        muon=config.optimiser == "muon",
        data=2.0 * latents * model.latent_channels * prod(model.latent_grid),
    )


def of_rounded(config: rounded.Config, of: phases.Config, model: ModelConfig, frames: int, own: bool) -> Work:
    """On the clips that the phases `of` before it were given. Where they are one's own, on their first units as well;
    otherwise on first units of its student that are answered: two latent frames for each of their steps. What answering
    costs beside the student's passes is not counted."""
    again = replace(of, steps=config.steps, starts=config.starts)
    if own:
        return replace(of_phases(again, model, frames), asking=0.0, constant={})
    again = replace(again, openings=0)
    steps, unit = len(model.unit_steps(0)), model.unit
    answers = 2.0 * 2 * steps * config.answers * unit * model.latent_channels * prod(model.latent_grid)
    playing = config.answers * (steps * unit_passes(model, unit)[0] + text(model, CAPTIONS * model.text.length))
    work = of_phases(again, model, frames)
    asking = playing / (config.steps * of.batch)
    return replace(work, asking=asking, constant={}, data=work.data + answers)


def of_cd(config: cd.Config, model: ModelConfig, frames: int) -> Work:
    once = teacher_forced(model, frames)
    return Work(
        config=config,
        trained={"student": model},
        constant={"teacher": model},
        learning=once,
        asking=(_branches(config.guidance) + 1 + config.resampled) * once,
        graphs=[Graph(model=model, frames=2 * frames)],
    )


def of_dmd(config: dmd.Config, model: ModelConfig, real: ModelConfig, fake: ModelConfig, frames: int) -> Work:
    passes = unit_passes(model, frames)
    steps = [len(model.unit_steps(unit)) for unit in range(len(passes))]
    exits = model.solver == "renoise"  # else every pass carries the gradient, and none comes before it
    carrying = [1 if exits else count for count in steps]
    earlier = [(count - 1) / 2 if exits else 0 for count in steps]  # mean exit
    before = sum(e * p for e, p in zip(earlier, passes, strict=True)) + sum(passes[:-1])  # and the clean passes
    last = sum(c * p for c, p in zip(carrying, passes, strict=True)) + text(model, CAPTIONS * model.text.length)
    fresh = config.critic_updates * (before + last) if config.fresh_rollouts else 0.0
    critic = whole_clip(fake, frames)
    seen = [_seen(model, unit) for unit in range(len(passes))]
    calls = sum(carrying)
    past = sum(c * s for c, s in zip(carrying, seen, strict=True)) - calls * model.unit
    rollout = Graph(model=model, frames=calls * model.unit, calls=calls, past=past, shared_past=frames - model.unit)
    return Work(
        config=config,
        trained={"student": model, "fake": fake},
        constant={"real": real},
        learning=last + config.critic_updates * critic,
        asking=before + _branches(config.guidance) * whole_clip(real, frames) + critic + fresh,
        graphs=[rollout, Graph(model=fake, frames=frames)],
    )


def of_autoencoder(config: autoencoder.Config, model: AutoencoderConfig) -> Work:
    coding, decoding = _coded(model, autoencoder.UNITS)
    return Work(config=config, trained={"student": model}, learning=coding + decoding)


def of_decoder(config: decoder.Config, model: ModelConfig) -> Work:
    coding, decoding = _coded(model.autoencoder, config.units)
    return Work(
        config=config,
        trained={"student": model.autoencoder},
        constant={"guesser": model},
        learning=decoding,
        asking=coding + config.guessed * teacher_forced(model, config.units),
    )


def _coded(model: AutoencoderConfig, units: int) -> tuple[float, float]:
    """FLOP of encoding and of decoding a clip, counted on the network itself, run without numbers."""
    from torch.utils.flop_counter import FlopCounterMode

    frames, counts = 1 + worlds.UNIT_FRAMES * (units - 1), []
    with torch.device("meta"):
        network, video = Autoencoder(model), torch.zeros(1, frames, 3, worlds.SIDE, worlds.SIDE)
        latents = network.encode(video)
        for code in (lambda: network.encode(video), lambda: network.decode(latents)):
            with FlopCounterMode(display=False) as counter:
                code()
            counts.append(float(counter.get_total_flops()))
    return counts[0], counts[1]


def _branches(guidance: float) -> int:
    return 1 if guidance == 1 else 2


# ------------------------------------------------------------------------------------------------------------ the plan


@dataclass(frozen=True, kw_only=True)
class Speed:
    """FLOP a second of one process, and how that is known."""

    flops: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    steps: int
    batch: int
    micros: int
    processes: int
    clips: int
    parameters: Mapping[str, int]
    memory: Mapping[str, float]
    """Bytes of a process; `activations` as configured, and either way."""
    total: float
    """Bytes of a process, as configured."""
    flops: float
    """Of a step, all processes together."""
    step_seconds: float
    hours: float
    """Predicted."""


def stage(name: str, work: Work, run: loop.Config, processes: int, speed: Speed) -> Stage:
    config, width = work.config, 2 if run.precision == "bf16" else 4
    trained = sum(parameters(model) for model in work.trained.values())
    memory = {
        "weights": 4 * trained,
        "gradients": 4 * trained,
        "moments": sum(_moments(model, work.muon) for model in work.trained.values()),
        "average": 4 * parameters(work.trained["student"]),
        "frozen": width * sum(parameters(model) for model in work.constant.values()),
    }
    memory = {kind: size / processes for kind, size in memory.items()} | {"data": work.data}
    models = [m for m in [*work.trained.values(), *work.constant.values()] if isinstance(m, ModelConfig)]
    memory["gathered"] = 0.0 if processes == 1 else max(_gathered(model, width) for model in models)
    kept = {
        f"activations{'_recomputed' if recomputed else ''}": config.batch
        * max((graph.bytes(width, recomputed) for graph in work.graphs), default=0.0)
        for recomputed in (False, True)
    }
    clips = config.batch * run.micros
    flops = clips * (work.asking + work.learning * (1 + BACKWARD + run.checkpointing))
    seconds = flops / processes / speed.flops
    return Stage(
        name=name,
        steps=config.steps,
        batch=config.batch,
        micros=run.micros,
        processes=processes,
        clips=config.steps * clips,
        parameters={label: parameters(m) for label, m in [*work.trained.items(), *work.constant.items()]},
        memory=memory | kept,
        total=sum(memory.values()) + kept["activations_recomputed" if run.checkpointing else "activations"],
        flops=flops,
        step_seconds=seconds,
        hours=config.steps * seconds / 3600,
    )


def making_pairs(
    config: ode.Config, model: ModelConfig, frames: int, run: loop.Config, processes: int, speed: Speed
) -> Stage:
    """The trajectories of `config`: each process has the whole teacher and makes its share of them."""
    flops, width = of_pairs(config, model, frames), 2 if run.precision == "bf16" else 4
    ring = _branches(config.guidance) * model.depth * model.geometry.capacity * _frame(model, width)
    memory = dict.fromkeys(KINDS, 0.0) | {"frozen": float(width * parameters(model)), "activations": ring}
    return Stage(
        name="pairs",
        steps=config.pairs,
        batch=1,
        micros=1,
        processes=processes,
        clips=config.pairs,
        parameters={"teacher": parameters(model)},
        memory=memory | {"activations_recomputed": ring},
        total=memory["frozen"] + ring,
        flops=flops,
        step_seconds=flops / speed.flops,
        hours=config.pairs * flops / speed.flops / processes / 3600,
    )


def of_recipe(recipe: recipes.Recipe, speed: Speed) -> list[Stage]:
    """The stages of the embedded student's chain, in one process."""
    model, frames = recipe.model, recipe.data.units
    long = recipe.long.units
    works = {
        "autoencoder": of_autoencoder(recipe.autoencoder, model.autoencoder),
        "bidirectional": of_bidirectional(recipe.bidirectional, model, frames),
        "teacher": of_teacher(recipe.teacher, model, frames),
        "score": of_bidirectional(recipe.score, model, frames),
        "teacher_long": of_teacher(recipe.teacher_long, model, long),
        "phases": of_phases(recipe.phases, model, long),
        "rounded": of_rounded(recipe.rounded, recipe.phases, model, long, recipe.shards is not None),
        "decoder": of_decoder(recipe.decoder, model),
        "dmd": of_dmd(recipe.dmd, model, model, model, frames),
    }
    return [stage(name, work, recipe.run, 1, speed) for name, work in works.items()]


def _moments(model: ModelConfig | AutoencoderConfig, muon: bool) -> float:
    """Two fp32 numbers a parameter for AdamW, one for Muon on the blocks' matrices."""
    if not muon or not isinstance(model, ModelConfig):
        return 8 * parameters(model)
    matrices = model.depth * (8 * model.width**2 + 2 * model.width * model.ffn)
    return 8 * parameters(model) - 4 * matrices


def _gathered(model: ModelConfig, width: int) -> float:
    """Whole weights that FSDP holds at a time: a block, the next one, and what is not in blocks."""
    block = 8 * (model.width**2 + model.width) + 2 * model.width * model.ffn
    return width * (2 * block + parameters(model) - model.depth * block)


def measured(model: ModelConfig, frames: int, seconds: float = 0.5) -> Speed:
    """FLOP a second of a differentiated forward of `model` on the CPU, as it trains."""
    generator = torch.Generator().manual_seed(0)
    network, batch = CausalDiT(model), 4
    x = torch.randn(batch, frames, model.latent_channels, *model.latent_grid, generator=generator)
    rows = torch.randn(batch, 1, model.text.length, model.text.width, generator=generator)
    t = torch.full((batch, frames), 500.0)
    flop = batch * 3 * (forward(model, frames, frames**2, model.text.length) + text(model, model.text.length))
    network(x, t, network.text_kv(rows)).sum().backward()  # the first one also allocates
    begun, count = time.monotonic(), 0
    while (spent := time.monotonic() - begun) < seconds or not count:
        network(x, t, network.text_kv(rows)).sum().backward()
        count += 1
    return Speed(flops=count * flop / spent, source=f"measured for {spent:.1f} s, {torch.get_num_threads()} threads")
