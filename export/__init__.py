"""Export: turns trained weights into something that runs without PyTorch. Run `python -m export.trt --help`."""

from importlib.util import find_spec

if _missing := [name for name in ("torch", "onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
    # with a name, `python -m export.trt` says it in one line instead of a traceback
    raise ImportError(f"export needs {', '.join(_missing)}: pip install 'cfrt[export]'", name=__name__)
