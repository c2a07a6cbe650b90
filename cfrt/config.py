"""What a model is: frozen dataclasses, checked when made, and the table of presets.

Sizes are counted in the unit that each field names: latent frames, latent cells, tokens, pixels. Nothing outside this
table knows a model's constants. No torch, no files but one JSON.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from .blocks import Geometry
from .errors import ConfigError
from .fields import counts, decode, positives, require, sequence

AUTOENCODERS = ("tiny", "wan", "taehv")
TEXTS = ("table", "umt5")
SINK_POSITIONS = ("relative", "window", "absolute")
SOLVERS = ("renoise", "euler")
SCHEDULES = ("sequential", "rolling")


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The causal video autoencoder. The first latent frame is one picture, each further one is `temporal` of them."""

    kind: str
    latent_channels: int
    spatial: int
    """Pixels along one side of a latent cell."""
    temporal: int = 4
    widths: tuple[int, ...] = ()
    """Channels of each level, from pixels to latents; empty where the kind fixes them."""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    """Of each latent channel, where the autoencoder's weights do not hold them; empty = 0 and 1."""

    def __post_init__(self) -> None:
        require(self.kind in AUTOENCODERS, f"autoencoder kind to be one of {', '.join(AUTOENCODERS)}", self.kind)
        counts(self, "latent_channels", "spatial", "temporal")
        require(all(width >= 1 for width in sequence(self, "widths", int)), "autoencoder widths >= 1", self.widths)
        for name in ("mean", "std"):
            values = sequence(self, name, float, self.latent_channels if getattr(self, name) else 0)
            require(name == "mean" or all(value > 0 for value in values), "latent std > 0", values)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of every latent channel."""
        return self.mean or (0.0,) * self.latent_channels, self.std or (1.0,) * self.latent_channels


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """What the model reads: `length` rows of `width`, from a table of known phrases or from umT5."""

    kind: str
    width: int
    length: int
    vocab: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Phrase (lower case, several words allowed) -> row of the table; row 0 is padding, all zeros."""
    ignored: tuple[str, ...] = ()
    """Filler words, skipped without a warning."""
    negative: str = ""
    """The prompt that guidance leads away from; a table leads away from no words at all."""

    def __post_init__(self) -> None:
        require(self.kind in TEXTS, f"text kind to be one of {', '.join(TEXTS)}", self.kind)
        counts(self, "width", "length")
        require(isinstance(self.vocab, Mapping), "vocab to map phrases to rows", self.vocab)
        object.__setattr__(self, "vocab", dict(self.vocab))
        for phrase, row in self.vocab.items():
            require(isinstance(phrase, str) and phrase == phrase.lower().strip() != "", "lower-case phrases", phrase)
            require(type(row) is int and row >= 1, f"a row >= 1 for {phrase!r} (row 0 is padding)", row)
        sequence(self, "ignored", str)
        require(isinstance(self.negative, str), "the negative prompt to be text", self.negative)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A causal Wan2.1-style DiT (arXiv:2602.02214, 2605.15141), how it is sampled, what it reads, and its decoder."""

    name: str
    width: int
    depth: int
    heads: int
    ffn: int
    latent_channels: int
    latent_grid: tuple[int, int]
    """Latent cells: rows, columns."""
    text: TextConfig
    autoencoder: AutoencoderConfig
    unit: int
    """F: latent frames denoised together."""
    window: int
    """W: latent frames that a unit sees, itself included, sinks not."""
    trained_frames: int
    """Latent frames of a training clip; the distance at which relative sinks stop receding."""
    steps: tuple[float, ...]
    """u of each denoising pass, before the shift warp: decreasing from 1."""
    shift: float
    first_steps: tuple[float, ...] | None = None
    """The list for unit 0, which has no past to lean on; None = `steps`."""
    solver: str = "renoise"
    """From one level to the next: "renoise" puts new noise on the estimate of x0 (students that jump to it), "euler"
    follows the flow (teachers, and students that were taught the way from each level to the next)."""
    guidance: float = 1.0
    """Weight of classifier-free guidance, v_null + weight (v - v_null); 1 is none, and half of the work."""
    sinks: int = 0
    """K: first latent frames of the stream, seen for ever."""
    sink_position: str = "relative"
    """"relative" clamps the distance to a sink at `trained_frames` - 1; "window" looks at the sinks as if they were
    right before the window (Rolling Forcing, arXiv:2509.25161); "absolute" lets it grow."""
    schedule: str = "sequential"
    """"sequential" makes one unit after another; "rolling" has `steps` units at as many noise levels in one pass, each
    of which finishes the oldest (Rolling Forcing). A stream may choose the other one."""
    patch: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns of one token."""
    time_width: int = 256
    rope_split: tuple[int, int, int] | None = None
    """Rotary pairs for time, height, width; None = Wan's rule, (c - 2 (c//3), c//3, c//3) of c pairs."""
    rope_theta: float = 10000.0
    eps: float = 1e-6
    fps: float = 16.0
    """Pixel frames per second of the video that the model was trained on."""
    reference_compat: bool = False
    """Does as the released inference code does, in all that it can be told apart by: noise in its order, from its
    generator, and sinks at their true distance. A clip then ends where its noise does."""

    def __post_init__(self) -> None:
        require(isinstance(self.name, str) and self.name != "", "a name", self.name)
        require(isinstance(self.text, TextConfig), "text to be a TextConfig", self.text)
        require(isinstance(self.autoencoder, AutoencoderConfig), "autoencoder to be its config", self.autoencoder)
        counts(
            self, "width", "depth", "heads", "ffn", "latent_channels", "unit", "window", "trained_frames", "time_width"
        )
        counts(self, "sinks", least=0)
        positives(self, "shift", "rope_theta", "eps", "fps", "guidance")
        self._check_sizes()
        self._check_time()

    def _check_sizes(self) -> None:
        grid, patch = sequence(self, "latent_grid", int, 2), sequence(self, "patch", int, 3)
        require(min(grid + patch) >= 1, "latent_grid and patch >= 1", (grid, patch))
        require(patch[0] == 1, "a patch of one latent frame (a token belongs to one frame)", patch)
        fits = grid[0] % patch[1] == 0 and grid[1] % patch[2] == 0
        require(fits, f"latent_grid to be a multiple of the patch {patch[1:]}", grid)
        require(self.width % (2 * self.heads) == 0, "width to be a multiple of 2 * heads", (self.width, self.heads))
        require(self.time_width % 2 == 0, "an even time_width", self.time_width)
        require(
            self.autoencoder.latent_channels == self.latent_channels,
            f"the autoencoder to have latent_channels = {self.latent_channels}",
            self.autoencoder.latent_channels,
        )
        if self.rope_split is not None:
            split, pairs = sequence(self, "rope_split", int, 3), self.head_dim // 2
            require(min(split) >= 0 and sum(split) == pairs, f"rope_split to add up to {pairs} pairs", split)

    def _check_time(self) -> None:
        Geometry(unit=self.unit, window=self.window, sinks=self.sinks)
        require(self.sink_position in SINK_POSITIONS, f"sink_position in {SINK_POSITIONS}", self.sink_position)
        require(
            not self.reference_compat or self.sink_position != "relative",
            'sink_position "absolute" or "window" with reference_compat: the released code knows no other',
            self.sink_position,
        )
        require(self.solver in SOLVERS, f"solver in {SOLVERS}", self.solver)
        require(self.sinks <= self.trained_frames, f"sinks <= trained_frames = {self.trained_frames}", self.sinks)
        whole = self.trained_frames % self.unit == 0  # so that no unit is both beyond the clip and, in part, a sink
        require(whole, f"trained_frames to be a multiple of the unit {self.unit}", self.trained_frames)
        for name in ("steps", "first_steps") if self.first_steps is not None else ("steps",):
            steps = sequence(self, name, float)
            falling = all(a > b > 0 for a, b in pairwise(steps))
            require(len(steps) > 0 and steps[0] == 1.0 and falling, f"{name} to fall from 1 and stay above 0", steps)
        require(self.schedule in SCHEDULES, f"schedule in {SCHEDULES}", self.schedule)
        if self.schedule == "rolling":
            self._check_rolling()

    def _check_rolling(self) -> None:
        require(self.solver == "renoise", 'solver "renoise" with a rolling schedule', self.solver)
        require(self.first_steps is None, "no first_steps with a rolling schedule: units share their passes", self.name)
        least = self.unit * len(self.steps)
        require(self.window >= least, f"a window of {least} latent frames, all that are in one pass", self.window)
        require(self.sinks <= self.unit, f"sinks of at most one unit ({self.unit}) with a rolling schedule", self.sinks)

    # ------------------------------------------------------------------ derived

    @property
    def head_dim(self) -> int:
        """Numbers in one head."""
        return self.width // self.heads

    @property
    def token_grid(self) -> tuple[int, int]:
        """Tokens of one latent frame: rows, columns."""
        return self.latent_grid[0] // self.patch[1], self.latent_grid[1] // self.patch[2]

    @property
    def frame_tokens(self) -> int:
        """N: tokens of one latent frame."""
        return self.token_grid[0] * self.token_grid[1]

    @property
    def patch_width(self) -> int:
        """Numbers in one token's patch of latents."""
        return self.latent_channels * self.patch[0] * self.patch[1] * self.patch[2]

    @property
    def rope_pairs(self) -> tuple[int, int, int]:
        """Rotary pairs of one head for time, height, width."""
        if self.rope_split is not None:
            return self.rope_split
        pairs = self.head_dim // 2
        return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3

    @property
    def geometry(self) -> Geometry:
        """Who sees whom."""
        return Geometry(unit=self.unit, window=self.window, sinks=self.sinks)

    @property
    def joint_units(self) -> int:
        """Units that go through a denoising pass together."""
        return len(self.steps) if self.schedule == "rolling" else 1

    @property
    def frame_size(self) -> tuple[int, int]:
        """Pixels of one frame: height, width."""
        return self.latent_grid[0] * self.autoencoder.spatial, self.latent_grid[1] * self.autoencoder.spatial

    def unit_frames(self, unit: int) -> int:
        """Pixel frames of a unit: the clip's first latent frame is one picture, each further one `temporal` of them."""
        every = self.unit * self.autoencoder.temporal
        return every if unit > 0 else every - self.autoencoder.temporal + 1

    def first_frame(self, unit: int) -> int:
        """Index of a unit's first pixel frame, counted from the start of the stream."""
        return 0 if unit <= 0 else self.unit_frames(0) + (unit - 1) * self.unit_frames(1)

    def unit_at(self, frame: int) -> int:
        """The unit of a pixel frame; -1 for frames before the stream."""
        return -1 if frame < 0 else max(0, (frame - self.unit_frames(0)) // self.unit_frames(1) + 1)

    @property
    def guided(self) -> bool:
        """Does every pass run twice, once for the negative prompt?"""
        return self.guidance != 1

    def as_reference(self) -> Self:
        """This model, run as the released code runs it."""
        position = "window" if self.sink_position == "window" else "absolute"
        return replace(self, reference_compat=True, sink_position=position)

    def unit_steps(self, unit: int) -> tuple[float, ...]:
        """The step list (u, before the warp) of a unit."""
        return self.first_steps if unit == 0 and self.first_steps is not None else self.steps

    # ------------------------------------------------------------------ JSON

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings; `from_dict` gives the same config back."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The config that `to_dict` wrote. ConfigError names every unknown and every missing key."""
        return decode(cls, data, where="the model config")

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The JSON text of `save`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads JSON. ConfigError when there is no file, no JSON, or no model in it."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the model config {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON ({error}); it is damaged or not a model config") from error
        return decode(cls, data, where=str(path))


# ---------------------------------------------------------------------- presets


def _even(count: int) -> tuple[float, ...]:
    """`count` values of u, evenly from 1, 0 left out."""
    return tuple(1 - i / count for i in range(count))


WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
"""Of the latents of Wan2.1_VAE.pth, from Wan2.1's own code."""
WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，"
    "倒着走"
)
"""The negative prompt that Wan2.1 was tuned with."""


def _wan(
    name: str, unit: int, steps: int, first: int | None = None, *, window: int = 21, sinks: int = 0
) -> ModelConfig:
    """Causal Wan2.1-T2V-1.3B at 480 x 832: 1560 tokens a latent frame, trained on 21 of them (81 pixel frames)."""
    return ModelConfig(
        name=name,
        width=1536,
        depth=30,
        heads=12,
        ffn=8960,
        latent_channels=16,
        latent_grid=(60, 104),
        text=TextConfig(kind="umt5", width=4096, length=512, negative=WAN_NEGATIVE),
        autoencoder=AutoencoderConfig(
            kind="wan", latent_channels=16, spatial=8, widths=(96, 192, 384, 384), mean=WAN_MEAN, std=WAN_STD
        ),
        unit=unit,
        window=window,
        sinks=sinks,
        trained_frames=21,
        steps=_even(steps),
        first_steps=None if first is None else _even(first),
        shift=5.0,
    )


def _wan_long() -> ModelConfig:
    """The long-video student, trained by rolling windows: 21 frames in reach, the first chunk of them for ever."""
    model = _wan("wan-1.3b-longvideo", unit=3, steps=4, window=18, sinks=3)
    return replace(model, sink_position="window", schedule="rolling")


def _wan_teacher(name: str, unit: int) -> ModelConfig:
    """Stage 1: 48 Euler steps, guidance 3, as arXiv:2605.15141 samples the teacher that it distils."""
    return replace(_wan(name, unit, steps=48), solver="euler", guidance=3.0)


def _wan_14b() -> ModelConfig:
    """Wan2.1-T2V-14B, the real score of asymmetric DMD: bidirectional, the whole clip is one unit."""
    return replace(_wan("wan-14b", unit=21, steps=50), width=5120, depth=40, heads=40, ffn=13824)


def _tiny() -> ModelConfig:
    """The embedded student: 64 x 64 pixels, 4 tokens a latent frame."""
    return ModelConfig(
        name="tiny",
        width=192,
        depth=4,
        heads=3,
        ffn=576,
        latent_channels=16,
        latent_grid=(4, 4),
        text=TextConfig(kind="table", width=64, length=8),
        autoencoder=AutoencoderConfig(kind="tiny", latent_channels=16, spatial=16, widths=(48, 96, 160, 176, 128, 64)),
        unit=1,
        window=8,
        trained_frames=10,
        steps=_even(4),
        first_steps=_even(16),
        shift=3.0,
        solver="euler",  # one jump is too smooth a function: LOG.md has the numbers
        rope_theta=100.0,
    )


# A = arXiv:2602.02214, tables 1 (one H100) and 2; B = arXiv:2605.15141, table 1 (one A800, no decoding).
# All 1.3B rows have 1,418,996,800 parameters in 825 tensors.
PRESETS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        #     name                        F  steps, unit 0               reproduces
        _wan("wan-1.3b-chunkwise-4step", 3, 4),  #                       A: 17.0 FPS, VBench 84.04
        _wan("wan-1.3b-framewise-4step", 1, 4),  #                       B: 8.69 FPS, VBench 84.10
        _wan("wan-1.3b-framewise-2step", 1, 2, first=4),  #              B: 14.1 FPS, VBench 84.14
        _wan("wan-1.3b-framewise-1step", 1, 1, first=4),  #              B: 20.7 FPS, VBench 83.35
        _wan_teacher("wan-1.3b-chunkwise-ar", 3),  #                     A: VBench 82.12 (teacher forcing)
        _wan_teacher("wan-1.3b-framewise-ar", 1),  #                     the teacher of B; no number of its own
        _wan("wan-1.3b-chunkwise-ode", 3, 4),  #                         starts the DMD of A: VBench 84.04 after it
        _wan("wan-1.3b-framewise-ode", 1, 4),  #                         starts the DMD of A: VBench 83.75 after it
        _wan("wan-1.3b-chunkwise-cd", 3, 4),  #                          A: VBench 81.48 (causal teacher)
        _wan("wan-1.3b-framewise-cd", 1, 4),  #                          starts the DMD of B: VBench 84.10 after it
        _wan_long(),  #                           F = 3, 4 steps         Rolling Forcing's windows; no number of its own
        _wan_14b(),  #                                                   14,288,491,584 parameters
        _tiny(),  #                                                      its card, cfrt/students/tiny/card.md
    )
}
