"""cfrt: few-step autoregressive video diffusion (Causal Forcing) as a live stream.

    import cfrt
    stream = cfrt.Stream("a large red circle moving left", seed=7)
    for frame in stream.frames(seconds=4):
        show(frame.pixels)                                            # (H, W, 3) uint8
    change = stream.prompt("a small blue square moving up")           # from the next unit on

Names are imported when they are first used, so that `import cfrt` costs nothing and loads no framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .clip import Clip as Clip
    from .config import PRESETS as PRESETS
    from .config import ModelConfig as ModelConfig
    from .errors import CfrtError as CfrtError
    from .errors import ConfigError as ConfigError
    from .errors import EngineError as EngineError
    from .errors import PromptError as PromptError
    from .errors import SnapshotError as SnapshotError
    from .errors import VideoError as VideoError
    from .errors import WeightsError as WeightsError
    from .frame import Frame as Frame
    from .pipeline import CausalForcingPipeline as CausalForcingPipeline
    from .snapshot import Snapshot as Snapshot
    from .stats import Stats as Stats
    from .stream import Change as Change
    from .stream import Stream as Stream
    from .text import PromptWarning as PromptWarning
    from .trace import Trace as Trace

__version__ = "0.1.0"

_HOME = {
    "Stream": "stream",
    "Change": "stream",
    "Snapshot": "snapshot",
    "Clip": "clip",
    "CausalForcingPipeline": "pipeline",
    "Frame": "frame",
    "Trace": "trace",
    "Stats": "stats",
    "ModelConfig": "config",
    "PRESETS": "config",
    "PromptWarning": "text",
    **dict.fromkeys(
        ("CfrtError", "ConfigError", "EngineError", "PromptError", "SnapshotError", "VideoError", "WeightsError"),
        "errors",
    ),
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cfrt' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
