"""Names of files: those of a model's folder, as messages show them, and which others may be named at all."""

import os
import re
from pathlib import Path
from typing import Final

MANIFEST: Final = "model.toml"
SAMPLE: Final = "sample.json"
LONGEST_PATH: Final = 500
"""Characters of a path that a manifest or a request names."""

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
SAFE_PATH: Final = r"^(?!.*(?:^|/)\.{0,2}(?:/|$))[^\\:\x00-\x1f\x7f]+$"
"""What :func:`why_unsafe` lets pass, as a pattern of JSON Schema."""


def shown(path: Path) -> str:
    """The path in words that can be logged: names on a disk need not be text."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def why_unsafe(path: str) -> str | None:
    """Why ``path`` may not name a file below a folder that is known elsewhere; None where it may.

    Allowed are names with slashes between them. Nothing that leads out of the folder, on any system that the
    file may lie on: no "..", no leading slash, no backslash, no drive, no address.
    """
    if not path:
        return "is empty"
    if len(path) > LONGEST_PATH:
        return f"has more than {LONGEST_PATH} characters"
    if "://" in path:
        return "is an address, not a file"
    if _CONTROL.search(path):
        return "holds a control character"
    if path.startswith("/"):
        return "begins with a slash"
    if "\\" in path:
        return "holds a backslash; write /"
    if ":" in path:
        return "holds a colon"
    parts = path.split("/")
    if ".." in parts:
        return 'leads out of its folder with ".."'
    if "" in parts or "." in parts:
        return "has an empty part or a single dot between its slashes"
    return None
