"""Prompts that the page offers. A model with a table of words is offered what its table holds."""

from ..config import ModelConfig

SHAPES = (
    "a large red circle moving left over the ocean",
    "a small yellow cross moving up at night",
    "a big blue square drifting right over a meadow",
    "a tiny white triangle falling fast at sunset",
    "a huge pink ball rising slowly in space",
    "a green box moving down over the sea",
)

SCENES = (
    "A red fox trots through fresh snow at dawn, breath steaming, low sun between birches.",
    "Waves break over black rocks under a stormy sky, slow motion, wide shot.",
    "A paper boat floats down a rainy street gutter, close-up, neon reflections.",
    "An astronaut walks across a field of sunflowers, golden hour, handheld camera.",
)


def presets(config: ModelConfig) -> list[str]:
    """At most six prompts that the model knows words of."""
    if config.text.kind != "table":
        return list(SCENES)
    vocabulary = set(config.text.vocab)
    return [prompt for prompt in SHAPES if vocabulary & set(prompt.split())]
