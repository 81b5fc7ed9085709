"""What the prompts of one ComfyUI share: the connection, its end, and who is before whom."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from rushes.engines.comfyui.events import Events
from rushes.engines.comfyui.progress import Timings
from rushes.engines.comfyui.server import Server, Unreachable
from rushes.errors import EngineError

T = TypeVar("T")
PAUSE_SECONDS: Final = 0.25
_INSIST_SECONDS: Final = 90.0
"""More than the silence after which a server is given up (:mod:`rushes.engines.comfyui.watch`)."""
_TAKE_BACK_SECONDS: Final = 0.1
"""Between two looks whether a prompt is gone: ComfyUI looks for an interrupt between two steps of the work."""
_LET_GO_SECONDS: Final = 30.0
_FORGET_SECONDS: Final = 1.0
_FORGET_AT: Final = 32


class Folders(Protocol):
    """The folders of a ComfyUI that is our own, on this machine."""

    input_dir: Path
    output_dir: Path
    temp_dir: Path


class InLine(Protocol):
    """A prompt that has been given to ComfyUI and has not ended there."""

    def estimate(self) -> float | None:
        """Seconds that its own work still takes; None where unknown."""


def lost(why: str, *, began: bool, replace: bool = False) -> EngineError:
    """The error of a run whose ComfyUI is gone. ``why`` is for the log; users read a plain sentence."""
    error = EngineError(
        "comfyui_lost",
        "The ComfyUI that was to make this was lost."
        if not began
        else "The ComfyUI that was making this was lost.",
        retryable=True,
        began=began,
        replace=replace,
    )
    error.add_note(why)
    return error


class Line:
    """In the order in which they were given to ComfyUI: which is the order in which it runs them."""

    def __init__(
        self, server: Server, events: Events, *, identity: str, folders: Folders | None = None
    ) -> None:
        self.server, self.events, self.identity, self.folders = server, events, identity, folders
        self.output_dir: Path | None = folders.output_dir if folders else None
        """ComfyUI's output folder, where it is within reach."""
        self.timings = Timings()
        self.gone: str | None = None
        """Why there is no ComfyUI any more; None while there is one."""
        self._line: list[InLine] = []
        self._forgotten: list[str] = []
        self._forgetting: asyncio.Task[None] | None = None

    def join(self, prompt: InLine) -> None:
        self._line.append(prompt)

    def leave(self, prompt: InLine) -> None:
        with contextlib.suppress(ValueError):
            self._line.remove(prompt)

    def is_first(self, prompt: InLine) -> bool:
        """Whether no prompt of ours is before this one: then ComfyUI may have begun it at any moment."""
        return bool(self._line) and self._line[0] is prompt

    def ahead(self, prompt: InLine) -> float | None:
        """Seconds until every prompt before this one has ended; None where that is unknown."""
        seconds = 0.0
        for other in self._line:
            if other is prompt:
                break
            left = other.estimate()
            if left is None:
                return None
            seconds += left
        return seconds

    async def insist(self, call: Callable[[], Awaitable[T]], *, tries: int | None = None) -> T:
        """The answer to a call that may be made twice, however long ComfyUI is too busy to give it.

        Passes on Rejected, where it says no, and raises EngineError ``comfyui_lost`` where no answer comes.
        """
        began = time.monotonic()
        made = 0
        while True:
            if self.gone is not None:
                raise lost(self.gone, began=True, replace=True)
            try:
                return await call()
            except Unreachable as error:
                made += 1
                if time.monotonic() - began > _INSIST_SECONDS or made == tries:
                    raise lost(str(error), began=True) from error
            await asyncio.sleep(PAUSE_SECONDS)

    def extra_data(self, request_id: str, attempt: int, prompt_id: str) -> dict[str, Any]:
        """What is given along with a prompt: it is found again by that, under whatever id the server knows it."""
        about = {"slot": self.identity, "request": request_id, "attempt": attempt, "prompt": prompt_id}
        # Newer servers make previews for prompts that ask for them; older ones where they were started so.
        return {"rushes": about, "preview_method": "auto"}

    async def find(self, prompt_id: str) -> str | None:
        """The id under which ComfyUI has, or had, a prompt; None where it never got it. Raises as :meth:`insist`."""
        # The queue before the history: what ends in between is then found in the latter.
        for entry in await self.insist(self.server.queue_entries):
            if _is_one_of(entry.prompt_id, entry.extra_data, (prompt_id,)):
                return entry.prompt_id
        if await self.insist(lambda: self.server.history(prompt_id)) is not None:
            return prompt_id
        for known_as, extra_data in await self.insist(self.server.recent):
            if _is_one_of(known_as, extra_data, (prompt_id,)):
                return known_as
        return None

    async def take_back(self, prompt_ids: Collection[str]) -> None:
        """Have ComfyUI drop prompts, and wait until it has. Raises EngineError where it does not answer."""
        while True:
            entries = await self.insist(self.server.queue_entries)
            ours = [one for one in entries if _is_one_of(one.prompt_id, one.extra_data, prompt_ids)]
            if not ours:
                return
            for entry in ours:
                with contextlib.suppress(Unreachable):
                    if entry.place == "pending":
                        await self.server.delete(entry.prompt_id)
                    else:
                        await self.server.interrupt(entry.prompt_id)
            await asyncio.sleep(_TAKE_BACK_SECONDS)

    async def let_go(self, prompt_ids: Collection[str]) -> bool:
        """Take prompts back within a bounded time; whether that was seen to succeed."""
        try:
            async with asyncio.timeout(_LET_GO_SECONDS):
                await self.take_back(prompt_ids)
        except (TimeoutError, EngineError):
            return False
        return True

    def forget(self, prompt_id: str) -> None:
        """Have a prompt's history deleted, soon: many with one call, as each costs ComfyUI's one thread time."""
        self._forgotten.append(prompt_id)
        if self._forgetting is None or self._forgetting.done():
            self._forgetting = asyncio.create_task(self._forget())

    async def close(self) -> None:
        if self._forgetting is not None:
            self._forgetting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._forgetting

    async def _forget(self) -> None:
        until = time.monotonic() + _FORGET_SECONDS
        while len(self._forgotten) < _FORGET_AT and time.monotonic() < until:
            await asyncio.sleep(_FORGET_SECONDS / 4)
        while self._forgotten:
            ids, self._forgotten = self._forgotten, []
            with contextlib.suppress(Unreachable):  # a server that is gone has forgotten already
                await self.server.forget(*ids)


def _is_one_of(known_as: str, extra_data: Mapping[str, Any], prompt_ids: Collection[str]) -> bool:
    """Whether a prompt is one of those submitted as ``prompt_ids``. Servers before the end of 2025's summer choose
    the id themselves; what was given along tells there.
    """
    about = extra_data.get("rushes")
    return known_as in prompt_ids or (isinstance(about, dict) and str(about.get("prompt")) in prompt_ids)
