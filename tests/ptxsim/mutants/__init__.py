"""Known bugs, put into kernels one at a time: `python -m tests.ptxsim.mutants`. See framework.py."""
