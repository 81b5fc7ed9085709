"""`rushes keys`: these commands work on the store itself, as the operator."""

from datetime import UTC, datetime
from pathlib import Path

import click

from rushes.cli.options import (
    config_option,
    data_dir_option,
    has_store,
    load,
    store_place,
    with_existing_store,
    with_store,
)
from rushes.errors import NotFound, SettingsError
from rushes.queue.base import Store
from rushes.requests.record import Key


@click.group()
def keys() -> None:
    """Create, list and revoke API keys."""


@keys.command()
@click.option("--name", required=True, help="What to call the key.")
@click.option("--account", default="default", show_default=True, help="Whose requests the key sees.")
@data_dir_option
@config_option
def create(name: str, account: str, data_dir: Path | None, config: Path | None) -> None:
    """Create a key. It is printed on standard output, alone, and is stored nowhere.

    Standard error says to which store it belongs; the servers and workers of that store alone know it.
    """
    from rushes.cli.show import note
    from rushes.service.keys import new_key

    key, record = new_key(name, account)

    async def add(store: Store) -> None:
        await store.add_key(record)

    settings = load(config, data_dir=data_dir)
    there = has_store(settings)
    with_store(settings, add)
    place = store_place(settings)
    if there:
        note(f"The key {name!r} is for the server with the store {place}.")
    else:
        note(f"There was no store yet, so a new one was made: {place}.")
        note(
            "A server that runs elsewhere does not know this key: make one in its folder, or with its --data-dir."
        )
    click.echo(key)


@keys.command(name="list")
@data_dir_option
@config_option
def list_(data_dir: Path | None, config: Path | None) -> None:
    """List the keys: never the keys themselves, but their last four characters."""
    from rushes.cli.show import table

    async def read(store: Store) -> list[Key]:
        return await store.list_keys()

    rows = [
        (
            key.id,
            key.name,
            key.account,
            f"…{key.hint}",
            _day(key.created_at),
            _day(key.revoked_at) if key.revoked_at else "",
        )
        for key in with_existing_store(load(config, data_dir=data_dir), read)
    ]
    table(("id", "name", "account", "key", "created", "revoked"), rows)


@keys.command()
@click.argument("id_or_name")
@data_dir_option
@config_option
def revoke(id_or_name: str, data_dir: Path | None, config: Path | None) -> None:
    """Revoke a key by its id, or by its name where that fits one key alone."""

    async def end(store: Store) -> Key | None:
        return await store.revoke_key(id_or_name)

    try:
        key = with_existing_store(load(config, data_dir=data_dir), end)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    if key is None:
        raise NotFound(f"There is no live key {id_or_name!r}; `rushes keys list` shows them.")
    click.echo(f"revoked {key.id} ({key.name})")


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
