"""A stream for those who know diffusers: load, call, `.frames`.

    pipe = CausalForcingPipeline.from_pretrained("tiny")
    frames = pipe("a large red circle moving left", num_frames=49).frames[0]    # (49, H, W, 3) float32 in [0, 1]

Shaped like `diffusers.WanPipeline`, so that `export_to_video` and what people have around it works; nothing here needs
diffusers or PyTorch. For frames as they are made, use `cfrt.Stream`.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from .config import ModelConfig
from .errors import VideoError
from .stream import Stream

if TYPE_CHECKING:
    from PIL.Image import Image

OUTPUT_TYPES = ("np", "pil")


@dataclass(frozen=True)
class CausalForcingPipelineOutput:
    """What a call gives."""

    frames: "np.ndarray | list[list[Image]]"
    """"np": float32 (prompts, frames, H, W, 3) in [0, 1]; "pil": a list of pictures for each prompt."""


class CausalForcingPipeline:
    """One model, loaded once: every call is a new branch of a stream that nobody has watched."""

    def __init__(self, model: str | os.PathLike[str] = "tiny", **options: Any) -> None:
        self._model, self._options = model, options
        self._root: Stream | None = None

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str] = "tiny", **options: Any) -> Self:
        """model: an embedded student, a preset that `cfrt pull` has fetched, or a model's folder. options: engine,
        device, precision, threads, decoder, tile, text, as `Stream` has them. What is wrong is said at the first call
        of the pipeline."""
        return cls(model, **options)

    def to(self, device: str) -> Self:
        """The same pipeline on "cpu", "cuda" or "cuda:N"."""
        self._options = {**self._options, "device": device}
        self._root = None
        return self

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        image: "np.ndarray | Image | None" = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        generator: Any = None,
        output_type: Literal["np", "pil"] = "np",
        return_dict: bool = True,
    ) -> CausalForcingPipelineOutput | tuple[Any]:
        """A clip for every prompt, all from one seed.

        num_frames: None for as many as the model was trained on at once. height, width: None, or the model's own.
        generator: in place of `seed`, anything with `initial_seed()` (a `torch.Generator`): its seed is taken, its
        numbers are not. image: the stream's first frame, of the model's size. ValueError, or what `Stream` raises."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"expected output_type {' or '.join(map(repr, OUTPUT_TYPES))}, got {output_type!r}")
        if num_frames is not None and num_frames < 1:
            raise ValueError(f"expected num_frames of at least 1, got {num_frames}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("expected at least one prompt, got an empty list")
        own = {
            "negative": negative_prompt,
            "guidance": guidance_scale,
            "image": None if image is None else np.asarray(image),
        }
        own = {name: value for name, value in own.items() if value is not None}
        seed = seed if generator is None else generator.initial_seed() % 2**64
        clips = [self._clip(text, seed, own, num_frames, (height, width)) for text in prompts]
        frames = _pictures(clips) if output_type == "pil" else _floats(clips)
        return CausalForcingPipelineOutput(frames) if return_dict else (frames,)

    def _clip(
        self, prompt: str, seed: int, own: dict[str, Any], num_frames: int | None, size: tuple[int | None, int | None]
    ) -> list[np.ndarray]:
        with self._stream(prompt, seed, own) as stream:
            config = stream.config
            check_size(config, *size)
            one_clip = config.first_frame(config.trained_frames // config.unit)
            count = one_clip if num_frames is None else num_frames
            return [frame.pixels for frame in stream.frames(count)]

    def _stream(self, prompt: str, seed: int, own: dict[str, Any]) -> Stream:
        """A new stream, at its start. What a branch cannot change is loaded anew."""
        if own:
            return Stream(prompt, model=self._model, seed=seed, fps="max", journal_bytes=0, **own, **self._options)
        if self._root is None:
            self._root = Stream(prompt, model=self._model, seed=seed, fps="max", journal_bytes=0, **self._options)
        branch = self._root.branch()
        try:
            branch.prompt(prompt)
            branch.reseed(seed)
        except BaseException:
            branch.close()
            raise
        return branch


def check_size(config: ModelConfig, height: int | None, width: int | None) -> None:
    """VideoError unless the size is left open or the model's own."""
    if (height or config.frame_size[0], width or config.frame_size[1]) != config.frame_size:
        expected = " x ".join(map(str, config.frame_size))
        raise VideoError(f"{config.name!r} makes frames of {expected} (height x width), got {height} x {width}")


def _floats(clips: Iterable[list[np.ndarray]]) -> np.ndarray:
    return np.stack([np.stack(clip) for clip in clips]).astype(np.float32) / np.float32(255)


def _pictures(clips: Iterable[list[np.ndarray]]) -> "list[list[Image]]":
    from PIL import Image

    return [[Image.fromarray(pixels) for pixels in clip] for clip in clips]
