"""`rushes doctor`: what is installed, reachable, missing, and the next step for each."""

import ipaddress
import os
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

import click

from rushes.cli.comfyui import python_of, unknown_variants
from rushes.cli.options import config_option, data_dir_option, has_store, load, store_place, unmatched
from rushes.errors import EngineError, RushesError, SettingsError, StoreUnavailable
from rushes.settings import Settings

_MAKE = "`rushes serve` makes it; for a server elsewhere run this in its folder, or give --data-dir"
_PACKAGES = ("rushes", "uvicorn", "uvloop", "httptools", "av", "opencv-python-headless", "obstore", "asyncpg")
Finding = tuple[str, str, str]
"""Whether it is well ("ok", "note" or "bad"), what was looked at, and what was found with the next step."""


@click.command()
@data_dir_option
@config_option
def doctor(data_dir: Path | None, config: Path | None) -> int:
    """Tell what is installed, reachable and missing, and the next step. Exit status 1: something is bad."""
    try:
        settings = load(config, data_dir=data_dir)
    except SettingsError as error:
        return _tell(
            [*_python(), *_packages(), *(("bad", "setting", line) for line in error.message.split("\n"))]
        )
    looks = (_directory, _store, _storage, _addresses, _catalog, _engine, _comfyui, _wan, _remotes, _server)
    found = [*_python(), *_packages()]
    for look in looks:
        found += _careful(look, settings)
    return _tell(found)


def _tell(found: list[Finding]) -> int:
    """Print what was found; the exit status."""
    marks = {"ok": click.style("ok  ", fg="green"), "bad": click.style("bad ", fg="red")}
    for state, what, text in found:
        click.echo(f"{marks.get(state, click.style('note', fg='yellow'))}  {what}: {text}")
    return 1 if any(state == "bad" for state, *_ in found) else 0


def _careful(look: Callable[[Settings], Iterator[Finding]], settings: Settings) -> Iterator[Finding]:
    """What ``look`` finds; whatever goes wrong in it is a finding too, on one line."""
    what = look.__name__.strip("_")
    try:
        yield from look(settings)
    except RushesError as error:
        yield "bad", what, _one_line(error.message)
    except Exception as error:
        yield "bad", what, f"cannot be looked at: {_one_line(error)}"


def _one_line(text: object) -> str:
    if isinstance(text, BaseException):
        return f"{type(text).__name__}: {' '.join(str(text).split())}"[:500]
    return " ".join(str(text).split())[:1000]


def _python() -> Iterator[Finding]:
    yield "ok", "python", f"{sys.version.split()[0]} at {sys.executable}"
    newest = sqlite3.sqlite_version_info >= (3, 37)
    text = sqlite3.sqlite_version + ("" if newest else ": too old, 3.37 is needed; use a newer Python build")
    yield "ok" if newest else "bad", "sqlite", text


def _packages() -> Iterator[Finding]:
    for name in _PACKAGES:
        try:
            yield "ok", name, version(name)
        except PackageNotFoundError:
            yield "bad", name, f"missing: pip install {name}"


def _directory(settings: Settings) -> Iterator[Finding]:
    folder = settings.data_dir
    if not folder.exists():
        yield "note", "data directory", f"{folder} is not there yet; {_MAKE}"
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
    from rushes.cli.remotes import adrift, told, told_adrift
    from rushes.queue.base import Store
    from rushes.requests.record import Request, WorkerRecord

    what = "PostgreSQL" if settings.database_url else "SQLite store"
    if not has_store(settings):
        yield "note", what, f"not made yet; {_MAKE}"
        return

    async def look(store: Store) -> tuple[str, int, list[WorkerRecord], list[Request]]:
        await store.ping()
        counts = await store.counts()
        live = [key for key in await store.list_keys() if key.revoked_at is None]
        text = ", ".join(f"{count} {state}" for state, count in counts.items())
        workers = await store.workers()
        return text, len(live), workers, await adrift(store, workers)

    text, live, workers, lost = with_store(settings, look)
    yield "ok", what, f"{store_place(settings)}: {text}"
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
        ("ok", "workers", f"{len(workers)} joined")
        if workers
        else (
            "note",
            "workers",
            "none joined; `rushes serve` or `rushes worker` starts one",
        )
    )
    yield from told(workers)
    yield from told_adrift(lost)


def _storage(settings: Settings) -> Iterator[Finding]:
    import asyncio

    from rushes.media.storage import open_storage

    if not settings.storage_url and not (settings.data_dir / "files").exists():
        yield "note", "storage", f"{settings.data_dir / 'files'} is not there yet; {_MAKE}"
        return
    try:
        asyncio.run(open_storage(settings).probe())
    except StoreUnavailable as error:
        yield "bad", "storage", _storage_trouble(settings, error)
        return
    yield "ok", "storage", settings.storage_url or str(settings.data_dir / "files")


def _storage_trouble(settings: Settings, error: StoreUnavailable) -> str:
    """Where the storage is, what it says, and what to do: the server's own message names none of it."""
    place = settings.storage_url or str(settings.data_dir / "files")
    cause = str(error.__cause__ or error.message)
    asked = re.search(r"https?://[^\s/,\"]+", cause)
    said = re.findall(r'message: "([^"]+)"|<Message>([^<]+)|code: Some\("([^"]+)"', cause)
    words = [part for found in said for part in found if part]
    reason = words[-1] if words else _one_line(cause.partition("\n")[0])
    where = f"{place} at {asked[0]}" if asked else place
    return f"{where}: {reason}. {_storage_step(settings, cause)}"


def _storage_step(settings: Settings, cause: str) -> str:
    """By the words of the cause, never its digits: keys and times in it may have those of any status."""
    text = cause.lower()
    if not settings.storage_url:
        return "Make the folder writable and make room on its disk, or give another --data-dir"
    vendor = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}[settings.storage_url.partition("://")[0]]
    endpoint = {"s3": "AWS_ENDPOINT_URL", "az": "AZURE_STORAGE_ENDPOINT"}.get(
        settings.storage_url[:2], "the network"
    )
    refused = ("unauthorized", "forbidden", "denied", "privileges", "signature", "credential", "imds")
    if any(word in text for word in refused):
        return f"Check the {vendor}_* credentials and what they may do in this bucket"
    if any(word in text for word in ("nosuchbucket", "nosuchcontainer", "not found")):
        return "Create the bucket, or mend RUSHES_STORAGE_URL"
    if any(word in text for word in ("connect", "dns", "timed out", "sending request")):
        return f"Check that it is running and reachable from here, and {endpoint}"
    return "Check RUSHES_STORAGE_URL and the storage's own log"


def _addresses(settings: Settings) -> Iterator[Finding]:
    """Who may reach what: the addresses in answers, the proxies that are believed, the private networks."""
    loopback = settings.host == "localhost" or _is_loopback(settings.host)
    url = settings.public_url
    if url:
        hidden = _is_loopback(urlsplit(url).hostname or "") and not loopback
        text = f"{url}: others cannot reach this; set RUSHES_PUBLIC_URL to the address that they use"
        yield ("note", "public_url", text) if hidden else ("ok", "public_url", url)
    elif not loopback:
        text = "not set: URLs in answers take the caller's Host header; set RUSHES_PUBLIC_URL behind a proxy"
        yield "note", "public_url", text
    if "*" in [part.strip() for part in settings.trusted_proxies.split(",")]:
        text = "*: any caller can choose the address that it seems to come from; name your proxies instead"
        yield "note", "trusted_proxies", text
    else:
        yield "ok", "trusted_proxies", settings.trusted_proxies or "none"
    for network in settings.fetch_allow:
        wide = ipaddress.ip_network(network, strict=False).prefixlen == 0
        text = f"{network}: inputs may point to any machine of yours; name the networks that they need"
        yield (
            ("note", "fetch_allow", text) if wide else ("ok", "fetch_allow", f"inputs may point into {network}")
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _catalog(settings: Settings) -> Iterator[Finding]:
    from rushes.catalog.load import Catalog

    catalog = Catalog.load(settings.models_dir)
    known = [entry.model.id for entry in catalog.entries()]
    yield "ok", "models", f"{len(known)} model(s) read; {len(catalog.broken)} error(s)"
    idle = unmatched(settings.models, known)
    none = len(idle) == len([part for part in settings.models.split(",") if part.strip()])
    for pattern in idle:
        step = "; the workers serve nothing" if none else ""
        text = f"no model fits {pattern!r}{step}: mend RUSHES_MODELS (`rushes models list` shows the ids)"
        yield "bad" if none else "note", "worker models", text
    for problem in catalog.broken:
        yield "bad", "model", problem.message
    read = (entry.model for entry in catalog.entries())
    for name, hint in unknown_variants(settings.comfyui_variants, read).items():
        yield "note", "variants", f"RUSHES_COMFYUI_VARIANTS: no model has a variant {name!r}; {hint}"
    if settings.models_dir is None:
        yield "note", "your own models", "none; set RUSHES_MODELS_DIR to a folder with them (docs/models.md)"


def _engine(settings: Settings) -> Iterator[Finding]:
    from rushes.wiring import make_engine

    if settings.engine == "comfyui":  # making it would start a ComfyUI, or wait for one: see _comfyui
        slots = len(settings.comfyui_urls) or settings.workers
        yield "ok", "engine comfyui", f"{slots} slot(s)"
        return
    if settings.engine == "wan":  # making it would fetch weights: see _wan
        yield "ok", "engine wan", f"{settings.workers} slot(s)"
        return
    try:
        engine = make_engine(settings)
    except SettingsError as error:
        yield "bad", f"engine {settings.engine}", _one_line(error.message)
        return
    except Exception as error:  # whatever a module of somebody's own does when it is imported or called
        text = f"cannot be loaded: {_one_line(error)}; mend it, or set RUSHES_ENGINE"
        yield "bad", f"engine {settings.engine}", text
        return
    if engine.name == "draft":
        yield "note", "engine draft", "animatics on the CPU, to build and test against; not generation"
    else:
        yield "ok", f"engine {engine.name}", "loads"


def _comfyui(settings: Settings) -> Iterator[Finding]:
    """Each ComfyUI that is named: whether it answers, or could be started."""
    from rushes.engines.comfyui.catalogue import (
        describe,
        fetch_object_info,
        fetch_system_stats,
        without_password,
    )

    if settings.comfyui_dir is not None:
        yield from _comfyui_folder(settings, settings.comfyui_dir)
    for url in settings.comfyui_urls:
        what = f"ComfyUI {without_password(url)}"
        try:
            text = describe(fetch_system_stats(url, 10.0))
            yield "ok", what, f"{text}, {len(fetch_object_info(url))} node classes"
        except EngineError as error:
            yield "bad", what, _one_line(error.message)
    if settings.comfyui_dir is not None or settings.comfyui_urls:
        yield "note", "workflows", "`rushes models check` compares them with this ComfyUI"


def _comfyui_folder(settings: Settings, folder: Path) -> Iterator[Finding]:
    import subprocess

    from rushes.engines.comfyui.catalogue import Installation

    what = f"ComfyUI {folder}"
    try:
        python = python_of(settings, folder)
        there = Installation(folder, settings.comfyui_args)
    except RushesError as error:
        yield "bad", what, _one_line(error.message)
        return
    program = "import torch, aiohttp, yaml, safetensors; print(torch.__version__)"
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield "bad", what, f"{python} cannot be run ({_one_line(error)}): mend RUSHES_COMFYUI_PYTHON"
        return
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        step = "install its requirements.txt, or name its Python in RUSHES_COMFYUI_PYTHON"
        yield "bad", what, f"{python} cannot start it ({_one_line(said)}): {step}"
        return
    packs = len(there.packs())
    yield "ok", what, f"{python} has torch {done.stdout.strip()}; {packs} node pack(s); each slot starts it"


def _wan(settings: Settings) -> Iterator[Finding]:
    """Torch, cards and weights, where this engine is the one."""
    if settings.engine == "wan":
        from rushes.cli.wan import findings

        yield from findings(settings)


def _remotes(settings: Settings) -> Iterator[Finding]:
    """Addresses, keys and models of remote engines."""
    from rushes.cli.remotes import findings

    yield from findings(settings)


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
