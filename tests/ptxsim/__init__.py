"""Runs the PTX that nvcc writes, on the CPU, and finds what a GPU would only sometimes show. See README.md."""

from .memory import Buffer, Memory
from .module import Module
from .parser import PtxError
from .report import Finding, Report
from .runtime import Built, Device, Runtime, build
from .schedule import EVERY_SCHEDULE, Options

__all__ = [
    "EVERY_SCHEDULE",
    "Buffer",
    "Built",
    "Device",
    "Finding",
    "Memory",
    "Module",
    "Options",
    "PtxError",
    "Report",
    "Runtime",
    "build",
]
