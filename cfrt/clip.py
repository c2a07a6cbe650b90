"""Frames that a notebook plays where it shows them. `Stream.clip` makes one."""

import base64
import html
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, overload

import numpy as np

from .encoders import Picture
from .frame import Frame
from .video import write

Form = Literal["mp4", "gif"]
TAGS: dict[str, str] = {
    "mp4": '<video controls loop autoplay muted playsinline src="data:video/mp4;base64,{data}" alt="{alt}"></video>',
    "gif": '<img src="data:image/gif;base64,{data}" alt="{alt}">',
}


class Clip(Sequence[Picture]):
    """A list of frames with a rate. A slice is a clip, an index is a frame.

    form: what a notebook gets: "mp4", or "gif" for viewers that play no video. Small frames are enlarged."""

    def __init__(self, frames: Iterable[Picture], fps: float = 16.0, *, form: Form = "mp4") -> None:
        if form not in TAGS:
            raise ValueError(f"expected form {' or '.join(map(repr, TAGS))}, got {form!r}")
        self.frames, self.fps, self.form = list(frames), fps, form

    def __len__(self) -> int:
        return len(self.frames)

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> "Clip": ...
    def __getitem__(self, index: int | slice) -> "Picture | Clip":
        found = self.frames[index]
        return Clip(found, self.fps, form=self.form) if isinstance(found, list) else found

    def __iter__(self) -> Iterator[Picture]:
        return iter(self.frames)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """(T, H, W, 3) uint8."""
        return np.stack([np.asarray(frame) for frame in self.frames]).astype(dtype or np.uint8, copy=False)

    def __repr__(self) -> str:
        return f"Clip({len(self)} frames, {len(self) / self.fps:.2f} s at {self.fps:g} fps)"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a film as the suffix says (`cfrt.video.write`)."""
        write(self.frames, path, fps=self.fps)

    def _repr_html_(self) -> str:
        if not self.frames:
            return html.escape(repr(self))
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"clip.{self.form}"
            self.save(path)
            data = base64.b64encode(path.read_bytes()).decode()
        return TAGS[self.form].format(data=data, alt=html.escape(repr(self), quote=True))


def panel(facts: Mapping[str, str], frame: Frame | None) -> str:
    """HTML of a few facts beside a frame."""
    rows = "".join(
        f'<tr><td style="text-align:left;opacity:.7">{html.escape(name)}</td>'
        f'<td style="text-align:left">{html.escape(value)}</td></tr>'
        for name, value in facts.items()
    )
    picture = ""
    if frame is not None:
        data = base64.b64encode(frame._repr_png_()).decode()
        picture = f'<img src="data:image/png;base64,{data}" alt="frame {frame.index}" style="margin-right:1em">'
    return f'<div style="display:flex;align-items:center">{picture}<table>{rows}</table></div>'
