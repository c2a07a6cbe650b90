"""A paced stream for many minutes: does its clock drift, does its memory grow, how even are its units?

    python -m benchmarks.soak --minutes 10 --json benchmarks/results/soak.json

The embedded student at its own 16 frames a second, one thread, with a journal that is full before the first minute is
over, so that growth would show. A change of prompt every ten seconds, a pause of one second and a rewind of four units
every minute: what a person at the page does.

Drift is how far the last frame of a stretch, from one pause or rewind to the next, came from where its first one had
it, in frames, less what the clock says that stalls have moved its beat on purpose (`Stats.stalled`). What stalls have
cost in all is counted apart; on an idle machine there are none.
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
    """The times of frames that nothing interrupts, and by how many seconds stalls have moved their beat."""

    begun: float
    """`Stats.stalled` before it."""
    times: list[float] = field(default_factory=list)
    stalled: float = 0.0

    def drift(self, fps: float) -> float:
        """Frames by which the last one came later than the first one's time has it, but for stalls."""
        return (self.times[-1] - self.times[0] - self.stalled) * fps - (len(self.times) - 1)


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
        stats, fps, config = stream.stats, stream.config.fps, stream.config
        what = (
            f"{config.name}, {stream.engine}, {stream.precision}, 1 thread, {fps:.0f} fps, {len(config.steps)} steps, "
            f"window {config.window}, decode included"
        )
    drifts = [stretch.drift(fps) for stretch in stretches]
    late = np.concatenate([np.diff(stretch.times) * fps - 1 for stretch in stretches])
    warm = [mb for at, mb in memory if at >= min(WARM_SECONDS, seconds / 2)]
    return {
        "what": what,
        "seconds": seconds,
        "load": os.getloadavg()[1],
        "niceness": os.nice(0),
        "frames": stats.frames,
        "drift_frames": {"largest": max(drifts, key=abs), "stretches": len(drifts)},
        "stalls": {"count": stats.stalls, "frames_lost": stats.stalled * fps},
        "interval_error_frames": {"p50": float(np.median(late)), "p99": float(np.quantile(late, 0.99))},
        "unit_ms": {name: 1000 * getattr(stats.unit, name) for name in ("p50", "p95", "p99")},
        "unit_p99_over_p50": stats.unit.p99 / stats.unit.p50,
        "change_to_pixel_ms": {name: 1000 * getattr(stats.change_to_pixel, name) for name in ("p50", "p95")},
        "dropped": stats.dropped,
        "memory": {"first_mb": warm[0], "last_mb": warm[-1], "growth_mb": warm[-1] - warm[0]},
    }


def _watch(stream: cfrt.Stream, seconds: float) -> tuple[list[Stretch], list[tuple[float, float]]]:
    """The stretches between a pause or a rewind and the next, and resident memory every ten seconds."""
    stretches = [Stretch(0.0)]
    memory: list[tuple[float, float]] = []
    begin, tens = perf_counter(), 0
    for frame in stream.frames():
        now = perf_counter()
        stretches[-1].times.append(now)
        stretches[-1].stalled = stream.stats.stalled - stretches[-1].begun
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
            stretches.append(Stretch(stream.stats.stalled))
        if tens % 6 == 0:
            unit = stream.rewind(4)
            assert unit == frame.unit - 3
            stretches.append(Stretch(stream.stats.stalled))
    return [stretch for stretch in stretches if stretch.times], memory


if __name__ == "__main__":
    sys.exit(main())
