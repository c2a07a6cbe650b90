"""Streams of small students with random weights, closed when the test ends; the fixtures are in conftest.py."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from sampling_fixture import EULER
from student_fixture import RED, save_student, small_config

import cfrt

CONFIGS = (
    small_config(),
    small_config(unit=3, window=7, sinks=2),
    small_config(window=3, sinks=1),
    small_config(**EULER),
)

Open = Callable[..., cfrt.Stream]


@contextmanager
def saved() -> Iterator[Callable[[int], Path]]:
    """The folder of each of CONFIGS."""
    with TemporaryDirectory() as root:
        yield cache(lambda index: save_student(Path(root) / str(index), CONFIGS[index]))


@contextmanager
def opening(folders: Callable[[int], Path]) -> Iterator[Open]:
    """Makes streams at full speed."""
    streams = []

    def make(prompt: str = RED, config: int = 0, **changes: Any) -> cfrt.Stream:
        options = {"model": folders(config), "fps": "max", "seed": 7, "precision": "fp32", **changes}
        streams.append(cfrt.Stream(prompt, **options))
        return streams[-1]

    yield make
    for stream in streams:
        stream.close()


def pixels(frames: Iterable[cfrt.Frame]) -> np.ndarray:
    return np.stack([frame.pixels for frame in frames])


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("waited ten seconds in vain")
