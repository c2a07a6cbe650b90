"""Theorem 7 for the native engine: after warm-up nothing is allocated, and 10,000 units are as quick as the first."""

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from sampling_fixture import sampled
from student_fixture import random_weights, small_config

from cfrt.engines import Spec
from cfrt.engines.native import NativeEngine

pytestmark = pytest.mark.cpu

COUNTER = """
#include <stddef.h>
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
static long count;
long allocations(void) { return __atomic_load_n(&count, __ATOMIC_SEQ_CST); }
static void seen(void) { __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST); }
void *malloc(size_t n) { seen(); return __libc_malloc(n); }
void *calloc(size_t n, size_t m) { seen(); return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { seen(); return __libc_realloc(p, n); }
void *memalign(size_t a, size_t n) { seen(); return __libc_memalign(a, n); }
void *aligned_alloc(size_t a, size_t n) { seen(); return __libc_memalign(a, n); }
int posix_memalign(void **p, size_t a, size_t n) { seen(); return (*p = __libc_memalign(a, n)) ? 0 : 12; }
"""


def engine_of(precision: str, threads: int, **changes: Any) -> NativeEngine:
    config = small_config(steps=(1.0, 0.5), first_steps=None, **changes)
    engine = NativeEngine()
    engine.prepare(Spec(config=config, weights=random_weights(config), precision=precision, seed=5, threads=threads))
    engine.set_text(np.ones((4, 16), np.float32))
    return engine


def count_allocations(precision: str, depth: int) -> tuple[list[int], list[int]]:
    """How often memory is asked for by each unit's passes and by a change of text, over 200 units, the first 20 left
    out: the different numbers that occur. Needs COUNTER before the C library."""
    count = ctypes.CDLL(None).allocations
    engine = engine_of(precision, threads=2, depth=depth, unit=3, window=7, sinks=2)
    dit, x, out, text = engine._dit, engine.noise(0, 0), engine.noise(0, 0), np.ones((4, 16), np.float32)
    owed, passes, texts = None, [], []
    for unit in range(200):
        before = count()
        dit.denoise(x, 1000.0, unit, out, owed)
        dit.denoise(x, 500.0, unit, out, None)
        after = count()
        dit.set_text(text)
        passes.append(after - before)
        texts.append(count() - after)
        owed = x
        if unit % 5 == 0:
            dit.commit(x, unit)
            owed = None
    return sorted(set(passes[20:])), sorted(set(texts[20:]))


@pytest.mark.skipif(sys.platform != "linux", reason="counts what the GNU C library is asked for")
def test_nothing_is_allocated_after_warm_up(tmp_path: Path) -> None:
    """What is left is the binding's own: the same few for each call, however many layers there are."""
    source, library = tmp_path / "counter.c", tmp_path / "counter.so"
    source.write_text(COUNTER)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    cases = [(precision, depth) for precision in ("fp32", "bf16", "int8") for depth in (1, 5)]
    code = f"import json, test_native_memory as t; print(json.dumps([t.count_allocations(*c) for c in {cases}]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=True,
    )
    counted = json.loads(done.stdout)
    assert all(counts == counted[0] for counts in counted), f"allocations that depend on the model: {counted}"
    passes, texts = counted[0]
    assert max(passes) <= 12, f"allocations within a pass: {passes}"
    assert max(texts) <= 4, f"allocations within a change of text: {texts}"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_ten_thousand_units_are_flat(precision: str) -> None:
    """Resident memory stays within 1 MB; the last thousand units take at most half as long again as the second."""
    engine = engine_of(precision, threads=1)
    config, owed, spans, resident = engine._config, None, [], []
    for unit in range(10_000):
        begin = time.process_time()
        x = sampled(engine, config, unit, commit=owed)
        engine.decode(x)
        owed = x
        spans.append(time.process_time() - begin)
        if unit % 1000 == 999:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"))
    assert np.isfinite(x).all()
    assert resident[-1] - resident[1] < 1_000_000
    assert median(spans[-1000:]) < 1.5 * median(spans[1000:2000])
