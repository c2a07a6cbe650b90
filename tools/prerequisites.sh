#!/bin/sh
# Checks what pip cannot install: a Python >= 3.11 with venv and headers, and a C++ compiler. Prints that Python's path.
# Where something is missing: runs the apt line as root, or says it and stops.
#   usage: tools/prerequisites.sh [python]
set -eu

find_python() {
    for name in "${1:-}" python3 python3.14 python3.13 python3.12 python3.11; do
        [ -n "$name" ] && command -v "$name" >/dev/null 2>&1 || continue
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v "$name"; return; }
        [ "$name" != "${1:-}" ] || return  # the one that was asked for, and it is too old
    done
}

missing() {
    if [ -z "$python" ] && command -v python3 >/dev/null 2>&1; then
        echo python3.11 python3.11-venv python3.11-dev  # an older python3 is the system's own; keep it
    elif [ -z "$python" ]; then
        echo python3 python3-venv python3-dev
    else
        version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
        "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "$version-venv"
        header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
        [ -e "$header" ] || echo "$version-dev"
    fi
    command -v c++ >/dev/null 2>&1 || command -v "${CXX:-c++}" >/dev/null 2>&1 || echo g++
}

python=$(find_python "${1:-}")
packages=$(missing | tr '\n' ' ')
if [ -n "$packages" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "Installing what is missing:  apt-get install -y $packages" >&2
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $packages; } >&2
    else
        echo "cfrt needs Python >= 3.11 with venv and headers, and a C++ compiler. Missing here; install with:" >&2
        echo "    sudo apt-get install -y $packages" >&2
        [ -n "$python" ] || echo "(or name another Python:  make PYTHON=/path/to/python3.12 demo)" >&2
        exit 1
    fi
    python=$(find_python "${1:-}")
    packages=$(missing | tr '\n' ' ')
    [ -z "$packages" ] || { echo "cfrt: apt-get ran, yet these are still missing: $packages" >&2; exit 1; }
fi
echo "$python"
