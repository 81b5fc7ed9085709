"""The worker: joins the queue, keeps its slots busy, and leaves nothing behind when it stops.

It refuses to know what an engine does: that happens in the slots' child processes.
"""

import asyncio
import contextlib
import os
import platform
import time
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Final

from rushes import log
from rushes.catalog.load import Catalog
from rushes.engines.remote.base import RemoteEngine
from rushes.errors import StoreUnavailable
from rushes.media.fetch import policy_from
from rushes.media.inspector import Inspector
from rushes.media.storage import Storage
from rushes.queue.base import Claim, Store
from rushes.requests.ids import WorkerId, uuid7
from rushes.requests.record import Lease, RemoteState, WorkerRecord
from rushes.settings import Settings
from rushes.worker.attempt import Attempts
from rushes.worker.errand import Faults, Tools
from rushes.worker.inputs import Intake
from rushes.worker.lease import Leases, Reaper
from rushes.worker.remotes import Remotes
from rushes.worker.serving import DELIVERIES, RETRY_SECONDS, Room, Serving
from rushes.worker.share import Share
from rushes.worker.slot import Slot
from rushes.worker.sweep import Sweeper
from rushes.worker.warm import warm_models

_WORDS_SECONDS: Final = 5.0
"""How often others are told anew of what changes nothing for them."""


class Worker:
    """One worker process. ``slot_command`` starts a slot's child; ``owner`` is the supervising server's id."""

    def __init__(
        self,
        settings: Settings,
        *,
        store: Store,
        storage: Storage,
        catalog: Catalog,
        inspector: Inspector,
        scratch: Path,
        slot_command: Sequence[str],
        remotes: Sequence[RemoteEngine] = (),
        owner: str = "",
    ) -> None:
        self._settings = settings
        self._store = store
        self._catalog = catalog
        self._scratch = scratch
        self._id = WorkerId(f"{platform.node()}-{os.getpid()}-{uuid7()[-6:]}")
        self._owner = owner
        self._slots = [Slot(slot_command, n, settings.engine_start_seconds) for n in range(settings.workers)]
        self._leases = Leases(store, settings.lease_seconds)
        self._reaper = Reaper(store, settings.lease_seconds, settings.attempt_limit)
        self._sweeper = Sweeper(store, storage, settings.retention_days)
        self._attempts = Attempts(
            store=store,
            storage=storage,
            catalog=catalog,
            leases=self._leases,
            scratch=scratch,
            attempt_limit=settings.attempt_limit,
        )
        self._intake = Intake(
            worker=self._id,
            store=store,
            storage=storage,
            inspector=inspector,
            policy=policy_from(settings),
            leases=self._leases,
            scratch=scratch,
            concurrency=settings.fetch_concurrency,
        )
        self._patterns = [pattern.strip() for pattern in settings.models.split(",") if pattern.strip()]
        self._models: tuple[str, ...] = ()
        self._local: tuple[str, ...] = ()
        """Those that the slots may take."""
        self._bells: list[asyncio.Event] = []
        self._warm: dict[str, tuple[str, ...]] = {}
        """What a ComfyUI is warm for after each model, as long as the catalog stays as it is."""
        self._looking: set[Slot] = set()
        """Slots that have nothing to do and look for it."""
        self._stopping = asyncio.Event()
        room = Room(lambda: sum(slot.lanes + DELIVERIES for slot in self._slots))
        self._servings = [
            Serving(
                slot,
                attempts=self._attempts,
                claim=partial(self._claim, slot, self._bell()),
                room=room,
                scratch=scratch,
                stopping=self._stopping,
            )
            for slot in self._slots
        ]
        self._started_at = time.time()
        tools = Tools(
            store=store,
            storage=storage,
            catalog=catalog,
            leases=self._leases,
            inspector=inspector,
            policy=policy_from(settings),
            scratch=scratch,
            attempt_limit=settings.attempt_limit,
            stopping=self._stopping,
            faults=Faults(),
        )
        self._remotes = Remotes(
            remotes, settings=settings, worker=self._id, tools=tools, models=lambda: self._models
        )
        self._share = Share(settings.engine, catalog)

    async def run(self, stop: asyncio.Event, ready: Callable[[], None] | None = None) -> None:
        """Work until ``stop`` is set, then drain. Returns when every lease is finished or given back."""
        self._read_models()
        await self._look_around()
        unsubscribe = self._store.subscribe(self._ring)
        await self._store.join(self._record())
        log.event("worker joined", worker=self._id, slots=len(self._slots), models=len(self._models))
        helpers = [
            asyncio.create_task(work)
            for work in (
                self._leases.keep_alive(self._record),
                self._reaper.run(),
                self._sweeper.run(),
                self._follow_catalog(),
                self._intake.run(self._bell(), lambda: self._models),
            )
        ]
        loops = [asyncio.create_task(serving.run()) for serving in self._servings]
        if self._remotes:
            loops.append(asyncio.create_task(self._remotes.run(self._bell())))
        if ready is not None:
            ready()
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait([stopped, *helpers, *loops], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        broken = [task for task in (*helpers, *loops) if task.done() and task.exception()]
        await self._drain(loops)
        unsubscribe()
        for task in helpers:
            task.cancel()
        await asyncio.gather(*helpers, return_exceptions=True)
        await self._intake.close()
        await self._remotes.close()
        await self._leave()
        if broken:
            await broken[0]

    async def _claim(self, slot: Slot, bell: asyncio.Event) -> Lease | None:
        """The next request for this slot. Where there is none, waits until there may be one, and answers None."""
        bell.clear()
        if slot.busy:
            if self._looking:  # a slot with nothing to do comes before one that would only take it early
                await self._listen(bell)
                return None
            return await self._claim_now(slot, bell)
        self._looking.add(slot)
        try:
            lease = await self._claim_now(slot, bell)
        finally:
            self._looking.discard(slot)
        if lease is not None and len(self._slots) > 1:
            self._ring()
        return lease

    async def _claim_now(self, slot: Slot, bell: asyncio.Event) -> Lease | None:
        claim = Claim(
            worker=self._id,
            models=self._local if slot.models is None else _both(self._local, slot.models),
            warm=self._warm_for(slot),
            warm_age_bound=self._settings.warm_age_seconds,
            account_limit=self._settings.account_limit,
            engine=slot.engine,
        )
        try:
            lease = await self._store.claim(claim)
        except StoreUnavailable as error:
            log.event("nothing claimed", error=error.message)
            await asyncio.sleep(RETRY_SECONDS)
            return None
        if lease is None and not self._stopping.is_set():
            await self._listen(bell)
        return lease

    async def _listen(self, bell: asyncio.Event) -> None:
        # With accounts at their limit, work can appear without a submit: look again now and then.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETRY_SECONDS):
                await bell.wait()

    def _warm_for(self, slot: Slot) -> tuple[str, ...]:
        last = slot.warm
        if last is None:
            return ()
        if slot.engine != "comfyui":
            return (last.id,)
        # A ComfyUI keeps the weights that it has loaded for whichever workflow comes next.
        if last.id not in self._warm:
            served = [entry.model for entry in self._catalog.entries() if entry.model.id in self._models]
            self._warm[last.id] = warm_models(last, served, self._settings.comfyui_variants)
        return self._warm[last.id]

    def _bell(self) -> asyncio.Event:
        bell = asyncio.Event()
        self._bells.append(bell)
        return bell

    def _ring(self) -> None:
        for bell in self._bells:
            bell.set()

    def _record(self) -> WorkerRecord:
        return WorkerRecord(
            id=self._id,
            host=platform.node(),
            pid=os.getpid(),
            slots=len(self._slots),
            models=self._served(),
            engine=self._settings.engine,
            owner=self._owner,
            wake_port=self._store.wake_port,
            started_at=self._started_at,
            remotes=self._remotes.states(),
        )

    def _served(self) -> tuple[str, ...]:
        """The models that at least one slot can work on, for all that is known."""
        if not self._slots or any(slot.models is None for slot in self._slots):
            return self._local if self._slots or not self._remotes else ()
        return _both(self._local, {id_ for slot in self._slots for id_ in slot.models or ()})

    def _read_models(self) -> bool:
        served = tuple(
            entry.model.id
            for entry in self._catalog.entries()
            if any(fnmatchcase(entry.model.id, pattern) for pattern in self._patterns)
        )
        changed = served != self._models
        self._models = served
        return changed

    async def _follow_catalog(self) -> None:
        told, told_at = (self._served(), self._remotes.states()), time.monotonic()
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            if await asyncio.to_thread(self._catalog.refresh_if_due, time.monotonic()):
                self._warm.clear()
                if self._read_models():
                    self._ring()
            with contextlib.suppress(StoreUnavailable):
                await self._look_around()
                now = (self._served(), self._remotes.states())
                late = time.monotonic() - told_at >= _WORDS_SECONDS
                if told[0] != now[0] or _in_short(told[1]) != _in_short(now[1]) or (late and told != now):
                    await self._store.join(self._record())
                    told, told_at = now, time.monotonic()

    async def _look_around(self) -> None:
        """Which of the models the slots here may take, by the models' routes and by who else there is."""
        if self._share.minds_others:
            others = [worker for worker in await self._store.workers() if worker.id != self._id]
            self._share.see(others, self._remotes.states(), time.monotonic())
        self._local = tuple(id_ for id_ in self._models if self._share.may_take(id_))

    async def _drain(self, loops: list[asyncio.Task[None]]) -> None:
        self._stopping.set()
        self._ring()
        log.event("worker draining", worker=self._id, held=len(self._leases))
        deadline = time.monotonic() + self._settings.drain_seconds
        while working := [task for task in (*loops, *self._working()) if not task.done()]:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            await asyncio.wait(working, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        late = working
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        await asyncio.gather(*(slot.stop(0.0 if late else 2.0) for slot in self._slots))

    def _working(self) -> list[asyncio.Task[None]]:
        return [task for serving in self._servings for task in serving.working] + self._remotes.working

    async def _leave(self) -> None:
        try:
            released = await self._store.leave(self._id)
        except StoreUnavailable as error:
            log.event("worker not taken off the list", error=error.message)
        else:
            log.event("worker left", worker=self._id, released=released)


def _in_short(remotes: tuple[RemoteState, ...]) -> list[tuple[object, ...]]:
    """What others decide by; the rest, until when and why, may change with every answer of a remote."""
    return [(one.name, one.models, one.capacity, one.state, sorted(one.unknown)) for one in remotes]


def _both(models: tuple[str, ...], some: Collection[str]) -> tuple[str, ...]:
    return tuple(id_ for id_ in models if id_ in some)
