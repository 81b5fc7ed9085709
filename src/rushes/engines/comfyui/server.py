"""The HTTP side of one ComfyUI: every call that the engine makes, and nothing of when it makes it.

Source: ComfyUI's own ``server.py`` (0.3.64; read for newer ones), and answers captured from it.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Literal

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
_AWAY: Final = frozenset({502, 503, 504})
"""What a proxy says where ComfyUI behind it does not answer."""
_BROKEN: Final = (aiohttp.ClientError, TimeoutError, ConnectionError)
_JSON: Final = {"Content-Type": "application/json"}


class Unreachable(Exception):
    """No answer came. ``sent`` False says that the call did not reach the server for sure: nobody listens."""

    def __init__(self, message: str, *, sent: bool = True) -> None:
        self.sent = sent
        super().__init__(message)


class Rejected(Exception):
    """The server answered, and said no."""

    def __init__(self, status: int, text: str) -> None:
        self.status, self.text = status, text
        super().__init__(f"{status}: {text[:200]}")


class Refusal(msgspec.Struct, frozen=True):
    """A graph that ComfyUI does not take. Status 200 means that it took a part of it: that part is queued.

    ``body`` is the answer's JSON, or its text where it is none.
    """

    status: int
    body: Any


class Server:
    """Belongs to the event loop in which it is opened. Every call raises Unreachable or Rejected.

    ``heard`` is the monotonic time of the server's last sign of life.
    """

    def __init__(self, url: str, *, client_id: str) -> None:
        self.url = url.rstrip("/")
        self.client_id = client_id
        self.heard = 0.0
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Make the session; connections are made as they are needed."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=16, keepalive_timeout=30.0),
            cookie_jar=aiohttp.DummyCookieJar(),
            # Compression costs ComfyUI's one thread more than it saves here, and hides a file's length.
            headers={"Accept-Encoding": "identity"},
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

        After Unreachable it may be queued or not. Node errors are a refusal, with status 200 too.
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
            answer = await self._post("/prompt", body)
        except Rejected as error:
            try:
                return Refusal(error.status, read_json(error.text))
            except ValueError:
                return Refusal(error.status, error.text)
        accepted = _object(answer)
        if accepted.get("node_errors"):
            return Refusal(200, accepted)
        return str(accepted.get("prompt_id") or prompt_id)

    async def place(self, prompt_id: str) -> Literal["running", "pending"] | None:
        """Where in the queue a prompt is; None where it is not, or no longer."""
        running, pending = await self._queue()
        if any(entry[1] == prompt_id for entry in running):
            return "running"
        return "pending" if any(entry[1] == prompt_id for entry in pending) else None

    async def queue_entries(self) -> list[tuple[str, dict[str, Any]]]:
        """Id and extra data of every running and every waiting prompt."""
        running, pending = await self._queue()
        return [
            (str(entry[1]), entry[3] if len(entry) > 3 and isinstance(entry[3], dict) else {})
            for entry in (*running, *pending)
        ]

    async def history(self, prompt_id: str) -> dict[str, Any] | None:
        """What is known of a prompt that has ended; None where nothing is."""
        entry = _object(await self._get(f"/history/{prompt_id}")).get(prompt_id)
        return entry if isinstance(entry, dict) else None

    async def upload(self, path: Path, name: str, subfolder: str) -> str:
        """Copy a file into the server's input folder; how a graph names it there.

        ``name`` is a wish: the server makes another of it where there is such a file with other content.
        """
        with path.open("rb") as file:
            form = aiohttp.FormData(quote_fields=False)
            form.add_field("type", "input")
            form.add_field("subfolder", subfolder)
            form.add_field("image", file, filename=name, content_type="application/octet-stream")
            async with self._call("POST", "/upload/image", data=form) as response:
                answer = _object(_decoded(await response.read()))
        stored, folder = str(answer.get("name") or name), str(answer.get("subfolder") or "")
        return f"{folder}/{stored}" if folder else stored

    async def view(self, file: Mapping[str, str], destination: Path) -> None:
        """Copy one of the server's files, whole or not at all: Unreachable where its end does not come."""
        wanted = {key: file.get(key, "") for key in ("filename", "subfolder", "type")}
        async with self._call("GET", "/view", params=wanted) as response:
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

    async def _post(self, path: str, body: bytes) -> Any:
        async with self._call("POST", path, data=body, headers=_JSON) as response:
            answer = await response.read()
            return _decoded(answer) if answer else None

    @asynccontextmanager
    async def _call(
        self, method: str, path: str, *, seconds: float | None = None, **options: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None
        if seconds is not None:
            options["timeout"] = aiohttp.ClientTimeout(total=seconds, sock_connect=_CONNECT_SECONDS)
        try:
            async with self._session.request(method, self.url + path, **options) as response:
                if response.status in _AWAY:
                    raise Unreachable(f"{path} was answered with status {response.status}")
                self.heard = time.monotonic()
                if response.status >= 400:
                    raise Rejected(response.status, await response.text(errors="replace"))
                yield response
        except _BROKEN as error:
            raise _unreachable(error) from error


def _unreachable(error: Exception) -> Unreachable:
    """Refused connections alone are sure not to have brought anything to the server."""
    refused = isinstance(error, aiohttp.ClientConnectorError)
    return Unreachable(str(error) or type(error).__name__, sent=not refused)


def read_json(text: bytes | str) -> Any:
    """What ComfyUI wrote as JSON, which Python's NaN and Infinity may stand in. Raises ValueError."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        # Nodes that are always to be run again have NaN as their mark, and the queue and the history show it.
        return json.loads(text)


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
    return [entry for entry in value or () if isinstance(entry, list) and len(entry) > 1]
