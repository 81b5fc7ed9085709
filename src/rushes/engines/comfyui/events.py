"""What one ComfyUI tells over its websocket, brought to whoever follows a prompt.

It is a convenience, never the truth: messages may be missed, and the followers of a prompt are told when that may
have happened. Source: ComfyUI's ``server.py``, ``protocol.py`` and ``comfy_execution/progress.py``.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, Literal, Protocol

import aiohttp

from rushes import log
from rushes.engines.comfyui.server import Server, Unreachable, read_json

_OPEN_SECONDS: Final = 15.0
_FIRST_PAUSE_SECONDS: Final = 0.05
_LONGEST_PAUSE_SECONDS: Final = 2.0
_STEADY_SECONDS: Final = 1.0
_LONGEST_ERROR: Final = 500
_HELLO: Final = '{"type":"feature_flags","data":{"supports_preview_metadata":true}}'
"""As the first message: have previews come with the id of their prompt. Older servers overhear it."""

ImageType = Literal["jpeg", "png"]


class Follower(Protocol):
    """Called in the event loop; must be quick. What it raises is logged, and ends nothing."""

    def message(self, type_: str, data: dict[str, Any]) -> None:
        """One message about the prompt, as ComfyUI sent it."""

    def preview(self, type_: ImageType, image: bytes) -> None:
        """A picture of what is being made."""

    def missed(self) -> None:
        """The socket went, or came back: whatever was sent in between is lost, so ask."""


class Events:
    """One websocket to one server, opened again and again until :meth:`close`."""

    def __init__(self, server: Server, *, lost: Callable[[], None] = lambda: None) -> None:
        """``lost`` is called whenever the socket goes, so that somebody can look whether the server did, too."""
        self._server = server
        self._lost = lost
        self._followers: dict[str, Follower] = {}
        self._current: str | None = None
        """The prompt that messages without an id are about."""
        self._task: asyncio.Task[None] | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self.open = asyncio.Event()

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def follow(self, prompt_id: str, follower: Follower) -> None:
        self._followers[prompt_id] = follower

    def unfollow(self, prompt_id: str) -> None:
        self._followers.pop(prompt_id, None)
        if self._current == prompt_id:
            self._current = None

    def is_deaf(self) -> None:
        """Say that something happened which the socket should have told: it is opened again.

        ComfyUI takes a client's new socket out of its table when the old one's end is noticed after the new one
        came: that socket then stays open, and silent.
        """
        if self._socket is not None and not self._socket.closed:
            closing = asyncio.create_task(self._socket.close())
            closing.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _keep(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            began = time.monotonic()
            with _survived("comfyui_socket_failed"), contextlib.suppress(Unreachable):
                await self._connect()
            if self._socket is not None and time.monotonic() - began > _STEADY_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            self._socket = None
            if self.open.is_set():
                self.open.clear()
                self._tell()
                with _survived("comfyui_socket_failed"):
                    self._lost()
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    async def _connect(self) -> None:
        """Open the socket and listen until it goes. Raises Unreachable, and whatever a broken one brings."""
        async with self._server.socket(seconds=_OPEN_SECONDS) as socket:
            self._socket = socket
            with contextlib.suppress(ConnectionError):
                await socket.send_str(_HELLO)
                self.open.set()
                self._tell()
                await self._listen(socket)

    def _tell(self) -> None:
        for follower in tuple(self._followers.values()):
            with _survived("comfyui_message_not_understood"):
                follower.missed()

    async def _listen(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for frame in socket:
            self._server.heard = time.monotonic()
            # Custom nodes send what they like: no message, of whatever shape, may end the messages.
            with _survived("comfyui_message_not_understood"):
                if frame.type is aiohttp.WSMsgType.TEXT:
                    self._text(frame.data)
                elif frame.type is aiohttp.WSMsgType.BINARY:
                    self._binary(frame.data)

    def _text(self, text: str) -> None:
        try:
            message = read_json(text)
            type_, data = str(message["type"]), message["data"]
        except (ValueError, KeyError, TypeError):
            return
        if not isinstance(data, dict):
            return
        prompt_id = data.get("prompt_id")
        if prompt_id is None:
            if type_ not in _WITHOUT_ID:
                return
            prompt_id = self._current
        elif type_ == "execution_start":
            self._current = str(prompt_id)
        follower = self._followers.get(str(prompt_id))
        if follower is not None:
            follower.message(type_, data)

    def _binary(self, frame: bytes) -> None:
        event = int.from_bytes(frame[:4], "big")
        prompt_id, image_type, image = self._current, "", b""
        if event == _PREVIEW:
            image_type = _IMAGE_TYPES.get(int.from_bytes(frame[4:8], "big"), "")
            image = frame[8:]
        elif event == _PREVIEW_WITH_METADATA:
            end = 8 + int.from_bytes(frame[4:8], "big")
            try:
                metadata = read_json(frame[8:end])
                prompt_id = str(metadata.get("prompt_id", prompt_id))
                image_type = str(metadata.get("image_type", "image/jpeg")).removeprefix("image/")
            except (ValueError, AttributeError):
                return
            image = frame[end:]
        follower = self._followers.get(prompt_id or "")
        if follower is None or not image:
            return
        if image_type == "png":
            follower.preview("png", image)
        elif image_type in ("jpeg", "jpg"):
            follower.preview("jpeg", image)


@contextlib.contextmanager
def _survived(name: str) -> Iterator[None]:
    """Log what is raised within, and go on."""
    try:
        yield
    except Exception as error:
        log.event(name, error=repr(error)[:_LONGEST_ERROR])


_PREVIEW: Final = 1
_PREVIEW_WITH_METADATA: Final = 4
_IMAGE_TYPES: Final = {1: "jpeg", 2: "png"}
_WITHOUT_ID: Final = frozenset({"progress", "executing"})
"""What older servers send, and newer ones on a reconnect, without saying for which prompt."""
