"""A contact sheet: a film on one page. Frames evenly spaced in time, the time under each, the prompt above its rows."""

import numpy as np

from .font import HEIGHT, WIDTH, render

COLUMNS = 8
CELLS = 4 * COLUMNS
"""At most this many frames on a sheet."""
CELL_SIDE = 128
"""Pixels that the shorter side of a small frame is enlarged to."""
GAP = 8
PAPER, INK, FAINT = 255, 32, 128  # levels of grey
CAPTION_DOTS, TIME_DOTS = 2, 1  # pixels to a dot of the font


class Sheet:
    """Collects frames in bounded memory: every k-th one, where k doubles whenever twice `CELLS` are kept."""

    def __init__(self, scale: int | None = None) -> None:
        self._scale = scale
        self._kept: list[tuple[np.ndarray, float, str]] = []
        self._every = 1
        self._count = 0

    def add(self, pixels: np.ndarray, time: float, prompt: str = "") -> None:
        """The next frame of the film: (H, W, 3) uint8, seconds from its start, what it was made from."""
        if self._count % self._every == 0:
            self._kept.append((pixels, time, prompt))
            if len(self._kept) == 2 * CELLS:
                self._kept = self._kept[::2]
                self._every *= 2
        self._count += 1

    def draw(self) -> np.ndarray:
        """The sheet, (H, W, 3) uint8."""
        stride = -(-len(self._kept) // CELLS)
        chosen = self._kept[::stride]
        scale = self._scale or max(1, CELL_SIDE // min(chosen[0][0].shape[:2]))
        bands: list[np.ndarray] = []
        for first, last in _runs([prompt for *_, prompt in chosen]):
            cells = [_cell(pixels, time, scale) for pixels, time, _ in chosen[first:last]]
            width = COLUMNS * cells[0].shape[1]
            if caption := chosen[first][2]:
                bands.extend(_band(line, width) for line in _lines(caption, width))
            bands.extend(_row(cells[at : at + COLUMNS], width) for at in range(0, len(cells), COLUMNS))
        return np.pad(np.vstack(bands), ((GAP, GAP), (GAP, 0), (0, 0)), constant_values=PAPER)


def _runs(items: list[str]) -> list[tuple[int, int]]:
    """Half-open ranges of equal neighbours."""
    starts = [at for at in range(len(items)) if at == 0 or items[at] != items[at - 1]]
    return list(zip(starts, [*starts[1:], len(items)], strict=True))


def _cell(pixels: np.ndarray, time: float, scale: int) -> np.ndarray:
    """A frame with its time below and a margin to the right and below."""
    picture = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    label = np.full((HEIGHT * TIME_DOTS, picture.shape[1], 3), PAPER, np.uint8)
    _print(label, f"{time:.2f} s", TIME_DOTS, FAINT)
    stacked = np.vstack([picture, np.full((GAP // 2, picture.shape[1], 3), PAPER, np.uint8), label])
    return np.pad(stacked, ((0, GAP), (0, GAP), (0, 0)), constant_values=PAPER)


def _row(cells: list[np.ndarray], width: int) -> np.ndarray:
    row = np.hstack(cells)
    return np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=PAPER)


def _band(line: str, width: int) -> np.ndarray:
    """One line of a caption across the sheet."""
    band = np.full((HEIGHT * CAPTION_DOTS + GAP // 2, width, 3), PAPER, np.uint8)
    _print(band, line, CAPTION_DOTS, INK)
    return band


def _print(canvas: np.ndarray, text: str, dots: int, level: int) -> None:
    ink = render(text, dots)[:, : canvas.shape[1]]
    canvas[: len(ink), : ink.shape[1]][ink] = level


def _lines(caption: str, width: int) -> list[str]:
    """The caption in lines that fit the width, broken between words."""
    room = max(1, width // (WIDTH * CAPTION_DOTS))
    lines = [""]
    for word in caption.split():
        joined = f"{lines[-1]} {word}".strip()
        if len(joined) > room and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = joined
    return lines
