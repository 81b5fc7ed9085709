"""A model's input schema: in the seeds' dialect, as standard JSON Schema, and as the validator enforces it.

The dialect is what the seed pages show: a JSON Schema object whose only foreign word is the type ``float``.
A list of LoRAs, which they do not have, is an array in standard words.
"""

import math
from typing import Any, Final

from rushes.catalog.loras import enforced_loras_schema, loras_schema
from rushes.catalog.model import Input, Model

INPUT_TITLE: Final = "Input schema"
STANDARD: Final = "https://json-schema.org/draft/2020-12/schema"

SEED_RANDOM: Final = -1
"""The seed by which many clients ask for a random one."""
SEED_LARGEST: Final = 2**64 - 1
"""The largest seed that ComfyUI's samplers take (`INT` with ``max`` 0xffffffffffffffff)."""
SEED_DRAWN_LARGEST: Final = 2**53 - 1
"""The largest seed that is drawn here: every JSON reader keeps it exact."""
INTEGER_SMALLEST: Final = -(2**63) + 1
INTEGER_LARGEST: Final = 2**64 - 1
"""The integers that survive JSON readers and databases. orjson reads larger ones as inexact floats."""


def seed_schema(model: Model) -> dict[str, Any]:
    """The input schema exactly in the seeds' shape and dialect; properties in the manifest's order."""
    return {
        "type": "object",
        "title": INPUT_TITLE,
        "required": list(model.required),
        "properties": {field.name: _property(field) for field in model.inputs},
    }


def _property(field: Input) -> dict[str, Any]:
    keywords: dict[str, Any] = {
        "title": field.title,
        "description": field.description,
        "type": field.type,
        "enum": list(field.enum) if field.enum is not None else None,
        "minimum": field.minimum,
        "maximum": field.maximum,
        "minLength": field.min_length,
        "maxLength": field.max_length,
        "default": field.default,
    }
    if field.type == "loras":
        keywords |= loras_schema()
    return {keyword: value for keyword, value in keywords.items() if value is not None}


def standard(schema: dict[str, Any]) -> dict[str, Any]:
    """``schema`` as standard JSON Schema 2020-12: ``float`` is "number", and unknown fields are refused."""
    properties = {
        name: {**keywords, "type": "number"} if keywords.get("type") == "float" else dict(keywords)
        for name, keywords in schema["properties"].items()
    }
    return {"$schema": STANDARD, **schema, "properties": properties, "additionalProperties": False}


def enforced_schema(model: Model) -> dict[str, Any]:
    """The standard schema with the bounds that the server holds to although the seeds do not print them.

    Seeds are -1 (random) or from 0 to 2**64-1; other integers lie within 64 bits; a file is not ""; LoRAs are
    few and named safely. The validator is compiled from this, and the OpenAPI documents show it.
    :func:`seed_schema` stays as it is.
    """
    schema = standard(seed_schema(model))
    for field in model.inputs:
        keywords = schema["properties"][field.name]
        if field.type == "integer":
            low, high = integer_bounds(field)
            keywords["minimum"], keywords["maximum"] = low, high
        if field.role == "seed" and accepts_random(field):
            note = f"{SEED_RANDOM} draws one at random."
            keywords["description"] = f"{field.description} {note}".lstrip()
        if field.type == "loras":
            keywords |= enforced_loras_schema()
        if field.name in model.files():
            keywords["minLength"] = max(1, field.min_length or 0)
    return schema


def integer_bounds(field: Input) -> tuple[int, int]:
    """The smallest and the largest value that the server accepts for an integer field."""
    low, high = INTEGER_SMALLEST, INTEGER_LARGEST
    if field.role == "seed":
        low, high = SEED_RANDOM, SEED_LARGEST
    if field.minimum is not None:
        low = max(low, math.ceil(field.minimum))
    if field.maximum is not None:
        high = min(high, math.floor(field.maximum))
    return low, high


def accepts_random(field: Input) -> bool:
    """Whether -1 is a value of this seed: yes, unless the manifest's own minimum excludes it."""
    return field.minimum is None or field.minimum <= SEED_RANDOM


def output_schema() -> dict[str, Any]:
    """What ``output`` of a result may hold, as the seeds show it."""
    return {
        "output": {
            "type": "object",
            "properties": {
                "image": {"type": "string", "format": "uri", "description": "URL of a single image"},
                "video": {"type": "string", "format": "uri", "description": "URL of a single video"},
                "images": {
                    "type": "array",
                    "description": "URLs of several images",
                    "items": {"type": "string", "format": "uri"},
                },
                "videos": {
                    "type": "array",
                    "description": "URLs of several videos",
                    "items": {"type": "string", "format": "uri"},
                },
            },
        }
    }
