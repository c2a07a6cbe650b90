"""`reference_compat`: its draws of noise, its limits, its command. tests/test_released.py holds whole clips against the
released loops."""

from dataclasses import replace

import pytest
import torch
from student_fixture import save_student, small_config

import cfrt
from cfrt import cli
from cfrt.engines import Spec, choose
from cfrt.errors import ConfigError, EngineError
from cfrt.nn.reference_noise import ReferenceNoise

pytestmark = pytest.mark.cpu

TWO = small_config(sinks=1)


def test_a_stream_makes_one_clip(tmp_path):
    """All frames of the clip come; what is beyond it is an error that says why."""
    folder = save_student(tmp_path / "model", TWO)
    total = TWO.first_frame(TWO.trained_frames)
    with cfrt.Stream("a red circle", model=folder, reference_compat=True, fps="max") as stream:
        assert stream.engine == "torch"
        assert "reference noise" in stream.refusals["native"]
        frames = list(stream.frames(total))
        assert [frame.index for frame in frames] == list(range(total))
        with pytest.raises(EngineError, match="clip of 6 latent frames"):
            next(stream.frames(1))


def test_what_would_draw_noise_again_is_refused_before_it_does(tmp_path):
    folder = save_student(tmp_path / "model", TWO)
    with cfrt.Stream("a red circle", model=folder, reference_compat=True, fps="max") as stream:
        first = [next(stream.frames()).index for _ in range(3)]
        for call in (lambda: stream.reseed(1), lambda: stream.rewind(1), stream.snapshot, stream.branch):
            with pytest.raises(EngineError, match="leave it out"):
                call()
        stream.pause()
        stream.resume()
        assert [*first, next(stream.frames()).index] == [0, 1, 2, 3]


def test_units_come_once_and_in_order():
    noise = ReferenceNoise(TWO.as_reference(), 0, torch.float32, torch.device("cpu"), prefix=0)
    noise(0, 0)
    with pytest.raises(EngineError, match=r"expected unit and step \(0, 1\), got \(1, 0\)"):
        noise(1, 0)


def test_given_frames_are_not_drawn():
    """After a picture the next unit has the first step list, and the clip's noise starts with it."""
    noise = ReferenceNoise(TWO.as_reference(), 3, torch.float32, torch.device("cpu"), prefix=1)
    torch.manual_seed(3)
    clip = torch.randn(1, TWO.trained_frames - 1, TWO.latent_channels, *TWO.latent_grid)
    assert torch.equal(noise(1, 0), clip[:, :1])
    for step in (1, 2, 3):
        assert torch.equal(noise(1, step)[0], torch.randn(1, TWO.latent_channels, *TWO.latent_grid))
    assert torch.equal(noise(2, 0), clip[:, 1:2])


def test_sinks_at_their_true_distance_belong_to_it():
    with pytest.raises(ConfigError, match="absolute"):
        replace(TWO, reference_compat=True)
    assert TWO.as_reference().sink_position == "absolute"


def test_the_native_engine_is_not_chosen():
    spec = Spec(config=TWO.as_reference(), weights={})
    with pytest.raises(EngineError, match="cannot do reference noise"):
        choose("native", spec)


def test_the_command(tmp_path, capsys):
    folder = save_student(tmp_path / "model", TWO)
    arguments = ["generate", "a red circle", "--model", str(folder), "--seconds", "1", "-o", str(tmp_path / "x.png")]
    assert cli.main([*arguments, "--reference-compat"]) == 0
    assert "torch" in capsys.readouterr().out
