"""What a stream should show, said in the plainest way: the score that a sequence of calls amounts to, and a loop over
its units that has no thread, no queue, no journal and no timeline of the runtime's."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from sampling_fixture import sampled
from student_fixture import RED, random_weights

from cfrt.config import ModelConfig
from cfrt.engines import Spec
from cfrt.engines.native import NativeEngine
from cfrt.text import encoder


@dataclass
class Score:
    """What each unit is made from. Texts and seeds hold from their unit on."""

    rows_of: Callable[[str], np.ndarray]
    seed: int
    texts: dict[int, tuple[str, np.ndarray, int]] = field(default_factory=dict)
    """Unit -> text, what it is blended from, over how many units."""
    seeds: dict[int, int] = field(default_factory=dict)
    recaches: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.texts:
            self.texts, self.seeds = {0: (RED, self.rows_of(RED), 0)}, {0: self.seed}

    def copy(self) -> "Score":
        return Score(self.rows_of, self.seed, dict(self.texts), dict(self.seeds), dict(self.recaches))

    def prompt(self, unit: int, text: str, blend_units: int, recache: bool) -> None:
        source = self.rows(unit - 1) if unit else self.rows_of(text)
        self.texts = {u: entry for u, entry in self.texts.items() if u < unit}
        self.texts[unit] = (text, source, blend_units)
        self.recaches = {u: rows for u, rows in self.recaches.items() if u <= unit}
        if recache:
            self.recaches[unit] = self.rows(unit)

    def reseed(self, unit: int, seed: int) -> None:
        self.seeds = {u: old for u, old in self.seeds.items() if u < unit} | {unit: seed}

    def text(self, unit: int) -> str:
        return self.texts[max(u for u in self.texts if u <= unit)][0]

    def rows(self, unit: int) -> np.ndarray:
        start = max(u for u in self.texts if u <= unit)
        text, source, blend_units = self.texts[start]
        share = min(1.0, (unit - start + 1) / (blend_units + 1))
        target = self.rows_of(text)
        return target if share == 1 else source + np.float32(share) * (target - source)

    def seed_of(self, unit: int) -> int:
        return self.seeds[max(u for u in self.seeds if u <= unit)]


class Oracle:
    """Plays a score from its first unit to its last."""

    def __init__(self, config: ModelConfig, precision: str = "fp32") -> None:
        self.config, self._precision = config, precision
        tensors = random_weights(config)
        self._weights = {name: array.astype(np.float16).astype(np.float32) for name, array in tensors.items()}
        text = encoder(config, self._weights)
        known: dict[str, np.ndarray] = {}
        self.rows_of = lambda prompt: known.setdefault(prompt, text.encode(prompt).rows)

    def play(self, score: Score, units: int) -> np.ndarray:
        """All frames of so many units."""
        config, engine = self.config, NativeEngine()
        engine.prepare(Spec(config=config, weights=self._weights, seed=score.seed, precision=self._precision))
        frames, past = [], {}
        for unit in range(units):
            if unit in score.recaches:
                engine.set_text(score.recaches[unit])
                for old in sorted(past):
                    if config.geometry.visible(unit, (old + 1) * config.unit - 1):
                        engine.commit(past[old], old)
            engine.set_text(score.rows(unit))
            engine._seed = score.seed_of(unit)
            x = sampled(engine, config, unit)
            frames.append(engine.decode(x))
            engine.commit(x, unit)
            past[unit] = x
            past.pop(unit - config.window // config.unit - 1, None)
        return np.concatenate(frames) if frames else np.zeros((0, *config.frame_size, 3), np.uint8)
