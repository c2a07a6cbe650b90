"""A paced stream for many minutes: does its clock drift, does its memory grow, how even are its units?

    python -m benchmarks.soak --minutes 10 --json benchmarks/results/soak.json

The embedded student at its own 16 frames a second, one thread, with a journal that is full before the first minute is
over, so that growth would show. A change of prompt every ten seconds, a pause of one second and a rewind of four units
every minute: what a person at the page does.

Drift is how far the last frame of a stretch without a pause or a jump came from where the beat had it at the first one,
in frames; stalls of more than half a frame move the beat (`cfrt.clock`), are drift, and are counted apart.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np

import cfrt
from cfrt.clock import JITTER

from .machine import header, resident

PROMPTS = (
    "a large red circle moving left",
    "a small blue square moving up",
    "a large yellow circle moving right over the ocean",
)
JOURNAL_BYTES = 4 * 2**20
"""Some forty seconds of the student."""

WARM_SECONDS = 60.0
"""After which memory is compared with itself."""


@dataclass
class Stretch:
    """Frames between two events that move the beat on purpose."""

    fps: float
    times: list[float] = field(default_factory=list)

    def drift(self) -> float:
        """Frames by which the last one came later than the first one's beat."""
        if len(self.times) < 2:
            return 0.0
        return (self.times[-1] - self.times[0]) * self.fps - (len(self.times) - 1)

    def stalls(self) -> int:
        """Frames more than `JITTER` late after the one before: each has moved the beat."""
        return int((np.diff(self.times) * self.fps - 1 > JITTER).sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = {**header(), **soak(60 * arguments.minutes)}
    print(json.dumps(report, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if abs(report["drift_frames"]["largest"]) <= 1 and report["memory"]["growth_mb"] < 8 else 1


def soak(seconds: float) -> dict[str, Any]:
    with cfrt.Stream(PROMPTS[0], threads=1, journal_bytes=JOURNAL_BYTES) as stream:
        stretches, memory = _watch(stream, seconds)
        stats = stream.stats
    drifts = [stretch.drift() for stretch in stretches]
    late = np.concatenate([np.diff(stretch.times) * stream.config.fps - 1 for stretch in stretches])
    warm = [mb for at, mb in memory if at >= min(WARM_SECONDS, seconds / 2)]
    return {
        "what": f"{stream.config.name}, {stream.engine}, {stream.precision}, 1 thread, {stream.config.fps} fps, "
        f"steps {len(stream.config.steps)}, window {stream.config.window}, decode included",
        "seconds": seconds,
        "load": os.getloadavg()[1],
        "frames": stats.frames,
        "stretches": len(stretches),
        "drift_frames": {"largest": max(drifts, key=abs), "sum": sum(drifts)},
        "stalls": sum(stretch.stalls() for stretch in stretches),
        "interval_error_frames": {"p50": float(np.median(late)), "p99": float(np.quantile(late, 0.99))},
        "unit_ms": {name: 1000 * getattr(stats.unit, name) for name in ("p50", "p95", "p99")},
        "unit_p99_over_p50": stats.unit.p99 / stats.unit.p50,
        "change_to_pixel_ms": {name: 1000 * getattr(stats.change_to_pixel, name) for name in ("p50", "p95")},
        "dropped": stats.dropped,
        "memory": {"first_mb": warm[0], "last_mb": warm[-1], "growth_mb": warm[-1] - warm[0]},
    }


def _watch(stream: cfrt.Stream, seconds: float) -> tuple[list[Stretch], list[tuple[float, float]]]:
    """The times of the frames, and resident memory every ten seconds."""
    fps = stream.config.fps
    stretches, memory = [Stretch(fps)], []
    begin, tens = perf_counter(), 0
    for frame in stream.frames():
        now = perf_counter()
        stretches[-1].times.append(now)
        if now - begin >= seconds:
            break
        if now - begin < 10 * (tens + 1):
            continue
        tens += 1
        memory.append((now - begin, resident()))
        stream.prompt(PROMPTS[tens % len(PROMPTS)], recache=tens % 2 == 0)
        if tens % 6 == 3:
            stream.pause()
            sleep(1.0)
            stream.resume()
            stretches.append(Stretch(fps))
        if tens % 6 == 0:
            unit = stream.rewind(4)
            assert unit == frame.unit - 3
            stretches.append(Stretch(fps))
    return stretches, memory


if __name__ == "__main__":
    sys.exit(main())
