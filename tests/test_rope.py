"""Rotary positions: Wan's frequencies, interleaved pairs, no last frame."""

import pytest
import torch

from cfrt.config import PRESETS
from cfrt.nn.rope import frequencies, phases, rotate

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")


def test_frequencies():
    """22 for time, 21 for height and for width, of a head of 128."""
    time, height, width = PRESETS["wan-1.3b-chunkwise-4step"].rope_pairs
    t, h, w = (frequencies(pairs, 10000.0) for pairs in (time, height, width))
    assert (len(t), len(h), len(w)) == (22, 21, 21)
    assert t[:3].tolist() == pytest.approx([1, 0.657933, 0.432876], abs=1e-6)
    assert t[-1].item() == pytest.approx(1.51991e-4, abs=1e-9)
    assert h[:3].tolist() == pytest.approx([1, 0.644947, 0.415956], abs=1e-6)
    assert h[-1].item() == pytest.approx(1.55052e-4, abs=1e-9)


def test_tokens_run_over_frames_rows_columns():
    """Each token's angles, written out."""
    turn = phases((7, 3), (2, 3), (2, 1, 1), 100.0, torch.float64, CPU)
    assert turn.shape == (12, 1, 4)
    for token in range(12):
        frame, row, column = (7, 3)[token // 6], token // 3 % 2, token % 3
        angle = torch.tensor([frame, frame * 0.1, row, column], dtype=torch.float64)
        torch.testing.assert_close(turn[token, 0], torch.polar(torch.ones(4, dtype=torch.float64), angle))


def test_pairs_are_interleaved():
    """(x0, x1) turn together by a quarter: (x0, x1) -> (-x1, x0)."""
    x = torch.arange(4, dtype=torch.float64).view(1, 1, 1, 4)
    quarter = torch.full((1, 1, 2), 1j, dtype=torch.complex128)
    assert rotate(x, quarter).flatten().tolist() == [-1, 0, -3, 2]


@pytest.mark.parametrize("start", [0, 1024, 1_000_000])
def test_only_distance_matters_however_late(start):
    """q . k depends on positions through their difference alone, in fp32 and without a table to run out of."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 2, 64), torch.randn(1, 4, 2, 64)

    def scores(frame: int) -> torch.Tensor:
        now, then = (phases((f,), (2, 2), (12, 10, 10), 100.0, torch.float32, CPU) for f in (frame + 5, frame))
        return torch.einsum("bnhd,bmhd->bhnm", rotate(q, now), rotate(k, then))

    torch.testing.assert_close(scores(start), scores(0), rtol=0, atol=2e-5)


def test_low_precision_is_rotated_in_fp32():
    turn = phases((3,), (2, 2), (12, 10, 10), 100.0, torch.bfloat16, CPU)
    x = torch.randn(1, 4, 2, 64).bfloat16()
    assert turn.dtype == torch.complex64
    assert torch.equal(rotate(x, turn), rotate(x.float(), turn).bfloat16())
