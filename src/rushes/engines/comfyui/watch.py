"""Whether one ComfyUI is still there, asked as long as it says nothing by itself."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final, Protocol

from rushes.engines.comfyui.events import Events
from rushes.engines.comfyui.server import SILENCE_SECONDS, Server, Unreachable

REFUSED_SECONDS: Final = 5.0
"""How long nobody may listen at the address: a server that is started again by others is soon back."""
_QUIET_SECONDS: Final = 5.0
_PROBE_SECONDS: Final = 15.0
_PAUSE_SECONDS: Final = 0.5


class LifeSigns(Protocol):
    """The process of a ComfyUI that is our own."""

    def alive(self) -> bool: ...


class Watch:
    """Calls ``lost`` with the reason, once, and ends."""

    def __init__(
        self,
        server: Server,
        events: Events,
        process: LifeSigns | None,
        lost: Callable[[str], None],
    ) -> None:
        self._server, self._events, self._process, self._lost = server, events, process, lost
        self._task: asyncio.Task[None] | None = None
        self._look = asyncio.Event()

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def look(self) -> None:
        """Look at once: something happened that the end of the server would explain."""
        self._look.set()

    async def _watch(self) -> None:
        asking = asyncio.create_task(self._ask())
        try:
            while not asking.done():
                if self._process is not None and not self._process.alive():
                    self._lost("its process ended")
                    return
                await asyncio.wait([asking], timeout=_PAUSE_SECONDS)
            self._lost(asking.result())
        finally:
            asking.cancel()

    async def _ask(self) -> str:
        """Ends when the server is given up; why."""
        refused_since: float | None = None
        silent = 0.0
        while True:
            if self._events.open.is_set() and time.monotonic() - self._server.heard < _QUIET_SECONDS:
                self._look.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_QUIET_SECONDS):
                        await self._look.wait()
                continue
            began = time.monotonic()
            try:
                await self._server.system_stats(seconds=_PROBE_SECONDS)
            except Unreachable as error:
                if not error.sent:
                    refused_since = refused_since or began
                    if time.monotonic() - refused_since >= REFUSED_SECONDS:
                        return f"nobody listens at its address: {error}"
                else:
                    # In portions, none longer than a probe: time in which this process itself stood still is no
                    # time in which the server was silent.
                    silent += min(time.monotonic() - began + _PAUSE_SECONDS, _PROBE_SECONDS)
                    if silent >= SILENCE_SECONDS:
                        return f"it did not answer for {SILENCE_SECONDS:.0f} seconds"
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            refused_since, silent = None, 0.0
            if not self._events.open.is_set():
                await asyncio.sleep(_PAUSE_SECONDS)
