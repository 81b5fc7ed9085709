"""A model's weights for the Wan engine: the table ``[engines.wan]`` of its manifest.

Reads :attr:`rushes.catalog.model.Model.options`. What is wrong with the table is raised as a ManifestError that names
file, key and fix; neither the hub nor a disk is asked. `docs/models.md` is the reference of the keys.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

import msgspec

from rushes.catalog.loras import LARGEST_SCALE
from rushes.catalog.model import Model
from rushes.catalog.nearest import did_you_mean, nearest
from rushes.catalog.paths import why_unsafe
from rushes.catalog.workflow import manifest_error

TABLE: Final = "engines.wan"
_ENGINE: Final = "wan"

Scheduler = Literal["unipc", "euler", "lcm"]
Experts = Literal["both", "high", "low"]

BOUNDS: Final[Mapping[str, tuple[float, float]]] = {
    "steps": (1, 1000),
    "guidance": (0, 100),
    "shift": (0.01, 100),
    "frames": (1, 4093),
    "fps": (0.1, 240),
}
"""What the engine takes, both ends included. 1000 is the number of steps that Wan was trained on
(``num_train_timesteps``); 4093 frames are the 1024 latent frames that its position embedding has
(``rope_max_seq_len`` of ``WanTransformer3DModel``, the first latent frame holding one frame and each other four).
"""

REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION: Final = re.compile(r"[\w.-]+(/[\w.-]+)*")
_WEIGHTS_SUFFIX: Final = ".safetensors"


class WanLora(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A LoRA that is fused into the model when it is loaded."""

    source: str
    """Repository on the hub, or a folder; as :attr:`WanModel.weights`."""
    path: str
    """The file in it."""
    revision: str = ""
    scale: float = 1.0
    experts: Experts = "both"
    """The expert that it is for: of Wan 2.2 the high-noise one begins and the low-noise one ends. A model that has
    but one transformer takes what is for ``high`` or ``both``.
    """
    bytes: int | None = None
    licence: str = ""


class Turbo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The profile ``turbo``: few steps, with LoRAs that were distilled for them.

    Its steps, guidance and shift win over those of a request.
    """

    steps: int
    loras: tuple[WanLora, ...] = ()
    """Fused besides :attr:`WanModel.loras`."""
    guidance: float = 1.0
    """1 is without classifier-free guidance."""
    shift: float | None = None
    """None leaves it as it is without the profile."""
    scheduler: Scheduler | None = None


class WanModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table ``[engines.wan]``. Numbers are used where no input of the model gives them."""

    weights: str
    """Repository on the hub in the format of diffusers, ``owner/name``, or a folder: absolute, or ``./…`` below the
    model's own; see :func:`local_folder`.
    """
    revision: str = ""
    bytes: int | None = None
    licence: str = ""
    stand_in: str = ""
    """What generates in the place of a model whose weights are closed; empty where these are its own."""
    scheduler: Scheduler = "unipc"
    steps: int | None = None
    guidance: float | None = None
    guidance_2: float | None = None
    """Of the low-noise expert; None as ``guidance``."""
    shift: float | None = None
    frames: int | None = None
    fps: float | None = None
    negative_prompt: str = ""
    loras: tuple[WanLora, ...] = ()
    turbo: Turbo | None = None


_WORDS: Final[dict[str, tuple[str, ...]]] = {"scheduler": get_args(Scheduler), "experts": get_args(Experts)}


def has_wan(model: Model) -> bool:
    """Whether the Wan engine can run ``model`` at all: its manifest has the table."""
    return _ENGINE in model.options


def local_folder(source: str, model: Model) -> Path | None:
    """The folder that ``source`` (of weights or of a LoRA) names; None where it is a repository on the hub."""
    if source.startswith("/"):
        return Path(source)
    return model.folder / source if source.startswith("./") else None


def wan_of(model: Model) -> WanModel:
    """The table of ``model``. Raises ManifestError where there is none, and where it is wrong."""
    table = model.options.get(_ENGINE)
    if table is None:
        problem = (
            f'{model.id} has no table [{TABLE}], so the Wan engine cannot run it: add one with weights = "…"'
        )
        raise manifest_error(model, TABLE, problem)
    _check_keys(model, table)
    try:
        wan = msgspec.convert(table, WanModel)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        key = path.rstrip("`").lstrip(".")
        raise manifest_error(model, f"{TABLE}.{key}".rstrip("."), _in_words(problem)) from None
    _check_source(model, f"{TABLE}.weights", wan.weights, wan.revision, TABLE)
    _check_bytes(model, TABLE, wan.bytes)
    _check_numbers(model, TABLE, wan, ("steps", "guidance", "guidance_2", "shift", "frames", "fps"))
    _check_loras(model, f"{TABLE}.loras", wan.loras)
    if wan.turbo is not None:
        _check_numbers(model, f"{TABLE}.turbo", wan.turbo, ("steps", "guidance", "shift"))
        _check_loras(model, f"{TABLE}.turbo.loras", wan.turbo.loras)
    return wan


# -- keys and words -----------------------------------------------------------------------------------------
def _check_keys(model: Model, table: Mapping[str, Any]) -> None:
    """Unknown keys, missing ones, and words that are none of those allowed."""
    for where, part, type_ in _parts(table):
        fields = msgspec.structs.fields(type_)
        known = [field.name for field in fields]
        for key, value in part.items():
            if key not in known:
                raise manifest_error(
                    model, f"{where}.{key}", f"there is no such key; {did_you_mean(key, known)}"
                )
            words = _WORDS.get(key)
            if words and isinstance(value, str) and value not in words:
                guess = nearest(value, words)
                hint = f"; did you mean {guess}?" if guess else ""
                raise manifest_error(model, f"{where}.{key}", f"{value!r} is none of {', '.join(words)}{hint}")
        for field in fields:
            if field.required and field.name not in part:
                raise manifest_error(model, f"{where}.{field.name}", f"is missing: {_FIXES[type_, field.name]}")


def _in_words(problem: str) -> str:
    """What msgspec says, "Expected `float | null`, got `bool`", in words of TOML, which has no null."""
    types = _MISMATCH.fullmatch(problem)
    if types is None:
        return problem
    wanted, given = types.groups()
    return f"must be {_WANTED.get(wanted, wanted)}, not {_GIVEN.get(given, f'a {given}')}"


_MISMATCH: Final = re.compile(r"Expected `(\w+)(?: \| null)?`, got `(\w+)`")
_WANTED: Final = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "array": "a list of tables",
    "object": "a table",
}
_GIVEN: Final = {
    "int": "a number",
    "float": "a number with a point",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
}

_FIXES: Final = {
    (WanModel, "weights"): 'name the repository, weights = "owner/name", or a folder',
    (WanLora, "source"): 'name the repository, source = "owner/name", or a folder',
    (WanLora, "path"): f'name the file in it, path = "name{_WEIGHTS_SUFFIX}"',
    (Turbo, "steps"): "say how many steps the profile takes, such as steps = 4",
}


def _parts(table: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], type[msgspec.Struct]]]:
    """The table and those in it, each with its place in the file; what is no table is left to the conversion."""
    yield TABLE, table, WanModel
    yield from _listed(f"{TABLE}.loras", table.get("loras"))
    turbo = table.get("turbo")
    if isinstance(turbo, dict):
        yield f"{TABLE}.turbo", turbo, Turbo
        yield from _listed(f"{TABLE}.turbo.loras", turbo.get("loras"))


def _listed(where: str, loras: object) -> Iterator[tuple[str, Mapping[str, Any], type[msgspec.Struct]]]:
    for index, lora in enumerate(loras if isinstance(loras, list) else ()):
        if isinstance(lora, dict):
            yield f"{where}[{index}]", lora, WanLora


# -- values -------------------------------------------------------------------------------------------------
def _check_source(model: Model, key: str, source: str, revision: str, table: str) -> None:
    folder = local_folder(source, model)
    if folder is None and not REPOSITORY.fullmatch(source):
        problem = (
            f"{source!r} is neither a repository, owner/name, nor a folder: "
            "an absolute path, or one that begins with ./"
        )
        raise manifest_error(model, key, problem)
    if "\0" in source:
        raise manifest_error(model, key, "holds a NUL character; take it out")
    if revision and folder is not None:
        raise manifest_error(model, f"{table}.revision", "a folder has no revisions; take it out")
    if revision and not _REVISION.fullmatch(revision):
        problem = f"{revision!r} must be a commit of the repository, or one of its branches or tags"
        raise manifest_error(model, f"{table}.revision", problem)


def _check_bytes(model: Model, table: str, count: int | None) -> None:
    if count is not None and count <= 0:
        raise manifest_error(model, f"{table}.bytes", "must be what the download takes, above 0")


def _check_numbers(model: Model, table: str, values: msgspec.Struct, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(values, name)
        least, most = BOUNDS[name.removesuffix("_2")]
        if value is not None and not (math.isfinite(value) and least <= value <= most):
            raise manifest_error(
                model, f"{table}.{name}", f"must be from {least:g} to {most:g}; it is {value:g}"
            )


def _check_loras(model: Model, key: str, loras: Sequence[WanLora]) -> None:
    seen: set[tuple[str, str, str]] = set()
    for index, lora in enumerate(loras):
        where = f"{key}[{index}]"
        _check_source(model, f"{where}.source", lora.source, lora.revision, where)
        _check_bytes(model, where, lora.bytes)
        why = why_unsafe(lora.path)
        if why:
            problem = (
                f"{lora.path!r} {why}; name the file in the repository, such as loras/name{_WEIGHTS_SUFFIX}"
            )
            raise manifest_error(model, f"{where}.path", problem)
        if not lora.path.endswith(_WEIGHTS_SUFFIX):
            problem = f"{lora.path!r} must end in {_WEIGHTS_SUFFIX}: other formats can hold programs"
            raise manifest_error(model, f"{where}.path", problem)
        if not (math.isfinite(lora.scale) and abs(lora.scale) <= LARGEST_SCALE):
            problem = f"must be from {-LARGEST_SCALE:g} to {LARGEST_SCALE:g}; it is {lora.scale:g}"
            raise manifest_error(model, f"{where}.scale", problem)
        for experts in ("high", "low") if lora.experts == "both" else (lora.experts,):
            if (lora.source, lora.path, experts) in seen:
                raise manifest_error(
                    model, f"{where}.path", f"{lora.path} is listed twice for the {experts} expert"
                )
            seen.add((lora.source, lora.path, experts))
