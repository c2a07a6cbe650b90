"""What every export needs to be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Decoder = Literal["wan", "taehv", "tiny"]
Level = Literal["full", "segments"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Which model, from which weights, into which folder."""

    model: str
    """Preset (`cfrt models` lists them), embedded student, model folder, or config.json."""

    out: Path
    """Folder of the bundle; it must not exist."""

    weights: str | None = None
    """Checkpoint (.safetensors or .pt with official, diffusers or cfrt names) or model folder; "random" measures an
    export without one. Default: the model's own, for a preset its released file."""

    vae: Path | None = None
    """Wan2.1_VAE.pth, where the model's folder holds no autoencoder. Default: looked for where `cfrt pull` puts it."""

    taehv: Path | None = None
    """taew2_1.pth, for `--decoder taehv`. Default: as above."""

    text_encoder: Path | None = None
    """Folder of umT5's files, to go into the bundle as int8 ONNX. Default: none; the bundle then reads prompts as any
    model does."""

    decoder: Decoder | None = None
    """What turns latents into pixels. Default: the model's own autoencoder."""

    resolution: str | None = None
    """HEIGHTxWIDTH of the frames in pixels. Default: the model's own."""

    window: int | None = None
    """W, latent frames that a unit sees. Default: the model's own."""

    sinks: int | None = None
    """K, first frames seen for ever. Default: the model's own."""

    sequential: bool = False
    """One unit after another, with sinks at the trained distance, of a model that was trained for rolling windows as
    well: what a bundle can do of them."""

    calibration: Path | None = None
    """File of prompts, one a line, that activations are measured with before they are rounded to 8 bits. Default: some
    for the embedded student's vocabulary."""

    verify: Level | None = None
    """"full" runs the whole chain through the ring's wrap and its sinks; "segments" one segment of each kind, with few
    tokens. Default: full below 0.3 billion parameters."""

    dry_run: bool = False
    """Say what would be made, how large it is and about how long it takes, and stop."""
