"""Options that several commands share."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click

from rushes import settings as settings_module
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
    return settings_module.load(file=config, **overrides)


def with_store(settings: Settings, use: Callable[[Store], Coroutine[Any, Any, T]]) -> T:
    """Open the store, have it used, close it."""
    from rushes.wiring import opened_store

    async def run() -> T:
        async with opened_store(settings) as store:
            return await use(store)

    return asyncio.run(run())
