"""From the bytes of a body to a complete input, or to an error that names every field at fault.

A :class:`Validator` is compiled once per model. What it decides beyond the schema, and why:

- ``null`` for an optional field is "not given", as form-driven clients send it; for a required field it is
  missing.
- 81.0 is an integer (as JSON Schema says) and becomes 81. Booleans are never numbers, strings never either.
- A seed is -1 or from 0 to 2**64-1, what ComfyUI's samplers take. -1 is how many clients ask for a random
  seed; it is drawn here, so that the stored input is what was generated and can be repeated. Without it this
  wire would have no random seed at all, as the default is a number. Drawn seeds stay below 2**53, which every
  JSON reader keeps exact.
- Integers beyond 64 bits are refused: orjson would hand on an inexact float.
- NUL characters are refused: no prompt needs one, and databases and C strings end there.
- A LoRA's scale that is left out, or null, is 1.0, and stands in the stored input.
- Of a name given twice, the last value counts, as in nearly every JSON reader.

No IO. Whether a file's address can be used is decided later, by those who fetch it.
"""

import json
import random
from collections.abc import Callable
from typing import Any, Final

import jsonschema_rs
import msgspec
import orjson

from rushes.catalog.loras import EXAMPLE, Problem, complete_loras, lora_problems, without_nulls
from rushes.catalog.model import FILE_ROLES, Input, Model
from rushes.catalog.nearest import did_you_mean
from rushes.catalog.resolution import parse_resolution
from rushes.catalog.schema import (
    SEED_DRAWN_LARGEST,
    SEED_RANDOM,
    accepts_random,
    enforced_schema,
    integer_bounds,
)
from rushes.errors import InvalidInput, MalformedRequest

DEEPEST: Final = 32
"""Levels of arrays and objects, the body's own included. No input of the dialect needs more than one."""
MOST_COMMAS: Final = 100_000
"""More of them in a body would be a hundred thousand values, each many times as large in memory."""
MOST_UNKNOWN: Final = 50
"""Unknown fields that an error lists one by one."""

_TYPE_NAMES: Final = {
    "string": "a string",
    "integer": "an integer",
    "float": "a number",
    "boolean": "true or false",
    "loras": f"a list of LoRAs such as {EXAMPLE}",
}

_system = random.SystemRandom()


class Validated(msgspec.Struct, frozen=True):
    """An input that fits its model, complete with defaults, in the schema's order."""

    input: dict[str, Any]
    json: bytes
    """The input as JSON."""
    files: dict[str, str]
    """The file inputs by field name: an address, a data URI, or the bare name of a sample."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in ``raw``. Raises MalformedRequest: none there, too deep, too large."""
    if len(raw) > MOST_COMMAS and raw.count(b",") > MOST_COMMAS:
        raise MalformedRequest(f"The body holds more than {MOST_COMMAS} values.")
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(_why_no_json(raw, error)) from None
    if type(value) is not dict:
        raise MalformedRequest(f"The body must be a JSON object with the input's fields, not {_kind(value)}.")
    nested = [item for item in value.values() if type(item) in (list, dict)]
    depth = 1
    while nested:
        depth += 1
        if depth > DEEPEST:
            raise MalformedRequest(f"The body nests deeper than {DEEPEST} levels.")
        nested = [
            item
            for outer in nested
            for item in (outer.values() if type(outer) is dict else outer)
            if type(item) in (list, dict)
        ]
    return value


def _why_no_json(raw: bytes, error: orjson.JSONDecodeError) -> str:
    if not raw.strip():
        return "The body is empty; send a JSON object with the input's fields."
    rest = str(error.doc)[error.pos : error.pos + 9].lstrip("-")
    if rest.startswith(("NaN", "Inf")):
        return f"The body is not JSON: NaN and Infinity are no JSON numbers (character {error.pos})."
    return f"The body is not JSON: {error}."


class Validator:
    """Checks inputs of one model. Safe to share between threads."""

    def __init__(self, model: Model, *, draw_seed: Callable[[int, int], int] = _system.randint) -> None:
        """Compile. ``draw_seed`` gives a random integer between two bounds, both included."""
        self._fields = {field.name: field for field in model.inputs}
        self._required = frozenset(model.required)
        self._schema = jsonschema_rs.Draft202012Validator(enforced_schema(model))
        self._draw_seed = draw_seed
        self._files = tuple(model.files())
        self._plan = tuple((f.name, f.default, f.type == "integer") for f in model.inputs)
        self._strings = tuple(f.name for f in model.inputs if f.type == "string")
        self._seeds = tuple(f for f in model.inputs if f.role == "seed" and accepts_random(f))
        self._free_sizes = tuple(f.name for f in model.inputs if f.role == "resolution" and f.enum is None)
        self._loras = tuple(f.name for f in model.inputs if f.type == "loras")
        self._aliases = _aliases(model)

    def validate(self, raw: bytes) -> Validated:
        """Check a body.

        Raises MalformedRequest where it is no JSON object, and InvalidInput, whose ``detail`` has one entry
        for every field at fault, in the schema's order and unknown fields last:
        ``{"loc": [field], "msg": ..., "type": ...}``. A LoRA at fault has its index and key in ``loc`` as well.
        """
        return self.validate_input(parse_object(raw))

    def validate_input(self, given: dict[str, Any]) -> Validated:
        """The same for what was parsed already; ``given`` is not changed. Raises InvalidInput."""
        if None in given.values():
            given = {
                name: value
                for name, value in given.items()
                if value is not None or name in self._required or name not in self._fields
            }
        for name in self._loras:
            if name in given:
                given = {**given, name: without_nulls(given[name])}
        fits = self._schema.is_valid(given)
        special, loras = self._special(given), self._lora_problems(given)
        if special or loras or not fits:
            raise self._refusal(given, special, loras)
        complete: dict[str, Any] = {}
        for name, default, integer in self._plan:
            value = given.get(name)
            if value is None:
                if default is None:
                    continue
                value = default
            elif integer and type(value) is float:
                value = int(value)
            elif name in self._loras:
                value = complete_loras(value)
            complete[name] = value
        for field in self._seeds:
            if complete.get(field.name) == SEED_RANDOM:
                low, high = integer_bounds(field)
                complete[field.name] = self._draw_seed(max(0, low), min(SEED_DRAWN_LARGEST, high))
        files = {name: complete[name] for name in self._files if name in complete}
        return Validated(complete, orjson.dumps(complete), files)

    def _special(self, given: dict[str, Any]) -> dict[str, tuple[str, str]]:
        """What no keyword of the schema says: NUL characters, and resolutions in free text."""
        found: dict[str, tuple[str, str]] = {}
        for name in self._strings:
            value = given.get(name)
            if type(value) is str and "\0" in value:
                found[name] = ("character", f"{name} holds a NUL character (\\u0000); take it out")
        for name in self._free_sizes:
            value = given.get(name)
            if type(value) is str and name not in found:
                try:
                    parse_resolution(value)
                except ValueError as error:
                    found[name] = ("resolution", f"{name}: {error}")
        return found

    def _lora_problems(self, given: dict[str, Any]) -> dict[str, list[Problem]]:
        """The schema finds them as well, but not the words for them."""
        values = {name: given[name] for name in self._loras if given.get(name) is not None}
        return {name: found for name, value in values.items() if (found := lora_problems(value))}

    def _refusal(
        self,
        given: dict[str, Any],
        special: dict[str, tuple[str, str]],
        loras: dict[str, list[Problem]],
    ) -> InvalidInput:
        failing: dict[str, str] = {}
        unknown: list[str] = []
        for error in self._schema.iter_errors(given):
            kind = error.kind
            if error.instance_path and error.instance_path[0] in loras:
                continue
            if isinstance(kind, jsonschema_rs.ValidationErrorKind.Required):
                failing[kind.property] = "missing"
            elif isinstance(kind, jsonschema_rs.ValidationErrorKind.AdditionalProperties):
                unknown = [name for name in given if name not in self._fields]
            else:
                failing.setdefault(str(error.instance_path[0]), kind.name)
        detail: list[dict[str, Any]] = []
        for name, field in self._fields.items():
            if name in loras:
                detail += [_explain_lora(name, problem) for problem in loras[name]]
                continue
            if name in failing:
                type_, message = _explain(field, given.get(name), failing[name])
            elif name in special:
                type_, message = special[name]
            else:
                continue
            detail.append({"loc": [name], "msg": message, "type": type_})
        for name in unknown[:MOST_UNKNOWN]:
            hint = did_you_mean(name, self._fields, self._aliases)
            message = f"{_short(name)} is no field of this model; {hint}"
            detail.append({"loc": [name[:200]], "msg": message, "type": "unknown_field"})
        if len(unknown) > MOST_UNKNOWN:
            message = f"{len(unknown) - MOST_UNKNOWN} more fields are unknown"
            detail.append({"loc": [], "msg": message, "type": "unknown_field"})
        return InvalidInput.listing(detail)


def _aliases(model: Model) -> dict[str, str]:
    """Titles and roles, lower-case and with spaces, to the first field that has them."""
    aliases: dict[str, str] = {}
    for field in model.inputs:
        for word in (field.title, field.role):
            aliases.setdefault(word.lower().replace("_", " "), field.name)
    aliases.pop("other", None)
    return aliases


def _explain(field: Input, value: Any, keyword: str) -> tuple[str, str]:
    """The wire's word for what is wrong with a field, and a sentence with the fix."""
    name = field.name
    if keyword == "missing":
        return "missing", f"{name} is required ({field.title})"
    if value is None:
        return "missing", f"{name} is required ({field.title}); null is no value"
    got = _describe(value)
    if field.enum is not None:
        allowed = ", ".join(orjson.dumps(option).decode() for option in field.enum)
        return "enum", f"{name} must be one of {allowed}; got {got}"
    if isinstance(value, str) and field.type == "string":
        return _explain_length(field, value)
    number = type(value) is int or (type(value) is float and (field.type == "float" or value.is_integer()))
    if number and field.type in ("integer", "float"):
        return _explain_bound(field, value, got)
    hint = "; send it without quotes" if isinstance(value, str) and _looks_plain(value) else ""
    return "type", f"{name} must be {_TYPE_NAMES[field.type]}; got {got}{hint}"


def _explain_lora(name: str, problem: Problem) -> dict[str, Any]:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem.loc)
    where = "".join((name, *parts))
    return {"loc": [name, *problem.loc], "msg": f"{where} {problem.message}", "type": problem.type}


def _explain_length(field: Input, value: str) -> tuple[str, str]:
    name = field.name
    if field.max_length is not None and len(value) > field.max_length:
        return "max_length", f"{name} must have at most {field.max_length} characters; it has {len(value)}"
    if field.role in FILE_ROLES and not value:
        return "min_length", f"{name} is empty; give an https URL, a data URI, or the name of a sample"
    return "min_length", f"{name} must have at least {field.min_length} characters; it has {len(value)}"


def _explain_bound(field: Input, value: float, got: str) -> tuple[str, str]:
    low: float | None = field.minimum
    high: float | None = field.maximum
    if field.type == "integer":
        low, high = integer_bounds(field)
    below = low is not None and value < low
    keyword = "minimum" if below else "maximum"
    if field.role == "seed" and accepts_random(field):
        return keyword, f"{field.name} must be from 0 to {high}, or -1 for a random seed; got {got}"
    if field.minimum is not None and field.maximum is not None:
        return keyword, f"{field.name} must be from {low} to {high}; got {got}"
    bound = f"at least {low}" if below else f"at most {high}"
    return keyword, f"{field.name} must be {bound}; got {got}"


def _looks_plain(text: str) -> bool:
    if text in ("true", "false"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, str):
        return "a string"
    return "null" if value is None else "a boolean" if isinstance(value, bool) else "a number"


def _describe(value: Any) -> str:
    if isinstance(value, str):
        return f"the string {_short(value)}"
    if isinstance(value, dict | list):
        return _kind(value)
    return json.dumps(value)


def _short(text: str) -> str:
    """``text`` in quotes, at most 60 characters of it."""
    return orjson.dumps(text[:60] + ("…" if len(text) > 60 else "")).decode()
