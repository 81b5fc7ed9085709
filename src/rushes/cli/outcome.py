"""What `rushes run` and `rushes result` share: the wait, the downloads, and how an error ends the command."""

import shlex
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from rushes.cli import show
from rushes.cli.exits import Exit, status_of
from rushes.client import errors
from rushes.client.sync import Client
from rushes.client.types import FieldError, Result, Submitted

F = TypeVar("F", bound=Callable[..., Any])


class CannotSave(Exception):
    """Outputs cannot be put where they shall go."""


def server_options(command: F) -> F:
    """``--base-url`` and ``--api-key``."""
    key = click.option("--api-key", metavar="KEY", help="The API key. [env: RUSHES_API_KEY]")
    url = click.option("--base-url", metavar="URL", help="The server. [env: RUSHES_BASE_URL]")
    return url(key(command))


def output_option(command: F) -> F:
    return click.option(
        "--output-dir",
        type=click.Path(file_okay=False, path_type=Path),
        default=".",
        show_default="the current folder",
        help="Where outputs are saved, as REQUEST_ID-N.ENDING.",
    )(command)


def connect(base_url: str | None, api_key: str | None, **options: Any) -> Client:
    """The client of this command line. Raises UsageError for an address or a key that cannot be one."""
    try:
        return Client(base_url, api_key, **options)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def later(request_id: str, base_url: str | None, *, wait: bool = True) -> str:
    """The command that fetches a request later, in backticks; ``base_url`` as it was given, if it was."""
    parts = ["rushes", "result", request_id, *(["--wait"] if wait else [])]
    return f"`{shlex.join([*parts, *(['--base-url', base_url] if base_url else [])])}`"


def check_folder(folder: Path) -> None:
    """Make the folder and try it, so that no generation is spent on one that takes no file.

    Raises CannotSave.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CannotSave(_cannot_save(folder, error)) from None


def wait(
    client: Client, request: str | Submitted, label: str, *, as_json: bool, timeout: float | None
) -> Result:
    """Wait for the result under a bar. Raises what :meth:`Client.wait` raises."""
    began = time.monotonic()
    with show.Watch() as watch:
        row = watch.add(label)

        def end(word: str) -> None:
            watch.finish(row, f"{word} in {time.monotonic() - began:.1f} s")

        try:
            result = client.wait(
                request,
                on_status=lambda status: watch.update(row, status),
                timeout=timeout,
                include_cost=as_json,
            )
        except errors.RequestFailed:
            end("failed")
            raise
        except errors.RequestCancelled:
            watch.finish(row, "cancelled")
            raise
        end("succeeded")
    return result


def deliver(
    client: Client, result: Result, output_dir: Path, *, as_json: bool, base_url: str | None = None
) -> int:
    """Download the outputs of a succeeded request and print their paths."""
    identifier = result.request_id
    again = later(identifier, base_url, wait=False)
    if result.engine:
        show.note(show.engine_note(result.engine, result.engine_cost_usd, result.remote_engine))
    try:
        paths = [str(path) for path in client.save(result, output_dir)]
    except KeyboardInterrupt:
        show.note(f"Interrupted while downloading: {again} downloads it again.")
        return Exit.INTERRUPTED
    except (OSError, errors.RushesClientError, ValueError) as error:
        local = isinstance(error, OSError)
        reason = _cannot_save(output_dir, error) if isinstance(error, OSError) else str(error)
        what = "its outputs cannot be saved" if local else "an output cannot be downloaded"
        message = f"request {identifier} succeeded, but {what}: {reason}"
        show.note(f"rushes: {message}")
        for output in result.outputs():
            show.note(output.url, indent="  ")
        show.note(f"{again} downloads it again{', with another --output-dir' if local else ''}.")
        if as_json:
            click.echo(show.as_json({**result.raw, "saved": [], "save_error": message}))
        return Exit.FAILED if local else status_of(error)
    if as_json:
        click.echo(show.as_json({**result.raw, "saved": paths}))
    else:
        for path in paths:
            click.echo(path)
    if not paths:
        show.note(f"request {identifier} succeeded without a file")
    return Exit.OK


def fail(
    error: errors.RushesClientError,
    client: Client,
    *,
    as_json: bool,
    notes: list[FieldError] | None = None,
    request_id: str | None = None,
) -> int:
    """Tell an error: in lines on standard error, with ``as_json`` on standard output too. Its exit status."""
    if as_json:
        if isinstance(error, errors.RequestFailed | errors.RequestCancelled):
            click.echo(show.as_json(error.result.raw))
        else:
            click.echo(show.as_json(error_json(error, request_id=request_id)))
    show.complain(error, had_key=client.has_key)
    for field in notes or ():
        show.note(str(field), indent="  ")
    return status_of(error)


def error_json(error: Exception, *, request_id: str | None = None) -> dict[str, Any]:
    """An error as ``{"error": {...}}``, without what is not known."""
    fields = [
        _known({"field": f.field, "message": f.message, "type": f.type, "suggestion": f.suggestion})
        for f in getattr(error, "fields", ())
    ]
    return {
        "error": _known(
            {
                "type": type(error).__name__,
                "message": getattr(error, "message", None) or str(error),
                "code": getattr(error, "error_code", None),
                "http_status": getattr(error, "status", None) if isinstance(error, errors.ApiError) else None,
                "trace_id": getattr(error, "trace_id", None),
                "request_id": request_id,
                "fields": fields or None,
            }
        )
    }


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _cannot_save(folder: Path, error: OSError) -> str:
    place = folder
    with suppress(OSError):
        place = folder.absolute()
    return f"cannot save to {place}: {error.strerror or error}"
