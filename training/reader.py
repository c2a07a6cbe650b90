"""The exact reader: pixels of `training.worlds` back to factors, positions and how well a drawing of them fits.

Nothing is learnt. The background is the one whose least-squares phase leaves the smallest median error; the object is
what remains; its outline is compared with every shape and size by soft intersection over union. On real clips it is
exact to sub-pixel positions (tests/test_reader.py), so what it says of a generated clip is a measurement.

Shapes: B clips, T frames; a clip must hold one scene (cut a clip at its switch before reading)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training import worlds
from training.worlds import (
    BACKGROUND,
    BACKGROUNDS,
    COLOUR,
    DIRECTION,
    FACTORS,
    HEADING,
    PALETTE,
    RADIUS,
    SHAPE,
    SIDE,
    SIZE,
    SPEED,
    STEP,
)

VALID_IOU = 0.7  # design: a frame shows a valid object when its outline overlaps the template this much
START_FRAMES = 5  # the first two units: where the direction of a start is read
_OUTLIER = 0.12  # colour distance past which a pixel is not background
_COARSE, _FINE = 4, 2  # every which pixel picks the background, and fits its waves
_CHUNK = 24  # frames read together: what stays in the cache
_FAINT = 0.3  # coverage below this does not count towards the centre of mass


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the reader saw. `factors` uses the indices of `worlds.FACTORS`."""

    factors: Tensor  # [B, 6] long
    position: Tensor  # [B, T, 2] pixels
    overlap: Tensor  # [B, T] IoU with the re-drawn object
    residual: Tensor  # [B, T] mean squared error to the re-drawn frame
    step: Tensor  # [B, T - 1] pixels moved

    @staticmethod
    def cat(parts: Sequence[Reading]) -> Reading:
        """Clips of several readings, in order."""
        names = Reading.__dataclass_fields__
        return Reading(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    @property
    def valid(self) -> Tensor:
        return self.overlap > VALID_IOU


def read(video: Tensor) -> Reading:
    """Read [B, T, 3, SIDE, SIDE] float in [0, 1]. A single frame shows neither direction nor speed: both read 0."""
    chunk = max(1, _CHUNK // video.shape[1])
    return Reading.cat([_read(clips.clamp(0, 1).float()) for clips in video.split(chunk)])


def _read(video: Tensor) -> Reading:
    count, frames = video.shape[:2]
    background, stage = _read_background(video)
    colour, ink, position = _read_colour(video, stage)
    shape, size, offset = _read_outline(ink, position)
    position = position - offset[:, None]
    alpha = _template(position.flatten(0, 1), size.repeat_interleave(frames), shape.repeat_interleave(frames)).view(
        ink.shape
    )
    drawn = torch.lerp(stage, _object(colour, position), alpha[:, :, None])
    step = (position[:, 1:] - position[:, :-1]).norm(dim=-1)
    factors = torch.zeros(count, len(FACTORS), dtype=torch.long)
    factors[:, SIZE], factors[:, COLOUR], factors[:, SHAPE] = size, colour, shape
    if frames > 1:
        factors[:, DIRECTION] = read_direction(position[:, :START_FRAMES])
        factors[:, SPEED] = (step.median(dim=1).values > STEP.mean()).long()
    factors[:, BACKGROUND] = background
    residual = (video - drawn).square().mean((2, 3, 4))
    return Reading(factors=factors, position=position, overlap=_iou(ink, alpha), residual=residual, step=step)


def read_direction(position: Tensor) -> Tensor:
    """[B, T, 2] -> [B] index of the heading nearest to the displacement from the first to the last of these frames."""
    return ((position[:, -1] - position[:, 0]) @ HEADING.T).argmax(-1)


def _read_background(video: Tensor) -> tuple[Tensor, Tensor]:
    """Index [B] of the background and its picture behind the object [B, T, 3, SIDE, SIDE]."""
    coarse = video[..., ::_COARSE, ::_COARSE]
    index = torch.stack([_misfit(coarse, picture) for picture in BACKGROUNDS[..., ::_COARSE, ::_COARSE]], 1).argmin(1)
    pictures = BACKGROUNDS[index].flatten(2)  # [B, 3, 3 P]
    amplitude = _fit_waves(video[..., ::_FINE, ::_FINE], BACKGROUNDS[index][..., ::_FINE, ::_FINE])  # [B, T, 2]
    return index, torch.baddbmm(pictures[:, :1], amplitude, pictures[:, 1:]).view(video.shape)


def _misfit(video: Tensor, picture: Tensor) -> Tensor:
    """[B] median colour error of a background [3, 3, h, w] (still, sine, cosine), half of which no object hides."""
    basis = picture.flatten(1)
    fit = torch.addmm(basis[:1], _fit_waves(video, picture.expand(len(video), -1, -1, -1, -1)).flatten(0, 1), basis[1:])
    return (video - fit.view(video.shape)).abs().sum(2).flatten(2).median(-1).values.mean(1)


def _fit_waves(video: Tensor, picture: Tensor) -> Tensor:
    """Amplitudes [B, T, 2] of the two waves of a background picture [B, 3, 3, h, w], by least squares on each frame.

    Fitted three times, each time without the pixels that the fit before did not explain: those of the object."""
    still, waves = picture[:, 0, None], picture[:, 1:].flatten(2)  # [B, 1, 3, h, w], [B, 2, P]
    moving = video - still
    products = torch.stack([waves[:, 0] ** 2, waves[:, 0] * waves[:, 1], waves[:, 1] ** 2], 2)  # [B, P, 3]
    fit = torch.zeros_like(moving)
    for _ in range(3):
        keep = ((moving - fit).square().sum(2, keepdim=True) < _OUTLIER**2).to(moving.dtype).expand_as(moving)
        aa, ab, bb = (keep.flatten(2) @ products).unbind(-1)  # normal equations, [B, T] each
        a, b = ((keep * moving).flatten(2) @ waves.mT).unbind(-1)
        determinant = (aa * bb - ab * ab).clamp(min=1e-6)
        amplitude = torch.stack([bb * a - ab * b, aa * b - ab * a], -1) / determinant[..., None]
        amplitude = amplitude / amplitude.norm(dim=-1, keepdim=True).clamp(min=1.0)
        fit = (amplitude @ waves).view(moving.shape)
    return amplitude


def _object(colour: Tensor, position: Tensor) -> Tensor:
    """[B, T, 3, SIDE, 1]: the object's colour on every row."""
    count, frames = position.shape[:2]
    each = PALETTE[colour].repeat_interleave(frames, 0)
    return worlds.shaded(each, position.flatten(0, 1)).view(count, frames, 3, SIDE, 1)


def _read_colour(video: Tensor, stage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Colour index [B], coverage [B, T, SIDE, SIDE] and centre of mass [B, T, 2] of what is not background."""
    excess = video - stage
    energy = excess.square().sum(2)  # [B, T, SIDE, SIDE]
    core = (energy >= 0.64 * energy.amax((2, 3), keepdim=True)).to(energy.dtype)
    mean = (video.flatten(3) @ core.flatten(2)[..., None])[..., 0] / core.sum((2, 3))[..., None]  # [B, T, 3]
    colour = (mean[:, :, None] - PALETTE).norm(dim=-1).mean(1).argmin(1)
    position = _centre(core)
    for every in (_FINE, 1):  # the light depends on the centre, the centre on the coverage
        rows = slice(None, None, every)
        towards = _object(colour, position)[..., rows, :] - stage[..., rows, rows]
        ink = (excess[..., rows, rows] * towards).sum(2).div_(towards.square_().sum(2).clamp_(min=1e-3)).clamp_(0, 1)
        position = _centre(ink * (ink > _FAINT), every)
    return colour, ink, position


def _centre(mass: Tensor, every: int = 1) -> Tensor:
    """Centre of mass [B, T, 2] in pixels, (x, y), of a picture of each `every`-th pixel; (0, 0) where there is none."""
    along = worlds.X[0, ::every]
    return torch.stack([mass.sum(2) @ along, mass.sum(3) @ along], -1) / (mass.sum((2, 3)) + 1e-6)[..., None]


def _template(position: Tensor, size: Tensor, shape: Tensor) -> Tensor:
    return worlds.coverage(position, RADIUS[size], shape)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    return torch.minimum(a, b).sum((-2, -1)) / torch.maximum(a, b).sum((-2, -1)).clamp(min=1.0)


def _read_outline(ink: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape [B], size [B] and their offset of the centre of mass [B, 2], judged on up to 8 frames."""
    count, frames = ink.shape[:2]
    looked = torch.linspace(0, frames - 1, min(frames, 8)).long()
    sample, centre = ink[:, looked], position[:, looked]
    pairs = [(shape, size) for shape in range(len(FACTORS["shape"])) for size in range(len(RADIUS))]
    overlaps = []
    for shape, size in pairs:
        rows = count * len(looked)
        at = (centre - _OFFSETS[shape, size]).flatten(0, 1)
        drawn = _template(at, torch.full((rows,), size), torch.full((rows,), shape)).view(sample.shape)
        overlaps.append(_iou(sample, drawn).mean(1))
    best = torch.tensor(pairs)[torch.stack(overlaps, 1).argmax(1)]
    return best[:, 0], best[:, 1], _OFFSETS[best[:, 0], best[:, 1]]


def _centre_offsets() -> Tensor:
    """[4, 2, 2]: centre of mass minus position for every shape and size (a triangle's differ)."""
    middle = torch.tensor([[SIDE / 2, SIDE / 2]])
    offsets = torch.zeros(len(FACTORS["shape"]), len(RADIUS), 2)
    for shape in range(len(offsets)):
        for size in range(len(RADIUS)):
            alpha = _template(middle, torch.tensor([size]), torch.tensor([shape]))[0]
            alpha = alpha * (alpha > _FAINT)
            centre = torch.stack([(alpha * worlds.X).sum(), (alpha * worlds.Y).sum()]) / alpha.sum()
            offsets[shape, size] = centre - SIDE / 2
    return offsets


_OFFSETS = _centre_offsets()
