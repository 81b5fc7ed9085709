"""The SQL files beside this module: one per action, and the numbered migrations."""

from functools import cache
from importlib.resources import files
from typing import Final

_SQL: Final = files(__package__) / "sql"


@cache
def sql(name: str) -> str:
    """The text of ``sql/<name>.sql``."""
    return (_SQL / f"{name}.sql").read_text("utf-8")


@cache
def migrations() -> tuple[tuple[int, str, str], ...]:
    """Number, name and text of each migration, ascending."""
    found = (entry for entry in (_SQL / "migrations").iterdir() if entry.name.endswith(".sql"))
    return tuple(sorted((int(e.name[:4]), e.name.removesuffix(".sql"), e.read_text("utf-8")) for e in found))
