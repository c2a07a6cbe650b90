"""Every kernel that has mutants. Their cases are the kernels' own tests (tests/test_cuda_*.py)."""

from . import append, attention, attention8, quantise, renoise
from .framework import Subject


def subjects() -> list[Subject]:
    return [renoise.SUBJECT, attention.SUBJECT, attention8.SUBJECT, append.SUBJECT, append.PIXELS, quantise.SUBJECT]
