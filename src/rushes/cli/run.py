"""`rushes run`: submit one request to any server of this wire, wait, and download what came out."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

import click

from rushes.cli import show
from rushes.cli.exits import Exit, listing
from rushes.cli.inputs import BadInput, LocalFile, not_here, read_pairs, read_whole, resolve
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
from rushes.client.types import FieldError, Submitted

CANCEL_SECONDS: Final = 5.0
"""How long Ctrl-C waits for each step of the cancel."""

EPILOG: Final = f"""\b
Example:
  rushes run community/wan-2-2/vace-fun -i 56_text="a slow pan" -i 118_image=@cat.png

\b
Exit status:
{listing()}
"""


@click.command(epilog=EPILOG)
@click.argument("model_id")
@click.option(
    "-i",
    "pairs",
    metavar="NAME=VALUE",
    multiple=True,
    help="One field of the input. @PATH uploads a local file; @@ stands for a leading @.",
)
@click.option("--input", "whole", metavar="JSON|@FILE|-", help="The input as a JSON object; -i wins over it.")
@output_option
@click.option("--no-wait", is_flag=True, help="Print the request's id and leave; `rushes result` fetches it.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the answer as JSON, with the saved files as `saved`."
)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds to wait at most.")
@server_options
def run(
    *,
    model_id: str,
    pairs: tuple[str, ...],
    whole: str | None,
    output_dir: Path,
    no_wait: bool,
    as_json: bool,
    timeout: float | None,
    base_url: str | None,
    api_key: str | None,
) -> int:
    """Submit a request to MODEL_ID, wait for it and download its outputs.

    The paths of the outputs are printed on standard output, everything else on standard error. Ctrl-C
    cancels a request that is still queued.
    """
    task = _Task(model_id, read_whole(whole), read_pairs(pairs))
    request: Submitted | None = None
    with connect(base_url, api_key) as client:
        try:
            if not no_wait:
                check_folder(output_dir)
            request, held = task.submit(client)
            if held:
                raise KeyboardInterrupt
            if no_wait:
                click.echo(show.as_json(request.raw) if as_json else request.request_id)
                show.note(f"{later(request.request_id, base_url)} waits for it and downloads its outputs.")
                return Exit.OK
            result = wait(client, request, model_id, as_json=as_json, timeout=timeout)
        except KeyboardInterrupt:
            if request is not None:
                return _take_back(
                    connect(base_url, api_key, timeout=CANCEL_SECONDS, retries=1), request, base_url
                )
            show.note("Interrupted: nothing was submitted, as far as is known.")
            return Exit.INTERRUPTED
        except (BadInput, CannotSave) as error:
            if as_json:
                click.echo(show.as_json(error_json(error)))
            show.note(f"rushes: {error}")
            for field in getattr(error, "fields", ()):
                show.note(str(field), indent="  ")
            return Exit.INVALID if isinstance(error, BadInput) else Exit.FAILED
        except errors.RushesClientError as error:
            identifier = request.request_id if request else None
            status = fail(error, client, as_json=as_json, notes=task.notes(error), request_id=identifier)
            if identifier and not isinstance(error, errors.RequestFailed | errors.RequestCancelled):
                show.note(
                    f"The request was accepted and may go on: {later(identifier, base_url)} waits for it."
                )
            return status
        return deliver(client, result, output_dir, as_json=as_json, base_url=base_url)


# the submit


class _Task:
    """What the command line asks for, on its way to the server."""

    def __init__(self, model_id: str, given: Mapping[str, Any], texts: Mapping[str, str]) -> None:
        self._model_id, self._given, self._texts = model_id, given, texts
        self._schema: Mapping[str, Any] | None = None
        self._values: dict[str, Any] = {}

    def submit(self, client: Client) -> tuple[Submitted, bool]:
        """The accepted request, and whether Ctrl-C was pressed meanwhile."""
        try:
            if self._given or self._texts:
                self._schema = _schema(client, self._model_id)
            self._values = resolve(self._given, self._texts, self._schema)
            sent = _uploaded(client, self._values)
            with _interrupt_held() as held:
                return client.submit(self._model_id, sent), bool(held)
        except ValueError as error:
            raise click.UsageError(str(error)) from None

    def notes(self, error: errors.RushesClientError) -> list[FieldError]:
        """What this side knows of refused fields and the server cannot: that no such file is here."""
        if not isinstance(error, errors.InvalidInput):
            return []
        return not_here(self._values, self._schema, {field.field for field in error.fields})


def _uploaded(client: Client, values: Mapping[str, Any]) -> dict[str, Any]:
    """The whole input, its local files uploaded, each once."""
    sent = dict(values)
    uploaded: dict[Path, str] = {}
    for name, value in values.items():
        if isinstance(value, LocalFile):
            path = value.path.resolve()
            if path not in uploaded:
                uploaded[path] = _upload(client, name, value.path)
            sent[name] = uploaded[path]
    return sent


def _schema(client: Client, model_id: str) -> Mapping[str, Any] | None:
    """The model's input schema, or None where the server does not show one; the submit tells what is wrong."""
    try:
        return client.model(model_id).input_schema
    except errors.Unauthorized:
        raise
    except errors.ApiError:
        return None


def _upload(client: Client, field: str, path: Path) -> str:
    show.note(f"uploading {path} ({path.stat().st_size / 1e6:.1f} MB)")
    try:
        return client.upload(path).url
    except OSError as error:
        raise BadInput([FieldError(field, f"{path} cannot be read: {error.strerror}")]) from None
    except errors.InvalidInput as error:
        why = error.message.removeprefix("file: ").rstrip(".")
        raise BadInput([FieldError(field, f"{path} was refused: {why}")]) from None
    except errors.ApiError as error:
        if error.status not in (404, 405, 501):
            raise
        message = f"{client.base_url} takes no uploads; give the public HTTPS address of {path.name}"
        raise BadInput([FieldError(field, message)]) from None


# Ctrl-C


def _take_back(client: Client, request: Submitted, base_url: str | None) -> int:
    """Cancel the request where it still waits, and say what became of it."""
    identifier = request.request_id
    more = f"{later(identifier, base_url)} fetches it."
    try:
        with client:
            answer = client.cancel(request)
    except KeyboardInterrupt:
        show.note(f"Interrupted twice: request {identifier} may go on; {more}")
    except errors.RushesClientError as error:
        show.note(f"Interrupted, but request {identifier} could not be cancelled and may go on: {error}")
        show.note(more)
    else:
        if answer.cancelled:
            show.note(f"Interrupted: request {identifier} was still queued and is cancelled.")
        elif answer.status in ("completed", "succeeded", "failed"):
            show.note(f"Interrupted, but request {identifier} has already ended: {more}")
        else:
            show.note(f"Interrupted, but request {identifier} already runs and goes on: {more}")
    return Exit.INTERRUPTED


@contextmanager
def _interrupt_held() -> Iterator[list[int]]:
    """Hold back the first Ctrl-C, so that a submit's answer, and with it the request's id, is not lost.

    Yields a list that is not empty once it was pressed; a second Ctrl-C interrupts at once.
    """
    held: list[int] = []
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield held
        return

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            raise KeyboardInterrupt
        held.append(number)
        show.note("Interrupted: waiting for the server's answer to cancel (Ctrl-C again to leave now)")

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, before)
