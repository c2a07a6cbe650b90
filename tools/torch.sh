#!/bin/sh
# Installs the torch that constraints.txt names, choosing where it comes from and saying how much that is beforehand.
#   usage: tools/torch.sh PIP...          (the pip command, e.g. .venv/bin/python -m pip)
#   TORCH_INDEX   auto (default) or the URL of a package index; with a URL nothing else is tried
#
# auto: 1. a wheel that pip finds without any index (PIP_FIND_LINKS): nothing is downloaded
#       2. no NVIDIA GPU, Linux: PyTorch's index of CPU wheels, when it answers
#       3. pip's own index; on Linux that is the CUDA build
set -eu
CPU_INDEX=https://download.pytorch.org/whl/cpu
torch=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

answers() {
    "$1" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)' "$2/torch/" 2>/dev/null
}

announce() { echo "cfrt: downloading $torch from $1: $2. Another source: make TORCH_INDEX=URL ..." >&2; }

case "${TORCH_INDEX:-auto}" in
auto)
    if "$@" install --no-index --no-deps "$torch" 2>/dev/null; then
        :
    elif [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 && answers "$1" "$CPU_INDEX"; then
        announce "$CPU_INDEX" "about 190 MB"
        "$@" install -c constraints.txt --index-url "$CPU_INDEX" --no-deps "$torch"
    elif [ "$(uname -s)" = Linux ]; then
        announce "pip's own index" "the CUDA build, about 3 GB with what it needs"
        "$@" install -c constraints.txt "$torch"
    else
        announce "pip's own index" "about 100 MB"
        "$@" install -c constraints.txt "$torch"
    fi ;;
*)
    announce "$TORCH_INDEX" "190 MB for a CPU build, about 3 GB for a CUDA one"
    "$@" install -c constraints.txt --index-url "$TORCH_INDEX" --no-deps "$torch" ;;
esac
