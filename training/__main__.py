"""`python -m training COMMAND`: train a student, reproduce the paper's table, prepare videos, evaluate a model.

A command is a recipe's name or one of the others; each has its own --help."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec

COMMANDS = {
    "tiny": ("training.run", "train the embedded student from nothing, on a procedural world"),
    "tiny-gpu": ("training.run", "the same on one GPU, with five to ten times the clips"),
    "wan-1.3b-framewise": ("training.wan_run", "one stage of Causal Forcing++ at full size, on GPUs"),
    "wan-1.3b-chunkwise": ("training.wan_run", "the same for Causal Forcing, three latent frames a unit"),
    "reproduce": ("training.reproduce", "the paper's table, with exact ground truth"),
    "prepare": ("training.prepare", "turn your own videos into shards of latents"),
    "evaluate": ("training.evaluate", "play prompts through any model, in VBench's layout, and measure what can be"),
    "quality": ("training.quality", "what exported bundles of a student lose, written into their manifests"),
}
RECIPES = ("tiny", "tiny-gpu", "wan-1.3b-framewise", "wan-1.3b-chunkwise")
"""Commands that are told their name."""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "usage: python -m training COMMAND [--help] ...\n\n" + "\n".join(lines)


def main() -> None:
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
        return
    if command not in COMMANDS:
        raise SystemExit(f"training: expected a command, got {command!r}\n\n{usage()}")
    if find_spec("torch") is None:
        raise SystemExit("training: it needs PyTorch: pip install 'cfrt[train]'")
    importlib.import_module(COMMANDS[command][0]).main([command, *arguments] if command in RECIPES else arguments)


if __name__ == "__main__":
    main()
