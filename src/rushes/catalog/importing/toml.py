"""Writes TOML: the few forms that a manifest needs."""

import json
import re
from typing import Final

Scalar = str | int | float | bool

_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
_SURROGATE: Final = re.compile(r"[\ud800-\udfff]")
_LINE: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]+")


def text(value: str) -> str:
    """A basic string. Half of a surrogate pair, which is no text, becomes U+FFFD."""
    whole = _SURROGATE.sub("\ufffd", value)
    return json.dumps(whole, ensure_ascii=False).replace("\x7f", "\\u007f")


def scalar(value: Scalar) -> str:
    """A value on the right of a key. Raises ValueError for NaN and infinities, which no manifest can hold."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"{value} cannot be written")
        return repr(value)
    return str(value)


def array(values: tuple[Scalar, ...]) -> str:
    """A list: on one line where it is short, else one value a line."""
    written = [scalar(value) for value in values]
    short = "[" + ", ".join(written) + "]"
    if len(short) <= 80:
        return short
    return "[\n" + "".join(f"  {one},\n" for one in written) + "]"


def key(name: str) -> str:
    return name if _BARE.fullmatch(name) else text(name)


def pair(name: str, value: Scalar | tuple[Scalar, ...]) -> str:
    """One line, or several for a long list: ``name = value``."""
    return f"{key(name)} = {array(value) if isinstance(value, tuple) else scalar(value)}\n"


def comment(words: str) -> str:
    """One line of comment, whatever ``words`` hold."""
    return f"# {_LINE.sub(' ', words).strip()}".rstrip() + "\n"
