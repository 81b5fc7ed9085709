"""Opening the database file: pragmas, the SQL files, numbered migrations under a lock."""

import re
import sqlite3
import time
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Final

from rushes.errors import SettingsError, StoreUnavailable

LOCK_SECONDS: Final = 10.0
"""How long a writer waits for another process's transaction before it says that the store is unavailable."""
_OLDEST = (3, 37, 0)


@cache
def sql(name: str) -> str:
    """The text of ``sql/<name>.sql``."""
    return (files(__package__) / "sql" / f"{name}.sql").read_text("utf-8")


def connect(path: Path) -> sqlite3.Connection:
    """A connection in WAL mode whose commits are on the disk when they return.

    The checkpoint is rare (20,000 pages) because it, not the commit, was what bounded grouped inserts.
    """
    if sqlite3.sqlite_version_info < _OLDEST:
        raise StoreUnavailable(f"SQLite {sqlite3.sqlite_version} is too old: Rushes needs 3.37 or newer")
    try:
        connection = sqlite3.connect(
            path, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "wal_autocheckpoint = 20000",
            "foreign_keys = ON",
            "cache_size = -16000",
            "mmap_size = 268435456",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()
    except sqlite3.Error as error:
        raise StoreUnavailable(f"{path} cannot be opened: {error}") from error
    return connection


def begin(connection: sqlite3.Connection) -> None:
    """Take the write lock.

    SQLite's own waiting sleeps in steps of up to 100 ms; transactions here last a few milliseconds, so short
    sleeps hand the lock over sooner.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    connection.execute("PRAGMA busy_timeout = 0")
    try:
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.0004)
            else:
                return
    finally:
        connection.execute(f"PRAGMA busy_timeout = {int(LOCK_SECONDS * 1000)}")


def _is_busy(error: sqlite3.OperationalError) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the schema up to date. Several processes may start at once: the first one does it."""
    scripts = sorted(
        (int(match[1]), entry.read_text("utf-8"))
        for entry in (files(__package__) / "sql" / "migrations").iterdir()
        if (match := re.fullmatch(r"(\d{4})_\w+\.sql", entry.name))
    )
    newest = scripts[-1][0]
    if _version(connection) == newest:
        return
    begin(connection)
    try:
        current = _version(connection)
        if current > newest:
            raise SettingsError(
                f"{path} was written by a newer Rushes (schema {current}, this one knows {newest}): upgrade"
            )
        for number, script in scripts:
            if number > current:
                for statement in _statements(script):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {number}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _statements(script: str) -> list[str]:
    found, part = [], ""
    for line in script.splitlines(keepends=True):
        part += line
        if sqlite3.complete_statement(part):
            found.append(part)
            part = ""
    return found
