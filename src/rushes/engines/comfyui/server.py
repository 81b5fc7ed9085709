"""The HTTP side of one ComfyUI: every call that the engine makes, and nothing of when it makes it.

Source: ComfyUI's own ``server.py`` (0.3.64; read for newer ones), and answers captured from it.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import unquote, urlsplit

import aiohttp
import msgspec
import orjson

from rushes.catalog.workflow import Graph

SILENCE_SECONDS: Final = 60.0
"""How long a ComfyUI may take to answer: while it loads a model it answers nobody."""
_CONNECT_SECONDS: Final = 5.0
_PIECE_BYTES: Final = 256 * 1024
_SOCKET_BYTES: Final = 64 * 1024 * 1024
"""Largest message of the websocket: previews, and outputs that nodes show as text."""
_NONE: Final[frozenset[int]] = frozenset()
_REFUSALS: Final = frozenset({400, 413})
"""What ComfyUI itself, or its limit for bodies, answers to what it does not take: prompts and uploads."""
_NO_FILE: Final = frozenset({400, 403, 404})
_RECENT: Final = 64
_BROKEN: Final = (aiohttp.ClientError, TimeoutError, ConnectionError)
_JSON: Final = {"Content-Type": "application/json"}


class Unreachable(Exception):
    """No answer of ComfyUI's came: none at all, or one that is somebody else's (a proxy, a tunnel, a login page) or
    that of a ComfyUI which failed. ``sent`` False says that the call did not reach the server for sure: nobody
    listens.
    """

    def __init__(self, message: str, *, sent: bool = True) -> None:
        self.sent = sent
        super().__init__(message)


class Rejected(Exception):
    """ComfyUI answered, and said no, with a status that it has for that."""

    def __init__(self, status: int, text: str) -> None:
        self.status, self.text = status, text
        super().__init__(f"{status}: {text[:200]}")


class Refusal(msgspec.Struct, frozen=True):
    """A graph that ComfyUI does not take. Status 200 means that it took a part of it: that part is queued.

    ``body`` is the answer's JSON, or its text where it is none.
    """

    status: int
    body: Any


class Queued(msgspec.Struct, frozen=True):
    """A prompt in the queue, and what it was given along: ours say there whose they are."""

    prompt_id: str
    place: Literal["running", "pending"]
    extra_data: dict[str, Any]


class Server:
    """Belongs to the event loop in which it is opened. Every call raises Unreachable, uploads and views Rejected too.

    ``url`` is the address without the name and password that it may have been given with: it may be shown. ``heard``
    is the monotonic time of the server's last sign of life.
    """

    def __init__(self, url: str, *, client_id: str) -> None:
        self.url, self._login = _without_login(url.rstrip("/"))
        self.client_id = client_id
        self.heard = 0.0
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Make the session; connections are made as they are needed."""
        # Redirects are followed nowhere: what answers in ComfyUI's place is not to get our prompts and files. For
        # the websocket aiohttp has no other way to say so.
        tracing = aiohttp.TraceConfig()
        tracing.on_request_redirect.append(_redirected)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=16, keepalive_timeout=30.0),
            cookie_jar=aiohttp.DummyCookieJar(),
            # Compression costs ComfyUI's one thread more than it saves here, and hides a file's length.
            headers={"Accept-Encoding": "identity"} | self._login,
            trace_configs=[tracing],
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=SILENCE_SECONDS),
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def system_stats(self, *, seconds: float = SILENCE_SECONDS) -> dict[str, Any]:
        """Version and memory."""
        return _object(await self._get("/system_stats", seconds=seconds))

    async def object_info(self) -> dict[str, Any]:
        """Every node class. Large: some 300 KB without custom nodes."""
        return _object(await self._get("/object_info"))

    async def submit(self, graph: Graph, prompt_id: str, extra_data: Mapping[str, Any]) -> str | Refusal:
        """Queue a graph; the id under which it is queued: older servers choose their own.

        After Unreachable it may be queued or not, after all statuses but those of a refusal, too: a ComfyUI that
        fails on it says 500, and what a proxy says is not ComfyUI's word. Node errors are a refusal, with status 200
        too.
        """
        body = orjson.dumps(
            {
                "prompt": graph,
                "prompt_id": prompt_id,
                "client_id": self.client_id,
                "extra_data": {**extra_data, "client_id": self.client_id},
            }
        )
        try:
            answer = await self._post("/prompt", body, refusing=_REFUSALS)
        except Rejected as error:
            return _refusal(error)
        accepted = _object(answer)
        if accepted.get("node_errors") or accepted.get("error"):
            return Refusal(200, accepted)
        return str(accepted.get("prompt_id") or prompt_id)

    async def place(self, prompt_id: str) -> Literal["running", "pending"] | None:
        """Where in the queue a prompt is; None where it is not, or no longer."""
        running, pending = await self._queue()
        if any(entry[1] == prompt_id for entry in running):
            return "running"
        return "pending" if any(entry[1] == prompt_id for entry in pending) else None

    async def queue_entries(self) -> list[Queued]:
        """Every running and every waiting prompt."""
        running, pending = await self._queue()
        return [Queued(str(entry[1]), "running", _extra_data(entry)) for entry in running] + [
            Queued(str(entry[1]), "pending", _extra_data(entry)) for entry in pending
        ]

    async def history(self, prompt_id: str) -> dict[str, Any] | None:
        """What is known of a prompt that has ended; None where nothing is."""
        entry = _object(await self._get(f"/history/{prompt_id}")).get(prompt_id)
        return entry if isinstance(entry, dict) else None

    async def recent(self) -> list[tuple[str, dict[str, Any]]]:
        """Id and extra data of the last prompts that have ended, as far as the history shows the latter."""
        history = _object(await self._get(f"/history?max_items={_RECENT}"))
        return [
            (prompt_id, _extra_data(entry["prompt"]))
            for prompt_id, entry in history.items()
            if isinstance(entry, dict) and isinstance(entry.get("prompt"), list)
        ]

    async def upload(self, path: Path, name: str, subfolder: str) -> str:
        """Copy a file into the server's input folder; how a graph names it there.

        ``name`` is a wish: the server makes another of it where there is such a file with other content.
        """
        with path.open("rb") as file:
            form = aiohttp.FormData(quote_fields=False)
            form.add_field("type", "input")
            form.add_field("subfolder", subfolder)
            form.add_field("image", file, filename=name, content_type="application/octet-stream")
            async with self._call("POST", "/upload/image", refusing=_REFUSALS, data=form) as response:
                answer = _object(_decoded(await response.read()))
        stored, folder = str(answer.get("name") or name), str(answer.get("subfolder") or "")
        return f"{folder}/{stored}" if folder else stored

    async def view(self, file: Mapping[str, str], destination: Path) -> None:
        """Copy one of the server's files, whole or not at all: Unreachable where its end does not come."""
        wanted = {key: file.get(key, "") for key in ("filename", "subfolder", "type")}
        async with self._call("GET", "/view", refusing=_NO_FILE, params=wanted) as response:
            copied = 0
            with destination.open("wb") as target:
                async for piece in response.content.iter_chunked(_PIECE_BYTES):
                    target.write(piece)
                    copied += len(piece)
            if response.content_length is not None and copied != response.content_length:
                raise Unreachable(f"{copied} of {response.content_length} bytes of an output came")

    async def interrupt(self, prompt_id: str) -> None:
        """Interrupt a prompt. Ask :meth:`place` first: older servers interrupt whatever runs."""
        await self._post("/interrupt", orjson.dumps({"prompt_id": prompt_id}))

    async def delete(self, prompt_id: str) -> None:
        """Take a prompt out of those that wait; one that runs is left alone."""
        await self._post("/queue", orjson.dumps({"delete": [prompt_id]}))

    async def forget(self, *prompt_ids: str) -> None:
        """Delete the history of prompts, not their files."""
        await self._post("/history", orjson.dumps({"delete": prompt_ids}))

    async def free(self) -> None:
        """Have the models and the cache dropped, before the next prompt that is not yet taken up."""
        await self._post("/free", orjson.dumps({"unload_models": True, "free_memory": True}))

    @asynccontextmanager
    async def socket(self, *, seconds: float) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """The websocket. ``seconds`` bounds the wait for it to open."""
        assert self._session is not None
        timeout = aiohttp.ClientWSTimeout(ws_close=1.0)
        opening = self._session.ws_connect(
            f"{self.url}/ws?clientId={self.client_id}", timeout=timeout, max_msg_size=_SOCKET_BYTES
        )
        try:
            socket = await asyncio.wait_for(opening, seconds)
        except _BROKEN as error:
            raise _unreachable(error) from error
        self.heard = time.monotonic()
        try:
            yield socket
        finally:
            await socket.close()

    async def _queue(self) -> tuple[list[list[Any]], list[list[Any]]]:
        queue = _object(await self._get("/queue"))
        return _entries(queue.get("queue_running")), _entries(queue.get("queue_pending"))

    async def _get(self, path: str, *, seconds: float | None = None) -> Any:
        async with self._call("GET", path, seconds=seconds) as response:
            return _decoded(await response.read())

    async def _post(self, path: str, body: bytes, *, refusing: frozenset[int] = _NONE) -> Any:
        async with self._call("POST", path, refusing=refusing, data=body, headers=_JSON) as response:
            answer = await response.read()
            return _decoded(answer) if answer else None

    @asynccontextmanager
    async def _call(
        self,
        method: str,
        path: str,
        *,
        seconds: float | None = None,
        refusing: frozenset[int] = _NONE,
        **options: Any,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """``refusing`` are the statuses with which ComfyUI says no to this call. All others but success are taken for
        no answer: a login page, a limit of a tunnel, an error in ComfyUI itself tell nothing of what was asked.
        """
        assert self._session is not None
        if seconds is not None:
            options["timeout"] = aiohttp.ClientTimeout(total=seconds, sock_connect=_CONNECT_SECONDS)
        try:
            request = self._session.request(method, self.url + path, allow_redirects=False, **options)
            async with request as response:
                if response.status in refusing:
                    raise Rejected(response.status, (await response.read()).decode("utf-8", "replace"))
                if not 200 <= response.status < 300:
                    raise Unreachable(f"{path.partition('?')[0]} was answered with status {response.status}")
                yield response
                self.heard = time.monotonic()
        except _BROKEN as error:
            raise _unreachable(error) from error


def _unreachable(error: Exception) -> Unreachable:
    """Refused connections alone are sure not to have brought anything to the server."""
    refused = isinstance(error, aiohttp.ClientConnectorError)
    return Unreachable(str(error) or type(error).__name__, sent=not refused)


async def _redirected(_: aiohttp.ClientSession, __: Any, about: aiohttp.TraceRequestRedirectParams) -> None:
    about.response.close()
    raise Unreachable(f"the answer is a redirect (status {about.response.status})")


def _without_login(url: str) -> tuple[str, dict[str, str]]:
    """The address without name and password, and the header that stands for them."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError("the address of the ComfyUI is none") from None  # the reason would show the password
    login, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    name, _, password = login.partition(":")
    both = f"{unquote(name)}:{unquote(password)}".encode()
    header = {"Authorization": f"Basic {base64.b64encode(both).decode()}"}
    return parts._replace(netloc=host).geturl(), header


def _refusal(error: Rejected) -> Refusal:
    """Of a prompt. Raises Unreachable where the answer is not one of ComfyUI's."""
    try:
        body = read_json(error.text)
    except ValueError:
        body = error.text
    if error.status == 413 or (isinstance(body, dict) and (body.get("error") or body.get("node_errors"))):
        return Refusal(error.status, body)
    raise Unreachable(f"/prompt was answered with status {error.status}, and not by a ComfyUI")


def read_json(text: bytes | str) -> Any:
    """What ComfyUI wrote as JSON, which Python's NaN and Infinity may stand in. Raises ValueError.

    Halves of surrogate pairs, which JSON can say and UTF-8 cannot, are replaced: nobody could write them anywhere.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        # Nodes that are always to be run again have NaN as their mark, and the queue and the history show it.
        try:
            return _writable(json.loads(text))
        except RecursionError as error:
            raise ValueError("nested too deep") from error


def _writable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_writable(one) for one in value]
    if isinstance(value, dict):
        return {_writable(key): _writable(one) for key, one in value.items()}
    return value


def _decoded(answer: bytes) -> Any:
    try:
        return read_json(answer)
    except ValueError as error:
        raise Unreachable("the answer is not ComfyUI's: no JSON") from error


def _object(answer: Any) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise Unreachable("the answer is not ComfyUI's: no JSON object")
    return answer


def _entries(value: Any) -> list[list[Any]]:
    """The queue's entries: ``[number, prompt id, graph, extra data, outputs, …]``."""
    listed = value if isinstance(value, list) else ()
    return [entry for entry in listed if isinstance(entry, list) and len(entry) > 1]


def _extra_data(entry: list[Any]) -> dict[str, Any]:
    return entry[3] if len(entry) > 3 and isinstance(entry[3], dict) else {}
