"""Wan recipes: Causal Forcing at the size of the papers, 1.3B students of Wan2.1 at 480 x 832 (arXiv:2602.02214,
2605.15141), from published weights and your own clips.

| recipe | stages | reproduces |
| --- | --- | --- |
| wan-1.3b-framewise | teacher, cd (or pairs, ode), dmd | arXiv:2605.15141, table 1: 1, 2 and 4 steps |
| wan-1.3b-chunkwise | teacher, pairs, ode (or cd), dmd | arXiv:2602.02214, table 1: 4 steps |

Hyper-parameters are those of the released configurations, but for what they get wrong: levels and dt are exact, the
last interval of consistency distillation is trained, and sigma = t / 1000 in every network. A step of 64 clips is 64
micro-batches of one, shared by however many processes there are. `training.wan_run` is the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from cfrt.config import PRESETS, ModelConfig
from cfrt.errors import ConfigError
from training import cd, dmd, loop, ode, plan, teacher

Name = Literal["teacher", "pairs", "ode", "cd", "dmd"]
STAGES: tuple[Name, ...] = get_args(Name)
STATED = plan.Speed(flops=400e12, source="stated: 40 % of the 989 TFLOP/s of an H100 in bf16")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    models: Mapping[str, ModelConfig]
    """The network of each stage, with the steps that it is sampled in."""
    real: ModelConfig
    """The score that is only asked."""
    fake: ModelConfig
    """The score that learns."""
    seed: int = 1
    run: loop.Config = field(
        default_factory=lambda: loop.Config(
            micros=64, clip=10.0, precision="bf16", checkpointing=True, log_every=10, save_seconds=1800.0
        )
    )
    teacher: teacher.Config
    ode: ode.Config
    cd: cd.Config
    dmd: dmd.Config


def framewise(steps: int = 2) -> Recipe:
    """F = 1: arXiv:2605.15141 (80 K clips; 20 K, 5 K and 1 K steps)."""
    return _recipe("framewise", steps, long=(20_000, 1000, 5000, 1000))


def chunkwise(steps: int = 4) -> Recipe:
    """F = 3: arXiv:2602.02214 (3 K clips; 2 K, 1 K, 3 K and 750 steps)."""
    return _recipe("chunkwise", steps, long=(2000, 1000, 3000, 750))


RECIPES = {"wan-1.3b-framewise": framewise, "wan-1.3b-chunkwise": chunkwise}


def _recipe(kind: str, steps: int, long: tuple[int, int, int, int]) -> Recipe:
    """`long`: steps of the teacher, of either second stage, and of the critic, which makes five for one of the
    student."""
    student = f"wan-1.3b-{kind}-{steps}step"
    if student not in PRESETS:
        known = [name for name in PRESETS if name.startswith(f"wan-1.3b-{kind}-") and name.endswith("step")]
        raise ConfigError(f"expected a student with published steps ({', '.join(known)}), got {steps} steps")
    presets = {"teacher": "ar", "pairs": "ar", "ode": "ode", "cd": "cd"}
    models = {stage: PRESETS[f"wan-1.3b-{kind}-{suffix}"] for stage, suffix in presets.items()}
    whole = replace(models["teacher"], unit=models["teacher"].trained_frames)
    return Recipe(
        name=f"wan-1.3b-{kind}",
        models=models | {"dmd": PRESETS[student]},
        real=PRESETS["wan-14b"],
        fake=whole,
        # no caption is dropped: guidance sets the prompt against a negative one, which Wan itself has learnt
        teacher=teacher.Config(
            steps=long[0], batch=1, lr=2e-6, betas=(0.0, 0.999), optimiser="adam", schedule="constant", ema=0.0,
            weighting="bell", caption_dropout=0.0, first_weight=1.0, early_weight=1.0, starts=0,
        ),
        ode=ode.Config(
            steps=long[1], batch=1, lr=2e-6, betas=(0.9, 0.999), schedule="constant", ema=0.0,
            pairs=6000, piece=1, half=True, euler_steps=48, guidance=6.0, first_weight=1.0, early_weight=1.0,
        ),
        cd=cd.Config(
            steps=long[2], batch=1, lr=2e-6, betas=(0.0, 0.999), schedule="constant", ema=0.99,
            levels=48, guidance=3.0, first_weight=1.0, early_weight=1.0,
        ),
        dmd=dmd.Config(
            steps=long[3] // 5, batch=1, lr=2e-6, critic_lr=4e-7, betas=(0.0, 0.999), schedule="constant", ema=0.99,
            critic_updates=5, critic_warmup=0, guidance=4.0, tau=(0.02, 0.98), fresh_rollouts=True,
        ),
    )  # fmt: skip


def reduced(recipe: Recipe) -> Recipe:
    """The same at a width that a CPU takes in seconds: every loss, one step; the result is noise."""

    def small(model: ModelConfig) -> ModelConfig:
        return replace(
            model, width=64, depth=2, heads=2, ffn=128, latent_grid=(4, 4), unit=min(model.unit, 6), window=6,
            trained_frames=6, text=replace(model.text, width=16, length=4),
        )  # fmt: skip

    return replace(
        recipe,
        name=f"{recipe.name}-smoke",
        models={stage: small(model) for stage, model in recipe.models.items()},
        real=replace(small(recipe.real), width=96, heads=3),
        fake=small(recipe.fake),
        run=replace(recipe.run, micros=2),
        teacher=replace(recipe.teacher, steps=1),
        ode=replace(recipe.ode, steps=1, pairs=2, euler_steps=4),
        cd=replace(recipe.cd, steps=1),
        dmd=replace(recipe.dmd, steps=1, critic_updates=1),
    )


def stages(recipe: Recipe, names: Sequence[str], processes: int, speed: plan.Speed) -> list[plan.Stage]:
    """The plan of each stage."""
    frames, found = recipe.models["teacher"].trained_frames, []
    for name in names:
        model = recipe.models[name]
        if name == "pairs":
            found.append(plan.making_pairs(recipe.ode, model, frames, recipe.run, processes, speed))
            continue
        work = {
            "teacher": lambda m: plan.of_teacher(recipe.teacher, m, frames),
            "ode": lambda m: plan.of_ode(recipe.ode, m, frames),
            "cd": lambda m: plan.of_cd(recipe.cd, m, frames),
            "dmd": lambda m: plan.of_dmd(recipe.dmd, m, recipe.real, recipe.fake, frames),
        }[name](model)
        found.append(plan.stage(name, work, recipe.run, processes, speed))
    return found
