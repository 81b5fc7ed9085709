"""Calls as plain data, and answers turned into types or errors. No input or output happens here.

Sources: RunComfy's Model API (asynchronous queue endpoints and error codes), and Rushes's own answers where
that leaves a gap: the error body, `/v1/files`, progress in a status.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, BinaryIO, Final
from urllib.parse import quote, urlencode, urljoin, urlsplit

from rushes.client import errors, types
from rushes.client.types import number_or_none, text_or_none

DEFAULT_BASE_URL: Final = "http://127.0.0.1:8000"
PORTS: Final = {"http": 80, "https": 443}
CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


@dataclass(frozen=True)
class Upload:
    """A file on its way to the server; it is read from its start each time it is sent."""

    name: str
    content_type: str
    source: BinaryIO


@dataclass(frozen=True)
class Call:
    """One HTTP call, ready for a transport."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    upload: Upload | None = None
    repeatable: bool = True
    """Whether a second sending does no harm where the outcome of the first is unknown."""


@dataclass(frozen=True)
class Reply:
    """One HTTP answer. Header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    url: str = ""
    received: int | None = None
    """The size of the file that the answer was written to; None where it went into ``body``."""


class Server:
    """The addresses of one server, and which of them may see the key.

    ``base_url`` is taken with and without a trailing ``/v1``. Raises ValueError for what cannot be the
    address of a server or a key.
    """

    def __init__(self, base_url: str, api_key: str | None) -> None:
        text = base_url.strip().rstrip("/")
        text = text.removesuffix("/v1").rstrip("/")
        try:
            origin = _origin(text)
        except ValueError:
            origin = None
        if origin is None or urlsplit(text).query or urlsplit(text).fragment:
            raise ValueError(f"{base_url!r} is no address of a server; it should look like {DEFAULT_BASE_URL}")
        self.base_url = text
        self._at = origin
        key = (api_key or "").strip()
        if not key.isascii() or CONTROL.search(key) or " " in key:
            raise ValueError("the API key holds characters that no key has; was it copied whole?")
        self.api_key = key or None

    def owns(self, url: str) -> bool:
        """Whether ``url`` has the scheme, host and port of this server, so that the key may go there."""
        try:
            return _origin(url) == self._at
        except ValueError:
            return False

    def headers_for(self, url: str) -> dict[str, str]:
        """The headers of a call; the key only for this server itself."""
        if self.api_key and self.owns(url):
            return {"Authorization": f"Bearer {self.api_key}"}
        return {}

    def absolute(self, url: str) -> str:
        """The full address of an output; raises ValueError where it is no http(s) address."""
        full = urljoin(self.base_url + "/", url)
        if _origin(full) is None:
            raise ValueError(f"{url!r} is no address of a file")
        return full

    def submit(self, model_id: str, values: Mapping[str, Any]) -> Call:
        """Raises ValueError for an id that cannot be one, and for an input that is no JSON object."""
        if not isinstance(values, Mapping):
            # what every input that cannot be one raises
            raise ValueError(  # noqa: TRY004
                f"the input must be a mapping of field names to values, not {_kind(values)}"
            )
        try:
            content = json.dumps(dict(values), allow_nan=False, ensure_ascii=False).encode()
        except TypeError as error:
            raise ValueError(f"the input cannot be written as JSON: {error}") from None
        url = self._model_url(model_id)
        headers = self._api_headers(url) | {"Content-Type": "application/json"}
        return Call("POST", url, headers, content, repeatable=False)

    def models(self, query: Mapping[str, str | int | None]) -> Call:
        chosen = {name: value for name, value in query.items() if value is not None}
        return self._get(f"{self.base_url}/v1/models" + (f"?{urlencode(chosen)}" if chosen else ""))

    def model(self, model_id: str) -> Call:
        return self._get(self._model_url(model_id))

    def status(self, request: "str | types.Submitted") -> Call:
        return self._get(self._request_url(request, "status"))

    def result(self, request: "str | types.Submitted", *, include_cost: bool) -> Call:
        url = self._request_url(request, "result")
        if include_cost:
            url += ("&" if urlsplit(url).query else "?") + "include_cost=true"
        return self._get(url)

    def cancel(self, request: "str | types.Submitted") -> Call:
        url = self._request_url(request, "cancel")
        return Call("POST", url, self._api_headers(url))

    def upload(self, source: BinaryIO, name: str, content_type: str | None) -> Call:
        ending = name.rpartition(".")[2].lower()
        guessed = content_type or types.MEDIA_TYPES.get(ending, "application/octet-stream")
        url = f"{self.base_url}/v1/files"
        return Call("POST", url, self._api_headers(url), upload=Upload(name, guessed, source))

    def download(self, url: str) -> Call:
        full = self.absolute(url)
        return Call("GET", full, self.headers_for(full) | {"Accept-Encoding": "identity"})

    def _get(self, url: str) -> Call:
        return Call("GET", url, self._api_headers(url))

    def _api_headers(self, url: str) -> dict[str, str]:
        return {"Accept": "application/json", **self.headers_for(url)}

    def _model_url(self, model_id: str) -> str:
        parts = model_id.strip("/").split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{model_id!r} is no model id; one looks like community/wan-2-2/vace-fun")
        return f"{self.base_url}/v1/models/" + "/".join(quote(part, safe="") for part in parts)

    def _request_url(self, request: "str | types.Submitted", action: str) -> str:
        request_id = request if isinstance(request, str) else request.request_id
        if request_id in ("", ".", ".."):
            raise ValueError(f"{request_id!r} is no request id")
        given = None if isinstance(request, str) else getattr(request, f"{action}_url")
        if given and self.owns(given):
            return str(given)
        return f"{self.base_url}/v1/requests/{quote(request_id, safe='')}/{action}"


def _kind(value: object) -> str:
    return "a string" if isinstance(value, str) else f"a value of type {type(value).__name__}"


def _origin(url: str) -> tuple[str, str, int] | None:
    """Scheme, host and port; None where ``url`` is no http(s) address or carries a user name."""
    parts = urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname or "@" in parts.netloc:
        return None
    return parts.scheme, parts.hostname, parts.port or PORTS[parts.scheme]


def submitted(body: Mapping[str, Any]) -> types.Submitted:
    return types.Submitted(
        request_id=_required(body, "request_id"),
        status_url=text_or_none(body.get("status_url")),
        result_url=text_or_none(body.get("result_url")),
        cancel_url=text_or_none(body.get("cancel_url")),
        raw=body,
    )


def status(body: Mapping[str, Any], *, retry_after: float | None = None) -> types.Status:
    position = body.get("queue_position")
    progress = number_or_none(body.get("progress"))
    eta = number_or_none(body.get("eta"))
    return types.Status(
        request_id=_required(body, "request_id"),
        status=_required(body, "status"),
        queue_position=position if type(position) is int and position >= 0 else None,
        progress=None if progress is None else min(1.0, max(0.0, progress)),
        eta=None if eta is None or eta < 0 else eta,
        stage=text_or_none(body.get("stage")),
        status_url=text_or_none(body.get("status_url")),
        result_url=text_or_none(body.get("result_url")),
        cancel_url=text_or_none(body.get("cancel_url")),
        retry_after=retry_after,
        raw=body,
    )


def result(body: Mapping[str, Any]) -> types.Result:
    output = body.get("output")
    word = _required(body, "status")
    return types.Result(
        request_id=_required(body, "request_id"),
        status=word,
        output=output if isinstance(output, Mapping) else {"output": output} if output else {},
        error=_failure(body.get("error")) if word == "failed" or body.get("error") else None,
        created_at=_time(body.get("created_at")),
        finished_at=_time(body.get("finished_at")),
        cost=number_or_none(body.get("cost")),
        engine=text_or_none(body.get("engine")),
        remote_engine=text_or_none(body.get("remote_engine")),
        engine_cost_usd=number_or_none(body.get("engine_cost_usd")),
        raw=body,
    )


def cancellation(request_id: str, body: Mapping[str, Any]) -> types.Cancellation:
    return types.Cancellation(
        request_id=text_or_none(body.get("request_id")) or request_id,
        status=text_or_none(body.get("status")),
        outcome=text_or_none(body.get("outcome")),
        raw=body,
    )


def file_ref(body: Mapping[str, Any]) -> types.FileRef:
    size = body.get("size")
    return types.FileRef(
        id=_required(body, "id"),
        url=_required(body, "url"),
        name=text_or_none(body.get("name")),
        content_type=text_or_none(body.get("content_type")),
        size=size if type(size) is int else None,
        raw=body,
    )


def model_info(body: Mapping[str, Any]) -> types.ModelInfo:
    categories = body.get("categories")
    schemas = body.get("schema")
    nested = schemas if isinstance(schemas, Mapping) else {}
    return types.ModelInfo(
        model_id=_required(body, "model_id"),
        display_name=text_or_none(body.get("display_name")),
        description=text_or_none(body.get("description")),
        categories=tuple(map(str, categories)) if isinstance(categories, list) else (),
        base_price_usd=number_or_none(body.get("base_price_usd")),
        price_unit=text_or_none(body.get("price_unit")),
        input_schema=_mapping(body.get("input_schema")) or _mapping(nested.get("input")),
        output_schema=_mapping(body.get("output_schema")) or _mapping(nested.get("output")),
        raw=body,
    )


def model_page(body: Mapping[str, Any]) -> types.ModelPage:
    entries = body.get("models")
    if not isinstance(entries, list):
        raise KeyError("models")
    found = tuple(model_info(entry) for entry in entries if isinstance(entry, Mapping))
    total = body.get("total")
    return types.ModelPage(found, total if type(total) is int else len(found), raw=body)


def starts_at(http_status: int, headers: Mapping[str, str], offset: int) -> int | None:
    """The byte at which an answer to a call for the rest from ``offset`` begins; None where it is no file."""
    if http_status == HTTPStatus.OK:
        return 0
    begins = headers.get("content-range", "").startswith(f"bytes {offset}-")
    return offset if http_status == HTTPStatus.PARTIAL_CONTENT and begins else None


def rest_of(call: Call, headers: Mapping[str, str], received: int) -> tuple[Call, int]:
    """The call for what is missing of a file, and the byte at which it goes on.

    A file without a strong mark could have changed in between, so it is asked for whole.
    """
    tag = headers.get("etag", "")
    mark = tag if tag.startswith('"') else headers.get("last-modified", "")
    packed = headers.get("content-encoding", "identity") != "identity"  # offsets count packed bytes then
    if not received or not mark or packed:
        return call, 0
    wanted = {"Range": f"bytes={received}-", "If-Range": mark}
    return replace(call, headers={**call.headers, **wanted}), received


def error_of(reply: Reply) -> errors.ApiError:
    """The error that an answer stands for, whatever its body is."""
    return api_error(reply, _decoded(reply))


def body_of(reply: Reply) -> Mapping[str, Any]:
    """The JSON object of a good answer; raises :class:`rushes.client.errors.ApiError` for any other.

    An HTTP 200 with a top-level ``error_code`` is an error, as RunComfy's own clients take it.
    """
    body = _decoded(reply)
    good = 200 <= reply.status < 300
    if isinstance(body, Mapping) and good and not body.get("error_code"):
        return body
    raise api_error(reply, body)


def _decoded(reply: Reply) -> Any:
    try:
        return json.loads(reply.body)
    except (ValueError, RecursionError):
        return None


def api_error(reply: Reply, body: Any) -> errors.ApiError:
    """The error that an answer stands for."""
    known = body if isinstance(body, Mapping) else {}
    code = known.get("error_code")
    detail = known.get("detail")
    kind = _class_of(reply.status, code)
    message = _message(known, detail) or _unreadable(reply)
    return kind(
        CONTROL.sub(" ", message).strip(),
        status=reply.status,
        error_code=code if isinstance(code, int | str) else None,
        detail=detail,
        fields=_field_errors(detail),
        retry_after=retry_after(reply),
        trace_id=reply.headers.get("x-request-id"),
        body=known,
    )


def retry_after(reply: Reply) -> float | None:
    """Seconds to wait as ``Retry-After`` says; a point in time is counted from the answer's own ``Date``."""
    value = reply.headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            until = parsedate_to_datetime(value)
            said = reply.headers.get("date")
            now = parsedate_to_datetime(said) if said else datetime.now(UTC)
            seconds = (until - now).total_seconds()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds < float("inf") else None


def _class_of(http_status: int, code: object) -> type[errors.ApiError]:
    word = str(code or "")
    exact = {
        "400004": errors.Unauthorized,  # UserAccountError: a bad or missing token
        "400001": errors.NotFound,  # InvalidResourceIdentifier: an id that cannot be an id
        "400002": errors.ApiError,  # InsufficientResources
    }
    if word in exact:
        return exact[word]
    shown = http_status
    if 200 <= http_status < 300 and len(word) == 6 and word.isdigit():
        shown = int(word[:3])
    if shown in (401, 403):
        return errors.Unauthorized
    if shown in (404, 410):
        return errors.NotFound
    if shown in (400, 413, 422):
        return errors.InvalidInput
    if shown == 429:
        return errors.RateLimited
    if shown >= 500 or (200 <= shown < 300 and not word):
        return errors.ServerError
    return errors.ApiError


def _message(body: Mapping[str, Any], detail: object) -> str | None:
    """The sentence of an error body; the names are tried in the order that RunComfy's clients use."""
    for name in ("error_message", "message", "error", "detail"):
        value = body.get(name)
        if isinstance(value, Mapping):
            value = value.get("message")
        if isinstance(value, str) and value.strip():
            return value
    return "the input does not fit the model" if isinstance(detail, list) and detail else None


def _unreadable(reply: Reply) -> str:
    if 200 <= reply.status < 300:
        return f"{reply.url} did not answer in this wire's JSON; is the address right?"
    try:
        phrase = HTTPStatus(reply.status).phrase
    except ValueError:
        phrase = ""
    where = f"; it points to {reply.headers['location']}" if "location" in reply.headers else ""
    return f"{reply.url} answered HTTP {reply.status} {phrase}".rstrip() + where


def _field_errors(detail: object) -> tuple[types.FieldError, ...]:
    """The entries of a ``detail`` list; the leading "body" or "input" of a path is dropped."""
    if not isinstance(detail, list):
        return ()
    found = []
    for entry in detail:
        if not isinstance(entry, Mapping):
            continue
        loc = entry.get("loc")
        path = [str(part) for part in loc] if isinstance(loc, list) else [str(loc)] if loc else []
        if len(path) > 1 and path[0] in ("body", "input"):
            path = path[1:]
        context = entry.get("ctx")
        suggestion = entry.get("suggestion") or (
            context.get("suggestion") if isinstance(context, Mapping) else None
        )
        found.append(
            types.FieldError(
                field=CONTROL.sub(" ", ".".join(path)),
                message=CONTROL.sub(" ", str(entry.get("msg") or entry.get("message") or "does not fit")),
                type=text_or_none(entry.get("type")),
                suggestion=CONTROL.sub(" ", str(suggestion)) if suggestion else None,
            )
        )
    return tuple(found)


def _failure(error: object) -> types.Failure:
    """The error of a failed result, which the wire leaves open: an object, a list of them, or a sentence."""
    if isinstance(error, list):
        parts = [_failure(part) for part in error]
        if not parts:
            return types.Failure(None, "the server gave no reason")
        return types.Failure(parts[0].code, "; ".join(part.message for part in parts), parts[0].node)
    if isinstance(error, Mapping):
        code = error.get("code", error.get("error_code", error.get("errorCode")))
        message = (
            error.get("message") or error.get("error_message") or error.get("error") or error.get("detail")
        )
        node = error.get("node")
        return types.Failure(
            None if code is None else str(code),
            str(message) if message else "the server gave no reason",
            None if node is None else str(node),
        )
    return types.Failure(None, str(error) if error else "the server gave no reason")


def _required(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if isinstance(value, str) and value:
        return value
    raise KeyError(name)


def _mapping(value: object) -> Mapping[str, Any] | None:
    return value if isinstance(value, Mapping) else None


def _time(value: object) -> str | float | None:
    return text_or_none(value) or number_or_none(value)
