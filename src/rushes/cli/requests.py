"""`rushes requests`: the operator's view, on the store itself, over all accounts."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, cast, get_args

import click

from rushes.cli.options import config_option, data_dir_option, load, with_existing_store
from rushes.errors import NotFound
from rushes.queue.base import Store
from rushes.requests.ids import AccountId, RequestId
from rushes.requests.record import Failure, Request, as_builtin, duration_seconds
from rushes.requests.states import State

GIVEN_UP: Final = (
    "The remote engine that had this request is not in use any more. What became of it is not known."
)


@click.group()
def requests() -> None:
    """List, show, cancel and give up requests."""


@requests.command(name="list")
@click.option("--state", type=click.Choice(get_args(State)), help="Only requests in this state.")
@click.option("--model", help="Only requests of this model.")
@click.option("--account", help="Only requests of this account.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@data_dir_option
@config_option
def list_(
    state: str | None,
    model: str | None,
    account: str | None,
    limit: int,
    data_dir: Path | None,
    config: Path | None,
) -> None:
    """List requests, the newest first."""
    from rushes.cli.show import table

    async def read(store: Store) -> tuple[list[Request], dict[State, int]]:
        found = await store.list_requests(
            account=AccountId(account) if account else None,
            state=cast("State | None", state),
            model=model,
            limit=limit,
        )
        return found, await store.counts()

    found, counts = with_existing_store(load(config, data_dir=data_dir), read)
    rows = [
        (
            request.id,
            request.model,
            request.state,
            str(request.attempt),
            request.engine or "",
            _moment(request.created_at),
            "" if (seconds := duration_seconds(request)) is None else f"{seconds:.1f}",
            "" if (task := request.remote_task) is None or task.cost_usd is None else f"{task.cost_usd:g}",
            request.failure.code if request.failure else "",
        )
        for request in found
    ]
    table(("id", "model", "state", "attempt", "engine", "created", "seconds", "usd", "error"), rows)
    click.echo(", ".join(f"{count} {name}" for name, count in counts.items()))


@requests.command()
@click.argument("request_id")
@data_dir_option
@config_option
def show(request_id: str, data_dir: Path | None, config: Path | None) -> None:
    """Show everything that is known of one request, as JSON.

    `remote_task` is there where a remote engine has it: the remote's name, whether it has taken the request
    (`phase`), its own id (in `handle`) and what it took (`cost_usd`).
    """

    async def read(store: Store) -> Request | None:
        return await store.get(RequestId(request_id))

    request = with_existing_store(load(config, data_dir=data_dir), read)
    if request is None:
        raise NotFound(f"There is no request {request_id!r}; `rushes requests list` shows the newest.")
    record: dict[str, Any] = as_builtin(request)
    record["input"] = json.loads(request.input)
    click.echo(json.dumps(record, indent=2, ensure_ascii=False))


@requests.command()
@click.argument("request_id")
@data_dir_option
@config_option
def cancel(request_id: str, data_dir: Path | None, config: Path | None) -> int:
    """Cancel a request that still waits."""

    async def end(store: Store) -> str | None:
        return await store.cancel(RequestId(request_id), None)

    outcome = with_existing_store(load(config, data_dir=data_dir), end)
    if outcome is None:
        raise NotFound(f"There is no request {request_id!r}; `rushes requests list` shows the newest.")
    click.echo(outcome)
    return 0 if outcome == "cancelled" else 1


@requests.command()
@click.argument("request_id")
@click.option("--why", metavar="TEXT", default=GIVEN_UP, help="What its user reads.")
@data_dir_option
@config_option
def fail(request_id: str, why: str, data_dir: Path | None, config: Path | None) -> int:
    """Give up a request that waits for a remote engine which no worker has any more.

    It ends with `remote_lost`. What the remote made of it, and what it took, stays unknown. `rushes doctor` names
    such requests. Exit status 1: it does not wait for a remote.
    """
    if not why.strip():
        raise click.UsageError("--why: say why, in words for the user")

    async def end(store: Store) -> tuple[Request | None, bool]:
        id_ = RequestId(request_id)
        done = await store.abandon(id_, Failure("remote_lost", " ".join(why.split())))
        return await store.get(id_), done

    request, done = with_existing_store(load(config, data_dir=data_dir), end)
    if request is None:
        raise NotFound(f"There is no request {request_id!r}; `rushes requests list` shows the newest.")
    if done:
        click.echo("failed")
        return 0
    there = "; a worker asks the remote about it" if request.state == "running" and request.remote_task else ""
    click.echo(f"It does not wait for a remote: it is {request.state}{there}.", err=True)
    return 1


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
