"""Whether the settings of a ComfyUI of our own can work: asked before anything is started or said."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from rushes.catalog.model import Model
from rushes.catalog.nearest import did_you_mean
from rushes.catalog.workflow import variant_names
from rushes.errors import ManifestError, SettingsError
from rushes.settings import Settings


def check_comfyui(settings: Settings) -> None:
    """Refuse settings with which no slot could ever start its ComfyUI. Raises SettingsError."""
    if settings.workers and settings.engine == "comfyui" and settings.comfyui_dir is not None:
        python_of(settings, settings.comfyui_dir)


def python_of(settings: Settings, folder: Path) -> str:
    """The Python that would start the ComfyUI in ``folder``; nothing is started.

    Raises SettingsError where the folder is none of a ComfyUI, the Python is no program, or the arguments
    cannot be read or name a file that is not there.
    """
    from rushes.engines.comfyui.catalogue import read_arguments
    from rushes.engines.comfyui.process import choose_python

    place = folder.expanduser()
    if not (place / "main.py").is_file():
        problem = (
            "has no main.py" if place.is_dir() else "is not there" if not place.exists() else "is no folder"
        )
        raise SettingsError(f"RUSHES_COMFYUI_DIR: {folder} is not the folder of a ComfyUI: it {problem}")
    python = settings.comfyui_python
    if python and shutil.which(python) is None:
        problem = "cannot be executed" if Path(python).exists() else "is no program that is there"
        raise SettingsError(f"RUSHES_COMFYUI_PYTHON: {python!r} {problem}")
    for name in read_arguments(settings.comfyui_args).extra_paths:
        if not (place / name).is_file():
            raise SettingsError(
                f"RUSHES_COMFYUI_ARGS: --extra-model-paths-config: there is no file {place / name}"
            )
    return choose_python(place.resolve(), python)


def unknown_variants(wanted: Sequence[str], models: Iterable[Model]) -> dict[str, str]:
    """Those of RUSHES_COMFYUI_VARIANTS that no model has, each with what was probably meant."""
    if not wanted:
        return {}
    known: set[str] = set()
    for model in models:
        try:
            known.update(variant_names(model))
        except ManifestError:
            continue  # said by those who look at the model
    hint = "no model has any variant"
    return {name: did_you_mean(name, sorted(known)) if known else hint for name in wanted if name not in known}
