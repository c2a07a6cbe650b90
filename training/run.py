"""`python -m training RECIPE`: train the embedded student from nothing, end to end, resumable."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train the embedded student: autoencoder, bidirectional teacher, AR teacher, the same on longer clips,
    distillation by phases, the same with rounded weights and exact answers for first units, decoder, asymmetric DMD.

    Run the same command again to go on after an interruption. Every stage leaves its statistics (stats.jsonl), a
    contact sheet (preview.png) and its averaged weights in its folder; the student and its card end up in
    OUT/student."""

    recipe: Annotated[Literal["tiny", "tiny-gpu"], tyro.conf.Positional]
    """What to train."""
    out: Path | None = None
    """Folder of the run; default runs/RECIPE."""
    smoke: bool = False
    """Every stage for a few steps (under three minutes): shows that the chain holds, the student is noise."""
    until: Literal[
        "autoencoder",
        "bidirectional",
        "teacher",
        "score",
        "teacher_long",
        "phases",
        "rounded",
        "decoder",
        "dmd",
        "card",
    ] = "card"
    """Last stage to run."""
    data: Path | None = None
    """Your own clips, from `python -m training prepare`, instead of the world's."""
    model: str = "tiny"
    """With --data: the model that prepared them, whose autoencoder this run keeps."""
    adopt: Path | None = None
    """Folder of released stages (training/weights/tiny) to begin with instead of training them."""
    release: Path | None = None
    """Folder to leave the finished stages' averaged weights in, halved to fp16."""
    threads: int | None = None
    """Threads of torch; default: all cores."""
    dry_run: bool = False
    """Print the resolved plan and stop: steps, clips, memory, FLOP and predicted time of every stage."""
    json: bool = False
    """The plan as JSON, with every field of the recipe."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where statistics go beside stats.jsonl."""


def main(words: Sequence[str]) -> None:
    """`words` is the command line, the recipe first."""
    arguments = tyro.cli(Arguments, args=words, prog="python -m training", config=(tyro.conf.DisallowNone,))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SystemExit(f"training: {arguments.recipe} is trained by one process; torchrun is for the wan recipes")
    import torch  # after the command line, so that --help is quick

    from cfrt.errors import CfrtError
    from training import chain, plan, plan_page, recipes

    recipe = recipes.smoke() if arguments.smoke else recipes.RECIPES[arguments.recipe]()
    recipe = replace(recipe, run=replace(recipe.run, log=arguments.log))
    if arguments.data is not None:
        from training.shards import Shards

        model = Shards(arguments.data, recipe.seed).model
        recipe = replace(recipe, shards=str(arguments.data), model=model)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.dry_run:
        speed = plan.measured(recipe.model, recipe.data.units)
        planned = plan.of_recipe(recipe, speed)
        print((plan_page.as_json if arguments.json else plan_page.page)(recipe.name, planned, speed, asdict(recipe)))
        return
    if recipe.run.precision == "bf16":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32: the optimiser's products
    out = arguments.out or Path("runs") / recipe.name
    try:
        if arguments.data is not None:
            chain.borrow(arguments.model, out)
        if arguments.adopt:
            chain.adopt(arguments.adopt, out)
        chain.run(recipe, out, until=arguments.until)
        if arguments.release:
            chain.release(recipe, out, arguments.release)
    except CfrtError as error:
        print(f"training: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"training: stopped; run the same command again to go on from {out}", file=sys.stderr)
        raise SystemExit(130) from None
