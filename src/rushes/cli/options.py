"""Options that several commands share."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import click

from rushes import settings as settings_module
from rushes.errors import SettingsError
from rushes.queue.base import Store
from rushes.settings import Settings

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def data_dir_option(command: F) -> F:
    return click.option(
        "--data-dir",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder of the SQLite store and of local files (default: ./rushes-data).",
    )(command)


def config_option(command: F) -> F:
    return click.option(
        "--config",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Settings file (default: ./rushes.toml where there is one).",
    )(command)


def load(config: Path | None = None, **overrides: Any) -> Settings:
    """The settings of this command line. Raises SettingsError."""
    return settings_module.load(file=config, cards=_cards, **overrides)


def _cards() -> int:
    from rushes.engines.wan.devices import visible

    return len(visible(os.environ))


def with_store(settings: Settings, use: Callable[[Store], Coroutine[Any, Any, T]]) -> T:
    """Open the store, have it used, close it. A SQLite store that is not there is made."""
    from rushes.wiring import opened_store

    async def run() -> T:
        async with opened_store(settings) as store:
            return await use(store)

    return asyncio.run(run())


def with_existing_store(settings: Settings, use: Callable[[Store], Coroutine[Any, Any, T]]) -> T:
    """:func:`with_store` for commands that read or change what is there: they never make a store.

    Raises SettingsError where there is none, which is what the wrong folder looks like.
    """
    if not has_store(settings):
        raise SettingsError(
            f"there is no store at {settings.data_dir}: run it where the server runs, or give --data-dir"
        )
    return with_store(settings, use)


def has_store(settings: Settings) -> bool:
    """Whether the SQLite store is there; of a database server that cannot be said without asking it."""
    from rushes.wiring import DATABASE

    return bool(settings.database_url) or (settings.data_dir / DATABASE).exists()


def store_place(settings: Settings) -> str:
    """Which store the settings name, in words and without a password."""
    from rushes.wiring import DATABASE

    if not settings.database_url:
        return str((settings.data_dir / DATABASE).absolute())
    parts = urlsplit(settings.database_url)
    host = parts.netloc.rpartition("@")[2] or parse_qs(parts.query).get("host", ["localhost"])[0]
    return f"PostgreSQL, {host}{unquote(parts.path)}"


def unmatched(patterns: str, ids: Iterable[str]) -> list[str]:
    """The comma-separated patterns of a worker that no model id fits."""
    known = list(ids)
    parts = [part.strip() for part in patterns.split(",") if part.strip()]
    return [part for part in parts if not any(fnmatchcase(id_, part) for id_ in known)]
