"""Retention: removes the files of requests that ended long ago, and never what a live request needs.

The order makes a crash harmless: files first, then the mark; what is removed twice is gone all the same.
"""

import asyncio
import time
from typing import Final

from rushes import log
from rushes.errors import StoreUnavailable
from rushes.media.storage import Storage
from rushes.queue.base import Store

_BATCH: Final = 100
_EVERY_SECONDS: Final = 60.0


class Sweeper:
    """``retention_days`` 0 keeps everything for ever."""

    def __init__(self, store: Store, storage: Storage, retention_days: float) -> None:
        self._store = store
        self._storage = storage
        self._seconds = retention_days * 86400

    async def run(self) -> None:
        while True:
            try:
                await self.sweep(time.time())
            except StoreUnavailable as error:
                log.event("sweep failed", error=error.message)
            await asyncio.sleep(min(_EVERY_SECONDS, max(1.0, self._seconds / 10)))

    async def sweep(self, now: float) -> int:
        """Remove what is due at ``now`` (seconds since the epoch); answers how many requests and files went."""
        if not self._seconds:
            return 0
        swept = 0
        while requests := await self._store.sweepable(now - self._seconds, _BATCH):
            for request in requests:
                for area in ("outputs", "inputs", "uploads"):
                    await self._storage.delete_prefix(f"{area}/{request.id}")
            await self._store.mark_swept([request.id for request in requests])
            swept += len(requests)
        while files := await self._store.sweepable_files(now - self._seconds, _BATCH):
            for file in files:
                # The record first: a file that is found can be read.
                await self._store.delete_file(file.id)
                await self._storage.delete(file.key)
            swept += len(files)
        if swept:
            log.event("swept", count=swept)
        return swept
