"""`rushes result`: fetch a request that was submitted before, over HTTP."""

from pathlib import Path

import click

from rushes.cli import show
from rushes.cli.exits import Exit, listing
from rushes.cli.outcome import (
    CannotSave,
    check_folder,
    connect,
    deliver,
    error_json,
    fail,
    later,
    output_option,
    server_options,
    wait,
)
from rushes.client import errors
from rushes.client.sync import Client
from rushes.client.types import Result

EPILOG = f"""\b
Example:
  rushes result 0198c0de-0000-7000-8000-000000000001 --wait --output-dir out

\b
Exit status:
{listing()}
"""


@click.command(epilog=EPILOG)
@click.argument("request_id")
@click.option("--wait", "waits", is_flag=True, help="Wait for the request to end, with its progress.")
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds that --wait takes at most."
)
@output_option
@click.option("--no-download", is_flag=True, help="Print the addresses of the outputs instead.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the answer as JSON, with the saved files as `saved`."
)
@server_options
def result(
    *,
    request_id: str,
    waits: bool,
    timeout: float | None,
    output_dir: Path,
    no_download: bool,
    as_json: bool,
    base_url: str | None,
    api_key: str | None,
) -> int:
    """Fetch the result of the request REQUEST_ID and download its outputs.

    The paths of the outputs are printed on standard output, everything else on standard error. A request
    that has not ended is told with its state, and exit status 9, unless --wait is given.
    """
    if timeout is not None and not waits:
        raise click.UsageError("--timeout goes with --wait")
    with connect(base_url, api_key) as client:
        try:
            if not no_download:
                check_folder(output_dir)
            if waits:
                found = wait(client, request_id, request_id, as_json=as_json, timeout=timeout)
            else:
                found = client.result(request_id, include_cost=as_json)
                if not found.done:
                    return _unfinished(client, found, base_url, as_json=as_json)
                _settle(found)
        except KeyboardInterrupt:
            again = later(request_id, base_url)
            show.note(f"Interrupted: request {request_id} goes on; {again} waits for it.")
            return Exit.INTERRUPTED
        except CannotSave as error:
            if as_json:
                click.echo(show.as_json(error_json(error, request_id=request_id)))
            show.note(f"rushes: {error}")
            return Exit.FAILED
        except errors.RushesClientError as error:
            return fail(error, client, as_json=as_json, request_id=request_id)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        if not no_download:
            return deliver(client, found, output_dir, as_json=as_json, base_url=base_url)
        return _print(found, as_json=as_json)


def _unfinished(client: Client, found: Result, base_url: str | None, *, as_json: bool) -> int:
    """Say how far the request is."""
    status = client.status(found.request_id)
    again = later(found.request_id, base_url)
    if as_json:
        click.echo(show.as_json(status.raw))
    show.note(f"Request {found.request_id} has not ended: {show.describe(status)}. {again} waits for it.")
    return Exit.SERVER


def _settle(found: Result) -> None:
    """Raise what a wait would raise for a request that did not succeed."""
    if found.status == "failed":
        raise errors.RequestFailed(found)
    if found.status not in ("succeeded", "completed"):
        raise errors.RequestCancelled(found)


def _print(found: Result, *, as_json: bool) -> int:
    if found.engine:
        show.note(show.engine_note(found.engine, found.engine_cost_usd, found.remote_engine))
    if as_json:
        click.echo(show.as_json(found.raw))
        return Exit.OK
    for output in found.outputs():
        click.echo(output.url)
    return Exit.OK
