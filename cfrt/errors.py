"""Every error that cfrt raises on purpose. A message says what was expected, what came, and what to do next."""


class CfrtError(Exception):
    """Root of all errors that cfrt raises on purpose."""


class UsageError(CfrtError):
    """The command line asks for something that makes no sense."""


class ConfigError(CfrtError, ValueError):
    """A configuration that contradicts itself, or a file that holds none."""


class WeightsError(CfrtError):
    """Weights that are missing, damaged, or made for another configuration."""


class BundleError(WeightsError):
    """An engine bundle that is missing, damaged, or of another version."""


class PromptError(CfrtError, ValueError):
    """A prompt from which the model can read nothing."""


class EngineError(CfrtError, RuntimeError):
    """No engine can do what was asked, or the one that was asked failed."""


class SnapshotError(EngineError):
    """A snapshot that cannot be read, or that belongs to another model or engine."""


class VideoError(CfrtError):
    """A video or picture that cannot be written or read."""


class ExportError(CfrtError, RuntimeError):
    """An export that cannot be made as it was asked for, or whose result is not what it should be."""


class TrainingError(CfrtError, RuntimeError):
    """Training that cannot start as it was asked to, or that must not go on."""
