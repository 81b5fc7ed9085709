"""`rushes models`: the catalog as this machine has it, or as a server shows it."""

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from rushes.catalog.listing import model_detail, model_summary
from rushes.catalog.load import Catalog
from rushes.cli.checking import check
from rushes.cli.fetching import fetch
from rushes.cli.importing import import_
from rushes.cli.options import config_option, load
from rushes.cli.outcome import connect, fail, server_options
from rushes.cli.routing import route
from rushes.client.errors import RushesClientError
from rushes.client.sync import Client
from rushes.errors import NotFound

PAGE = 200
"""Models asked for at once; the most that a server gives."""


@click.group()
def models() -> None:
    """List, show, check and import models; fetch their weights; explain where their requests run.

    `list` and `show` look into the catalog of this machine; with --base-url, or where RUSHES_BASE_URL is
    set, they ask that server.
    """


@models.command(name="list")
@click.option("--search", default="", help="Words that must appear.")
@click.option("--category", default="", help="Only this category.")
@server_options
@config_option
def list_(
    search: str, category: str, base_url: str | None, api_key: str | None, config: Path | None
) -> int | None:
    """List the models, the built-in ones and those of RUSHES_MODELS_DIR, or those of a server."""
    if _asks_server(base_url):
        with connect(base_url, api_key) as client:
            try:
                _list(list(_pages(client, search, category)))
            except RushesClientError as error:
                return fail(error, client, as_json=False)
            _say_where(client)
        return None
    catalog = Catalog.load(load(config).models_dir)
    found, _ = catalog.search(search, category, limit=len(catalog.entries()))
    _list([model_summary(entry) for entry in found])
    _complain(catalog)
    return None


@models.command()
@click.argument("model_id")
@click.option("--json", "as_json", is_flag=True, help="Print the whole description as JSON.")
@server_options
@config_option
def show(
    model_id: str, *, as_json: bool, base_url: str | None, api_key: str | None, config: Path | None
) -> int | None:
    """Show one model: its inputs with their types, bounds and defaults, and a command that runs it."""
    if _asks_server(base_url):
        with connect(base_url, api_key) as client:
            try:
                detail = client.model(model_id).raw
            except RushesClientError as error:
                return fail(error, client, as_json=as_json)
            except ValueError as error:
                raise click.UsageError(str(error)) from None
            _show(detail, base_url, as_json=as_json)
            _say_where(client)
        return None
    entry = Catalog.load(load(config).models_dir).get(model_id)
    if entry is None:
        raise NotFound(f"There is no model {model_id!r}; `rushes models list` shows them.")
    _show(model_detail(entry), None, as_json=as_json)
    return None


models.add_command(check)
models.add_command(import_)
models.add_command(fetch)
models.add_command(route)


def _asks_server(base_url: str | None) -> bool:
    return bool(base_url or os.environ.get("RUSHES_BASE_URL"))


def _say_where(client: Client) -> None:
    from rushes.cli.show import note

    note(f"as {client.base_url} shows it")


def _pages(client: Client, search: str, category: str) -> Iterator[Mapping[str, Any]]:
    seen = 0
    while True:
        page = client.models(search or None, category or None, limit=PAGE, offset=seen)
        yield from (model.raw for model in page)
        seen += len(page)
        if not len(page) or seen >= page.total:
            return


def _list(found: list[Mapping[str, Any]]) -> None:
    from rushes.cli.show import table

    rows = [
        (
            one.get("model_id"),
            one.get("display_name"),
            one.get("output_type"),
            ", ".join(map(str, one.get("categories") or ())),
        )
        for one in found
    ]
    table(("id", "name", "makes", "categories"), rows)


def _show(detail: Mapping[str, Any], base_url: str | None, *, as_json: bool) -> None:
    from rushes.cli.show import as_json as dumped
    from rushes.cli.show import clean, table

    if as_json:
        click.echo(dumped(detail))
        return
    schema = detail.get("input_schema")
    schema = schema if isinstance(schema, Mapping) else {}
    required = list(schema.get("required") or ())
    known = schema.get("properties")
    fields = {
        str(name): field
        for name, field in (known.items() if isinstance(known, Mapping) else ())
        if isinstance(field, Mapping)
    }
    model_id = str(detail.get("model_id"))
    click.echo(f"{clean(model_id)}: {clean(detail.get('display_name') or '')}")
    click.echo(f"{clean(detail.get('description') or '')}\n")
    rows = [
        (
            name,
            field.get("title"),
            field.get("type"),
            "required" if name in required else _short(field.get("default")),
            _values(field),
        )
        for name, field in fields.items()
    ]
    table(("input", "title", "type", "default", "values"), rows)
    click.echo(f"\n{_command(model_id, detail.get('sample'), fields, required, base_url)}")


def _command(
    model_id: str, sample: object, fields: Mapping[str, Any], required: list[str], base_url: str | None
) -> str:
    """A command that runs the model and can be pasted into a shell as it is."""
    values = sample if isinstance(sample, Mapping) else {}
    parts = ["rushes", "run", model_id]
    for name in required:
        value = values.get(name, fields.get(name, {}).get("default", "VALUE"))
        parts += ["-i", f"{name}={_plain(value)}"]
    return shlex.join(parts + (["--base-url", base_url] if base_url else []))


def _plain(value: object) -> str:
    """A value of a sample as ``-i`` reads it."""
    return json.dumps(value) if isinstance(value, bool | list | dict) else str(value)


def _values(field: Mapping[str, Any]) -> str:
    if isinstance(field.get("enum"), list):
        return " | ".join(map(str, field["enum"]))
    return f"{_bound(field.get('minimum'))}..{_bound(field.get('maximum'))}".strip(".")


def _complain(catalog: Catalog) -> None:
    for problem in catalog.broken:
        click.echo(problem.message, err=True)


def _short(value: object, most: int = 60) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def _bound(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else ""
