"""How remote engines run a model: the tables ``[engines.<kind>]`` of its manifest for the kinds of remotes.

Reads :attr:`rushes.catalog.model.Model.options`; asks nobody. What is wrong with a table is raised as a ManifestError
that names file, key and fix. `docs/models.md` is the reference of the keys.
"""

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, get_args

import msgspec

from rushes.catalog.bindings import (
    NUMBER_ROLES,
    RANDOM_SEED,
    SIZE,
    TEXT_ROLES,
    expression_names,
    trials,
)
from rushes.catalog.expressions import BadExpression, Evaluator, Expression, compile_expression
from rushes.catalog.model import FILE_ROLES, Model
from rushes.catalog.nearest import did_you_mean, nearest
from rushes.catalog.roles import roles_of
from rushes.catalog.schema import SEED_DRAWN_LARGEST
from rushes.catalog.workflow import manifest_error
from rushes.errors import EngineError, ManifestError
from rushes.settings import REMOTE_KINDS

KINDS: Final = REMOTE_KINDS
OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "dashscope": ("parameters",),
    "runcomfy": ("files",),
    "openai-video": ("endpoint", "extra"),
    "fal": ("files",),
    "replicate": ("files",),
}
"""Keys of one kind, besides those of every table."""
_OPTION_WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "files": ("data", "url"),
    "endpoint": ("videos", "images", "tasks"),
}
"""Those of them that take one of a few words; the others are tables."""

PriceUnit = Literal["output", "second"]
Mapped = Expression | tuple[Expression, ...]

_KEYS: Final = ("model", "price_usd", "price_unit", "input")
_SEGMENT: Final = r"[A-Za-z0-9][\w.-]*"
_MODELS: Final[Mapping[str, tuple[re.Pattern[str], str]]] = {
    "dashscope": (re.compile(_SEGMENT), "wan2.5-t2i-preview"),
    "runcomfy": (re.compile(rf"{_SEGMENT}(/{_SEGMENT})+"), "wan-ai/wan-2-5/text-to-image"),
    "openai-video": (re.compile(r"[^\s\x00-\x1f\x7f]([^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f])?"), "owner/name"),
    "fal": (re.compile(rf"{_SEGMENT}(/{_SEGMENT})+"), "fal-ai/wan/v2.2-a14b/image-to-video"),
    "replicate": (re.compile(rf"{_SEGMENT}/{_SEGMENT}(:\w+)?"), "owner/name or owner/name:version"),
}
"""What a model's name looks like there, as most of them stand in the paths of addresses, with an example."""
_LEVEL: Final = "/"
"""Between the names of an object and of a field in it; no remote has it in a name."""
_NAMED_BY_US: Final = "runcomfy"
"""The kind whose models have our ids, so that it needs no table."""
_system = random.SystemRandom()


class RemoteTable(msgspec.Struct, frozen=True):
    """How one kind of remote runs one model."""

    kind: str
    model: str
    """What the remote calls it."""
    price_usd: float | Expression | None = None
    """For each ``price_unit``; None where it is not known. The manifest's word, not the vendor's."""
    price_unit: PriceUnit = "output"
    """``second``: of video."""
    input: Mapping[str, Mapped] = {}
    """The remote's fields; those of an object in the input stand as ``object/field``. Empty: the engine has its own
    idea of which roles go where.
    """
    options: Mapping[str, Any] = {}
    """Further keys, of :data:`OPTIONS`."""
    file_fields: Mapping[str, str] = {}
    """The model's file inputs by name, each with its role."""


def remote_table(model: Model, kind: str) -> RemoteTable | None:
    """How remotes of ``kind`` run ``model``; None where they do not. Raises ManifestError for a wrong table."""
    table = model.options.get(kind)
    files = {field.name: field.role for field in model.inputs if field.role in FILE_ROLES}
    if table is None:
        return RemoteTable(kind, model.id, file_fields=files) if kind == _NAMED_BY_US else None
    _check_keys(model, kind, table)
    return RemoteTable(
        kind=kind,
        model=_name(model, kind, table),
        price_usd=_price(model, kind, table),
        price_unit=_unit(model, kind, table),
        input=dict(_mapping(model, kind, table)),
        options=dict(_options(model, kind, table)),
        file_fields=files,
    )


def remote_values(
    table: RemoteTable,
    input: Mapping[str, Any],  # noqa: A002
    roles: Mapping[str, Any],
    files: Mapping[str, str],
    *,
    draw_seed: Callable[[int, int], int] = _system.randint,
) -> dict[str, Any]:
    """The remote's fields with their values, as the table maps them; one whose input is not given is left out.

    ``input`` and ``roles`` are complete, with defaults; ``files`` has what stands for each input file, by field.
    ``draw_seed`` gives a random integer between two bounds, both included. Raises EngineError ``binding_failed``
    where an expression has no value.
    """
    fields = {name: value for name, value in input.items() if not isinstance(value, list | dict)}
    for name in table.file_fields:
        if name in fields and name not in files:
            raise EngineError("binding_failed", f"The input file {name} is not at hand.", field=name)
    fields |= {name: text for name, text in files.items() if name in table.file_fields}
    names = _plain_names(roles)
    for name, role in table.file_fields.items():
        if name in files:
            names.setdefault(role, files[name])
    names[RANDOM_SEED] = draw_seed(0, SEED_DRAWN_LARGEST)
    evaluator = Evaluator(names, fields)

    def value(key: str, expression: Expression) -> Any:
        try:
            return evaluator.value(expression)
        except BadExpression as error:
            message = f"{key} for {table.kind} cannot be computed as {expression.text}: {error}."
            raise EngineError("binding_failed", message) from None

    values: dict[str, Any] = {}
    for key, mapped in table.input.items():
        several = isinstance(mapped, tuple) and not isinstance(mapped, Expression)
        given = [
            value(key, one)
            for one in (mapped if several else (mapped,))
            if isinstance(one, Expression) and one.names <= names.keys() and one.fields <= fields.keys()
        ]
        if given:
            *objects, last = key.split(_LEVEL)
            place = values
            for name in objects:
                place = place.setdefault(name, {})
            place[last] = given if several else given[0]
    return values


def estimate_usd(table: RemoteTable, model: Model, roles: Mapping[str, Any]) -> float | None:
    """What a request will cost there by the table's price, in USD; None where that is not known."""
    price = table.price_usd
    if isinstance(price, Expression):
        names = _plain_names(roles)
        if not price.names <= names.keys():
            return None
        try:
            price = float(Evaluator(names, {}).value(price))
        except (BadExpression, ValueError):
            return None
    if price is None or not (math.isfinite(price) and price >= 0):
        return None
    if table.price_unit == "output":
        return price
    frames, fps = roles.get("frames"), roles.get("fps")
    if model.output != "video" or not frames or not fps:
        return None
    return price * float(frames) / float(fps)


def _plain_names(roles: Mapping[str, Any]) -> dict[str, Any]:
    """What expressions call the values of the roles, without files."""
    names = {role: roles[role] for role in (*TEXT_ROLES, *NUMBER_ROLES) if role in roles}
    if "resolution" in roles:
        names |= zip(SIZE, roles["resolution"], strict=True)
    return names


def check_remotes(model: Model, complete: Mapping[str, Any]) -> None:
    """Read every table, and try its expressions. Raises ManifestError.

    They are tried on ``complete``, an input with its defaults, and with each allowed value and bound of every field
    in its place.
    """
    for kind in KINDS:
        table = remote_table(model, kind)
        if table is None:
            continue
        for trial in trials(model, complete):
            files = {name: str(trial[name]) for name in table.file_fields if name in trial}
            roles = roles_of(model, trial)
            try:
                remote_values(table, trial, roles, files)
            except EngineError as error:
                raise _wrong(model, kind, "input", error.message) from None
            price = table.price_usd
            if isinstance(price, Expression) and estimate_usd(table, model, roles) is None:
                raise _wrong(model, kind, "price_usd", f"{price.text} is no amount of money for every input")


# -- the keys of a table ----------------------------------------------------------------------------------
def _wrong(model: Model, kind: str, key: str, problem: str) -> ManifestError:
    return manifest_error(model, f"engines.{kind}.{key}".rstrip("."), problem)


def _check_keys(model: Model, kind: str, table: Mapping[str, Any]) -> None:
    known = (*_KEYS, *OPTIONS[kind])
    for key in table:
        if key not in known:
            raise _wrong(model, kind, key, f"there is no such key; {did_you_mean(key, known)}")


def _name(model: Model, kind: str, table: Mapping[str, Any]) -> str:
    name = table.get("model", model.id if kind == _NAMED_BY_US else None)
    pattern, example = _MODELS[kind]
    if name is None:
        raise _wrong(
            model, kind, "model", f'is missing: write what {kind} calls the model, such as "{example}"'
        )
    if not isinstance(name, str) or not pattern.fullmatch(name):
        raise _wrong(model, kind, "model", f"{name!r} is no model of {kind}: write it as in {example!r}")
    return name


def _price(model: Model, kind: str, table: Mapping[str, Any]) -> float | Expression | None:
    price = table.get("price_usd")
    if isinstance(price, str):
        known = [name for name in expression_names(model) if name not in (*FILE_ROLES, RANDOM_SEED)]
        try:
            return compile_expression(price, known, ())
        except BadExpression as error:
            raise _wrong(model, kind, "price_usd", str(error)) from None
    if price is None:
        if "price_unit" in table:
            raise _wrong(model, kind, "price_unit", "says nothing without price_usd; add that, or take it out")
        return None
    if type(price) not in (int, float) or not (math.isfinite(price) and price >= 0):
        raise _wrong(
            model, kind, "price_usd", "must be a number of US dollars, 0 or more, or an expression of it"
        )
    return float(price)


def _unit(model: Model, kind: str, table: Mapping[str, Any]) -> PriceUnit:
    words: tuple[PriceUnit, ...] = get_args(PriceUnit)
    unit = table.get("price_unit", "output")
    for word in words:
        if unit == word:
            if word == "second" and model.output != "video":
                raise _wrong(model, kind, "price_unit", 'an image has no seconds; write "output"')
            return word
    raise _no_word(model, kind, "price_unit", unit, words)


def _no_word(model: Model, kind: str, key: str, value: object, words: tuple[str, ...]) -> ManifestError:
    guess = nearest(value, words) if isinstance(value, str) else None
    hint = f"; did you mean {guess}?" if guess else ""
    return _wrong(model, kind, key, f"{value!r} is none of {', '.join(words)}{hint}")


def _options(model: Model, kind: str, table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in OPTIONS[kind]:
        if key not in table:
            continue
        value, words = table[key], _OPTION_WORDS.get(key)
        if words and value not in words:
            raise _no_word(model, kind, key, value, words)
        if not words and not isinstance(value, dict):
            raise _wrong(model, kind, key, f"must be a table: [engines.{kind}.{key}]")
        yield key, value


def _mapping(model: Model, kind: str, table: Mapping[str, Any]) -> Iterator[tuple[str, Mapped]]:
    mapping = table.get("input", {})
    if not isinstance(mapping, dict):
        raise _wrong(model, kind, "input", f"must be a table: [engines.{kind}.input]")
    names = expression_names(model)
    fields = [field.name for field in model.inputs if field.type != "loras"]

    def wrong(key: str, problem: str) -> ManifestError:
        return _wrong(model, kind, f"input.{key.replace(_LEVEL, '.')}", problem)

    def compiled(key: str, value: Any) -> Expression:
        if not isinstance(value, str | int | float):
            raise wrong(
                key,
                "must be an expression in quotes, a number, true or false, or a list of them",
            )
        try:
            return compile_expression(value if isinstance(value, str) else repr(value), names, fields)
        except BadExpression as error:
            raise wrong(key, str(error)) from None

    for key, value in _leaves(mapping):
        if isinstance(value, list | dict):
            if not value:
                raise wrong(key, "is empty; give expressions or take it out")
            yield key, tuple(compiled(key, one) for one in value)
        else:
            yield key, compiled(key, value)


def _leaves(mapping: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no table, and empty tables, each by its path."""
    for key, value in mapping.items():
        path = f"{above}{key}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{_LEVEL}")
        else:
            yield path, value
