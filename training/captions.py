"""Captions of the world: the lexicon that the student's tokenizer ships with, and a grammar that words scenes in many
ways.

A caption is a set of rows of the text table, one per factor it mentions: synonyms share a row, word order is free, and
row 0 is padding. The grammar exists to prove that what people may write reaches the rows that training used."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from training.worlds import FACTORS

LENGTH = 8  # rows of one caption: six factors and two to spare
SYNONYMS: dict[str, dict[str, tuple[str, ...]]] = {
    "size": {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")},
    "colour": {
        "red": ("red", "crimson", "scarlet"),
        "green": ("green", "emerald", "lime"),
        "blue": ("blue", "azure", "cobalt"),
        "yellow": ("yellow", "golden", "lemon"),
        "pink": ("pink", "magenta", "fuchsia"),
        "white": ("white", "snowy", "pale"),
    },
    "shape": {
        "circle": ("circle", "ball", "disc", "dot", "circles", "round thing"),
        "square": ("square", "box", "cube", "block"),
        "triangle": ("triangle", "pyramid", "wedge"),
        "cross": ("cross", "plus", "plus sign"),
    },
    "direction": {
        "right": ("right", "rightward", "rightwards", "east", "eastward", "left to right", "left to the right"),
        "left": ("left", "leftward", "leftwards", "west", "westward", "right to left", "right to the left"),
        "down": ("down", "downward", "downwards", "south", "southward", "falling", "sinking", "top to bottom"),
        "up": ("up", "upward", "upwards", "north", "northward", "rising", "climbing", "bottom to top"),
    },
    "speed": {
        "slow": ("slow", "slowly", "gently", "lazily", "calmly"),
        "fast": ("fast", "quickly", "quick", "rapidly", "swiftly"),
    },
    "background": {
        "night": ("night", "starry sky", "night sky", "stars", "space", "starry night"),
        "ocean": ("ocean", "sea", "waves", "water", "blue ocean", "blue sea", "blue water"),
        "meadow": ("meadow", "grass", "field", "lawn", "green meadow", "green grass", "green field"),
        "dusk": ("dusk", "sunset", "twilight", "evening", "evening sky", "red sunset", "pink sunset"),
    },
}
_FILLERS = """
a an the of at in on over across above before against with and is it its to from toward towards goes going moves moving
move drifts drifting drift slides sliding glides gliding travels travelling heads heading floats floating flies flying
which that scene background backdrop side shape object thing coloured colored very please show me video clip by through
there one some sky under into rolls rolling bounces bouncing runs running swims swimming jumps jumping dark deep calm
steadily shaped filled solid
"""
FILLERS = tuple(_FILLERS.split())


def _vocabulary() -> dict[str, int]:
    row = 1
    vocabulary: dict[str, int] = {}
    for factor, values in FACTORS.items():
        for value in values:
            vocabulary |= dict.fromkeys(SYNONYMS[factor][value], row)
            row += 1
    return vocabulary


VOCABULARY = _vocabulary()  # phrase -> row of the text table
ROWS = 1 + sum(len(values) for values in FACTORS.values())
_FIRST_ROW = torch.tensor([1 + sum(len(v) for v in list(FACTORS.values())[:index]) for index in range(len(FACTORS))])


def rows(factors: Tensor, mentioned: Tensor | None = None) -> Tensor:
    """Rows of the text table [..., LENGTH] for factors [..., 6]; what is not `mentioned` [..., 6] bool is padding."""
    ids = factors + _FIRST_ROW
    if mentioned is not None:
        ids = ids * mentioned
    return torch.nn.functional.pad(ids, (0, LENGTH - len(FACTORS)))


def factors_of(ids: Tensor) -> dict[str, str]:
    """The factors that rows of the text table name, for tests and cards."""
    names = [(factor, value) for factor, values in FACTORS.items() for value in values]
    return dict(names[int(row) - 1] for row in ids.flatten().tolist() if row)


_TEMPLATES = (
    "a {size} {colour} {shape} moving {direction} {speed} over the {background}",
    "a {size} {colour} {shape} is drifting {direction} {speed}, {background} background",
    "{background}: a {size}, {colour} {shape} goes {direction} {speed}",
    "{speed} moving {direction}, a {colour} {shape}, {size}, before the {background}",
    "the {shape} is {size} and {colour}; it travels {direction} {speed} across the {background}",
    "over the {background} a {size} {colour} {shape} {speed} heads {direction}",
    "a {colour} {shape} ({size}) slides {direction} {speed} in the {background}",
)


def caption(factors: Tensor, chooser: random.Random) -> str:
    """One wording of a scene [6]: any template, any synonym."""
    words = {
        factor: chooser.choice(SYNONYMS[factor][values[int(index)]])
        for (factor, values), index in zip(FACTORS.items(), factors.tolist(), strict=True)
    }
    return chooser.choice(_TEMPLATES).format(**words)
