"""The leases that this worker holds, and the sign of life it gives for each of them.

Renewed by the worker's own event loop, outside the engine's process: an engine that hogs its process, or
crashes, cannot lose a lease that the worker still wants, nor keep one that it does not.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from rushes import log
from rushes.errors import StoreUnavailable
from rushes.queue.base import Beat, Store
from rushes.requests.ids import RequestId, WorkerId
from rushes.requests.record import Failure, Lease, LeaseMark, Progress, WorkerRecord
from rushes.worker.reaper import BeatWatch


class Held:
    """One lease in our hands. ``lost`` is set once somebody else owns the outcome."""

    def __init__(self, lease: Lease, on_lost: Callable[[], None] | None) -> None:
        self.lease = lease
        self.progress: Progress | None = None
        self.preview: Path | None = None
        """The newest picture of it, in the scratch folder: it is gone as soon as the attempt is over."""
        self.lost = False
        self.on_lost = on_lost

    def show(self, progress: Progress, preview: Path | None) -> None:
        """What the next beat tells of it."""
        self.progress = progress
        self.preview = preview or self.preview


class Leases:
    """Holds leases and keeps them alive; also tells the queue that the worker itself lives."""

    def __init__(self, store: Store, lease_seconds: float) -> None:
        self._store = store
        self._held: dict[tuple[RequestId, int], Held] = {}
        self.beat_seconds = min(1.0, lease_seconds / 5)
        self._lease_seconds = lease_seconds

    def hold(self, lease: Lease, on_lost: Callable[[], None] | None = None) -> Held:
        held = self._held[lease.request.id, lease.fence] = Held(lease, on_lost)
        return held

    def drop(self, held: Held) -> None:
        self._held.pop((held.lease.request.id, held.lease.fence), None)

    def __len__(self) -> int:
        return len(self._held)

    async def keep_alive(self, record: Callable[[], WorkerRecord]) -> None:
        """Beat until cancelled. ``record`` gives the worker's record, for joining anew where it is gone."""
        worker_beat = 0.0
        while True:
            await asyncio.sleep(self.beat_seconds)
            try:
                await self.beat()
                if time.monotonic() - worker_beat >= self._lease_seconds / 3:
                    worker_beat = time.monotonic()
                    if not await self._store.worker_beat(record().id):
                        await self._store.join(record())
            except StoreUnavailable as error:
                log.event("heartbeat failed", error=error.message)

    async def beat(self) -> None:
        """One sign of life for everything held."""
        newest: dict[RequestId, int] = {}
        for id_, fence in self._held:
            newest[id_] = max(fence, newest.get(id_, 0))
        for key, one in tuple(self._held.items()):
            if key[1] < newest[key[0]]:  # we ourselves hold the request anew: the old lease is over
                self._end(key, one)
        held = list(self._held.values())
        if not held:
            return
        beats = [Beat(one.lease.request.id, one.lease.fence, one.progress) for one in held]
        lost = await self._store.renew(beats)
        for one in held:
            key = (one.lease.request.id, one.lease.fence)
            if one.lease.request.id in lost and self._held.get(key) is one:
                self._end(key, one)

    def _end(self, key: tuple[RequestId, int], held: Held) -> None:
        held.lost = True
        del self._held[key]
        log.event("lease lost", request=held.lease.request.id, purpose=held.lease.purpose)
        if held.on_lost is not None:
            held.on_lost()


class Reaper:
    """Ends the leases of others that stand still, and forgets workers that are gone."""

    def __init__(self, store: Store, lease_seconds: float, attempt_limit: int) -> None:
        self._store = store
        self._attempt_limit = attempt_limit
        self.interval = lease_seconds / 5
        self._leases: BeatWatch[tuple[RequestId, int]] = BeatWatch(lease_seconds, self.interval)
        self._workers: BeatWatch[WorkerId] = BeatWatch(3 * lease_seconds, self.interval)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self.interval)
            try:
                await self.look(time.monotonic())
            except StoreUnavailable as error:
                log.event("reaper failed", error=error.message)

    async def look(self, now: float) -> int:
        """One look at every lease and worker; answers how many leases were ended. ``now`` is monotonic."""
        marks: dict[tuple[RequestId, int], LeaseMark] = {
            (mark.id, mark.fence): mark for mark in await self._store.leases()
        }
        silent = self._leases.look({key: mark.beat for key, mark in marks.items()}, now)
        ended = 0
        if silent:
            failure = worker_lost()
            ended = await self._store.expire([marks[key] for key in silent], failure, self._attempt_limit)
            self._leases.forget(silent)
            log.event("leases expired", count=ended)
        workers = {worker.id: worker.beat for worker in await self._store.workers()}
        for worker in self._workers.look(workers, now):
            await self._store.bury(worker, worker_lost(), self._attempt_limit)
            self._workers.forget([worker])
            log.event("worker gone", worker=worker)
        return ended


def worker_lost() -> Failure:
    """What a user reads when the attempt limit was reached by workers that vanished."""
    return Failure("worker_lost", "The worker stopped in the middle of this request, too many times in a row.")
