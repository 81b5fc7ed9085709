"""Retention: removes the files of requests that ended long ago, and never what a live request needs.

The store chooses and marks in one step; the files are removed after that. What a crash leaves between the two is
found by a slow walk through the storage, a piece in each round.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from pathlib import PurePosixPath
from typing import Final

from rushes import log
from rushes.media.storage import Meta, Storage
from rushes.queue.base import Store
from rushes.requests.ids import FileId, RequestId, is_request_id

_BATCH: Final = 100
_EVERY_SECONDS: Final = 60.0
_OF_REQUESTS: Final = ("outputs", "inputs", "uploads")
_UPLOADS: Final = "files"
_LOOK: Final = 500
"""Files that one round of the walk looks at."""
_YOUNG_SECONDS: Final = 86400.0
"""What was stored this lately may belong to a request that is only just being submitted."""
_REST_SECONDS: Final = 3600.0
"""Between the end of a walk and the next."""


class Sweeper:
    """``retention_days`` 0 keeps everything for ever."""

    def __init__(self, store: Store, storage: Storage, retention_days: float) -> None:
        self._store = store
        self._storage = storage
        self._seconds = retention_days * 86400
        self._marked: deque[str] = deque()
        """Prefixes that are still to be removed."""
        self._unlisted: deque[str] = deque()
        """Keys of uploads that are still to be removed."""
        self._walk: AsyncIterator[Meta] | None = None
        self._rest_until = 0.0

    async def run(self) -> None:
        """Work until cancelled. Nothing that goes wrong here is worth a worker."""
        while True:
            for step in (self.sweep, self.tidy):
                try:
                    await step(time.time())
                except Exception as error:
                    log.event("sweep failed", error=repr(error))
            await asyncio.sleep(min(_EVERY_SECONDS, max(1.0, self._seconds / 10)))

    async def sweep(self, now: float) -> int:
        """Remove what is due at ``now`` (seconds since the epoch); answers how many requests and files went."""
        if not self._seconds:
            return 0
        await self._remove()  # what storage was away for
        swept = 0
        while requests := await self._store.sweep(now - self._seconds, _BATCH):
            self._marked.extend(f"{area}/{request.id}" for request in requests for area in _OF_REQUESTS)
            swept += len(requests)
            await self._remove()
        while files := await self._store.sweep_files(now - self._seconds, _BATCH):
            self._unlisted.extend(file.key for file in files)
            swept += len(files)
            await self._remove()
        if swept:
            log.event("swept", count=swept)
        return swept

    async def _remove(self) -> None:
        while self._marked:
            await self._storage.delete_prefix(self._marked[0])
            self._marked.popleft()
        while self._unlisted:
            await self._storage.delete(self._unlisted[0])
            self._unlisted.popleft()

    async def tidy(self, now: float) -> int:
        """Go on with the walk: remove files whose request is swept or unknown, or whose upload is, once they are
        older than a day and than the retention. Answers how many.
        """
        if not self._seconds or now < self._rest_until:
            return 0
        walk = self._walk = self._walk or self._everything()
        judged: dict[str, bool] = {}
        removed = looked = 0
        try:
            async for meta in walk:
                looked += 1
                if now - meta.last_modified > max(_YOUNG_SECONDS, self._seconds):
                    owner = "/".join(meta.key.split("/")[:2])
                    if owner not in judged:
                        judged[owner] = await self._is_stray(owner)
                    if judged[owner]:
                        await self._storage.delete(meta.key)
                        removed += 1
                if looked >= _LOOK:
                    break
            else:
                self._walk = None
                self._rest_until = now + _REST_SECONDS
        except BaseException:
            self._walk = None  # a walk that broke off is over
            raise
        if removed:
            log.event("strays removed", count=removed)
        return removed

    async def _everything(self) -> AsyncIterator[Meta]:
        for area in (*_OF_REQUESTS, _UPLOADS):
            async for meta in self._storage.list(area):
                yield meta

    async def _is_stray(self, owner: str) -> bool:
        """Whether nothing can ask for the files under ``area/name``. What we would not name so is not ours."""
        area, _, name = owner.partition("/")
        if area == _UPLOADS:
            id_ = FileId(PurePosixPath(name).stem)
            ours = is_request_id(id_.removeprefix("file_"))
            return ours and await self._store.get_file(id_, None) is None
        if not is_request_id(name):
            return False
        found = await self._store.get(RequestId(name))
        return found is None or found.swept_at is not None
