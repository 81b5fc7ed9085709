"""The log: one JSON object a line on standard error. No keys, no prompts, no signatures go in here."""

import json
import logging
import os
import sys
import time
from typing import Any

import orjson


def event(name: str, **fields: Any) -> None:
    """Write one line: the time (seconds since the epoch), what happened, and its fields. Never raises."""
    text = _line({"time": round(time.time(), 3), "event": name} | fields)
    try:
        sys.stderr.flush()
        os.write(sys.stderr.fileno(), text)
    except (OSError, ValueError, AttributeError):
        return  # nobody reads any more; the work goes on


def _line(record: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(record, default=str) + b"\n"
    except TypeError:  # orjson takes neither lone surrogates nor integers of more than 64 bits
        pass
    try:
        return json.dumps(record, default=str, skipkeys=True).encode("ascii") + b"\n"
    except Exception as error:  # an object that cannot even be told
        head = {"time": record["time"], "event": str(record["event"]), "unloggable": type(error).__name__}
        return json.dumps(head).encode("ascii") + b"\n"


class _Lines(logging.Handler):
    """Brings what libraries log into the same form."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"level": record.levelname.lower(), "logger": record.name}
        if record.exc_info:
            fields["traceback"] = logging.Formatter().formatException(record.exc_info)
        event("log", message=record.getMessage(), **fields)


def configure(level: int = logging.WARNING) -> None:
    """Send the log records of libraries, from ``level`` up, through :func:`event`."""
    root = logging.getLogger()
    root.handlers[:] = [_Lines()]
    root.setLevel(level)
