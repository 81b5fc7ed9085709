"""HTTP towards one remote: what was sent and what was not is told apart, and no key leaves by an error's words.

A submit goes over a connection of its own: on a kept one, a server that has just closed it cannot be told from one
that took the job and died. What fails before the first byte of the request has left was not taken
(:class:`RemoteUnavailable`); what fails after it may have been (:class:`SubmitUnknown`).

Redirects are not followed, and our key goes to the remote's own origin alone. Proxies of the environment are not
used, as outputs are not fetched through them either. Answers are read as they come, compressed ones not at all: a few
kilobytes could be many gigabytes.
"""

import asyncio
import contextlib
import math
import os
import re
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, Final
from urllib.parse import quote, urlsplit

import httpx
import msgspec

from rushes.engines.remote.base import RemoteRefused, RemoteUnavailable, SubmitUnknown
from rushes.errors import MediaError
from rushes.media.fetch import origin_of

BODY_LIMIT: Final = 1 << 20
"""Bytes of an answer."""
LARGE_LIMIT: Final = 64 << 20
"""Bytes of an answer that may hold the file itself, as base64."""
MOST_VALUES: Final = 100_000
"""Values in an answer, which would hold up the worker's other jobs while they are made; also, about, the punctuation
marks in its texts."""
DEEPEST: Final = 64
"""Lists and objects in one another in an answer."""
LONGEST_WORDS: Final = 500
_LONGEST_READ: Final = 8000
"""Characters of a remote's words that are looked at."""
_LONGEST_SECRET: Final = 200
"""Characters at the end of words which were cut that could be a part of any key."""
_LONGEST_ADDRESS: Final = 2048
_PLAIN: Final = re.compile(r"[!-\[\]-~]+")
"""What an address is made of: printable ASCII without spaces and backslashes."""
_ID: Final = re.compile(r"[!-~]{1,200}")
LONGEST_PAUSE: Final = 3600.0
"""Seconds of a Retry-After that are believed."""
_CONNECT_SECONDS: Final = 10.0
_SLOWEST_UPLOAD: Final = 100_000
"""Bytes a second: a submit has as much longer as its body needs at this pace."""
_SECRET_HEADERS: Final = frozenset({"authorization", "x-api-key", "api-key", "x-dashscope-workspace"})
_SHORTEST_PART: Final = 8
"""Characters of a part of a key of the form `id:secret` that is taken out by itself."""
_KEYLIKE: Final = re.compile(
    r"\b(?:sk|r8|rk|pk|fal|whsec)[-_][\w*-]{12,}|\b(?:Bearer|Basic)\s+[\w.:*+/=-]{12,}", re.IGNORECASE
)
_QUERY: Final = re.compile(
    r"""(https?://)(?:[^\s/?#"'<>@]*@)?([^\s?#"'<>]*)(?:[?#][^\s"'<>]*)?""", re.IGNORECASE
)
_NOT_PASSED_ON: Final = re.compile(
    rb"no healthy upstream"
    rb"|disconnect/reset before headers\. reset reason: (?:(?:local|remote) )?(?:connection failure|overflow)\b",
    re.IGNORECASE,
)
"""Envoy's words where it had no connection to hand the request to. Where it "retried and the latest reset reason" is
one of them, an earlier try may have gone through."""
_BROKEN_OFF: Final = re.compile(rb"reset before headers|connection termination", re.IGNORECASE)
_GATEWAYS: Final = frozenset({502, 504, *range(520, 527)})
_OWN_FAULTS: Final = frozenset({500, 501, 503})
_GATEWAY_WORDS: Final = (
    "internal server error",
    "service unavailable",
    "endpoint request timed out",
    "network error communicating with endpoint",
    "an unexpected error occurred",
    "the upstream server is timing out",
    "an invalid response was received from the upstream server",
)
"""All that the gateways of AWS and Kong say, as `message`, of what is behind them."""
_DATA_URI: Final = re.compile(r"data:[\w/+.;=-]{0,100},[\w+/=%-]{32,}", re.IGNORECASE)


class Answer(msgspec.Struct, frozen=True):
    """One answer, whole. ``headers`` by lower-case name; ``submitted`` where it answers a submit."""

    name: str
    """Of the remote, for people."""
    status: int
    headers: Mapping[str, str]
    body: bytes
    submitted: bool = False

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    def json(self) -> Any:
        """Raises what a call that got no answer raises where it is no JSON: SubmitUnknown after a submit, else
        RemoteUnavailable.
        """
        try:
            return _decoded(self.body)
        except (ValueError, RecursionError):
            raise self.unreadable() from None

    def fields(self) -> dict[str, Any]:
        """The JSON object that it must be. Raises as :meth:`json` does."""
        value = self.json()
        if not isinstance(value, dict):
            raise self.unreadable()
        return value

    def problem(self) -> dict[str, Any]:
        """The JSON object of an error; empty where it is none, such as the page of a proxy. Never raises."""
        try:
            value = _decoded(self.body)
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def unreadable(self) -> RemoteUnavailable | SubmitUnknown:
        """The error for an answer that does not hold what it must: a job may be there all the same."""
        why = f"{self.name} answers with status {self.status} and with what is not of its API"
        return SubmitUnknown(why) if self.submitted else RemoteUnavailable("fault", why)


def _decoded(body: bytes) -> Any:
    """The JSON of an answer. Raises ValueError (which the errors of msgspec are) and RecursionError.

    Not in a thread: all of it is done under the interpreter's lock, so that the size of what there is to make is
    what has to be bounded. Long texts, such as files, take no time.
    """
    brackets = body.count(b"[") + body.count(b"{")
    if brackets + body.count(b",") > MOST_VALUES:
        raise ValueError("too many values")
    value = msgspec.json.decode(body)
    if brackets > DEEPEST:
        level = [value]
        for _ in range(DEEPEST):
            lists = (one.values() if isinstance(one, dict) else one for one in level)
            level = [below for one in lists for below in one if isinstance(below, dict | list)]
        if level:
            raise ValueError("too deep")
    return value


class _Unfit(Exception):
    """An answer that is not read to its end."""


class Headers(dict[str, str]):
    """Headers with a key among them, which they do not show."""

    def __repr__(self) -> str:
        return f"<{', '.join(self)}>"


class RemoteHTTP:
    """The connection to one remote. ``headers`` go along with every call; ``seconds`` bound each call as a whole,
    a submit's longer with its size. ``body_limit`` is in bytes, ``large_limit`` that of calls which say that their
    answer may be ``large``, with a file in it.

    Belongs to one event loop.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        headers: Mapping[str, str],
        seconds: float = 60.0,
        body_limit: int = BODY_LIMIT,
        large_limit: int = LARGE_LIMIT,
    ) -> None:
        self.name = name
        self.base_url = base_url.rstrip("/")
        self.origin = origin_of(base_url)
        self._sendable = all(value.isascii() and value.isprintable() for value in headers.values())
        self.headers = Headers(headers)
        self._seconds, self._limits = seconds, (body_limit, large_limit)
        secrets = tuple(_secrets(headers))
        self.clean: Callable[[object], str] = lambda text: clean(text, *secrets)
        """The remote's words as they may be shown; see :func:`clean`."""
        self._polls: httpx.AsyncClient | None = None

    def __repr__(self) -> str:
        return f"RemoteHTTP({self.name!r}, {self.base_url!r})"

    def own(self, url: object) -> str | None:
        """``url``, written anew, where it is an address at the remote's own origin, which may have our key; else
        None. What two readers could read as two addresses is none.
        """
        if not isinstance(url, str) or len(url) > _LONGEST_ADDRESS or not _PLAIN.fullmatch(url):
            return None
        with contextlib.suppress(MediaError, ValueError):
            parts = urlsplit(url)
            if "@" not in parts.netloc and parts.port != 0 and origin_of(url) == self.origin:
                return f"{self.origin}{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
        return None

    async def submit(
        self,
        method: str,
        path_or_url: str,
        *,
        json: Any = None,
        data: Mapping[str, Any] | None = None,
        files: Any = None,
        headers: Mapping[str, str] | None = None,
        large: bool = False,
    ) -> Answer:
        """Send what makes the remote work, once. ``data`` and ``files`` are a form, as httpx takes them; ``large``
        where files may come with the answer.

        Answers every status. Raises RemoteUnavailable where nothing was sent, and SubmitUnknown where something
        was and no whole answer came.
        """
        sent = False

        async def trace(event: str, _: dict[str, Any]) -> None:
            nonlocal sent
            sent = sent or "send_request" in event

        async with self._client(limits=httpx.Limits(max_keepalive_connections=0)) as client:
            try:
                request = await self._request(client, method, path_or_url, headers, json, data, files)
                request.extensions["trace"] = trace
                size = request.headers.get("content-length", "0")
                seconds = self._seconds + int(size if size.isdecimal() else 0) / _SLOWEST_UPLOAD
                return await self._exchange(client, request, seconds, submitted=True, large=large)
            except _Unfit as error:
                raise SubmitUnknown(f"{self.name} got the request, and {error}") from None
            except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, OSError) as error:
                if sent:
                    raise SubmitUnknown(
                        f"{self.name} got the request and gave no whole answer ({_told(error)})"
                    ) from None
                raise self._unreachable(error) from None

    async def ask(
        self,
        method: str,
        path_or_url: str,
        *,
        json: Any = None,
        headers: Mapping[str, str] | None = None,
        large: bool = False,
    ) -> Answer:
        """Send what may be sent again. Answers every status; raises RemoteUnavailable where no whole answer came.
        ``large`` where files may come with the answer.
        """
        if self._polls is None:
            self._polls = self._client(limits=httpx.Limits(max_keepalive_connections=8, keepalive_expiry=5.0))
        try:
            request = await self._request(self._polls, method, path_or_url, headers, json, None, None)
            try:
                return await self._exchange(self._polls, request, self._seconds, large=large)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                if method != "GET":
                    raise
                # A kept connection that the server closed just then looks like this.
                return await self._exchange(self._polls, request, self._seconds, large=large)
        except _Unfit as error:
            raise RemoteUnavailable("fault", f"{self.name} answers, and {error}") from None
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, OSError) as error:
            raise self._unreachable(error) from None

    async def close(self) -> None:
        """Close the kept connections; a later call opens new ones."""
        polls, self._polls = self._polls, None
        if polls is not None:
            await polls.aclose()

    def _client(self, limits: httpx.Limits) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            verify=_tls(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")),
            trust_env=False,
            follow_redirects=False,
            limits=limits,
            timeout=httpx.Timeout(self._seconds, connect=_CONNECT_SECONDS, pool=None),
            headers={"User-Agent": "rushes", "Accept": "application/json", "Accept-Encoding": "identity"},
        )

    async def _request(
        self,
        client: httpx.AsyncClient,
        method: str,
        path_or_url: str,
        headers: Mapping[str, str] | None,
        json: Any,
        data: Mapping[str, Any] | None,
        files: Any,
    ) -> httpx.Request:
        if not self._sendable:  # the words and logs of libraries would quote it
            raise RemoteUnavailable("key", f"the key of {self.name} holds characters that no key has")
        is_path = "://" not in path_or_url
        url = f"{self.base_url}/{path_or_url.lstrip('/')}" if is_path else self.own(path_or_url)
        if url is None:
            raise RemoteUnavailable("fault", f"{self.name} points to another host than its own")
        content = None
        head = httpx.Headers(self.headers)
        head.update(headers)
        if json is not None:
            # In a thread: input files are in it, and tens of megabytes take a while.
            content = await asyncio.to_thread(msgspec.json.encode, json)
            head["Content-Type"] = "application/json"
        return client.build_request(method, url, headers=head, content=content, data=data, files=files)

    async def _exchange(
        self,
        client: httpx.AsyncClient,
        request: httpx.Request,
        seconds: float,
        *,
        submitted: bool = False,
        large: bool,
    ) -> Answer:
        async with asyncio.timeout(seconds):
            response = await client.send(request, stream=True)
            try:
                headers = {name.lower(): value for name, value in response.headers.items()}
                if headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
                    raise _Unfit("its answer is compressed, though it was asked for a plain one")
                # Errors of the input may have the input in them, files and all; faults have no reason to be large.
                limit = self._limits[large and response.status_code < 500]
                body = bytearray()
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > limit:
                        raise _Unfit(f"its answer is longer than {limit} bytes")
            finally:
                await response.aclose()
        return Answer(self.name, response.status_code, headers, bytes(body), submitted)

    def _unreachable(self, error: Exception) -> RemoteUnavailable:
        return RemoteUnavailable("unreachable", f"{self.name} cannot be reached ({_told(error)})")


@lru_cache(maxsize=4)
def _tls(*_: str | None) -> ssl.SSLContext:
    """Kept: reading the certificates takes longer than a call. By the variables that httpx goes by."""
    context = httpx.create_ssl_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _told(error: Exception) -> str:
    """What went wrong, without the words of a library, which may quote an address or a header."""
    if isinstance(error, httpx.ConnectTimeout):
        return "no connection in time"
    if isinstance(error, httpx.ConnectError):
        certificate = "CERTIFICATE_VERIFY_FAILED" in str(error)
        return "its certificate is not valid" if certificate else "no connection"
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return "no answer in time"
    return "the connection broke off"


def _secrets(headers: Mapping[str, str]) -> Iterable[str]:
    for name, value in headers.items():
        if name.lower() in _SECRET_HEADERS and value.strip():
            key = value.split()[-1]
            yield from (value, key, *(part for part in key.split(":") if len(part) >= _SHORTEST_PART))


def clean(text: object, *secrets: str) -> str:
    """A vendor's words as users may see them: one line of at most :data:`LONGEST_WORDS` characters, without
    ``secrets``, what looks like a key, the queries of addresses (which sign them), and files written out as data.
    """
    try:
        words = text if isinstance(text, str) else msgspec.json.encode(text, enc_hook=str).decode()
    except (RecursionError, ValueError):  # nested too deep, or with halves of letters
        words = "…"
    forms = {form for secret in secrets if secret for form in (secret, quote(secret, safe=""))}
    cut = len(words) > _LONGEST_READ
    words = words[:_LONGEST_READ]
    for form in sorted(forms, key=len, reverse=True):
        words = words.replace(form, "***")
    if cut:  # half a key may be at the end
        words = words[: -max((_LONGEST_SECRET, *map(len, forms)))] + "…"
    words = "".join(letter if letter.isprintable() else " " for letter in words)
    words = _DATA_URI.sub("data:…", words)
    words = _QUERY.sub(r"\1\2", words)
    words = _KEYLIKE.sub("***", words)
    words = " ".join(words.split())
    return words if len(words) <= LONGEST_WORDS else words[: LONGEST_WORDS - 1].rstrip() + "…"


def id_of(value: object) -> str | None:
    """What a remote calls a job or a file, where it can stand in an address, a log and the store: 1 to 200 printable
    ASCII characters without spaces; else None, and the answer is unreadable.
    """
    if isinstance(value, str) and _ID.fullmatch(value) and value not in (".", ".."):
        return value
    return None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a ``Retry-After``, a number or a date, at most :data:`LONGEST_PAUSE`; None where there is none.

    ``headers`` by lower-case name.
    """
    text = headers.get("retry-after", "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), LONGEST_PAUSE) if math.isfinite(seconds) else None


def trouble_of(
    answer: Answer, words: str = "", *, own_error: bool = False
) -> RemoteRefused | RemoteUnavailable | SubmitUnknown:
    """The error that an answer which is no success stands for, by its status.

    ``words`` are the remote's own, cleaned; ``own_error`` True where the body is an error of its API, not the page
    of a proxy: such a 500, 501 or 503 to a submit says that nothing was taken. No other 5xx does, whatever its body:
    gateways write JSON too. An engine looks at its vendor's codes first, and asks here for what is left.
    """
    name, status = answer.name, answer.status
    said = f": {words}" if words else ""
    pause = retry_after(answer.headers)
    if status in (401, 403):
        return RemoteUnavailable("key", f"{name} refuses the key ({status}){said}")
    if status == 402:
        return RemoteUnavailable("funds", f"the account at {name} has no money left (402){said}")
    if status in (408, 425, 429):
        return RemoteUnavailable(
            "throttled", f"{name} takes no more for now ({status}){said}", retry_after=pause
        )
    if status >= 500:
        why = f"{name} has a fault of its own ({status}){said}"
        if answer.submitted and not _surely_not_taken(answer, own_error=own_error):
            return SubmitUnknown(f"{why}; whether it took the request is not known")
        return RemoteUnavailable("fault", why, retry_after=pause)
    if status in (404, 405, 410):
        if answer.submitted:
            return RemoteUnavailable(
                "model", f"{name} does not know the model, or the address ({status}){said}"
            )
        return RemoteRefused(
            "remote_lost", f"{name} does not know this job any more ({status}){said}", billed=True
        )
    if answer.submitted and 400 <= status < 500:
        return RemoteRefused("remote_refused", f"{name} refuses the request ({status}){said}")
    if status >= 300:
        return RemoteUnavailable("fault", f"{name} answers with status {status}{said}", retry_after=pause)
    return answer.unreadable()


def _surely_not_taken(answer: Answer, *, own_error: bool) -> bool:
    """Whether a 5xx to a submit says that the request did not get to where jobs are made, or was turned away."""
    if between(answer) or answer.status not in _OWN_FAULTS:
        return False
    if own_error or answer.status != 503:
        return own_error
    return retry_after(answer.headers) is not None or _NOT_PASSED_ON.search(answer.body) is not None


def between(answer: Answer) -> bool:
    """Whether an error is that of a gateway which got no answer from the remote behind it, or lost it: what became of
    a request is not known then, whatever the words are. For 5xx.

    Cloudflare answers those who accept JSON with an RFC 9457 object, API gateways with `{"message": …}`; Envoy says
    how a connection ended.
    """
    if answer.status in _GATEWAYS:
        return True
    if answer.status < 500:
        return False
    problem = answer.problem()
    if problem.get("cloudflare_error") or "developers.cloudflare.com" in str(problem.get("type")):
        return True
    words = str(problem.get("message")).strip(" .").lower()
    if words in _GATEWAY_WORDS and problem.keys() <= {"message", "request_id", "requestId"}:
        return True
    return _BROKEN_OFF.search(answer.body) is not None and _NOT_PASSED_ON.search(answer.body) is None
