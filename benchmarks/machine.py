"""What a number must be read with: the processor, the date, the versions."""

import datetime
import os
import platform
import re
import resource
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("cfrt", "numpy", "torch", "onnxruntime", "openvino")


def header() -> dict[str, Any]:
    return {"date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions()}


def machine() -> dict[str, Any]:
    """CPU by its own name and family, the cores that this process may use, and the instructions that matter here."""
    info = _cpuinfo()
    family = ", ".join(
        f"{name} {info[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in info
    )
    name = info.get("model name") or platform.processor() or platform.machine()
    flags = set(info.get("flags", "").split())
    isa = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16") if flag in flags]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": f"{name} ({family})" if family else name, "cores": cores, "isa": isa}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def resident() -> float:
    """MB of this process in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0]
    except OSError:
        return {}
    return dict(re.findall(r"^(.*?)\s*:\s*(.*)$", text, re.MULTILINE))
