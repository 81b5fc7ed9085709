"""The worker: joins the queue, keeps its slots busy, and leaves nothing behind when it stops.

It refuses to know what an engine does: that happens in the slots' child processes.
"""

import asyncio
import contextlib
import os
import platform
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from rushes import log
from rushes.catalog.load import Catalog
from rushes.errors import StoreUnavailable
from rushes.media.fetch import policy_from
from rushes.media.inspector import Inspector
from rushes.media.storage import Storage
from rushes.queue.base import Claim, Store
from rushes.requests.ids import WorkerId, uuid7
from rushes.requests.record import Lease, WorkerRecord
from rushes.settings import Settings
from rushes.worker.attempt import Attempts, NotStarted
from rushes.worker.inputs import Intake
from rushes.worker.lease import Leases, Reaper
from rushes.worker.slot import ChildLost, Slot
from rushes.worker.sweep import Sweeper

_RETRY_SECONDS = 1.0
_LONGEST_PAUSE = 30.0


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
        owner: str = "",
    ) -> None:
        self._settings = settings
        self._store = store
        self._catalog = catalog
        self._scratch = scratch
        self._id = WorkerId(f"{platform.node()}-{os.getpid()}-{uuid7()[-6:]}")
        self._owner = owner
        self._slots = [Slot(slot_command, f"slot-{n + 1}") for n in range(settings.workers)]
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
        self._bells: list[asyncio.Event] = []
        self._deliveries: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(2 * max(1, len(self._slots)))
        self._stopping = asyncio.Event()
        self._started_at = time.time()

    async def run(self, stop: asyncio.Event, ready: Callable[[], None] | None = None) -> None:
        """Work until ``stop`` is set, then drain. Returns when every lease is finished or given back."""
        self._read_models()
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
        loops = [asyncio.create_task(self._serve(slot, self._bell())) for slot in self._slots]
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
        await self._leave()
        if broken:
            await broken[0]

    async def _serve(self, slot: Slot, bell: asyncio.Event) -> None:
        """One slot's life: make sure of the child, claim, run, hand over, again."""
        troubles = 0
        while not self._stopping.is_set():
            try:
                # Before a claim: an engine that cannot start must not use up anybody's attempts, and a worker
                # whose disk is full must not take requests only to give them back.
                await slot.ensure()
                if troubles:
                    await asyncio.to_thread(self._probe)
                if not await self._serve_one(slot, bell):
                    continue
            except (ChildLost, OSError) as error:
                log.event("engine not started", slot=slot.name, error=str(error))
            except NotStarted:
                pass  # logged where it happened
            except Exception:
                log.event("slot failed", slot=slot.name, traceback=traceback.format_exc())
            else:
                troubles = 0
                continue
            troubles += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_LONGEST_PAUSE, _RETRY_SECONDS * 2 ** min(troubles - 1, 10))):
                    await self._stopping.wait()

    async def _serve_one(self, slot: Slot, bell: asyncio.Event) -> bool:
        """Claim and run one request; False where there was none."""
        # Room to deliver comes before the claim: a lease must not wait for it.
        await self._room.acquire()
        deliver = None
        try:
            lease = await self._next(slot, bell)
            if lease is None:
                return False
            deliver = await self._attempts.run(slot, lease)
        finally:
            if deliver is None:
                self._room.release()
        if deliver is not None:
            task = asyncio.create_task(deliver())
            self._deliveries.add(task)
            task.add_done_callback(self._deliveries.discard)
            task.add_done_callback(lambda _: self._room.release())
        return True

    def _probe(self) -> None:
        """Raises OSError where the scratch folder cannot be written to."""
        self._scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = self._scratch / f"probe-{threading.get_ident()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()

    async def _next(self, slot: Slot, bell: asyncio.Event) -> Lease | None:
        bell.clear()
        claim = Claim(
            worker=self._id,
            models=self._models,
            warm=slot.warm,
            warm_age_bound=self._settings.warm_age_seconds,
            account_limit=self._settings.account_limit,
            engine=slot.engine,
        )
        try:
            lease = await self._store.claim(claim)
        except StoreUnavailable as error:
            log.event("nothing claimed", error=error.message)
            await asyncio.sleep(_RETRY_SECONDS)
            return None
        if lease is None and not self._stopping.is_set():
            # With accounts at their limit, work can appear without a submit: look again now and then.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RETRY_SECONDS):
                    await bell.wait()
        return lease

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
            models=self._models,
            engine=self._settings.engine,
            owner=self._owner,
            wake_port=self._store.wake_port,
            started_at=self._started_at,
        )

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
        while True:
            await asyncio.sleep(_RETRY_SECONDS)
            if await asyncio.to_thread(self._catalog.refresh_if_due, time.monotonic()) and self._read_models():
                with contextlib.suppress(StoreUnavailable):
                    await self._store.join(self._record())
                self._ring()

    async def _drain(self, loops: list[asyncio.Task[None]]) -> None:
        self._stopping.set()
        self._ring()
        log.event("worker draining", worker=self._id, held=len(self._leases))
        deadline = time.monotonic() + self._settings.drain_seconds
        while working := [task for task in (*loops, *self._deliveries) if not task.done()]:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            await asyncio.wait(working, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        late = working
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        await asyncio.gather(*(slot.kill("stop") if late else slot.stop() for slot in self._slots))

    async def _leave(self) -> None:
        try:
            released = await self._store.leave(self._id)
        except StoreUnavailable as error:
            log.event("worker not taken off the list", error=error.message)
        else:
            log.event("worker left", worker=self._id, released=released)
