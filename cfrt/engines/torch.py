"""The engine that defines what is right: `cfrt.nn`, eager, on any device PyTorch has.

Bytes are the same for the same seed, device, precision and number of threads. `Spec.threads` sets PyTorch's own,
process-wide number; without it that is left alone.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .. import noise
from ..errors import EngineError
from ..flow import TIME_SCALE, guide, x0_from_v
from ..nn.attention import fastest
from ..nn.autoencoder import Autoencoder
from ..nn.codec import codec, tiny_decoder
from ..nn.dit import CausalDiT, TextKV
from ..nn.reference_noise import ReferenceNoise
from ..nn.ring import RingCache
from ..nn.taehv import TAEHV
from ..nn.tiles import Tiling
from ..trace import Hook
from ..weights import part
from . import Memory, Spec, fit_memory

Module = TypeVar("Module", bound=nn.Module)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class TorchSnapshot:
    """Everything that later passes depend on. Tensors in it are never written to."""

    ring: dict[str, Any]
    decoder: Any
    decoded: int
    made_by: tuple[object, ...]
    """Decoder and size of its tiles."""


class TorchEngine:
    """One stream in eager PyTorch. Latents are tensors [1, F, C, h, w] on the device, in at least fp32.

    A guided model runs every pass as a batch of two, prompt and negative prompt, each with a ring of its own."""

    name: ClassVar[str] = "torch"
    fuses: ClassVar[bool] = True
    features: ClassVar[frozenset[str]] = frozenset(
        {
            "guidance",
            "a film to go on from",
            "another decoder",
            "reference noise",
            "tiles",
            "a rolling schedule",
            "sinks that stay before the window",
        }
    )

    @classmethod
    def supported(cls, spec: Spec) -> str | None:
        kind = spec.config.autoencoder.kind
        if kind == "taehv" and spec.prefix:
            return "TAEHV does not read pictures: use a model with Wan's autoencoder, and decoder 'taehv'"
        if spec.decoder == "taehv" and kind != "wan":
            return f"TAEHV decodes the latents of Wan's autoencoder, not those of kind {kind!r}"
        if spec.precision not in ("auto", *DTYPES):
            return f"it computes in {', '.join(DTYPES)}, not in {spec.precision!r}"
        if spec.device.split(":")[0] not in ("auto", "cpu", "cuda"):
            return f"it runs on cpu, cuda or cuda:N, not on {spec.device!r}"
        if spec.device not in ("auto", "cpu") and not torch.cuda.is_available():
            return f"PyTorch {torch.__version__} finds no CUDA device here; device='cpu' works"
        return None

    def prepare(self, spec: Spec) -> None:
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        self._spec, self._config = replace(spec, weights={}), spec.config
        self._device = torch.device("cpu" if spec.device == "auto" else spec.device)
        own = "bf16" if self._device.type == "cuda" else "fp32"  # our kernels and flash-attn want 16 bits
        self.precision = own if spec.precision == "auto" else spec.precision
        self._dtype = DTYPES[self.precision]
        self.annotate: Hook | None = torch.cuda.nvtx.range if self._device.type == "cuda" else None
        self._dit = self._placed(CausalDiT.from_arrays(spec.config, part(spec.weights, "dit")))
        self._prepare_pixels(spec)
        self._null = self._negative(spec)
        self._attention = fastest(self._device, self._dtype, spec.config.head_dim)
        self._start()

    def _start(self) -> None:
        """The beginning of a stream; the weights are there already."""
        config, spec = self._config, self._spec
        self._seed = spec.seed
        self._ring = RingCache(config, 1 if self._null is None else 2, self._dtype, self._device)
        self._reference = self._reference_noise(spec) if config.reference_compat else None
        self._text: TextKV | None = None
        self._read: list[tuple[np.ndarray, TextKV]] = []  # rows and what was made of them, of the last joint pass
        self._decoded = 0  # units decoded: the next one's number
        self._state: Any = None
        self._state_before: tuple[int, Any] = (0, None)

    def _prepare_pixels(self, spec: Spec) -> None:
        """The autoencoder, and what decodes: it, or another decoder, or either of them in tiles."""
        config = spec.config.autoencoder
        self._autoencoder = decoder = self._placed(codec(config, part(spec.weights, "autoencoder")))
        if spec.decoder is not None:
            decoder = self._placed(tiny_decoder(config, part(spec.weights, spec.decoder)))
        self._tiles = None if spec.tile is None else Tiling(side=spec.tile, overlap=spec.tile // 4)
        self._decode = decoder.decode if self._tiles is None else partial(self._tiles.decode, decoder.decode)
        self._one_state: Callable[[list[Tensor]], Any] = itemgetter(0) if isinstance(decoder, Autoencoder) else tuple
        self._at_once = spec.config.unit if config.kind == "tiny" else 1  # latent frames: Wan's are large
        self._made_by = (spec.decoder or config.kind, spec.tile)

    def _reference_noise(self, spec: Spec) -> ReferenceNoise:
        config = spec.config
        prefix = config.unit * (config.unit_at(spec.prefix - 1) + 1)
        return ReferenceNoise(config, spec.seed, self._dtype, self._device, prefix)

    def _negative(self, spec: Spec) -> Tensor | None:
        if spec.config.guided and spec.null is None:
            raise EngineError(f"expected the rows of a negative prompt for {spec.config.name!r}, which is guided")
        return self._to_device(spec.null) if spec.config.guided and spec.null is not None else None

    @torch.no_grad()
    def set_text(self, unit_context: np.ndarray) -> None:
        self._text = self._keys_of(unit_context)

    def noise(self, unit: int, step: int) -> Tensor:
        config = self._config
        if self._reference is not None:
            return self._reference(unit, step).to(torch.promote_types(self._dtype, torch.float32))
        shape = (1, config.unit, config.latent_channels, *config.latent_grid)
        made = torch.from_numpy(noise.normal(self._seed, unit, step, noise.Purpose.SAMPLE, shape))
        return made.to(self._device, torch.promote_types(self._dtype, torch.float32))

    @torch.no_grad()
    def denoise(self, latents: Tensor, t: float, unit: int, commit: Tensor | None = None) -> Tensor:
        """A fused commit is made first, in a pass of its own: exact, and no slower than to make it apart."""
        if commit is not None:
            self.commit(commit, unit - 1)
        x = self._for_each_text(latents)
        time = torch.full((len(x),), t, dtype=torch.float64, device=self._device)
        v = self._dit.step(x, time, self._heard(), self._ring, unit, backend=self._attention).to(latents.dtype)
        v = v if self._null is None else guide(v[:1], v[1:], self._config.guidance)
        return x0_from_v(latents, v, t / TIME_SCALE)

    @torch.no_grad()
    def denoise_jointly(
        self, latents: Sequence[Tensor], times: Sequence[float], unit: int, texts: Sequence[np.ndarray]
    ) -> Sequence[Tensor]:
        text, which = self._captions(texts)
        joined = torch.cat(list(latents), dim=1)
        x = self._for_each_text(joined)
        time = self._for_each_frame(torch.tensor(times, dtype=torch.float64))
        t, caption = time.expand(len(x), -1), self._for_each_frame(torch.tensor(which)).expand(len(x), -1)
        v = self._dit.step_jointly(x, t, text, self._ring, unit, caption, backend=self._attention).to(joined.dtype)
        v = v if self._null is None else guide(v[:1], v[1:], self._config.guidance)
        s = (time / TIME_SCALE).to(joined.dtype)[:, None, None, None]
        return x0_from_v(joined, v, s).split(self._config.unit, dim=1)

    @torch.no_grad()
    def commit(self, latents: Tensor, unit: int) -> None:
        upcoming = self._ring.next_frame // self._config.unit
        if unit < upcoming:  # again: without the frames that the next unit overwrites, whether it already has or not
            self._ring.open(upcoming)
        self._dit.commit(self._for_each_text(latents), self._heard(), self._ring, unit, backend=self._attention)

    def encode(self, image: np.ndarray) -> Tensor:
        return self.encode_film(image[None])[0]

    @torch.no_grad()
    def encode_film(self, frames: np.ndarray) -> list[Tensor]:
        if isinstance(self._autoencoder, TAEHV):
            raise EngineError("TAEHV does not read pictures: use a model with Wan's autoencoder, and decoder 'taehv'")
        video = self._to_device(frames.transpose(0, 3, 1, 2))[None] / 255
        latents = self._autoencoder.encode(video)
        wide = latents.to(torch.promote_types(self._dtype, torch.float32))
        return list(wide.split(self._config.unit, dim=1))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        self._state_before = (self._decoded, self._state)
        parts = []
        for frames in latents.to(self._dtype).split(self._at_once, dim=1):
            video, self._state = self._decode(frames, self._state)
            parts.append(_levels(video[0]).cpu())
        self._decoded += 1
        return torch.cat(parts).numpy()

    def rewind(self, unit: int) -> None:
        if unit < self._decoded:
            decoded, state = self._state_before
            if unit != decoded:
                raise EngineError(f"expected to go back to unit {decoded} at most, got {unit}; restore a snapshot")
            self._decoded, self._state = decoded, state
        if unit * self._config.unit < self._ring.next_frame:
            self._ring.rewind(unit)

    def reseed(self, seed: int) -> None:
        if self._reference is not None:
            raise EngineError("reference_compat draws its noise in one order from one seed; leave it out to reseed")
        self._seed = seed

    @torch.no_grad()
    def memory(self, frames: Iterable[int]) -> Memory:
        held = set(self._ring.held())
        keys = {frame: _host(torch.stack(self._ring.frame(frame))) for frame in frames if frame in held}
        return Memory(unit=self._decoded, keys=keys, decoder=tuple(_host(part) for part in _leaves(self._state)))

    @torch.no_grad()
    def recall(self, memory: Memory) -> None:
        config, batch = self._config, 1 if self._null is None else 2
        shape = (config.depth, 2, batch, config.frame_tokens, config.heads, config.head_dim)
        fit_memory(memory, shape)
        state = self._state_of([self._to_device(array) for array in memory.decoder])
        for frame, kv in sorted(memory.keys.items()):
            for layer, (k, v) in enumerate(self._to_device(kv)):
                self._ring.write(layer, frame, k, v)
            self._ring.hold(frame)
        self._decoded, self._state = memory.unit, state
        self._state_before = (memory.unit, state)
        self.rewind(memory.unit)

    def _state_of(self, parts: list[Tensor]) -> Any:
        """The decoder's state from its tensors in order (`_leaves`)."""
        if not parts:
            return None
        if self._tiles is None:
            return self._one_state(parts)
        count = self._tiles.count(*self._config.latent_grid)
        if len(parts) % count:
            raise EngineError(
                f"expected the states of {count} tiles, got {len(parts)} tensors: decode in the same tiles"
            )
        each = len(parts) // count
        return tuple(self._one_state(parts[i : i + each]) for i in range(0, len(parts), each))

    def host(self, latents: Tensor) -> np.ndarray:
        return _host(latents)

    def place(self, array: np.ndarray) -> Tensor:
        wide = torch.promote_types(self._dtype, torch.float32)
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, wide)

    def twin(self) -> "TorchEngine":
        """Shares every weight."""
        twin = copy(self)
        twin._start()
        return twin

    def snapshot(self) -> TorchSnapshot:
        return TorchSnapshot(ring=self._ring.state(), decoder=self._state, decoded=self._decoded, made_by=self._made_by)

    def restore(self, snapshot: Any) -> None:
        if not isinstance(snapshot, TorchSnapshot):
            raise EngineError(f"expected a snapshot of the torch engine, got {type(snapshot).__name__}")
        if snapshot.made_by != self._made_by:
            raise EngineError(f"expected a snapshot of (decoder, tile) = {self._made_by}, got {snapshot.made_by}")
        self._ring.load_state(snapshot.ring)
        self._decoded, self._state = snapshot.decoded, snapshot.decoder
        self._state_before = (snapshot.decoded, snapshot.decoder)

    def close(self) -> None:
        self.__dict__.clear()

    # ------------------------------------------------------------------ parts

    def _keys_of(self, rows: np.ndarray) -> TextKV:
        """Of a text, and of the negative prompt if there is one; kept from the last joint pass, if it read this one."""
        for known, keys in self._read:
            if known is rows:
                return keys
        own = self._to_device(rows)
        return self._dit.text_kv(torch.stack([own] if self._null is None else [own, self._null])[:, None])

    def _captions(self, texts: Sequence[np.ndarray]) -> tuple[TextKV, list[int]]:
        """The different texts side by side, and which of them each unit reads."""
        different: list[np.ndarray] = []
        which = []
        for rows in texts:
            same = (i for i, known in enumerate(different) if np.array_equal(known, rows))
            which.append(next(same, len(different)))
            if which[-1] == len(different):
                different.append(rows)
        self._read = [(rows, self._keys_of(rows)) for rows in different]
        layers = zip(*(keys for _, keys in self._read), strict=True)
        return [(torch.cat([k for k, _ in layer], 1), torch.cat([v for _, v in layer], 1)) for layer in layers], which

    def _heard(self) -> TextKV:
        if self._text is None:
            raise EngineError("expected set_text before the first pass")
        return self._text

    def _for_each_text(self, latents: Tensor) -> Tensor:
        """The latents once for the prompt and, if there is one, once for the negative prompt."""
        return latents.expand(1 if self._null is None else 2, *latents.shape[1:])

    def _for_each_frame(self, of_units: Tensor) -> Tensor:
        return of_units.repeat_interleave(self._config.unit).to(self._device)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, self._dtype)

    def _placed(self, module: Module) -> Module:
        return module.to(self._device, self._dtype).eval().requires_grad_(False)


def _leaves(state: Any) -> list[Tensor]:
    """The tensors of a decoder's state, in order: one, a tuple, or a tuple of these for tiles."""
    if state is None:
        return []
    return [state] if isinstance(state, Tensor) else [leaf for part in state for leaf in _leaves(part)]


def _host(tensor: Tensor) -> np.ndarray:
    """A copy in numpy, which has no bf16."""
    plain = tensor.detach().to("cpu", torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype, copy=True)
    return plain.numpy()


def _levels(video: Tensor) -> Tensor:
    """uint8 [f, H, W, 3] of pixels [f, 3, H, W] in [0, 1]; half precision has no room for 255 levels."""
    wide = video.to(torch.promote_types(video.dtype, torch.float32))
    return wide.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
