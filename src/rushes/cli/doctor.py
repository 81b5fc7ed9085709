"""`rushes doctor`: what is installed, reachable, missing, and the next step for each."""

import os
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from rushes.cli.options import config_option, data_dir_option, load
from rushes.errors import RushesError
from rushes.settings import Settings

_PACKAGES = ("rushes", "uvicorn", "uvloop", "httptools", "av", "opencv-python-headless", "obstore", "asyncpg")
Finding = tuple[str, str, str]
"""Whether it is well ("ok", "note" or "bad"), what was looked at, and what was found with the next step."""


@click.command()
@data_dir_option
@config_option
def doctor(data_dir: Path | None, config: Path | None) -> int:
    """Tell what is installed, reachable and missing, and the next step. Exit status 1: something is bad."""
    settings = load(config, data_dir=data_dir)
    bad = 0
    for look in (_python, _packages, _directory, _store, _storage, _catalog, _engine, _server):
        for state, what, text in _careful(look, settings):
            bad += state == "bad"
            mark = {"ok": click.style("ok  ", fg="green"), "bad": click.style("bad ", fg="red")}.get(
                state, click.style("note", fg="yellow")
            )
            click.echo(f"{mark}  {what}: {text}")
    return 1 if bad else 0


def _careful(look: Callable[[Settings], Iterator[Finding]], settings: Settings) -> Iterator[Finding]:
    try:
        yield from look(settings)
    except RushesError as error:
        yield "bad", look.__name__.strip("_"), error.message


def _python(_: Settings) -> Iterator[Finding]:
    yield "ok", "python", f"{sys.version.split()[0]} at {sys.executable}"
    newest = sqlite3.sqlite_version_info >= (3, 37)
    text = sqlite3.sqlite_version + ("" if newest else ": too old, 3.37 is needed; use a newer Python build")
    yield "ok" if newest else "bad", "sqlite", text


def _packages(_: Settings) -> Iterator[Finding]:
    for name in _PACKAGES:
        try:
            yield "ok", name, version(name)
        except PackageNotFoundError:
            yield "bad", name, f"missing: pip install {name}"


def _directory(settings: Settings) -> Iterator[Finding]:
    folder = settings.data_dir
    if not folder.exists():
        yield "note", "data directory", f"{folder} is not there yet; `rushes serve` makes it"
        return
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        yield "bad", "data directory", f"{folder} cannot be written to: change its owner, or use --data-dir"
    elif free < 1 << 30:
        yield (
            "bad",
            "data directory",
            f"{free >> 20} MiB free in {folder}: make room, or set RUSHES_RETENTION_DAYS",
        )
    else:
        yield "ok", "data directory", f"{folder}, {free >> 30} GiB free"


def _store(settings: Settings) -> Iterator[Finding]:
    from rushes.cli.options import with_store
    from rushes.queue.base import Store
    from rushes.wiring import DATABASE

    what = "PostgreSQL" if settings.database_url else "SQLite store"
    if not settings.database_url and not (settings.data_dir / DATABASE).exists():
        yield "note", what, "not made yet; `rushes serve` makes it"
        return

    async def look(store: Store) -> tuple[str, int, int]:
        await store.ping()
        counts = await store.counts()
        live = [key for key in await store.list_keys() if key.revoked_at is None]
        text = ", ".join(f"{count} {state}" for state, count in counts.items())
        return text, len(live), len(await store.workers())

    text, live, workers = with_store(settings, look)
    yield "ok", what, text
    yield (
        ("ok", "API keys", f"{live} live")
        if live
        else (
            "note",
            "API keys",
            "none; `rushes keys create --name NAME` makes one",
        )
    )
    yield (
        ("ok", "workers", f"{workers} joined")
        if workers
        else (
            "note",
            "workers",
            "none joined; `rushes serve` or `rushes worker` starts one",
        )
    )


def _storage(settings: Settings) -> Iterator[Finding]:
    import asyncio

    from rushes.media.storage import open_storage

    if not settings.storage_url and not settings.data_dir.exists():
        yield "note", "storage", "the data directory is not there yet; `rushes serve` makes it"
        return
    asyncio.run(open_storage(settings).probe())
    yield "ok", "storage", settings.storage_url or str(settings.data_dir / "files")


def _catalog(settings: Settings) -> Iterator[Finding]:
    from rushes.catalog.load import Catalog

    catalog = Catalog.load(settings.models_dir)
    yield "ok", "models", f"{len(catalog.entries())} usable"
    for problem in catalog.broken:
        yield "bad", "model", problem.message
    if settings.models_dir is None:
        yield "note", "your own models", "none; set RUSHES_MODELS_DIR to a folder with them (docs/models.md)"


def _engine(settings: Settings) -> Iterator[Finding]:
    from rushes.wiring import make_engine

    engine = make_engine(settings)
    if engine.name == "draft":
        yield "note", "engine draft", "animatics on the CPU, to build and test against; not generation"
    else:
        yield "ok", f"engine {engine.name}", "loads"


def _server(settings: Settings) -> Iterator[Finding]:
    import json

    import httpx

    note = settings.data_dir / "server.json"
    if not note.exists():
        yield "note", "server", "not running here; `rushes serve` starts it"
        return
    try:
        url = str(json.loads(note.read_text("utf-8"))["url"])
        answer = httpx.get(f"{url}/healthz", timeout=5.0, trust_env=False)
    except (OSError, ValueError, KeyError, httpx.HTTPError) as error:
        yield "bad", "server", f"{note} names one that does not answer ({error}); start it again"
        return
    well = answer.status_code == 200
    yield "ok" if well else "bad", "server", f"{url} answers {answer.status_code}"
