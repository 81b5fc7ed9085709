"""From one input of a node to one field of a public schema: type, bounds, choices, default."""

import math
import re
from collections.abc import Iterable
from typing import Any, Final, Literal

import msgspec

from rushes.catalog.importing.flow import Flow
from rushes.catalog.importing.nodes import Nodes, Port, Target
from rushes.catalog.model import Role
from rushes.catalog.schema import INTEGER_LARGEST, INTEGER_SMALLEST, SEED_LARGEST, SEED_RANDOM

MOST_CHOICES: Final = 500
"""A longer list of choices is not written out: it would be in every schema that a server shows."""

FieldType = Literal["string", "integer", "float", "boolean"]
_TYPES: Final[dict[str, FieldType]] = {
    "INT": "integer",
    "FLOAT": "float",
    "STRING": "string",
    "BOOLEAN": "boolean",
}


class Field(msgspec.Struct):
    """A proposed input: what the manifest will say of it, and which node inputs it drives."""

    targets: list[Target]
    """The first gives the field its name, or for a resolution the first two; the others follow it."""
    type: FieldType
    title: str
    role: Role = "other"
    description: str = ""
    default: str | int | float | bool | None = None
    enum: tuple[str | int | float, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    required: bool = False
    sample: str | int | float | bool | None = None
    """What the sample request sends where there is no default."""
    remark: str = ""
    """Stands as a comment in the manifest: what was guessed."""
    name: str = ""


class NotExposable(Exception):
    """Why an input cannot be a public one."""


def field_of(flow: Flow, target: Target, role: Role = "other") -> Field:
    """The field that drives ``target``, a plain value of the graph. Raises NotExposable."""
    id_, name = target
    port, value = flow.nodes.port(id_, name), flow.nodes.inputs(id_).get(name)
    title = default_title(flow.nodes, target)
    if port.type == "COMBO":
        field = _choice(target, port, title)
    elif port.type in _TYPES:
        field = Field([target], _TYPES[port.type], title)
    else:
        kind = f"a {port.type}" if port.type else "neither a text, a number nor a switch"
        raise NotExposable(f"{id_}.{name} is {kind}")
    field.role = role
    field.description = port.tooltip
    if field.type in ("integer", "float") and field.enum is None:
        field.minimum, field.maximum = bounds(flow.ports(target), field.type)
    if role == "seed":
        seed_bounds(field)
    field.default = fitting(field, value)
    return field


def default_title(nodes: Nodes, target: Target) -> str:
    """The node's title and the input's name, without what both say."""
    id_, name = target
    words = re.sub(r"[_.]+", " ", name).strip()
    title = nodes.title(id_)
    return title if words.lower() in ("", "value", title.lower()) else f"{title}: {words}"


def _choice(target: Target, port: Port, title: str) -> Field:
    options = list(dict.fromkeys(_plain(port.options)))
    kinds = {type(option) for option in options}
    type_: FieldType = "string"
    if kinds == {bool}:
        return Field([target], "boolean", title)
    if kinds == {int}:
        type_ = "integer"
    elif kinds <= {int, float} and kinds:
        type_ = "float"
    elif kinds - {str}:
        raise NotExposable(f"{target[0]}.{target[1]} chooses among values of several types")
    known = [option for option in options if not isinstance(option, str) or "\0" not in option]
    enum = tuple(known) if 0 < len(known) <= MOST_CHOICES else None
    return Field([target], type_, title, enum=enum)


def _plain(options: Iterable[Any]) -> list[str | int | float | bool]:
    return [
        option
        for option in options
        if isinstance(option, str)
        or (isinstance(option, int) and INTEGER_SMALLEST <= option <= INTEGER_LARGEST)
        or (isinstance(option, float) and math.isfinite(option))
    ]


def bounds(ports: Iterable[Port], type_: FieldType) -> tuple[float | None, float | None]:
    """The smallest and the largest value that all of ``ports`` take; None where there is no such bound.

    Bounds that no manifest can hold count as none.
    """
    lows, highs = [], []
    for port in ports:
        low, high = port.number("min"), port.number("max")
        lows += [low] if low is not None and storable(low) else []
        highs += [high] if high is not None and storable(high) else []
    lowest, highest = max(lows, default=None), min(highs, default=None)
    if type_ == "integer":
        lowest = None if lowest is None else math.ceil(lowest)
        highest = None if highest is None else math.floor(highest)
    if lowest is not None and highest is not None and lowest > highest:
        return None, None
    return lowest, highest


def storable(number: float) -> bool:
    """Whether a manifest can hold the number: within 64 bits, and not infinite."""
    return INTEGER_SMALLEST <= number <= INTEGER_LARGEST


def seed_bounds(field: Field) -> None:
    """Leave out what every seed has anyway, so that -1 goes on drawing one at random."""
    if field.minimum is not None and field.minimum <= 0:
        field.minimum = None
    if field.maximum is not None and (field.maximum >= SEED_LARGEST or field.maximum < SEED_RANDOM):
        field.maximum = None


def fitting(field: Field, value: Any) -> str | int | float | bool | None:
    """``value`` as the field's default: within its bounds; None where it is of another type or no choice."""
    if field.type == "boolean":
        return value if isinstance(value, bool) else None
    if field.type == "string":
        if not isinstance(value, str) or "\0" in value:
            return None
        return value if field.enum is None or value in field.enum else None
    number = _within(field, value)
    return number if field.enum is None or number in field.enum else None


def _within(field: Field, value: Any) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not storable(value):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if field.type == "integer" and not float(value).is_integer():
        return None
    number = int(value) if field.type == "integer" else float(value)
    if field.minimum is not None:
        number = max(number, field.minimum)
    if field.maximum is not None:
        number = min(number, field.maximum)
    if field.role == "seed":
        number = min(max(number, SEED_RANDOM), SEED_LARGEST)
    return number if storable(number) else None
