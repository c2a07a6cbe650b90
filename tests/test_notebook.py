"""What a notebook shows, the example notebook, and the pipeline that looks like diffusers'."""

import ast
import base64
import json
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from student_fixture import BLUE, RED, save_student

import cfrt
from cfrt.pipeline import CausalForcingPipeline

pytestmark = pytest.mark.cpu

NOTEBOOK = Path(__file__).parents[1] / "examples" / "live.ipynb"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture
def pipe(student: Path) -> Iterator[CausalForcingPipeline]:
    yield (made := CausalForcingPipeline.from_pretrained(student, threads=1))
    if made._root is not None:
        made._root.close()


def film_in(html: str) -> list[np.ndarray]:
    """The frames of the film that a piece of HTML carries."""
    data = re.search(r'src="data:(?:video|image)/\w+;base64,([^"]+)"', html)
    assert data is not None
    with av.open(BytesIO(base64.b64decode(data[1]))) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


# ---------------------------------------------------------------------- display


def test_a_clip_plays_in_a_notebook(student: Path) -> None:
    with cfrt.Stream(RED, model=student, fps="max", seed=7) as stream:
        clip = stream.clip(seconds=1)
        with pytest.raises(ValueError, match="got neither"):
            stream.clip()
    assert (len(clip), repr(clip)) == (16, "Clip(16 frames, 1.00 s at 16 fps)")
    frames = film_in(clip._repr_html_())
    assert (len(frames), frames[0].shape) == (16, (256, 256, 3))
    gif = film_in(cfrt.Clip(clip[:3], form="gif")._repr_html_())
    enlarged = np.asarray(clip[2]).repeat(8, 0).repeat(8, 1).astype(int)
    assert len(gif) == 3
    assert np.abs(gif[2] - enlarged).mean() < 4  # a palette of 256 colours
    assert isinstance(clip[2:5], cfrt.Clip)
    assert np.asarray(clip).shape == (16, 32, 32, 3)
    assert cfrt.Clip([])._repr_html_() == "Clip(0 frames, 0.00 s at 16 fps)"
    with pytest.raises(ValueError, match="'mp4' or 'gif'"):
        cfrt.Clip([], form="avi")  # type: ignore[arg-type]


def test_a_stream_shows_where_it_is_and_loses_no_frame(student: Path) -> None:
    with pytest.warns(cfrt.PromptWarning, match="script"):
        stream = cfrt.Stream("a red <script>alert(1)</script> circle", model=student, fps="max")
    with stream:
        assert "<img" not in stream._repr_html_()
        list(stream.frames(6))
        stream.pause()
        html = stream._repr_html_()
        assert "<script>" not in html
        assert "&lt;script&gt;" in html
        assert "paused, unit 2" in html
        assert 'alt="frame 5"' in html
        stream.resume()
        assert next(stream.frames()).index == 6
    assert "closed" in stream._repr_html_()


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Every code cell, and what its last line would show."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    shown = []
    for cell in cells:
        body = ast.parse("".join(cell["source"])).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), str(NOTEBOOK), "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)
            shown.append(None if value is None else value._repr_html_())
    films = [film_in(html) for html in shown if html is not None and "<table" not in html]
    assert [len(film) for film in films] == [32, 32, 32, 32, 32, 16, 33]
    assert sum(html is not None and "<table" in html for html in shown) == 1
    assert "31 of 31 frames are the same as before" in capsys.readouterr().out


# ---------------------------------------------------------------------- the pipeline


def test_frames_are_those_of_a_stream(pipe: CausalForcingPipeline, student: Path) -> None:
    """Whatever was called before: weights are loaded once, and nothing else is carried over."""
    for prompt, seed in ((RED, 0), (BLUE, 5), (RED, 0)):
        with cfrt.Stream(prompt, model=student, seed=seed, fps="max", threads=1) as stream:
            expected = np.asarray(stream.clip(21))  # six latent frames
        frames = pipe(prompt, seed=seed).frames
        assert (frames.shape, frames.dtype) == ((1, 21, 32, 32, 3), np.float32)
        np.testing.assert_array_equal((255 * frames[0]).round().astype(np.uint8), expected)
    root = pipe._root
    pipe(BLUE)
    assert pipe._root is root


def test_pictures_batches_and_generators(pipe: CausalForcingPipeline, student: Path, tmp_path: Path) -> None:
    both = pipe([RED, BLUE], num_frames=5, generator=torch.Generator().manual_seed(3), output_type="pil").frames
    assert [len(clip) for clip in both] == [5, 5]
    assert both[0][0].size == (32, 32)
    np.testing.assert_array_equal(
        np.stack([np.asarray(picture) for picture in both[1]]),
        (255 * pipe(BLUE, num_frames=5, seed=3, return_dict=False)[0][0]).round().astype(np.uint8),
    )
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    with cfrt.Stream(RED, model=student, image=image, fps="max", threads=1) as stream:
        expected = np.asarray(stream.clip(9)) / np.float32(255)
    np.testing.assert_allclose(pipe(RED, image=image, num_frames=9).frames[0], expected, atol=1e-6)


def test_diffusers_own_tool_takes_the_frames(pipe: CausalForcingPipeline, tmp_path: Path) -> None:
    from diffusers.video_processor import VideoProcessor

    frames = pipe(RED, num_frames=5).frames
    tensor = torch.from_numpy(frames).permute(0, 4, 1, 2, 3) * 2 - 1
    np.testing.assert_allclose(VideoProcessor().postprocess_video(tensor, output_type="np"), frames, atol=1e-6)


def test_what_a_pipeline_refuses(pipe: CausalForcingPipeline) -> None:
    for call, error, words in (
        (lambda: pipe(RED, output_type="pt"), ValueError, "'np' or 'pil'"),
        (lambda: pipe([]), ValueError, "at least one prompt"),
        (lambda: pipe(RED, height=480, width=832), cfrt.VideoError, "frames of 32 x 32"),
        (lambda: pipe(RED, num_frames=0), ValueError, "num_frames of at least 1"),
        (lambda: pipe("zebra"), cfrt.PromptError, "knows no word"),
        (lambda: pipe(RED, negative_prompt=BLUE), cfrt.EngineError, "not guided"),
        (lambda: CausalForcingPipeline.from_pretrained("nothing")(RED), cfrt.WeightsError, "no model 'nothing'"),
    ):
        with pytest.raises(error, match=words):
            call()
    assert len(pipe(RED, num_frames=2).frames[0]) == 2
