"""The full-size run at a fraction of its size: it runs, and agrees with diffusers."""

import pytest

from benchmarks import full_size

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(("precision", "most"), [("fp32", 2e-6), ("bf16", 0.05)])
def test_smoke(precision, most):
    row = full_size.one_unit(full_size.model_config(smoke=True), precision)
    assert row["finite"]
    assert len(row["seconds"]["passes"]) == 4
    assert 0 < row["diffusers"]["max"] < most
