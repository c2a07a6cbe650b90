"""The models that ship inside the package, each a folder with its weights and its card."""

from importlib.resources import files
from os import PathLike, fspath
from pathlib import Path

from ..bundle import MANIFEST, is_bundle
from ..config import PRESETS
from ..errors import WeightsError
from ..hub import model_folder

CONFIG = "config.json"


def embedded() -> dict[str, Path]:
    """Name -> folder of every student in this installation."""
    folders = [Path(str(entry)) for entry in files(__name__).iterdir() if entry.is_dir()]
    return {folder.name: folder for folder in sorted(folders) if (folder / CONFIG).is_file()}


def find(model: str | PathLike[str]) -> Path:
    """The folder of a model: the name of an embedded student, of a preset that `cfrt pull` has fetched, or the path of
    a model's or an exported bundle's folder.

    WeightsError when there is neither; it tells a published preset without weights from a name nobody knows."""
    name, students = fspath(model), embedded()
    if name in students:
        return students[name]
    folder = Path(name).expanduser()
    if (folder / CONFIG).is_file() or is_bundle(folder):
        return folder
    known = ", ".join(students) or "none in this installation"
    if folder.is_dir():
        raise WeightsError(
            f"{folder} is no model folder: expected {CONFIG} or {MANIFEST} in it; embedded students: {known}"
        )
    if name in PRESETS:
        made = model_folder(name)
        if (made / CONFIG).is_file():
            return made
        raise WeightsError(f"{name!r} is a preset whose weights are not in {made}: fetch them with `cfrt pull {name}`")
    raise WeightsError(
        f"there is no model {name!r}: expected a folder with {CONFIG} or {MANIFEST}, an embedded student ({known}) "
        "or a preset (`cfrt models` lists them)"
    )
