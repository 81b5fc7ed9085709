"""Input files, fetched and checked while their request waits, so that no slot waits for a download.

A file that cannot be used ends the request here, before any slot is touched.
"""

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from rushes import log
from rushes.catalog.samples import sample_path
from rushes.errors import MediaError, NotFound, StoreUnavailable
from rushes.media.fetch import FetchPolicy, fetch
from rushes.media.inspector import Inspector
from rushes.media.sniff import FORMATS
from rushes.media.storage import Storage
from rushes.queue.base import Store
from rushes.requests.ids import WorkerId
from rushes.requests.record import Failure, Lease, Source
from rushes.worker.lease import Leases
from rushes.worker.outputs import until_written

_PAUSE: Final = 1.0


def input_prefix(request_id: str) -> str:
    """Where a request's checked input files lie."""
    return f"inputs/{request_id}"


async def input_path(storage: Storage, source: Source, folder: Path) -> Path:
    """Where a file that is ready lies on this machine; what is stored elsewhere is copied into ``folder``. Raises
    NotFound, StoreUnavailable.
    """
    if source.kind == "sample":
        path = sample_path(source.value)
        if path is None:
            raise NotFound
        return path
    assert source.key is not None
    here = storage.local_path(source.key)
    if here is not None:
        return here
    copy = folder / Path(source.key).name
    await storage.download(source.key, copy)
    return copy


class Intake:
    """Claims requests whose files are pending and makes their inputs ready."""

    def __init__(
        self,
        *,
        worker: WorkerId,
        store: Store,
        storage: Storage,
        inspector: Inspector,
        policy: FetchPolicy,
        leases: Leases,
        scratch: Path,
        concurrency: int,
    ) -> None:
        self._worker = worker
        self._store = store
        self._storage = storage
        self._inspector = inspector
        self._policy = policy
        self._leases = leases
        self._scratch = scratch
        self._concurrency = concurrency
        self._tasks: set[asyncio.Task[None]] = set()
        self._freed = asyncio.Event()

    async def run(self, bell: asyncio.Event, models: Callable[[], Sequence[str]]) -> None:
        """Work until cancelled; ``bell`` is set when there may be something to do."""
        while True:
            bell.clear()
            try:
                free = self._concurrency - len(self._tasks)
                taken = await self._store.claim_inputs(self._worker, models(), free)
            except StoreUnavailable as error:
                log.event("no inputs claimed", error=error.message)
                await asyncio.sleep(_PAUSE)
                continue
            for lease in taken:
                task = asyncio.create_task(self._make_ready(lease))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                task.add_done_callback(lambda _: bell.set())
            await bell.wait()

    async def close(self) -> None:
        """Stop in the middle; the leases go back with the worker's others."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _make_ready(self, lease: Lease) -> None:
        held = self._leases.hold(lease)
        try:
            self._scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._scratch, prefix="in-") as folder:
                sources = await self._fetch_all(lease, Path(folder))
            await until_written("inputs", lambda: self._store.inputs_ready(lease, sources))
        except _Refused as refused:
            failure = refused.failure
            log.event("input refused", request=lease.request.id, field=failure.field, code=failure.code)
            await until_written("refusal", lambda: self._store.refuse(lease, failure))
        except (StoreUnavailable, OSError) as error:
            # Ours to mend, not the user's: back to the queue, and a little later again.
            log.event("inputs not stored", request=lease.request.id, error=str(error))
            await asyncio.sleep(_PAUSE)
            lost = Failure("inputs_lost", "The input files could not be kept.")
            await until_written("inputs", lambda: self._store.lose(lease, lost, attempt_limit=1))
        except Exception as error:
            log.event("inputs failed", request=lease.request.id, error=repr(error), level="error")
            failure = Failure("internal_error", "The server made a mistake with the input files.")
            await until_written("refusal", lambda: self._store.refuse(lease, failure))
        finally:
            self._leases.drop(held)

    async def _fetch_all(self, lease: Lease, folder: Path) -> dict[str, Source]:
        pending = {
            name: source
            for name, source in lease.request.sources.items()
            if source.kind != "sample" and not source.key
        }
        made = await asyncio.gather(
            *(self._fetch(lease, name, source, folder) for name, source in pending.items()),
            return_exceptions=True,
        )
        problems = [one for one in made if isinstance(one, BaseException)]
        if problems:
            raise next((one for one in problems if isinstance(one, _Refused)), problems[0])
        ready = [one for one in made if isinstance(one, Source)]
        return lease.request.sources | dict(zip(pending, ready, strict=True))

    async def _fetch(self, lease: Lease, name: str, source: Source, folder: Path) -> Source:
        number = list(lease.request.sources).index(name) + 1
        raw = folder / f"{number}.raw"
        checked = raw.with_suffix(".checked")
        try:
            if source.kind == "url":
                await fetch(source.value, raw, media=source.media, policy=self._policy)
            else:
                await self._storage.download(source.value, raw)
            info = await self._inspector.normalise(raw, checked, source.media)
        except MediaError as error:
            raise _Refused(Failure(error.reason, f"{name}: {error.message}", field=name)) from None
        except NotFound:
            text = f"{name}: this file is no longer here; upload it again"
            raise _Refused(Failure("input_gone", text, field=name)) from None
        # Images have become PNGs; videos stay as they came.
        content_type = "image/png" if info.kind == "image" else info.content_type
        key = f"{input_prefix(lease.request.id)}/{number}{_extension(content_type)}"
        await self._storage.put_file(key, checked, content_type)
        return msgspec.structs.replace(source, key=key, content_type=content_type)


def _extension(content_type: str) -> str:
    return next(one.extension for one in FORMATS.values() if one.content_type == content_type)


class _Refused(Exception):
    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.message)
