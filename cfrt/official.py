"""The released files: which one each preset reads, and what a stream needs beside it.

Causal Forcing's checkpoints are pickled dicts of several state dicts; which one counts differs by file (the release's
README). Text encoder and video autoencoder are Wan2.1's own; TAEHV is a small decoder for the same latents.
"""

from dataclasses import dataclass
from pathlib import PurePath


@dataclass(frozen=True)
class File:
    """A file, or all files below a folder, of a repository."""

    repository: str
    """A Hugging Face Hub id, or the address of a folder that is served as it is."""
    path: str
    """Inside it; with `*` it stands for several."""
    gigabytes: float
    branch: str | None = None
    """The dict to read, of a file that has several."""

    @property
    def address(self) -> str:
        """Where a person finds it: of several files, their folder."""
        if "://" in self.repository:
            return f"{self.repository}/{self.path}"
        folder, _, name = self.path.rpartition("/")
        base = f"https://huggingface.co/{self.repository}"
        return f"{base}/tree/main/{folder}".rstrip("/") if "*" in name else f"{base}/blob/main/{self.path}"


RELEASE = "zhuhz22/Causal-Forcing"
WAN = "Wan-AI/Wan2.1-T2V-1.3B"
WAN_DIFFUSERS = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def _released(path: str, branch: str) -> File:
    return File(RELEASE, path, 5.7, branch)


OFFICIAL: dict[str, File] = {
    "wan-1.3b-chunkwise-4step": _released("chunkwise/causal_forcing.pt", "generator"),
    "wan-1.3b-framewise-4step": _released("framewise/causal_forcing.pt", "generator_ema"),
    "wan-1.3b-framewise-2step": _released("causal-forcing++/framewise-2step.pt", "generator_ema"),
    "wan-1.3b-framewise-1step": _released("causal-forcing++/framewise-1step.pt", "generator_ema"),
    "wan-1.3b-chunkwise-ar": _released("chunkwise/ar_diffusion.pt", "generator"),
    "wan-1.3b-framewise-ar": _released("framewise/ar_diffusion.pt", "generator"),
    "wan-1.3b-chunkwise-ode": _released("chunkwise/causal_ode.pt", "generator"),
    "wan-1.3b-framewise-ode": _released("framewise/causal_ode.pt", "generator"),
    "wan-1.3b-chunkwise-cd": _released("chunkwise/causal_cd.pt", "generator_ema"),
    "wan-1.3b-framewise-cd": _released("framewise/causal_cd.pt", "generator_ema"),
    "wan-1.3b-longvideo": _released("chunkwise/longvideo.pt", "generator_ema"),
    "wan-14b": File("Wan-AI/Wan2.1-T2V-14B", "diffusion_pytorch_model*", 57.2),
}
"""The transformer of each preset."""

AUTOENCODER = File(WAN, "Wan2.1_VAE.pth", 0.5)
TAEHV = File("https://github.com/madebyollin/taehv/raw/main", "taew2_1.pth", 0.05)
TEXT_ENCODER = File(WAN_DIFFUSERS, "text_encoder/*", 22.7)
TOKENIZER = File(WAN_DIFFUSERS, "tokenizer/*", 0.02)


def preset_of(path: PurePath) -> str | None:
    """The preset whose released file this path ends in, such as `framewise/causal_forcing.pt`."""
    return next((name for name, file in OFFICIAL.items() if path.parts[-2:] == PurePath(file.path).parts[-2:]), None)
