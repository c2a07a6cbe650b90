"""The chain of stages: autoencoder -> data -> bidirectional -> AR teacher -> score -> AR teacher again, on longer clips
-> distillation by phases -> the same, rounded -> decoder -> DMD -> student -> card. The score is the bidirectional
network again, trained on from the AR teacher's weights, which know far better where a caption sends the object. What
the AR teacher was before the longer clips is what it is led away from in distillation.

Every stage is a folder with its config, its checkpoint, its statistics, its previews and, when it is done, its averaged
weights (`average.safetensors`). Running the chain again goes on where it stopped; a finished stage is not run again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from cfrt import students
from cfrt.config import ModelConfig
from cfrt.errors import WeightsError
from cfrt.nn.autoencoder import Autoencoder
from cfrt.weights import load_model, part, save_model
from training import (
    autoencoder,
    bidirectional,
    data,
    decoder,
    dmd,
    ideal,
    loop,
    ode,
    parallel,
    phases,
    preview,
    rollout,
    rounded,
    teacher,
    worlds,
)
from training.loop import Average, Stage, step_generator
from training.network import Network, frozen, load
from training.recipes import Recipe
from training.shards import Shards, fingerprint

TEACHERS = ("autoencoder", "bidirectional", "teacher", "score", "teacher_long")
STAGES = (*TEACHERS, "phases", "rounded", "decoder", "dmd")
BEGIN = {"bidirectional": "teacher"}
"""Stages that only begin another: where that one is finished nobody needs their weights."""
PIXELS = ("decoder",)
"""Stages that need a clip's pixels: left out where the clips are one's own and only their latents are kept."""


def train(recipe: Recipe, out: Path, *, until: str = STAGES[-1]) -> None:
    """Run every stage of the recipe up to `until`, each from where it stopped."""
    out.mkdir(parents=True, exist_ok=True)
    for name in STAGES[: STAGES.index(until) + 1]:
        folder = out / name
        begun = name in BEGIN and finished(out / BEGIN[name])
        if finished(folder) or begun or (recipe.shards is not None and name in PIXELS):
            continue
        torch.manual_seed(recipe.seed)
        build = {
            "autoencoder": _autoencoder,
            "bidirectional": _bidirectional,
            "teacher": _teacher,
            "teacher_long": _teacher_long,
            "score": _score,
            "phases": _phases,
            "rounded": _rounded,
            "decoder": _decoder,
            "dmd": _dmd,
        }[name]
        stage, average = build(recipe, out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(getattr(recipe, name)), indent=2) + "\n")
        after = _previewer(recipe, out, name, average)
        loop.run(stage, folder, seed=recipe.seed, average=average, after=after, config=recipe.run)
        del stage, average, after  # the next stage may keep as many trajectories


def finished(folder: Path) -> bool:
    return (folder / "average.safetensors").exists()


def weights(out: Path, stage: str) -> dict[str, Tensor]:
    """The averaged weights of a finished stage."""
    found = load_file(out / stage / "average.safetensors")
    return rounded.shipped(found) if stage == "rounded" else found


def trained_autoencoder(recipe: Recipe, out: Path) -> Autoencoder:
    network = Autoencoder(recipe.model.autoencoder)
    network.load_state_dict({name: value.float() for name, value in weights(out, "autoencoder").items()})
    return autoencoder.channels_last(network.eval().requires_grad_(False))


def shown(recipe: Recipe, out: Path) -> Autoencoder:
    """The autoencoder that ships: with the decoder of the last stage, where the run has come so far."""
    network = trained_autoencoder(recipe, out)
    if finished(out / "decoder"):
        network.load_state_dict(weights(out, "decoder"))
    return network


def trained_network(recipe: Recipe, out: Path, stage: str) -> Network:
    return load(recipe.model, weights(out, stage))


def release(recipe: Recipe, out: Path, folder: Path, stages: Sequence[str] = TEACHERS) -> None:
    """Keep what the finished teachers have learnt, small enough to commit: averaged weights in fp16, and their
    statistics. Students are kept as bundles."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in stages:
        if finished(out / name):
            if name not in BEGIN or not finished(out / BEGIN[name]):
                halves = {key: value.half() for key, value in weights(out, name).items()}
                about = {"recipe": recipe.name, "seed": str(recipe.seed)}
                loop.write_tensors(folder / f"{name}.safetensors", halves, about)
            shutil.copyfile(out / name / "stats.jsonl", folder / f"{name}.jsonl")


def adopt(folder: Path, out: Path) -> None:
    """Begin a run with the stages that `folder` (made by `release`) holds; a stage that the run has is left alone."""
    found = sorted(path.stem for path in folder.glob("*.jsonl"))
    if not found:
        raise WeightsError(f"expected released stages ({', '.join(TEACHERS)}) in {folder}, found none")
    for name in found:
        if not (out / name).exists():
            (out / name).mkdir(parents=True)
            shutil.copyfile(folder / f"{name}.jsonl", out / name / "stats.jsonl")
            if (folder / f"{name}.safetensors").exists():
                full = {key: value.float() for key, value in load_file(folder / f"{name}.safetensors").items()}
                loop.write_tensors(out / name / "average.safetensors", full)


def borrow(model: str, out: Path) -> None:
    """Begin a run with a finished model's autoencoder: the one that prepared the clips."""
    if not finished(out / "autoencoder"):
        arrays = part(load_model(students.find(model))[1], "autoencoder")
        (out / "autoencoder").mkdir(parents=True, exist_ok=True)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        loop.write_tensors(out / "autoencoder" / "average.safetensors", tensors)


def save_student(recipe: Recipe, out: Path, folder: Path) -> None:
    """Write the student's bundle: config.json and model.safetensors."""
    tensors = dict(weights(out, recipe.ships))
    tensors |= {f"autoencoder.{name}": value.contiguous() for name, value in shown(recipe, out).state_dict().items()}
    save_model(folder, recipe.model, {name: value.float().numpy() for name, value in tensors.items()})


def _clips(recipe: Recipe, out: Path, *, long: bool = False) -> data.DataSet:
    if recipe.shards is not None:
        return _own(recipe, out, recipe.shards)
    folder, config = (out / "data-long", recipe.long) if long else (out / "data", recipe.data)
    device = parallel.device(recipe.run.device)
    data.write(folder, config, trained_autoencoder(recipe, out).to(device), recipe.seed)
    return data.Clips(folder, config, recipe.seed, device)


def _own(recipe: Recipe, out: Path, folder: str) -> Shards:
    """One's own clips, if their latents mean to this run's autoencoder what they meant to the one that made them."""
    clips = Shards(folder, recipe.seed, recipe.model)
    own = {name: value.float().numpy() for name, value in weights(out, "autoencoder").items()}
    if fingerprint(own) != clips.manifest.autoencoder:
        raise WeightsError(
            f"expected the autoencoder that made {folder} in {out / 'autoencoder'}, found other weights; begin a new "
            "run and name the model that prepared the clips (--model)"
        )
    return clips


def _prompts(recipe: Recipe, out: Path, *, long: bool = False) -> dmd.Draw:
    """What rollouts are asked to play."""
    if recipe.shards is not None:
        return _clips(recipe, out).prompts
    return partial(data.prompts, config=recipe.long if long else recipe.data)


def _averaged(stage: Stage, decay: float) -> tuple[Stage, Average]:
    return stage, Average(stage.student, decay)


def _autoencoder(recipe: Recipe, out: Path) -> tuple[Stage, Average]:
    return _averaged(autoencoder.Stage(recipe.autoencoder, recipe.model.autoencoder), recipe.autoencoder.ema)


def _bidirectional(recipe: Recipe, out: Path) -> tuple[Stage, Average]:
    stage = bidirectional.Stage(recipe.bidirectional, recipe.model, _clips(recipe, out), Network(recipe.model))
    return _averaged(stage, recipe.bidirectional.ema)


def _teacher(recipe: Recipe, out: Path) -> tuple[Stage, Average]:
    start = trained_network(recipe, out, "bidirectional")
    return _averaged(teacher.Stage(recipe.teacher, recipe.model, _clips(recipe, out), start), recipe.teacher.ema)


def _teacher_long(recipe: Recipe, out: Path) -> tuple[Stage, Average]:
    config, start = recipe.teacher_long, trained_network(recipe, out, "teacher")
    return _averaged(teacher.Stage(config, recipe.model, _clips(recipe, out, long=True), start), config.ema)


def _score(recipe: Recipe, out: Path) -> tuple[Stage, Average]:
    stage = bidirectional.Stage(
        recipe.score, recipe.model, _clips(recipe, out), trained_network(recipe, out, "teacher")
    )
    return _averaged(stage, recipe.score.ema)


def _phases(recipe: Recipe, out: Path) -> tuple[Stage, Average]:
    start, clips = trained_network(recipe, out, "teacher_long"), _clips(recipe, out, long=True)
    pairs, openings = _pairs(recipe, out, clips), _openings(recipe, out, clips)
    return _averaged(phases.Stage(recipe.phases, recipe.model, pairs, openings, start), recipe.phases.ema)


def _rounded(recipe: Recipe, out: Path) -> tuple[Stage, Average]:
    start, clips = trained_network(recipe, out, "phases"), _clips(recipe, out, long=True)
    pairs, first = _pairs(recipe, out, clips), _answers if recipe.shards is None else _openings
    openings = first(recipe, out, clips)
    stage = rounded.Stage(recipe.rounded, recipe.phases, recipe.model, pairs, openings, start)
    return _averaged(stage, recipe.rounded.ema)


def _pairs(recipe: Recipe, out: Path, clips: data.DataSet) -> ode.Pairs:
    """Clips of the led teacher."""
    kept, make = recipe.phases.trajectories(recipe.model), _led(recipe, out, recipe.phases.pairs_of)
    ode.write(out / "pairs", kept, clips, make, recipe.seed)
    return ode.read(out / "pairs", kept).to(parallel.device(recipe.run.device))


def _openings(recipe: Recipe, out: Path, clips: data.DataSet) -> ode.Pairs:
    """First units of it."""
    kept, make = recipe.phases.first_trajectories(recipe.model), _led(recipe, out, recipe.phases.openings_of)
    ode.write(out / "openings", kept, clips, make, recipe.seed)
    return ode.read(out / "openings", kept).to(parallel.device(recipe.run.device))


def _led(recipe: Recipe, out: Path, make: phases.Maker) -> ode.Maker:
    device = parallel.device(recipe.run.device)
    strong, weak = (frozen(trained_network(recipe, out, name).to(device)) for name in ("teacher_long", "teacher"))
    return partial(make, strong, weak, recipe.model)


def _answers(recipe: Recipe, out: Path, clips: data.DataSet) -> ideal.Answers:
    """First units of the world as the student plays them, with what is right in each of their states."""
    device, kept = parallel.device(recipe.run.device), recipe.rounded.answered(recipe.phases, recipe.model)
    student = frozen(trained_network(recipe, out, "phases").to(device))
    pictures = trained_autoencoder(recipe, out).to(device)

    def make(_: data.Batch, generator: torch.Generator) -> ideal.Answers:
        return ideal.play(pictures, student, recipe.model, kept.piece, generator)

    ode.write(out / "answers", kept, clips, make, recipe.seed)
    return ode.read(out / "answers", kept, ideal.Answers).to(device)


def _dmd(recipe: Recipe, out: Path) -> tuple[Stage, Average]:
    causal = recipe.dmd.scores == "causal"
    score = trained_network(recipe, out, "teacher_long" if causal else "score")
    student, prompts = trained_network(recipe, out, "rounded"), _prompts(recipe, out, long=causal)
    longer = partial(restart, trained_autoencoder(recipe, out))
    return _averaged(dmd.Stage(recipe.dmd, recipe.model, prompts, student, score, restart=longer), recipe.dmd.ema)


def _decoder(recipe: Recipe, out: Path) -> tuple[Stage, Average]:
    guesser, start = trained_network(recipe, out, "rounded"), trained_autoencoder(recipe, out)
    stage = decoder.Stage(recipe.decoder, recipe.model, recipe.data, start, guesser)
    return _averaged(stage, recipe.decoder.ema)


def restart(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """The last picture of latents [B, k, C, h, w] as the first latent frame of a clip, [B, 1, C, h, w]."""
    return data.encode(autoencoder, data.decode(autoencoder, latents)[:, -1:])


PREVIEW_CLIPS = 8
TEACHER_STEPS = 24
GUIDANCE = 2.0


def _previewer(recipe: Recipe, out: Path, name: str, average: Average) -> Callable[[int], None]:
    """A contact sheet of what the stage makes, drawn at every checkpoint from the same captions and noise."""

    def draw(step: int) -> None:
        if name in ("autoencoder", "decoder"):
            video = _reconstructions(recipe, average.weights)
        else:
            network = load(recipe.model, average.weights)
            latents = sample(network, recipe.model, name, _prompts(recipe, out))
            video = data.decode(trained_autoencoder(recipe, out), latents)
        preview.sheet(video, out / name / "preview.png")

    return draw


def _reconstructions(recipe: Recipe, weights: Mapping[str, Tensor]) -> Tensor:
    """Real clips, each with its reconstruction below it: [B, T, 3, H, W]."""
    network = Autoencoder(recipe.model.autoencoder).eval()
    network.load_state_dict(dict(weights))
    generator = step_generator(7, 0)
    plan = data.script(PREVIEW_CLIPS // 2, recipe.data, generator)
    video = worlds.render(data.play(plan, recipe.data.units, generator))
    return torch.stack([video, data.decode(network, data.encode(network, video))], 1).flatten(0, 1)


@torch.no_grad()
def sample(network: Network, model: ModelConfig, stage: str, draw: dmd.Draw, seed: int = 7) -> Tensor:
    """Latents of a few clips as the stage samples them: guided Euler for teachers, few steps for students."""
    generator = step_generator(seed, 0)
    prompts = draw(PREVIEW_CLIPS, generator)
    units = prompts.caption.shape[1] // model.unit
    if stage in ("bidirectional", "score"):
        return bidirectional.sample(network, model, prompts, generator, steps=TEACHER_STEPS, guidance=GUIDANCE)
    if stage in ("teacher", "teacher_long"):
        player = rollout.Player(network, model, prompts, guidance=GUIDANCE)
        return rollout.play(player, units, rollout.euler(model, TEACHER_STEPS), generator)
    player = rollout.Player(network, model, prompts)
    return rollout.play(player, units, rollout.few_step(model, generator), generator)


def run(recipe: Recipe, out: Path, *, until: str = "card") -> None:
    """The whole recipe: every stage, then the student's bundle in OUT/student, with its card where the exact reader
    knows the clips."""
    train(recipe, out, until=STAGES[-1] if until == "card" else until)
    if until != "card":
        return
    save_student(recipe, out, out / "student")
    if recipe.shards is None:
        from training import card  # imports the runtime as well, which no stage needs

        card.write(recipe, out, out / "student")
