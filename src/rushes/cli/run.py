"""`rushes run`: submit one request to any server of this wire, wait, and download what came out."""

import difflib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

import click

from rushes.cli import show
from rushes.cli.exits import Exit, listing, status_of
from rushes.client import errors
from rushes.client.sync import Client
from rushes.client.types import MEDIA_TYPES, FieldError, Result, Submitted

TRUE: Final = frozenset({"true", "yes", "on", "1"})
FALSE: Final = frozenset({"false", "no", "off", "0"})
FILE_WORDS: Final = ("image", "video", "audio", "picture", "photo", "mask", "file")
CANCEL_SECONDS: Final = 5.0
"""How long Ctrl-C waits for each step of the cancel."""

EPILOG: Final = f"""\b
Example:
  rushes run community/wan-2-2/vace-fun -i 56_text="a slow pan" -i 118_image=@cat.png

\b
Exit status:
{listing()}
"""


class BadInput(Exception):
    """Fields that cannot be read on this side; nothing was sent."""

    def __init__(self, fields: list[FieldError]) -> None:
        self.fields = fields
        super().__init__("the input cannot be used")


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine that stands for the value of a field until it is uploaded."""

    path: Path


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
@click.option(
    "--output-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=".",
    show_default="the current folder",
    help="Where outputs are saved, as REQUEST_ID-N.ENDING.",
)
@click.option("--no-wait", is_flag=True, help="Print the request's id and leave.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the answer as JSON, with the saved files as `saved`."
)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds to wait at most.")
@click.option("--base-url", metavar="URL", help="The server. [env: RUSHES_BASE_URL]")
@click.option("--api-key", metavar="KEY", help="The API key. [env: RUSHES_API_KEY]")
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
    texts = read_pairs(pairs)
    given = read_whole(whole)
    try:
        client = Client(base_url, api_key)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    request: Submitted | None = None
    with client:
        try:
            request, held = _submit(client, model_id, given, texts)
            if held:
                raise KeyboardInterrupt
            if no_wait:
                click.echo(show.as_json(request.raw) if as_json else request.request_id)
                return Exit.OK
            result = _wait(client, request, model_id, as_json=as_json, timeout=timeout)
        except KeyboardInterrupt:
            if request is not None:
                return _take_back(Client(base_url, api_key, timeout=CANCEL_SECONDS, retries=1), request)
            show.note("Interrupted: nothing was submitted, as far as is known.")
            return Exit.INTERRUPTED
        except BadInput as error:
            show.note(f"rushes: {error}")
            for field in error.fields:
                show.note(str(field), indent="  ")
            return Exit.INVALID
        except errors.RushesClientError as error:
            show.complain(error, had_key=client.has_key)
            return status_of(error)
        return _deliver(client, result, output_dir, as_json=as_json)


# the input


def read_pairs(pairs: tuple[str, ...]) -> dict[str, str]:
    """The ``-i`` options by field name; of a name given twice the last counts."""
    texts = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip():
            raise click.UsageError(f"-i {pair!r}: write it as NAME=VALUE")
        texts[name.strip()] = text
    return texts


def read_whole(whole: str | None) -> dict[str, Any]:
    """The object that ``--input`` gives: as JSON, as ``@file``, or as ``-`` for standard input."""
    if whole is None:
        return {}
    where = "--input"
    try:
        if whole == "-":
            where, text = "standard input", sys.stdin.buffer.read().decode()
        elif whole.startswith("@"):
            where = whole[1:]
            text = Path(where).read_text("utf-8")
        else:
            text = whole
        value = json.loads(text, parse_constant=_no_constant)
    except OSError as error:
        raise click.UsageError(f"{where}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{where} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise click.UsageError(f"{where} must be a JSON object with the input's fields")
    return value


def parse_value(text: str, field: Mapping[str, Any] | None) -> Any:
    """The value of one ``-i`` option by its field's schema; without one JSON, else the text itself.

    Raises ValueError with what the field takes.
    """
    kind = (field or {}).get("type")
    if isinstance(kind, list):
        kind = next((word for word in kind if word != "null"), None)
    if kind == "string":
        return text
    if kind == "boolean":
        if text.lower() not in TRUE | FALSE:
            raise ValueError(f"must be true or false, not {text!r}")
        return text.lower() in TRUE
    if kind in ("integer", "number", "float"):
        return _number(text, whole=kind == "integer")
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        if kind in ("array", "object"):
            raise ValueError(f"must be a JSON {kind}, not {text!r}") from None
        return text


def _number(text: str, *, whole: bool) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if whole and value.is_integer():
        return int(value)
    if whole or not math.isfinite(value):
        raise ValueError(f"must be {'a whole number' if whole else 'a number'}, not {text!r}")
    return value


def takes_file(name: str, field: Mapping[str, Any] | None) -> bool:
    """Whether a field's value is a file. The wire's schemas call it a string, so its names decide."""
    known = field or {}
    if known.get("type", "string") != "string" or known.get("enum"):
        return False
    if known.get("format") in ("uri", "binary", "file"):
        return True
    default = known.get("default")
    if isinstance(default, str) and " " not in default and default.rpartition(".")[2].lower() in MEDIA_TYPES:
        return True
    words = f"{name} {known.get('title', '')}".lower().replace("_", " ").split()
    return any(word.rstrip("s") in FILE_WORDS for word in words) and "prompt" not in words


def resolve(
    given: Mapping[str, Any], texts: Mapping[str, str], schema: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The input with :class:`LocalFile` where a file is to be uploaded. Raises BadInput with all bad fields."""
    fields = (schema or {}).get("properties")
    fields = fields if isinstance(fields, Mapping) else {}
    values: dict[str, Any] = dict(given)
    bad: list[FieldError] = []
    for name, value in given.items():
        if isinstance(value, str) and takes_file(name, fields.get(name)) and _is_file(value):
            values[name] = LocalFile(Path(value))
    for name, text in texts.items():
        field = fields.get(name)
        if fields and field is None:
            message = "is no field of this model"
            bad.append(FieldError(name, message, "unknown_field", _nearest(name, fields)))
            continue
        try:
            values[name] = _value_or_file(name, text, field)
        except ValueError as error:
            bad.append(FieldError(name, str(error)))
    if bad:
        raise BadInput(bad)
    return values


def _value_or_file(name: str, text: str, field: Mapping[str, Any] | None) -> Any:
    if (field or {}).get("type", "string") == "string":
        if text.startswith("@@"):
            return text[1:]
        if text.startswith("@"):
            if not _is_file(text[1:]):
                raise ValueError(f"there is no file {text[1:]!r}; write @@ for a value that begins with @")
            return LocalFile(Path(text[1:]))
        if takes_file(name, field) and _is_file(text):
            return LocalFile(Path(text))
    return parse_value(text, field)


def _is_file(text: str) -> bool:
    """Whether ``text`` is the path of an existing file; addresses and data URIs never are."""
    if "://" in text or text.startswith("data:"):
        return False
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def _nearest(name: str, fields: Mapping[str, Any]) -> str | None:
    """The field whose name or title is most like ``name``."""
    titles = {
        str(field.get("title", "")).lower(): known
        for known, field in fields.items()
        if isinstance(field, Mapping)
    }
    word = name.lower().replace("_", " ")
    if word in titles:
        return titles[word]
    close = difflib.get_close_matches(name, list(fields), n=1, cutoff=0.5)
    close_titles = difflib.get_close_matches(word, list(titles), n=1, cutoff=0.6)
    return close[0] if close else titles[close_titles[0]] if close_titles else None


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")


def _submit(
    client: Client, model_id: str, given: Mapping[str, Any], texts: Mapping[str, str]
) -> tuple[Submitted, bool]:
    """The accepted request, and whether Ctrl-C was pressed meanwhile."""
    try:
        values = _values(client, model_id, given, texts)
        with _interrupt_held() as held:
            return client.submit(model_id, values), bool(held)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _values(
    client: Client, model_id: str, given: Mapping[str, Any], texts: Mapping[str, str]
) -> dict[str, Any]:
    """The whole input, its local files uploaded."""
    schema = _schema(client, model_id) if given or texts else None
    values = resolve(given, texts, schema)
    uploaded: dict[Path, str] = {}
    for name, value in values.items():
        if isinstance(value, LocalFile):
            path = value.path.resolve()
            if path not in uploaded:
                uploaded[path] = _upload(client, name, value.path)
            values[name] = uploaded[path]
    return values


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
        raise BadInput([FieldError(field, f"{path}: {error.message}")]) from None
    except errors.ApiError as error:
        if error.status not in (404, 405, 501):
            raise
        message = f"{client.base_url} takes no uploads; give the public HTTPS address of {path.name}"
        raise BadInput([FieldError(field, message)]) from None


# the wait


def _wait(client: Client, request: Submitted, model_id: str, *, as_json: bool, timeout: float | None) -> Result:
    """Wait for the result under a bar; what ends without one is raised."""
    began = time.monotonic()
    try:
        with show.Watch() as watch:
            row = watch.add(model_id)
            result = client.wait(
                request,
                on_status=lambda status: watch.update(row, status),
                timeout=timeout,
                include_cost=as_json,
            )
            watch.finish(row, f"succeeded in {time.monotonic() - began:.1f} s")
    except (errors.RequestFailed, errors.RequestCancelled) as error:
        if as_json:
            click.echo(show.as_json(error.result.raw))
        raise
    except errors.RushesClientError:
        more = f"`rushes requests show {request.request_id}`"
        show.note(f"Request {request.request_id} was submitted and may go on: {more}.")
        raise
    return result


def _deliver(client: Client, result: Result, output_dir: Path, *, as_json: bool) -> int:
    """Download the outputs and print their paths."""
    identifier = result.request_id
    if result.engine:
        show.note(show.engine_note(result.engine))
    try:
        paths = [str(path) for path in client.save(result, output_dir)]
    except KeyboardInterrupt:
        show.note(f"Interrupted while downloading. `rushes requests show {identifier}` has the addresses.")
        return Exit.INTERRUPTED
    except OSError as error:
        show.note(f"rushes: cannot save to {output_dir}: {error.strerror or error}")
        return Exit.FAILED
    except (errors.RushesClientError, ValueError) as error:
        show.note(f"rushes: request {identifier} succeeded, but an output cannot be downloaded: {error}")
        for output in result.outputs():
            show.note(output.url, indent="  ")
        return status_of(error)
    if as_json:
        click.echo(show.as_json({**result.raw, "saved": paths}))
    else:
        for path in paths:
            click.echo(path)
    if not paths:
        show.note(f"request {identifier} succeeded without a file")
    return Exit.OK


def _take_back(client: Client, request: Submitted) -> int:
    """Cancel the request where it still waits, and say what became of it."""
    identifier = request.request_id
    more = f"`rushes requests show {identifier}` follows it."
    try:
        with client:
            answer = client.cancel(request)
    except KeyboardInterrupt:
        show.note(f"Interrupted twice: request {identifier} may go on; {more}")
    except errors.RushesClientError as error:
        show.note(f"Interrupted, but request {identifier} could not be cancelled and may go on: {error}")
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
