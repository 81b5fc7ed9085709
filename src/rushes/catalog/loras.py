"""LoRAs as an input: ``[{"path": "wan/style.safetensors", "scale": 0.8}]``.

``path`` is a file in the server's folder of LoRAs, never an address: a request cannot make a server load weights
from anywhere else. ``scale`` is the strength, 1.0 where it is left out.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from rushes.catalog.nearest import did_you_mean
from rushes.catalog.paths import LONGEST_PATH, SAFE_PATH, why_unsafe

MOST: Final = 8
"""LoRAs of one request."""
DEFAULT_SCALE: Final = 1.0
LARGEST_SCALE: Final = 100.0
"""The strength that ComfyUI's ``LoraLoaderModelOnly`` takes, in either direction."""
EXAMPLE: Final = '[{"path": "style.safetensors", "scale": 0.8}]'
_KEYS: Final = ("path", "scale")
_MOST_PROBLEMS: Final = 20


class Problem(NamedTuple):
    """What is wrong, where in the list (an index and perhaps a key), and the wire's word for it."""

    loc: tuple[str | int, ...]
    type: str
    message: str
    """Continues a sentence that begins with the place, such as ``loras[0].path``."""


def loras_schema() -> dict[str, Any]:
    """The keywords of such a field, as the wire shows them."""
    return {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "path": {"type": "string"},
                "scale": {"type": "number", "default": DEFAULT_SCALE},
            },
            "required": ["path"],
            "additionalProperties": False,
        },
    }


def enforced_loras_schema() -> dict[str, Any]:
    """The same with the bounds that the server holds to."""
    schema = loras_schema()
    path, scale = (schema["items"]["properties"][key] for key in _KEYS)
    path |= {
        "description": "A file in the server's folder of LoRAs.",
        "minLength": 1,
        "maxLength": LONGEST_PATH,
        "pattern": SAFE_PATH,
    }
    scale |= {"minimum": -LARGEST_SCALE, "maximum": LARGEST_SCALE}
    return schema | {"maxItems": MOST}


def without_nulls(value: Any) -> Any:
    """``value`` without the scales that are null, which is "not given"."""
    if not isinstance(value, list):
        return value
    return [
        {key: one for key, one in item.items() if key != "scale" or one is not None}
        if isinstance(item, dict)
        else item
        for item in value
    ]


def complete_loras(value: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A valid list with every scale written out."""
    return [{"path": item["path"], "scale": item.get("scale", DEFAULT_SCALE)} for item in value]


def lora_problems(value: Any) -> list[Problem]:
    """Everything that is wrong with a value, the first few; empty where it fits."""
    if not isinstance(value, list):
        return [Problem((), "type", f"must be a list such as {EXAMPLE}")]
    if len(value) > MOST:
        return [Problem((), "max_items", f"takes {MOST} LoRAs at most; it has {len(value)}")]
    return [problem for index, item in enumerate(value) for problem in _of_item(index, item)][:_MOST_PROBLEMS]


def _of_item(index: int, item: Any) -> Iterator[Problem]:
    if not isinstance(item, Mapping):
        yield Problem((index,), "type", 'must be an object such as {"path": "style.safetensors"}')
        return
    for key in item:
        if key not in _KEYS:
            yield Problem(
                (index, key[:60]), "unknown_field", f"is no key of a LoRA; {did_you_mean(key, _KEYS)}"
            )
    if "path" not in item:
        yield Problem(
            (index, "path"), "missing", "is required: the name of a file in the server's loras folder"
        )
    else:
        yield from _of_path(index, item["path"])
    if "scale" in item:
        yield from _of_scale(index, item["scale"])


def _of_path(index: int, path: Any) -> Iterator[Problem]:
    fix = "give the file's name in the server's loras folder, such as \"wan/style.safetensors\""
    if not isinstance(path, str):
        yield Problem((index, "path"), "type", f"must be a string: {fix}")
        return
    why = why_unsafe(path)
    if why:
        yield Problem((index, "path"), "path", f"{why}: {fix}")


def _of_scale(index: int, scale: Any) -> Iterator[Problem]:
    where = (index, "scale")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        yield Problem(where, "type", "must be a number, such as 1.0")
    elif abs(scale) > LARGEST_SCALE:
        keyword = "minimum" if scale < 0 else "maximum"
        yield Problem(where, keyword, f"must be from {-LARGEST_SCALE:g} to {LARGEST_SCALE:g}; got {scale:g}")
