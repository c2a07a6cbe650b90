"""The engine that defines what is right: `cfrt.nn`, eager, on any device PyTorch has.

Bytes are the same for the same seed, device, precision and number of threads. `Spec.threads` sets PyTorch's own,
process-wide number; without it that is left alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .. import noise
from ..config import ModelConfig
from ..errors import EngineError
from ..flow import TIME_SCALE, x0_from_v
from ..nn.autoencoder import Autoencoder
from ..nn.dit import CausalDiT, TextKV
from ..nn.ring import RingCache
from ..weights import match, part
from . import Spec

Module = TypeVar("Module", bound=nn.Module)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class TorchSnapshot:
    """Everything that later passes depend on. Tensors in it are never written to."""

    ring: dict[str, Any]
    decoder: Tensor | None
    decoded: int


class TorchEngine:
    """One stream in eager PyTorch. Latents are tensors [1, F, C, h, w] on the device."""

    name: ClassVar[str] = "torch"
    fuses: ClassVar[bool] = True

    @classmethod
    def supported(cls, spec: Spec) -> str | None:
        kind = spec.config.autoencoder.kind
        if kind != "tiny":
            return f"it has no video autoencoder of kind {kind!r} yet"
        if spec.precision not in ("auto", *DTYPES):
            return f"it computes in {', '.join(DTYPES)}, not in {spec.precision!r}"
        if spec.device.split(":")[0] not in ("cpu", "cuda"):
            return f"it runs on cpu, cuda or cuda:N, not on {spec.device!r}"
        if spec.device != "cpu" and not torch.cuda.is_available():
            return f"PyTorch {torch.__version__} finds no CUDA device here; device='cpu' works"
        return None

    def prepare(self, spec: Spec) -> None:
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        self._config, self._seed = spec.config, spec.seed
        self.precision = "fp32" if spec.precision == "auto" else spec.precision
        self._device, self._dtype = torch.device(spec.device), DTYPES[self.precision]
        self._dit = self._placed(CausalDiT.from_arrays(spec.config, part(spec.weights, "dit")))
        self._autoencoder = self._placed(_autoencoder(spec.config, part(spec.weights, "autoencoder")))
        self._ring = RingCache(spec.config, 1, self._dtype, self._device)
        self._text: TextKV | None = None
        self._decoded = 0  # units decoded: the next one's number
        self._decoder: Tensor | None = None
        self._decoder_before: tuple[int, Tensor | None] = (0, None)

    @torch.no_grad()
    def set_text(self, unit_context: np.ndarray) -> None:
        self._text = self._dit.text_kv(self._to_device(unit_context)[None, None])

    def noise(self, unit: int, step: int) -> Tensor:
        config = self._config
        shape = (1, config.unit, config.latent_channels, *config.latent_grid)
        return self._to_device(noise.normal(self._seed, unit, step, noise.Purpose.SAMPLE, shape))

    @torch.no_grad()
    def denoise(self, latents: Tensor, t: float, unit: int, commit: Tensor | None = None) -> Tensor:
        """A fused commit is made first, in a pass of its own: exact, and no slower than to make it apart."""
        if commit is not None:
            self.commit(commit, unit - 1)
        time = torch.full((1,), t, dtype=torch.float64, device=self._device)
        return x0_from_v(latents, self._dit.step(latents, time, self._heard(), self._ring, unit), t / TIME_SCALE)

    @torch.no_grad()
    def commit(self, latents: Tensor, unit: int) -> None:
        upcoming = self._ring.next_frame // self._config.unit
        if unit < upcoming:  # again: without the frames that the next unit overwrites, whether it already has or not
            self._ring.open(upcoming)
        self._dit.commit(latents, self._heard(), self._ring, unit)

    @torch.no_grad()
    def encode(self, image: np.ndarray) -> Tensor:
        video = self._to_device(image.transpose(2, 0, 1))[None, None] / 255
        return self._autoencoder.encode(video)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        self._decoder_before = (self._decoded, self._decoder)
        video, self._decoder = self._autoencoder.decode(latents, self._decoder)
        self._decoded += 1
        wide = video[0].to(torch.promote_types(video.dtype, torch.float32))  # half precision has no room for 255 levels
        levels = wide.clamp(0, 1).mul(255).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def rewind(self, unit: int) -> None:
        if unit < self._decoded:
            decoded, state = self._decoder_before
            if unit != decoded:
                raise EngineError(f"expected to go back to unit {decoded} at most, got {unit}; restore a snapshot")
            self._decoded, self._decoder = decoded, state
        if unit * self._config.unit < self._ring.next_frame:
            self._ring.rewind(unit)

    def snapshot(self) -> TorchSnapshot:
        return TorchSnapshot(ring=self._ring.state(), decoder=self._decoder, decoded=self._decoded)

    def restore(self, snapshot: Any) -> None:
        if not isinstance(snapshot, TorchSnapshot):
            raise EngineError(f"expected a snapshot of the torch engine, got {type(snapshot).__name__}")
        self._ring.load_state(snapshot.ring)
        self._decoded, self._decoder = snapshot.decoded, snapshot.decoder
        self._decoder_before = (snapshot.decoded, snapshot.decoder)

    def close(self) -> None:
        self.__dict__.clear()

    # ------------------------------------------------------------------ parts

    def _heard(self) -> TextKV:
        if self._text is None:
            raise EngineError("expected set_text before the first pass")
        return self._text

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, self._dtype)

    def _placed(self, module: Module) -> Module:
        return module.to(self._device, self._dtype).eval().requires_grad_(False)


def _autoencoder(config: ModelConfig, arrays: Mapping[str, np.ndarray]) -> Autoencoder:
    """The autoencoder with these weights; WeightsError when they do not fit."""
    module = Autoencoder(config.autoencoder)
    match({name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}, arrays)
    module.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    return module
