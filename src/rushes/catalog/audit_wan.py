"""What is wrong with a model's table for the Wan engine, and how to mend it.

Looks at the manifest, and at the folders that it names on this machine; the hub is not asked. What is downloaded and
what is not is the matter of `rushes doctor`.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from rushes.catalog.audit import Finding, Severity
from rushes.catalog.model import Input, Model
from rushes.catalog.nearest import did_you_mean
from rushes.catalog.paths import MANIFEST, shown
from rushes.catalog.wan import BOUNDS, REPOSITORY, TABLE, WanModel, has_wan, local_folder, wan_of
from rushes.errors import ManifestError

PIPELINES: Final = ("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline")
"""Classes of diffusers that the engine runs, as ``model_index.json`` names them."""
WEIGHTS_SETTING: Final = "RUSHES_WAN_WEIGHTS"
_INDEX: Final = "model_index.json"


def audit_wan(model: Model, instead: str = "") -> list[Finding]:
    """Everything that is found, the worst first; nothing for a model that the Wan engine does not run.

    ``instead`` is the folder or repository that RUSHES_WAN_WEIGHTS gives the model; empty where it gives none.
    """
    if not has_wan(model):
        return []
    try:
        wan = wan_of(model)
    except ManifestError as error:
        where = ": ".join(filter(None, (error.file, error.key)))
        return [Finding("error", model.id, where, "manifest", error.problem)]
    found = [*_folders(model, wan, instead), *_prompt(model), *_inputs(model)]
    order = ("error", "warning", "note")
    return sorted(found, key=lambda one: order.index(one.severity))


def not_on_wan(model: Model) -> list[Finding]:
    """That the Wan engine, where it is the server's, does not run the model; nothing where it does."""
    if has_wan(model):
        return []
    text = f"has no table [{TABLE}]: it does not run on the engine wan"
    return [
        _say(model, "note", MANIFEST, "no_wan", text, 'add the table with weights = "owner/name", or a folder')
    ]


def weights_instead(setting: Sequence[str]) -> dict[str, str]:
    """RUSHES_WAN_WEIGHTS by the id of a model, as the engine reads it."""
    pairs = (text.partition("=") for text in setting)
    return {model.strip(): place.strip() for model, _, place in pairs}


def audit_instead(names: Collection[str], known: Collection[str]) -> list[Finding]:
    """Those of RUSHES_WAN_WEIGHTS that are no model."""
    return [
        Finding(
            "error",
            "",
            WEIGHTS_SETTING,
            "unknown_model",
            f"there is no model {name!r}; {did_you_mean(name, known)}",
        )
        for name in names
        if name not in known
    ]


def _say(model: Model, severity: Severity, where: str, kind: str, text: str, fix: str) -> Finding:
    return Finding(severity, model.id, where, kind, text, fix)


# -- folders on this machine --------------------------------------------------------------------------------
def _folders(model: Model, wan: WanModel, instead: str) -> Iterator[Finding]:
    if instead:
        yield from _instead(model, instead)
    elif (folder := local_folder(wan.weights, model)) is not None:
        yield from _weights(model, folder, f"{TABLE}.weights")
    turbo = wan.turbo.loras if wan.turbo else ()
    for table, loras in ((f"{TABLE}.loras", wan.loras), (f"{TABLE}.turbo.loras", turbo)):
        for index, lora in enumerate(loras):
            place = local_folder(lora.source, model)
            if place is not None and not _is_file(place / lora.path):
                text = f"there is no file {shown(place / lora.path)}"
                fix = "put it there, or name the repository that it comes from as its source"
                yield _say(model, "error", f"{table}[{index}]", "missing_weights", text, fix)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, a folder that may not be read
        return False


def _instead(model: Model, place: str) -> Iterator[Finding]:
    """By the engine's rule of what in RUSHES_WAN_WEIGHTS is a folder; another may be a repository."""
    try:
        folder = Path(place).expanduser()
    except RuntimeError:  # ~ of a user that there is not
        folder = Path(place)
    if place.startswith(("/", "~", ".")) or folder.is_dir():
        yield from _weights(model, folder.absolute(), WEIGHTS_SETTING)
    elif not REPOSITORY.fullmatch(place.partition("@")[0]):
        text = (
            f"{place!r} is neither a folder that is there nor a repository, owner/name or owner/name@revision"
        )
        fix = "name the folder that diffusers saved the pipeline in, or a repository"
        yield _say(model, "error", WEIGHTS_SETTING, "missing_weights", text, fix)


def _weights(model: Model, folder: Path, key: str) -> Iterator[Finding]:
    file = folder / _INDEX
    try:
        index: Any = orjson.loads(file.read_bytes())
    except FileNotFoundError:
        text = f"there is no {shown(file)}" if folder.is_dir() else f"there is no folder {shown(folder)}"
        fix = "name the folder that diffusers saved the pipeline in, or a repository, owner/name"
        yield _say(model, "error", key, "missing_weights", text, fix)
        return
    except OSError as error:
        text = f"{shown(file)} cannot be read: {error.strerror}"
        yield _say(model, "error", key, "missing_weights", text, "let the server read it")
        return
    except orjson.JSONDecodeError as error:
        text, fix = f"{shown(file)} is not JSON: {error}", "copy the folder again"
        yield _say(model, "error", key, "damaged_weights", text, fix)
        return
    name = index.get("_class_name") if isinstance(index, dict) else None
    if name not in PIPELINES:
        text = f"{shown(file)} names the pipeline {name!r}; the Wan engine runs {', '.join(PIPELINES)}"
        yield _say(model, "error", key, "wrong_pipeline", text, "name a Wan model in the format of diffusers")


# -- inputs -------------------------------------------------------------------------------------------------
def _prompt(model: Model) -> Iterator[Finding]:
    if model.field("prompt") is None:
        text = "no input has the role prompt: every request is generated from an empty one"
        yield _say(model, "warning", MANIFEST, "no_prompt", text, 'give an input role = "prompt"')


def _inputs(model: Model) -> Iterator[Finding]:
    image = model.output == "image"
    for field in model.inputs:
        if field.role == "other":
            text = "has no role: the Wan engine does not read it"
            fix = "give it a role, or take it out"
            yield _say(model, "warning", field.name, "unused_input", text, fix)
        elif image and field.role in ("frames", "fps"):
            text = f"has the role {field.role}, and the model makes images of one frame: it has no effect"
            yield _say(model, "warning", field.name, "unused_input", text, "take it out")
        elif field.role in BOUNDS:
            yield from _bounds(model, field)


def _bounds(model: Model, field: Input) -> Iterator[Finding]:
    """Values that the schema lets pass and the engine refuses."""
    least, most = BOUNDS[field.role]
    allowed = field.enum or (field.minimum, field.maximum)
    beyond = [one for one in allowed if isinstance(one, int | float) and not least <= one <= most]
    if beyond:
        text = f"allows {', '.join(f'{one:g}' for one in beyond)}; the Wan engine takes {least:g} to {most:g}"
        fix = "set minimum and maximum, or enum, within that"
        yield _say(model, "warning", field.name, "out_of_bounds", text, fix)
