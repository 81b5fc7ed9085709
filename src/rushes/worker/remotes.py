"""The remotes of a worker at work: what they have already is taken up, and what waits is looked through.

Slots take what comes; which requests leave for a remote is decided in :mod:`rushes.worker.dispatch`. Requests that a
remote has already are taken up first, whoever handed them over.
"""

import asyncio
import contextlib
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Final

from rushes import log
from rushes.engines.remote.base import RemoteEngine
from rushes.errors import StoreUnavailable
from rushes.queue.base import Store
from rushes.requests.ids import WorkerId
from rushes.requests.record import Lease, RemoteState
from rushes.settings import Settings
from rushes.worker.dispatch import Dispatcher, Looked
from rushes.worker.errand import Tools, fail_submitting, place_of, run_errand
from rushes.worker.fleet import Fleet, Remote

LOOK_SECONDS: Final = 1.0
"""How long a change can go unnoticed that nobody tells of: a pause that ends, an hour that begins, a longer line."""
_LEAST_PAUSE: Final = 0.02
"""Between two looks, however often the bell rings."""
_VAIN_PAUSE: Final = 0.2
"""After a look at requests of which none went."""
_VAIN_SHARE: Final = 4.0
"""Such looks take at most a fifth of the time."""


class Remotes:
    """``models`` are the ids that this worker serves."""

    def __init__(
        self,
        engines: Sequence[RemoteEngine],
        *,
        settings: Settings,
        worker: WorkerId,
        tools: Tools,
        models: Callable[[], Sequence[str]],
    ) -> None:
        self._fleet = Fleet(
            engines, settings.remote_limit, catalog=tools.catalog, models=models, clock=tools.clock
        )
        self._dispatcher = Dispatcher(
            self._fleet, settings=settings, worker=worker, tools=tools, models=models, begin=self._hand_over
        )
        self._worker = worker
        self._tools = tools
        self._store: Store = tools.store
        self._places = [(one.name, place_of(one.engine)) for one in self._fleet]
        self._bell: asyncio.Event | None = None

    def __bool__(self) -> bool:
        return bool(len(self._fleet))

    @property
    def working(self) -> list[asyncio.Task[None]]:
        return [errand for remote in self._fleet for errand in remote.errands]

    def states(self) -> tuple[RemoteState, ...]:
        """As other workers, and people, see them."""
        return tuple(self._fleet.state(remote, remote.limit) for remote in self._fleet)

    async def run(self, bell: asyncio.Event) -> None:
        """Serve until the worker stops; ``bell`` is set when there may be something to do."""
        self._bell = bell
        while not self._tools.stopping.is_set():
            bell.clear()
            began, looked, pause = time.monotonic(), Looked(), _LEAST_PAUSE
            try:
                await self._resume()
                looked = await self._dispatcher.look()
            except StoreUnavailable as error:
                log.event("no remote work taken", error=error.message)
            except Exception:
                log.event("remotes failed", traceback=traceback.format_exc())
                pause = LOOK_SECONDS
            if not looked.sent:
                took = time.monotonic() - began
                pause = max(pause, _VAIN_PAUSE if looked.weighed else 0.0, _VAIN_SHARE * took)
                pause = min(pause, LOOK_SECONDS)
            await _within(pause, self._tools.stopping)
            if not looked.deeper:
                await _within(LOOK_SECONDS - pause, bell)

    async def close(self) -> None:
        for remote in self._fleet:
            await remote.engine.close()

    async def _resume(self) -> None:
        """Take up what a remote has. There is no limit to it: it runs there anyway."""
        while not self._tools.stopping.is_set():
            known = [entry.model.id for entry in self._tools.catalog.entries()]
            lease = await self._store.resume(self._worker, self._places, known)
            if lease is None:
                return
            task = lease.request.remote_task
            remote = self._fleet.get(task.remote) if task is not None and task.phase == "accepted" else None
            if remote is None:
                await fail_submitting(self._tools, lease)
            else:
                self._begin(remote, lease, 0)

    def _hand_over(self, remote: Remote, lease: Lease) -> None:
        self._begin(remote, lease, remote.breaker.begin())

    def _begin(self, remote: Remote, lease: Lease, token: int) -> None:
        errand = asyncio.create_task(run_errand(self._tools, remote.engine, remote.breaker, lease, token))
        remote.errands.add(errand)
        errand.add_done_callback(remote.errands.discard)
        if self._bell is not None:
            bell = self._bell
            errand.add_done_callback(lambda _: bell.set())


async def _within(seconds: float, event: asyncio.Event) -> None:
    """Wait for the event, so long at most."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
