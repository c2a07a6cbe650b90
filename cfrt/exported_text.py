"""umT5 out of a bundle: a graph with int8 weights in ONNX Runtime, no PyTorch (export/text_encoder.py makes it)."""

from pathlib import Path

import numpy as np
import onnxruntime

from .errors import BundleError


class ExportedUMT5:
    """Called with a prompt, as `cfrt.nn.umt5.UMT5` is.

    graph: the encoder's, from `ids` int64 [n] to `rows` float32 [n, width]; its weights lie beside it."""

    def __init__(self, graph: Path, tokenizer: Path, length: int) -> None:
        from .tokens import Tokens  # its libraries are those of `cfrt[wan]`, and an export only wants `session`

        self._session = session(graph)
        self._tokens = Tokens(tokenizer, length)

    def __call__(self, prompt: str) -> tuple[np.ndarray, str]:
        """float32 rows [n, width], n <= L, and the end of the prompt for which there was no room."""
        ids, rest = self._tokens(prompt)
        (rows,) = self._session.run(["rows"], {"ids": np.array(ids, dtype=np.int64)})
        return rows, rest


def session(graph: Path) -> onnxruntime.InferenceSession:
    """Runs the encoder with fp32 activations: left alone, ONNX Runtime rounds them to eight bits as well, which costs
    rows of a random encoder 2 % (measured with 1.32). BundleError when it cannot be opened."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors share no base
        raise BundleError(f"ONNX Runtime cannot open {graph} ({error}); export the bundle again") from error
