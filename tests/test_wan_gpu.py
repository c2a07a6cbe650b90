"""The official models' kind on a GPU: the same stream as on the CPU, to what fp32 on two devices may differ by."""

from pathlib import Path

import numpy as np
import pytest
from wan_fixture import FOX, save_wan, wan_config

import cfrt

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("changes", [{}, {"solver": "euler", "guidance": 3.0}], ids=["student", "teacher"])
@pytest.mark.parametrize("decoder", [None, "taehv"])
def test_a_gpu_makes_the_same_frames(
    changes: dict[str, object], decoder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CFRT_CACHE", str(tmp_path / "cache"))
    model = save_wan(tmp_path / "model", wan_config(**changes), taehv=True)
    made = []
    for device in ("cpu", "cuda"):
        with cfrt.Stream(FOX, model=model, device=device, decoder=decoder, precision="fp32", fps="max") as stream:
            made.append(np.stack([frame.pixels for frame in stream.frames(13)]).astype(int))
    assert made[0].std(axis=(1, 2, 3)).min() > 4, "a plane shows no difference"
    assert np.abs(made[0] - made[1]).max() <= 3  # levels of 255: convolutions on a GPU round to TF32


def test_a_snapshot_goes_to_the_gpu_and_stages_are_nvtx_ranges_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    ranges: list[str] = []
    push = torch.cuda.nvtx.range_push
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: ranges.append(name) or push(name))
    monkeypatch.setenv("CFRT_CACHE", str(tmp_path / "cache"))
    model = save_wan(tmp_path / "model", wan_config())
    options = {"model": model, "precision": "fp32", "fps": "max"}
    with cfrt.Stream(FOX, **options) as cpu, cfrt.Stream(FOX, device="cuda", **options) as gpu:
        list(cpu.frames(13))
        gpu.restore(cpu.snapshot(portable=True))
        there, here = (np.stack([frame.pixels for frame in one.frames(12)]).astype(int) for one in (gpu, cpu))
        assert np.abs(there - here).max() <= 3
        cut = gpu.config.first_frame(gpu.rewind(2))
        assert [frame.index for frame in gpu.frames(2)] == [cut, cut + 1]
    assert {"unit", "noise", "denoise 0", "decode"} <= set(ranges)
