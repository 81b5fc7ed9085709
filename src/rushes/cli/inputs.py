"""The input of a request as a command line gives it: texts, JSON and local files, read by the model's schema.

Nothing here talks to a server; what it refuses, it refuses before anything is sent.
"""

import difflib
import json
import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import click

from rushes.client.types import MEDIA_TYPES, FieldError

TRUE: Final = frozenset({"true", "yes", "on", "1"})
FALSE: Final = frozenset({"false", "no", "off", "0"})
FILE_WORDS: Final = ("image", "video", "audio", "picture", "photo", "mask", "file")
TEXT_WORDS: Final = ("prompt", "text", "caption", "description")


class BadInput(Exception):
    """Fields that cannot be read on this side; nothing was submitted."""

    def __init__(self, fields: list[FieldError]) -> None:
        self.fields = fields
        super().__init__("the input cannot be used")


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine that stands for the value of a field until it is uploaded."""

    path: Path


def read_pairs(pairs: tuple[str, ...]) -> dict[str, str]:
    """The ``-i`` options by field name; of a name given twice the last counts."""
    texts = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip():
            raise click.UsageError(f"-i {pair!r}: write it as NAME=VALUE")
        texts[name.strip()] = text
    return texts


def read_whole(whole: str | None) -> dict[str, Any]:
    """The object that ``--input`` gives: as JSON, as ``@file``, or as ``-`` for standard input."""
    if whole is None:
        return {}
    where = "--input"
    try:
        if whole == "-":
            where, text = "standard input", sys.stdin.buffer.read().decode()
        elif whole.startswith("@"):
            where = whole[1:]
            text = Path(where).read_text("utf-8")
        else:
            text = whole
        value = json.loads(text, parse_constant=_no_constant)
    except OSError as error:
        raise click.UsageError(f"{where}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{where} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise click.UsageError(f"{where} must be a JSON object with the input's fields")
    return value


def parse_value(text: str, field: Mapping[str, Any] | None) -> Any:
    """The value of one ``-i`` option by its field's schema; without one JSON, else the text itself.

    Raises ValueError with what the field takes.
    """
    kind = (field or {}).get("type")
    if isinstance(kind, list):
        kind = next((word for word in kind if word != "null"), None)
    if kind == "string":
        return text
    if kind == "boolean":
        if text.lower() not in TRUE | FALSE:
            raise ValueError(f"must be true or false, not {text!r}")
        return text.lower() in TRUE
    if kind in ("integer", "number", "float"):
        return _number(text, whole=kind == "integer")
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        if kind in ("array", "object"):
            raise ValueError(f"must be a JSON {kind}, not {text!r}") from None
        return text


def _number(text: str, *, whole: bool) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if whole and value.is_integer():
        return int(value)
    if whole or not math.isfinite(value):
        raise ValueError(f"must be {'a whole number' if whole else 'a number'}, not {text!r}")
    return value


def takes_file(name: str, field: Mapping[str, Any] | None) -> bool:
    """Whether a field's value is a file. The wire's schemas call it a string, so its names decide."""
    known = field or {}
    if known.get("type", "string") != "string" or known.get("enum"):
        return False
    if known.get("format") in ("uri", "binary", "file"):
        return True
    default = known.get("default")
    if isinstance(default, str) and " " not in default and default.rpartition(".")[2].lower() in MEDIA_TYPES:
        return True
    words = _words(name, known)
    return any(word.rstrip("s") in FILE_WORDS for word in words) and "prompt" not in words


def _words(name: str, field: Mapping[str, Any]) -> list[str]:
    return f"{name} {field.get('title', '')}".lower().replace("_", " ").split()


def _may_take_file(name: str, field: Mapping[str, Any], path: str) -> bool:
    """Whether a file that is named with @ makes sense for a text field of the schema.

    The schemas of other servers call a file's field what they like, so media goes to any field that does not
    say of itself that it is a text.
    """
    if takes_file(name, field):
        return True
    ending = path.rpartition(".")[2].lower()
    media = MEDIA_TYPES.get(ending, "").partition("/")[0] in ("image", "video", "audio")
    return media and not field.get("enum") and not any(word in TEXT_WORDS for word in _words(name, field))


def not_here(
    values: Mapping[str, Any], schema: Mapping[str, Any] | None, refused: Collection[str]
) -> list[FieldError]:
    """Of the ``refused`` fields those whose value reads like a local file that is not there."""
    fields = _fields(schema)
    return [
        FieldError(name, f"there is no file {value!r} here ({Path.cwd()}), so the text itself was sent")
        for name, value in values.items()
        if name in refused
        and isinstance(value, str)
        and "://" not in value
        and not value.startswith(("data:", "file_"))
        and len(value) < 1000
        and takes_file(name, fields.get(name))
    ]


def resolve(
    given: Mapping[str, Any], texts: Mapping[str, str], schema: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The input with :class:`LocalFile` where a file is to be uploaded. Raises BadInput with all bad fields."""
    fields = _fields(schema)
    values: dict[str, Any] = dict(given)
    bad: list[FieldError] = []
    for name, value in given.items():
        if isinstance(value, str) and takes_file(name, fields.get(name)) and _is_file(value):
            values[name] = LocalFile(Path(value))
    for name, text in texts.items():
        field = fields.get(name)
        if fields and field is None:
            message = "is no field of this model"
            bad.append(FieldError(name, message, "unknown_field", _nearest(name, fields)))
            continue
        try:
            values[name] = _value_or_file(name, text, field)
        except ValueError as error:
            bad.append(FieldError(name, str(error)))
    if bad:
        raise BadInput(bad)
    return values


def _fields(schema: Mapping[str, Any] | None) -> Mapping[str, Any]:
    found = (schema or {}).get("properties")
    return found if isinstance(found, Mapping) else {}


def _value_or_file(name: str, text: str, field: Mapping[str, Any] | None) -> Any:
    if (field or {}).get("type", "string") == "string":
        if text.startswith("@@"):
            return text[1:]
        if text.startswith("@"):
            if field and not _may_take_file(name, field, text[1:]):
                raise ValueError(
                    "takes a text, not a file; write @@ for a text that begins with @, "
                    "and --input @FILE to read the whole input from a file"
                )
            if not _is_file(text[1:]):
                raise ValueError(f"there is no file {text[1:]!r}; write @@ for a value that begins with @")
            return LocalFile(Path(text[1:]))
        if takes_file(name, field) and _is_file(text):
            return LocalFile(Path(text))
    return parse_value(text, field)


def _is_file(text: str) -> bool:
    """Whether ``text`` is the path of an existing file; addresses and data URIs never are."""
    if "://" in text or text.startswith("data:"):
        return False
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def _nearest(name: str, fields: Mapping[str, Any]) -> str | None:
    """The field whose name or title is most like ``name``."""
    titles = {
        str(field.get("title", "")).lower(): known
        for known, field in fields.items()
        if isinstance(field, Mapping)
    }
    word = name.lower().replace("_", " ")
    if word in titles:
        return titles[word]
    close = difflib.get_close_matches(name, list(fields), n=1, cutoff=0.5)
    close_titles = difflib.get_close_matches(word, list(titles), n=1, cutoff=0.6)
    return close[0] if close else titles[close_titles[0]] if close_titles else None


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")
