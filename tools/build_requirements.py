"""Prints what building this checkout needs, one requirement a line, so that pip can install it into the environment.

The Makefile builds without pip's throw-away build environment: compiled objects then survive from one build to the
next. With `--dynamic`, asks the build backend (installed by then) for what depends on this machine and on CFRT_CUDA:
cmake, ninja, NVIDIA's compiler wheels.
"""

import sys
import tomllib
from pathlib import Path


def main() -> None:
    if "--dynamic" in sys.argv:
        from scikit_build_core.build import get_requires_for_build_wheel

        requirements = get_requires_for_build_wheel()
    else:
        requirements = tomllib.loads(Path("pyproject.toml").read_text())["build-system"]["requires"]
    print(*requirements, sep="\n")


if __name__ == "__main__":
    main()
