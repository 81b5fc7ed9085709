"""A worker in this process, with real child processes, over an empty SQLite store."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rushes.catalog.load import Catalog
from rushes.engines.remote.base import RemoteEngine
from rushes.media.inspector import Inspector
from rushes.media.storage import Storage, open_storage
from rushes.queue.sqlite.store import SqliteStore
from rushes.requests.ids import AccountId, KeyId, RequestId, new_request_id
from rushes.requests.record import NewRequest, Request
from rushes.settings import Settings
from rushes.wiring import CHILD_SETTINGS, SLOT_COMMAND, encode_settings
from rushes.worker.loop import Worker
from support.server import TESTS

T2I = "wan-ai/wan-2-5/text-to-image"


class Workbench:
    def __init__(
        self,
        settings: Settings,
        store: SqliteStore,
        storage: Storage,
        scratch: Path,
        remotes: Sequence[RemoteEngine] = (),
    ) -> None:
        self.settings, self.store, self.storage, self.scratch = settings, store, storage, scratch
        self.remotes = remotes
        self.catalog = Catalog.load(settings.models_dir)
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._inspector = Inspector()

    async def submit(self, prompt: str = "ok", model: str = T2I, *, hops: int = 0, **more: object) -> RequestId:
        import msgspec

        text = msgspec.json.encode({"prompt": prompt, **more})
        new = NewRequest(new_request_id(), AccountId("a"), KeyId("k"), model, text, {}, hops=hops)
        await self.store.submit(new)
        return new.id

    def start(self) -> None:
        self._stop = asyncio.Event()
        worker = Worker(
            self.settings,
            store=self.store,
            storage=self.storage,
            catalog=self.catalog,
            inspector=self._inspector,
            scratch=self.scratch,
            slot_command=SLOT_COMMAND,
            remotes=self.remotes,
        )
        self._task = asyncio.create_task(worker.run(self._stop))

    async def stop(self) -> None:
        """In an orderly way; it can be started again."""
        self._stop.set()
        if self._task is not None:
            await self._task
            self._task = None
        await self._inspector.close()

    def alive(self) -> bool:
        return self._task is not None and not self._task.done()

    async def ended(self, id_: RequestId, seconds: float = 30) -> Request:
        deadline = time.monotonic() + seconds
        while True:
            record = await self.store.get(id_)
            assert record is not None
            if record.finished_at is not None:
                return record
            assert time.monotonic() < deadline, (record.state, record.attempt)
            await asyncio.sleep(0.02)


@asynccontextmanager
async def workbench(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, remotes: Sequence[RemoteEngine] = (), **given: object
) -> AsyncIterator[Workbench]:
    values = {"engine": "support.engines:PromptEngine", "lease_seconds": 1.0, "drain_seconds": 5.0} | given
    settings = Settings(data_dir=folder / "data", **values)  # type: ignore[arg-type]
    monkeypatch.setenv(CHILD_SETTINGS, encode_settings(settings))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    assert sys.executable
    store = SqliteStore(settings.data_dir / "rushes.db")
    await store.open()
    scratch = folder / "scratch"
    scratch.mkdir()
    bench = Workbench(settings, store, open_storage(settings), scratch, remotes)
    try:
        yield bench
    finally:
        await bench.stop()
        await store.close()
