"""The commands about model files: convert, pull, plan."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from .errors import CfrtError

if TYPE_CHECKING:
    from .config import ModelConfig
    from .official import File


class NotFetched(CfrtError):
    """Files that are not here and cannot be had; which, and where they belong, has been said."""


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Turn a checkpoint (official .pt, Wan's or diffusers' folder) into a model folder, or into diffusers' layout."""

    source: Annotated[Positional[Path], arg(metavar="IN")]
    """A .pt or .safetensors file, or a folder."""
    target: Annotated[Positional[Path], arg(metavar="OUT")]
    """The folder to make; it must not exist."""
    model: str | None = None
    """The preset that it is. Default: by the released file's name, such as framewise/causal_forcing.pt."""
    to: Literal["cfrt", "diffusers"] = "cfrt"
    """The layout to write."""
    format: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Numbers in the new file; fp32 loses nothing."""
    branch: str | None = None
    """generator_ema, generator or model. Default: the one that the release names for this file."""
    autoencoder: Path | None = None
    """Wan2.1_VAE.pth, to go into the model folder."""
    taehv: Path | None = None
    """taew2_1.pth, the small decoder, likewise."""

    def run(self) -> None:
        from .convert import plan

        conversion = plan(
            self.source,
            model=self.model,
            layout=self.to,
            format=self.format,
            branch=self.branch,
            autoencoder=self.autoencoder,
            taehv=self.taehv,
        )
        with _bar(conversion.size, "converting") as bar:
            conversion.run(self.target, bar.update)
        tensors, size = len(conversion.shapes), conversion.size / 1e9
        print(f"{self.target}: {conversion.config.name}, {tensors} tensors in {self.format}, {size:.2f} GB")


@dataclass(frozen=True, kw_only=True)
class Pull:
    """Fetch what a released model needs, and make the folder that streams: transformer, autoencoder, text encoder."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A preset (see `cfrt models`)."""
    decoder: Literal["wan", "taehv"] = "wan"
    """taehv fetches the small decoder as well."""
    text: Annotated[bool, arg(help_behavior_hint="(default: it is fetched)")] = True
    """Leave the text encoder out; prompts then need cached embeddings."""
    format: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Numbers in the model folder."""
    dry_run: bool = False
    """Only say what is here, what is missing and where it belongs."""

    def run(self) -> None:
        from . import hub

        files = hub.needs(self.model, decoder=self.decoder, text=self.text)
        absent = hub.missing(files)
        if self.dry_run:
            for file in files:
                print(f"{'missing' if file in absent else 'here   '}  {file.gigabytes:6.2f} GB  {file.address}")
            return
        failed = absent if hub.offline() else self._fetch(absent)
        if failed:
            print(hub.instructions(failed))
            why = "HF_HUB_OFFLINE is set" if hub.offline() else "they cannot be fetched"
            raise NotFetched(f"{len(failed)} files are missing and {why}; put them where it says above, and pull again")
        self._make()

    def _fetch(self, files: "Iterable[File]") -> "list[File]":
        """The files that cannot be fetched; says why. Those of the hub have its own bars."""
        from . import hub

        failed, answers = [], True
        for file in files:
            plain = "://" in file.repository
            try:
                if plain:
                    with _bar(round(file.gigabytes * 1e9), file.path) as bar:
                        hub.fetch(file, bar.update)
                elif answers:
                    hub.fetch(file)
                else:
                    failed.append(file)
            except CfrtError as error:
                print(f"cfrt: {error}".split("; by hand:")[0], file=sys.stderr)
                failed.append(file)
                answers = answers and not isinstance(error, hub.Unreachable)
        return failed

    def _make(self) -> None:
        """The model folder, from files that are here."""
        from . import hub
        from .convert import plan
        from .official import AUTOENCODER, OFFICIAL, TAEHV

        folder = hub.model_folder(self.model)
        if not folder.exists():
            conversion = plan(
                hub.fetch(OFFICIAL[self.model]),
                model=self.model,
                format=self.format,
                branch=OFFICIAL[self.model].branch,
                autoencoder=hub.fetch(AUTOENCODER),
                taehv=hub.fetch(TAEHV) if self.decoder == "taehv" else None,
            )
            with _bar(conversion.size, "converting") as bar:
                conversion.run(folder, bar.update)
        print(f"{self.model} is ready in {folder}: cfrt generate --model {self.model} ...")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say how much memory a model needs, and what to change so that it fits."""

    model: str = "wan-1.3b-framewise-2step"
    """A preset, an embedded model or the folder of one."""
    gpu: str | None = None
    """The memory there is, such as 24GB."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of weights, ring and activations."""
    decoder: Literal["wan", "taehv", "tiny"] | None = None
    """Default: the model's own."""
    text: Literal["cpu", "gpu"] = "cpu"
    """Where the text encoder runs."""
    text_precision: Literal["bf16", "int8", "fp32"] = "bf16"
    """What it is kept in."""
    window: int | None = None
    """W, latent frames that a unit sees. Default: the model's own."""
    sinks: int | None = None
    """K, first frames seen for ever. Default: the model's own."""
    guided: bool = False
    """Guidance, as the teachers want it: two rings."""
    train: bool = False
    """Training instead of streaming; with the model's real score, the memory of DMD."""
    gpus: int = 1
    """GPUs that share a training."""
    json: bool = False
    """Print it as JSON."""

    def run(self) -> None:
        from . import memory
        from .config import PRESETS

        try:
            budget = None if self.gpu is None else memory.read_size(self.gpu)
        except ValueError as error:
            raise CfrtError(f"--gpu: {error}") from error
        config = self._config()
        if self.train:
            real = PRESETS["wan-14b"] if config.text.kind == "umt5" else config
            account = memory.training(config, real=real, processes=self.gpus)
        else:
            setup = memory.Setup(
                config=config,
                precision=self.precision,
                decoder=self.decoder or config.autoencoder.kind,
                text=self.text,
                text_precision=self.text_precision,
                guided=self.guided or config.guided,
            )
            account = memory.stream(setup)
        print(json.dumps(asdict(account) | {"total": account.total}) if self.json else memory.page(account, budget))

    def _config(self) -> "ModelConfig":
        from . import students
        from .config import PRESETS
        from .weights import read_config

        config = PRESETS.get(self.model) or read_config(students.find(self.model))
        window = config.window if self.window is None else self.window
        return replace(config, window=window, sinks=config.sinks if self.sinks is None else self.sinks)


@contextmanager
def _bar(total: int, what: str) -> Iterator[Any]:
    from tqdm import tqdm

    # disable=None: no bar where standard error is no terminal
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        yield bar
