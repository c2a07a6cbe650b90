"""What the units of a stream are made from: blends, and what may be forgotten."""

import numpy as np
import pytest

import cfrt
from cfrt.timeline import Timeline, slerp

pytestmark = pytest.mark.cpu


def test_slerp_goes_along_the_arc() -> None:
    a, b = (
        np.array([[2.0, 0], [0, 0], [1, 0], [1, 1]], np.float32),
        np.array([[0, 4.0], [1, 1], [3, 0], [-1, -1]], np.float32),
    )
    middle = slerp(a, b, 0.5)
    np.testing.assert_allclose(middle[0], 3 * np.array([1, 1]) / np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(middle[1:], [[0.5, 0.5], [2, 0], [0, 0]], atol=1e-6)
    for weight, end in ((0.0, a), (1.0, b)):
        np.testing.assert_allclose(slerp(a, b, weight), end, atol=1e-6)
    timeline = Timeline("a", a)
    timeline.change(3, "b", b, blend_units=1, blend="slerp")
    np.testing.assert_allclose(timeline.at(3).rows, middle)


def test_a_timeline_forgets_what_nobody_can_ask_for() -> None:
    rows = np.zeros((1, 2), np.float32)
    timeline = Timeline("0", rows)
    for unit in range(1, 100):
        timeline.change(unit, str(unit), rows)
        timeline.reseed(unit, unit)
    timeline.forget(90)
    assert timeline.changes()[0] == (90, "90")
    assert (timeline.at(95).text, timeline.seed(95)) == ("95", 95)
    with pytest.raises(cfrt.EngineError, match="unit 89 is not remembered"):
        timeline.at(89)
