"""The engine that proves an export: a bundle's graphs in ONNX Runtime, on any CPU.

Between the segments work the same ring and attention as in the native engine. ONNX Runtime's CPU kernels know hardly
any bf16, so every graph runs as its fp32 twin: the same nodes and the same weights (rounded to what the bundle holds),
all arithmetic in fp32. It is the graphs' truth and not a fast engine: `native` is that.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnxruntime

from _cfrt import Geometry, kernels

from ..bundle import Bundle, Port, Segment
from ..config import ModelConfig
from ..errors import BundleError, EngineError
from ..flow import x0_from_v
from ..noise import Purpose, normal
from . import Spec
from .segmented import SegmentedEngine
from .twin import fp32_twin

Layers = Sequence[tuple[np.ndarray, np.ndarray]]
