"""One object per way to run a unit, chosen once by asking each whether it can.

An engine owns the memory: weights, the ring of past keys and values, the decoder's state. Latents never leave it; its
caller only carries them about and does arithmetic on them (+, - and products with floats, which is all that
`cfrt.flow` needs). Nothing here imports a framework until an engine that needs it is asked.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from ..bundle import Bundle
from ..config import ModelConfig
from ..errors import EngineError
from ..noise import is_seed

Latents = Any
"""One unit of latents in the engine's own memory, [1, F, C, h, w] by meaning."""

PRECISIONS = ("auto", "fp32", "bf16", "int8", "fp16", "fp64")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """All that an engine must know to start."""

    config: ModelConfig
    weights: Mapping[str, np.ndarray] = field(repr=False)
    """`dit.*` by Wan's names, `autoencoder.*`, fp32."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:N", or "auto": a GPU for the engine that can do nothing without, else the CPU."""
    precision: str = "auto"
    """One of PRECISIONS; "auto" leaves it to the engine, which takes the fastest that is good enough."""
    seed: int = 0
    threads: int | None = None
    """CPU threads; None leaves the engine's own default."""
    null: np.ndarray | None = field(default=None, repr=False)
    """Text rows of the negative prompt, for a guided model; None for others."""
    prefix: int = 0
    """Pixel frames that the stream goes on from."""
    decoder: str | None = None
    """"taehv" decodes by the small decoder in `taehv.*`; None by the autoencoder's own."""
    tile: int | None = None
    """Latent cells along the side of a tile that is decoded at once; None decodes whole frames."""
    bundle: Bundle | None = field(default=None, repr=False)
    """An exported model; `weights` then hold what is outside its graphs."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise EngineError(f"expected a precision among {', '.join(PRECISIONS)}, got {self.precision!r}")
        if not is_seed(self.seed):
            raise EngineError(f"expected a seed, a whole number from 0 to 2**64 - 1, got {self.seed!r}")
        if self.threads is not None and self.threads < 1:
            raise EngineError(f"expected at least one thread, got {self.threads}")
        if self.decoder not in (None, "taehv"):
            raise EngineError(f'expected decoder "taehv" or None, got {self.decoder!r}')

    @property
    def features(self) -> frozenset[str]:
        """What is asked of an engine beyond a student's weights, and a stream from nothing or from one picture."""
        asked = {
            "guidance": self.config.guided,
            "a film to go on from": self.prefix > 1,
            "another decoder": self.decoder is not None,
            "tiles": self.tile is not None,
            "reference noise": self.config.reference_compat,
            "a rolling schedule": self.config.schedule == "rolling",
            "sinks that stay before the window": self.config.sink_position == "window" and self.config.sinks > 0,
        }
        return frozenset(name for name, wanted in asked.items() if wanted)


@dataclass(frozen=True, kw_only=True, eq=False)
class Memory:
    """What an engine remembers where a unit begins, or part of it: on the host, and in numbers that lose nothing."""

    unit: int
    keys: Mapping[int, np.ndarray]
    """Keys and values of whole latent frames, each [layers, 2, B, N, H, D], keys turned to their absolute position
    and the two numbers of a rotary pair side by side, as Wan has them."""
    decoder: tuple[np.ndarray, ...]
    """What the decoder keeps of the frames before, in the order in which its layers run, each with the clips as its
    first axis (one): [1, C, h, w] for the small autoencoder. Empty where the stream begins."""

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.keys.values(), *self.decoder))


class Engine(Protocol):
    """How a unit is made. Calls come from one thread, in the order of the units.

    For every unit: `set_text`, then `denoise` from the highest noise level to the lowest, `decode`, and `commit` when
    its clean latents are to be remembered. A unit that is denoised but not yet committed may be done again.
    """

    name: ClassVar[str]
    fuses: ClassVar[bool]
    """Can `denoise` take the previous unit's commit into its own pass?"""
    features: ClassVar[frozenset[str]]
    """Those of `Spec.features` that it has; an engine that does not say has none."""
    precision: str
    """What it computes in, once it is prepared: never "auto"."""
    # annotate: Hook | None, which an engine may have: entered around every stage (`cfrt.trace`), for its own profiler.

    @classmethod
    def supported(cls, spec: Spec) -> str | None:
        """None when this engine can run `spec` on this machine, else the reason why not, in one sentence."""
        ...

    def prepare(self, spec: Spec) -> None:
        """Loads weights and allocates everything, once. WeightsError when they do not fit the configuration."""
        ...

    def set_text(self, unit_context: np.ndarray) -> None:
        """float32 rows [L, width] that every later pass reads, until the next call."""
        ...

    def noise(self, unit: int, step: int) -> Latents:
        """Standard normals of one unit: a function of seed, unit and step alone."""
        ...

    def denoise(self, latents: Latents, t: float, unit: int, commit: Latents | None = None) -> Latents:
        """The estimate of x0 from latents at time t = 1000 s. `commit`: the previous unit's clean latents, remembered
        in the same pass, under the same text; EngineError where the engine cannot."""
        ...

    def denoise_jointly(
        self, latents: Sequence[Latents], times: Sequence[float], unit: int, texts: Sequence[np.ndarray]
    ) -> Sequence[Latents]:
        """`denoise` of consecutive units from `unit` on in one pass, each at its own time and reading its own rows.
        They see each other whole, and what the last of them sees of the past; the ring stays as it is. Only asked of
        engines that have the feature "a rolling schedule"."""
        ...

    def commit(self, latents: Latents, unit: int) -> None:
        """The clean pass (t = 0) that writes a unit's keys and values into the ring. Any unit that the ring still
        holds may be committed again, each seeing what the ring holds of its past."""
        ...

    def encode(self, image: np.ndarray) -> Latents:
        """The latents of a picture, (H, W, 3) uint8 of the model's frame size, as unit 0 of a stream."""
        ...

    def encode_film(self, frames: np.ndarray) -> list[Latents]:
        """The latents of the first pictures of a stream, (T, H, W, 3) uint8 that fill whole units: one for each unit.
        Only asked of engines that have the feature "a film to go on from"."""
        ...

    def decode(self, latents: Latents) -> np.ndarray:
        """The next unit's pixels, (frames, H, W, 3) uint8, on the host."""
        ...

    def rewind(self, unit: int) -> None:
        """Forgets `unit` and what came after it, at most one unit back from the last one decoded: the ring's spare
        unit and the decoder's last state make this free. EngineError further back."""
        ...

    def reseed(self, seed: int) -> None:
        """All further noise is that of another seed."""
        ...

    def memory(self, frames: Iterable[int]) -> Memory:
        """What a journal or another engine needs: those of the latent frames that the ring holds, and the decoder's
        state at the next unit to be decoded."""
        ...

    def recall(self, memory: Memory) -> None:
        """Makes `memory.unit` the next one: puts frames and decoder back, forgets what came later. The ring must then
        hold all that the unit sees. EngineError where sizes do not fit."""
        ...

    def host(self, latents: Latents) -> np.ndarray:
        """Latents as an array that loses nothing, [1, F, C, h, w]."""
        ...

    def place(self, array: np.ndarray) -> Latents:
        """The way back."""
        ...

    def twin(self) -> Self:
        """An engine for a second stream of the same spec, as if newly prepared, that shares the weights it can."""
        ...

    def snapshot(self) -> Any:
        """The exact state between two units, independent of what the engine does later."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Goes back to a snapshot of the same engine, model and precision; EngineError for another one."""
        ...

    def close(self) -> None:
        """Frees the memory. The engine cannot be used afterwards."""
        ...


def fit_memory(memory: Memory, keys: tuple[int, ...], decoder: Sequence[tuple[int, ...]] | None = None) -> None:
    """EngineError unless every frame of `memory` has the shape `keys`, and the decoder's arrays those of `decoder`,
    where the engine can tell."""
    got = [array.shape for array in memory.decoder]
    if decoder is not None and got != list(decoder):
        raise EngineError(
            f"expected the state of a decoder of shapes {list(decoder)}, got {got}: it is another model's"
        )
    for frame, kv in memory.keys.items():
        if kv.shape != keys:
            raise EngineError(f"expected keys and values {keys} of frame {frame}, got {kv.shape}: another model's")


# ---------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class _Entry:
    module: str
    name: str
    needs: tuple[str, ...]
    """Importable modules without which the engine's own module cannot be imported."""
    package: str
    """What to install where they are missing."""
    bundles: bool = False
    """Does it run exported bundles? Others run a model's weights. Asked before anything is imported."""


_ENGINES = {
    "native": _Entry("cfrt.engines.native", "NativeEngine", needs=("_cfrt",), package="cfrt"),
    "trt": _Entry("cfrt.engines.trt", "TrtEngine", needs=("_cfrt",), package="cfrt", bundles=True),
    "onnx": _Entry(
        "cfrt.engines.onnx",
        "OnnxEngine",
        needs=("_cfrt", "onnx", "onnxruntime"),
        package="'cfrt[export]'",
        bundles=True,
    ),
    "torch": _Entry("cfrt.engines.torch", "TorchEngine", needs=("torch",), package="'cfrt[torch]'"),
}
"""Every engine of this build, the preferred one first."""


def names() -> tuple[str, ...]:
    """The engines of this build, the preferred one first."""
    return tuple(_ENGINES)


def refusal(name: str, spec: Spec) -> str | None:
    """Why the engine cannot run `spec` here, or None."""
    entry = _ENGINES[name]
    missing = [module for module in entry.needs if find_spec(module) is None]
    if missing:
        return f"{', '.join(missing)} is not installed: pip install {entry.package}"
    if entry.bundles and spec.bundle is None:
        return "it runs exported bundles: `python -m export.trt` or `export.onnx` with --model ... --out DIR makes one"
    if spec.bundle is not None and not entry.bundles:
        return "it runs a model's weights, not an exported bundle"
    engine = _load(name)
    lacking = sorted(spec.features - getattr(engine, "features", frozenset()))
    return f"it cannot do {' or '.join(lacking)}" if lacking else engine.supported(spec)


def cuda_build() -> dict[str, Any] | None:
    """The CUDA toolkit and architectures of the kernels in this installation, and the oldest NVIDIA driver branch that
    runs them: {"version", "archs", "driver"}; None in a CPU-only build, or where there is no native core at all."""
    if find_spec("_cfrt") is None:
        return None
    from _cfrt import build_info, cuda

    built = build_info()["cuda"]
    return None if built is None else {**built, "driver": cuda.least_driver()}


def gpu_attention() -> dict[str, str | None]:
    """Why each attention that the torch engine may ask for on GPU 0 in bf16 would not run, or None, in its order."""
    refusals: dict[str, str | None] = {"cuda": "the native core is not installed", "flash": None, "sdpa": None}
    if find_spec("_cfrt") is not None:
        from _cfrt import cuda

        refusals["cuda"] = cuda.refusal(0)
    if find_spec("flash_attn") is None:
        refusals["flash"] = "flash-attn is not installed: pip install 'cfrt[flash]'"
    if find_spec("torch") is None:
        refusals["sdpa"] = "torch is not installed: pip install 'cfrt[torch]'"
    return refusals


def choose(name: str, spec: Spec) -> tuple[type[Engine], dict[str, str]]:
    """The engine of that name, or for "auto" the first one that can run `spec` (CFRT_ENGINE overrides "auto").

    Gives its class and the refusals of those that were asked before it. EngineError when the name is unknown, when the
    named engine refuses (with its reason and the alternative), or when all do."""
    name = os.environ.get("CFRT_ENGINE") or name if name == "auto" else name
    if name != "auto" and name not in _ENGINES:
        raise EngineError(f"there is no engine {name!r} in this build; expected auto or {' or '.join(_ENGINES)}")
    refusals: dict[str, str] = {}
    for candidate in _ENGINES if name == "auto" else (name,):
        reason = refusal(candidate, spec)
        if reason is None:
            return _load(candidate), refusals
        refusals[candidate] = reason
    raise EngineError(_no_engine(name, refusals, spec))


def _no_engine(name: str, refusals: Mapping[str, str], spec: Spec) -> str:
    reasons = "; ".join(f"{engine}: {reason}" for engine, reason in refusals.items())
    if name == "auto":
        return f"no engine can run {spec.config.name!r} here ({reasons})"
    others = [other for other in _ENGINES if other != name and refusal(other, spec) is None]
    return f"engine {name!r} cannot run {spec.config.name!r} ({reasons}); " + (
        f"these can: {', '.join(others)}" if others else "no other engine of this build can either"
    )


def _load(name: str) -> type[Engine]:
    entry = _ENGINES[name]
    engine: type[Engine] = getattr(import_module(entry.module), entry.name)
    return engine
