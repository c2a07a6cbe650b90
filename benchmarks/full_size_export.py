"""Exporting the 1.3B model at 480 x 832 with random weights on this machine: time, memory, disk, and what came out.

    python -m benchmarks.full_size_export --precision bf16

runs `python -m export.trt` in a process of its own, and writes its log, its manifest and the measurements to
benchmarks/results/export_1.3b_PRECISION.json. Weights are random, so pixels are noise; sizes, graphs, engines and the
verification are those of the released model. Memory is that of all of the export's processes together, sampled; seconds
are of the clock, and of the processor beside them, since a shared machine makes the first longer.
"""

import argparse
import json
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cfrt.bundle import MANIFEST

from .machine import header

RESULTS = Path(__file__).parent / "results"
EVERY = 0.2
"""Seconds between two looks at the memory."""
MODEL = "wan-1.3b-framewise-2step"


def resident(pid: int) -> int:
    """Bytes that a process and its children hold; 0 once they have ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")), 0)
    return 1024 * own + sum(resident(int(child)) for child in children)


def seen(line: str) -> str:
    """A line as it stands in the end: progress bars write over themselves, with blanks at last."""
    kept = [part for part in line.split("\r") if part.strip()]
    return kept[-1].rstrip() if kept else ""


def export(arguments: list[str], out: Path) -> dict[str, Any]:
    """The measurements, the log and the manifest of one export."""
    command = [sys.executable, "-m", "export.trt", *arguments, "--out", str(out)]
    begin, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(EVERY)
        seconds = time.perf_counter() - begin
        log.seek(0)
        said = [seen(line) for line in log.read().decode().split("\n")]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit("\n".join(said))
    manifest = json.loads((out / MANIFEST).read_text())
    return {
        "command": shlex.join(["python", "-m", "export.trt", *arguments, "--out", "bundle"]),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gb": round(peak / 1e9, 2),
        "disk_gb": round(sum(entry["bytes"] for entry in manifest["files"].values()) / 1e9, 2),
        "log": [line.replace(str(out), "bundle") for line in said if line],
        "manifest": manifest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--decoder", default="wan")
    parser.add_argument("--json", type=Path, help="where to write; by default among the results")
    options = parser.parse_args()
    arguments = ["--model", options.model, "--weights", "random", "--decoder", options.decoder]
    arguments += ["--precision", options.precision, "--verify", "segments", "--target", "sm89"]
    folder = Path(tempfile.mkdtemp(prefix="cfrt-export-"))
    try:
        found = header() | export(arguments, folder / "bundle")
    finally:
        shutil.rmtree(folder)
    path = options.json or RESULTS / f"export_1.3b_{options.precision}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{found['seconds']} s, {found['peak_gb']} GB of memory, {found['disk_gb']} GB on disk: {path}")


if __name__ == "__main__":
    main()
