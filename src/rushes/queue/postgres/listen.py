"""Wake-ups: one connection per process that LISTENs, and a slow poll for what it misses while it is lost."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from rushes.queue.postgres.connection import UNAVAILABLE, Database

CHANNEL: Final = "rushes"
POLL_SECONDS: Final = 0.9
PROOF_SECONDS: Final = 10.0
"""How often a silent connection is proved: a machine that vanished sends no end."""

_log = logging.getLogger(__name__)


class Listener:
    """Calls its subscribers on the event loop that started it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._callbacks: dict[object, Callable[[], None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._due = False
        self._connection: Any = None

    async def start(self) -> None:
        """Listens when it returns, so that nothing sent from then on is missed."""
        await self._connect()
        self._tasks = [asyncio.create_task(self._stay_connected()), asyncio.create_task(self._poll())]

    async def stop(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                await connection.close(timeout=1.0)
            except UNAVAILABLE:
                connection.terminate()

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        token = object()
        self._callbacks[token] = callback

        def end() -> None:
            self._callbacks.pop(token, None)

        return end

    async def _connect(self) -> None:
        connection = await self._database.connect()
        try:
            await connection.add_listener(CHANNEL, self._heard)
        except BaseException:
            connection.terminate()
            raise
        self._connection = connection

    def _heard(self, *_: object) -> None:
        # Many notifications that arrive at once are one call.
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._call)

    def _call(self) -> None:
        self._due = False
        for callback in list(self._callbacks.values()):
            try:
                callback()
            except Exception:
                _log.exception("a subscriber of the queue's wake-ups failed")

    async def _stay_connected(self) -> None:
        while True:
            await self._until_lost(self._connection)
            self._connection.terminate()
            await self._reconnect()
            self._call()

    async def _until_lost(self, connection: Any) -> None:
        lost = asyncio.Event()
        connection.add_termination_listener(lambda *_: lost.set())
        while not connection.is_closed() and not lost.is_set():
            try:
                await asyncio.wait_for(lost.wait(), PROOF_SECONDS)
            except TimeoutError:
                try:
                    await connection.execute("SELECT 1")
                except UNAVAILABLE as error:
                    _log.debug("the listening connection failed its proof: %s", error)
                    return

    async def _reconnect(self) -> None:
        wait = 0.05
        while True:
            try:
                await self._connect()
            except UNAVAILABLE:
                await asyncio.sleep(wait)
                wait = min(2 * wait, 1.0)
            else:
                return

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            self._call()
