"""Whether there is an NVIDIA GPU, and which, without touching it: through cuda-python, where that is installed."""

from importlib.util import find_spec


def refusal(device: int = 0) -> str | None:
    """Why there is no GPU to use, or None. Never raises, and creates no context."""
    if find_spec("cuda") is None:
        return "cuda-python is not installed: pip install 'cfrt[trt]'"
    from cuda.bindings import runtime

    code, version = runtime.cudaDriverGetVersion()
    if code != runtime.cudaError_t.cudaSuccess or not version:  # 0 where there is no driver
        return "there is no NVIDIA driver on this machine"
    code, count = runtime.cudaGetDeviceCount()
    if code != runtime.cudaError_t.cudaSuccess or not count:
        return f"the NVIDIA driver shows no GPU ({code.name})"
    if device >= count:
        return f"the NVIDIA driver shows {count} GPU{'s' if count > 1 else ''}, so there is no number {device}"
    return None


def capability(device: int = 0) -> str:
    """Architecture of a GPU that is there: "sm89"."""
    from cuda.bindings import runtime

    names = runtime.cudaDeviceAttr
    major, minor = (
        runtime.cudaDeviceGetAttribute(name, device)[1]
        for name in (names.cudaDevAttrComputeCapabilityMajor, names.cudaDevAttrComputeCapabilityMinor)
    )
    return f"sm{major}{minor}"
