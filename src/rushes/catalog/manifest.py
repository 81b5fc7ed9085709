"""Reads one model folder: ``model.toml``, ``sample.json`` and, where named, the workflow.

Everything that can be wrong with a folder is found here and raised as a ManifestError that names the file,
the key and the fix. `docs/models.md` is the reference of the keys.
"""

import math
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, Final, Literal, get_args

import msgspec
import orjson

from rushes.catalog.model import FILE_ROLES, Input, Model, Price, Role, Type
from rushes.catalog.nearest import did_you_mean, nearest
from rushes.catalog.paths import MANIFEST, SAMPLE, shown
from rushes.catalog.resolution import parse_resolution
from rushes.catalog.roles import REPEATABLE
from rushes.catalog.routes import Route, problems
from rushes.catalog.samples import sample_names
from rushes.catalog.schema import INTEGER_LARGEST, INTEGER_SMALLEST, integer_bounds
from rushes.errors import ManifestError

FEWEST_SEGMENTS: Final = 2
MOST_SEGMENTS: Final = 6

_SEGMENT: Final = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")
_FIELD_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_RESERVED: Final = "openapi.json"
"""No last segment of an id: `/v1/models/{id}/openapi.json` is the document of the model above it."""

_ROLE_TYPES: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(("prompt", "negative_prompt", "resolution", *FILE_ROLES), ("string",)),
    **dict.fromkeys(("frames", "seed", "steps"), ("integer",)),
    **dict.fromkeys(("fps", "guidance", "shift"), ("integer", "float")),
    "loras": ("loras",),
}
_WORDS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "": {"output": ("image", "video")},
    "price": {"unit": ("second", "output")},
    "inputs": {"type": get_args(Type), "role": get_args(Role)},
    "routes": {},
}
"""Keys that take one of a few words, by table."""


class _Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    output: Literal["image", "video"]
    inputs: tuple[Input, ...]
    description: str = ""
    categories: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    price: Price = Price()
    time_limit: float = 3600.0
    graph: str | None = None
    engines: dict[str, dict[str, Any]] = {}
    routes: tuple[Route, ...] = ()


def model_id(folder: Path, root: Path) -> str:
    """The id of the model in ``folder``: its path below ``root``. Raises ManifestError if that is none."""
    file = shown(folder / MANIFEST)
    segments = folder.relative_to(root).parts
    if not FEWEST_SEGMENTS <= len(segments) <= MOST_SEGMENTS:
        raise ManifestError(
            file,
            "",
            f"a model's id is its folder's path, with {FEWEST_SEGMENTS} to {MOST_SEGMENTS} parts such as "
            f"my-name/my-model; this one has {len(segments)}: move the folder",
        )
    for segment in segments:
        if not _SEGMENT.fullmatch(segment):
            raise ManifestError(
                file,
                "",
                f"the folder {segment!r} cannot be part of an id: rename it to lower-case letters and digits "
                "with single dots, dashes or underscores between them",
            )
    if segments[-1] == _RESERVED:
        raise ManifestError(file, "", f"a model cannot be called {_RESERVED}: rename the folder")
    return "/".join(segments)


def read_manifest(folder: Path, root: Path) -> Model:
    """The model in ``folder``, checked but for its sample. Raises ManifestError."""
    return _Reader(folder).read(model_id(folder, root))


class _Reader:
    """One reading of one folder; knows the file for the messages."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / MANIFEST

    def _wrong(self, key: str, problem: str) -> ManifestError:
        return ManifestError(shown(self._file), key, problem)

    def read(self, id_: str) -> Model:
        table = self._table()
        self._check_words(table)
        manifest = self._convert(table)
        self._check_model(manifest)
        self._check_names(manifest)
        for field in manifest.inputs:
            self._check_field(field)
        for key, problem in problems(manifest.routes):
            raise self._wrong(key, problem)
        return Model(
            id=id_,
            name=manifest.name,
            description=manifest.description,
            categories=manifest.categories,
            output=manifest.output,
            inputs=manifest.inputs,
            required=manifest.required,
            folder=self._folder,
            price=manifest.price,
            time_limit=manifest.time_limit,
            graph=manifest.graph,
            sample=self._sample(manifest),
            options=manifest.engines,
            routes=manifest.routes,
        )

    # -- the shape --------------------------------------------------------------------------------------
    def _table(self) -> dict[str, Any]:
        try:
            return tomllib.loads(self._file.read_text("utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise self._wrong("", f"this is not TOML: {error}") from None
        except RecursionError:
            raise self._wrong("", "arrays or tables are nested too deeply") from None
        except UnicodeDecodeError as error:
            raise self._wrong("", f"this is not UTF-8: {error}; save it as UTF-8") from None
        except OSError as error:
            raise self._wrong("", f"cannot be read: {error.strerror}") from None

    def _check_words(self, table: dict[str, Any]) -> None:
        """Unknown keys, and keys that take one of a few words, with the nearest of them."""
        price, inputs, routes = table.get("price"), table.get("inputs"), table.get("routes")
        self._check_keys("", table, _Manifest, "")
        if isinstance(price, dict):
            self._check_keys("price", price, Price, "price.")
        for index, field in enumerate(inputs if isinstance(inputs, list) else ()):
            if isinstance(field, dict):
                self._check_keys("inputs", field, Input, f"inputs.{field.get('name', f'[{index}]')}.")
        for index, route in enumerate(routes if isinstance(routes, list) else ()):
            if isinstance(route, dict):
                self._check_keys("routes", route, Route, f"routes[{index}].")

    def _check_keys(self, kind: str, table: dict[str, Any], type_: type[msgspec.Struct], where: str) -> None:
        known = [field.encode_name for field in msgspec.structs.fields(type_)]
        for key, value in table.items():
            if key not in known:
                raise self._wrong(where + key, f"there is no such key; {did_you_mean(key, known)}")
            words = _WORDS[kind].get(key)
            if words and isinstance(value, str) and value not in words:
                guess = nearest(value, words)
                hint = f"; did you mean {guess}?" if guess else ""
                raise self._wrong(where + key, f"{value!r} is none of {', '.join(words)}{hint}")

    def _convert(self, table: dict[str, Any]) -> _Manifest:
        try:
            return msgspec.convert(table, _Manifest)
        except msgspec.ValidationError as error:
            problem, _, path = str(error).partition(" - at `$")
            key = path.rstrip("`").lstrip(".")
            indexed = re.fullmatch(r"inputs\[(\d+)\](.*)", key)
            if indexed:
                field = table["inputs"][int(indexed[1])]
                named = field.get("name") if isinstance(field, dict) else None
                if isinstance(named, str):
                    key = f"inputs.{named}{indexed[2]}"
            raise self._wrong(key, problem) from None

    # -- the content ------------------------------------------------------------------------------------
    def _check_model(self, manifest: _Manifest) -> None:
        if not manifest.name.strip():
            raise self._wrong("name", "give the model a name for people")
        if not all(category.strip() for category in manifest.categories):
            raise self._wrong("categories", "a category is empty; take it out")
        if not (math.isfinite(manifest.time_limit) and manifest.time_limit > 0):
            raise self._wrong("time_limit", "must be a number of seconds greater than 0")
        if not (math.isfinite(manifest.price.base_usd) and manifest.price.base_usd >= 0):
            raise self._wrong("price.base_usd", "must be 0 or more")
        if not manifest.inputs:
            raise self._wrong("inputs", "give at least one [[inputs]] table")
        if manifest.graph == "":
            raise self._wrong("graph", "must be the bare name of a file in the model's folder; it is empty")

    def _check_names(self, manifest: _Manifest) -> None:
        names = [field.name for field in manifest.inputs]
        for name, count in Counter(names).items():
            if count > 1:
                raise self._wrong(f"inputs.{name}", f"{count} inputs have this name; rename all but one")
            if not _FIELD_NAME.fullmatch(name):
                raise self._wrong(
                    f"inputs.{name}", "a name has 1 to 128 letters, digits, underscores, dots and dashes"
                )
        for name, count in Counter(manifest.required).items():
            if name not in names:
                raise self._wrong("required", f"there is no input {name!r}; {did_you_mean(name, names)}")
            if count > 1:
                raise self._wrong("required", f"{name} stands here {count} times; once is enough")
        for role, count in Counter(field.role for field in manifest.inputs).items():
            if count > 1 and role not in REPEATABLE:
                same = ", ".join(field.name for field in manifest.inputs if field.role == role)
                raise self._wrong("inputs", f"only one input can have the role {role}; {same} have it")

    def _check_field(self, field: Input) -> None:
        key = f"inputs.{field.name}"
        types = _ROLE_TYPES.get(field.role)
        if types and field.type not in types:
            raise self._wrong(f"{key}.type", f"the role {field.role} needs the type {' or '.join(types)}")
        self._check_bounds(field, key)
        if field.type == "loras":
            self._check_loras(field, key)
            return
        if field.enum is not None:
            if not field.enum:
                raise self._wrong(f"{key}.enum", "is empty; give values or take it out")
            if len(set(field.enum)) < len(field.enum):
                raise self._wrong(f"{key}.enum", "has a value twice; take one out")
            for option in field.enum:
                self._check_value(field, option, f"{key}.enum")
        if field.default is not None:
            self._check_value(field, field.default, f"{key}.default")
            if field.enum is not None and field.default not in field.enum:
                allowed = ", ".join(repr(option) for option in field.enum)
                raise self._wrong(f"{key}.default", f"{field.default!r} is not in enum: {allowed}")

    def _check_loras(self, field: Input, key: str) -> None:
        if field.role != "loras":
            raise self._wrong(f"{key}.role", 'the type loras needs role = "loras"')
        for name, value in (("default", field.default), ("enum", field.enum)):
            if value is not None:
                raise self._wrong(f"{key}.{name}", "a list of LoRAs has none; take it out")

    def _check_bounds(self, field: Input, key: str) -> None:
        numeric, text = field.type in ("integer", "float"), field.type == "string"
        for name, bound in (("minimum", field.minimum), ("maximum", field.maximum)):
            if bound is not None and not numeric:
                raise self._wrong(f"{key}.{name}", f"only numbers have one, and this is a {field.type}")
            if bound is not None and not _storable(bound):
                raise self._wrong(f"{key}.{name}", "must be a finite number of at most 64 bits")
        for name, length in (("min_length", field.min_length), ("max_length", field.max_length)):
            if length is not None and not text:
                raise self._wrong(f"{key}.{name}", f"only strings have one, and this is a {field.type}")
            if length is not None and not 0 <= length < 2**31:
                raise self._wrong(f"{key}.{name}", "must be a number of characters from 0 to 2147483647")
        if field.minimum is not None and field.maximum is not None and field.minimum > field.maximum:
            raise self._wrong(f"{key}.minimum", f"{field.minimum} is above maximum, {field.maximum}")
        shortest, longest = field.min_length, field.max_length
        if shortest is not None and longest is not None and shortest > longest:
            raise self._wrong(f"{key}.min_length", f"{shortest} is above max_length, {longest}")

    def _check_value(self, field: Input, value: Any, key: str) -> None:
        """A default or an allowed value against the field's own type and bounds."""
        fits = {
            "string": isinstance(value, str),
            "boolean": isinstance(value, bool),
            "integer": type(value) is int,
            "float": type(value) in (int, float),
        }
        if not fits[field.type]:
            raise self._wrong(key, f"{value!r} does not have the type {field.type}")
        if isinstance(value, str):
            self._check_text(field, value, key)
        elif not isinstance(value, bool):
            low: float | None = field.minimum
            high: float | None = field.maximum
            if not _storable(value):
                raise self._wrong(key, f"{value} is no finite number of at most 64 bits")
            if field.type == "integer":
                low, high = integer_bounds(field)
            if low is not None and value < low:
                raise self._wrong(key, f"{value} is below the minimum, {low}")
            if high is not None and value > high:
                raise self._wrong(key, f"{value} is above the maximum, {high}")

    def _check_text(self, field: Input, value: str, key: str) -> None:
        if field.max_length is not None and len(value) > field.max_length:
            raise self._wrong(key, f"has {len(value)} characters, more than max_length, {field.max_length}")
        if field.min_length is not None and len(value) < field.min_length:
            raise self._wrong(key, f"has {len(value)} characters, fewer than min_length, {field.min_length}")
        if "\0" in value:
            raise self._wrong(key, "holds a NUL character; take it out")
        if field.role == "resolution":
            try:
                parse_resolution(value)
            except ValueError as error:
                raise self._wrong(key, str(error)) from None
        if field.role in FILE_ROLES and not value.startswith(("https://", "data:")):
            samples = sample_names()
            if samples and value not in samples:
                raise self._wrong(
                    key,
                    f"{value!r} is neither an https URL, nor a data URI, nor a sample: {', '.join(samples)}",
                )

    # -- the other files --------------------------------------------------------------------------------
    def _sample(self, manifest: _Manifest) -> dict[str, Any]:
        """What sample.json holds; without one, the defaults of the required inputs."""
        file = self._folder / SAMPLE
        try:
            value = orjson.loads(file.read_bytes())
        except FileNotFoundError:
            fields = {field.name: field for field in manifest.inputs}
            for name in manifest.required:
                if fields[name].default is None:
                    raise ManifestError(
                        shown(file),
                        name,
                        "write a sample input to this file; it can only be left out where every required "
                        "input has a default",
                    ) from None
            return {name: fields[name].default for name in manifest.required}
        except OSError as error:
            raise ManifestError(shown(file), "", f"cannot be read: {error.strerror}") from None
        except orjson.JSONDecodeError as error:
            raise ManifestError(shown(file), "", f"this is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ManifestError(shown(file), "", "must be a JSON object with the input's fields")
        return value


def _storable(number: float) -> bool:
    if isinstance(number, int):
        return INTEGER_SMALLEST <= number <= INTEGER_LARGEST
    return math.isfinite(number)
