"""Input files are fetched and checked while their request waits; what is bad ends it before any slot."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from rushes.media.fetch import FetchPolicy
from rushes.media.inspector import Inspector
from rushes.media.storage import Storage, open_storage
from rushes.queue.base import Claim
from rushes.queue.sqlite.store import SqliteStore
from rushes.requests.ids import AccountId, KeyId, RequestId, WorkerId, new_request_id
from rushes.requests.record import NewRequest, Request, Source
from rushes.settings import Settings
from rushes.worker.inputs import Intake
from rushes.worker.lease import Leases
from support.engines import png
from support.https_server import Asked, Write, answer, serve, write_authority

MODEL = "a/b"
W = WorkerId("w")


class Bench:
    def __init__(self, store: SqliteStore, storage: Storage, policy: FetchPolicy, folder: Path) -> None:
        self.store, self.storage = store, storage
        self.leases = Leases(store, lease_seconds=5)
        self.inspector = Inspector()
        self.intake = Intake(
            worker=W,
            store=store,
            storage=storage,
            inspector=self.inspector,
            policy=policy,
            leases=self.leases,
            scratch=folder,
            concurrency=2,
        )

    async def submit(self, **sources: Source) -> RequestId:
        new = NewRequest(new_request_id(), AccountId("a"), KeyId("k"), MODEL, b"{}", sources)
        await self.store.submit(new)
        return new.id

    async def record(self, id_: RequestId) -> Request:
        found = await self.store.get(id_)
        assert found is not None
        return found

    async def settled(self, id_: RequestId) -> Request:
        async with asyncio.timeout(30):
            while (record := await self.record(id_)).inputs != "ready" and record.state == "queued":
                await asyncio.sleep(0.01)
        return record


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    settings = Settings(data_dir=tmp_path / "data")
    store = SqliteStore(settings.data_dir / "rushes.db")
    await store.open()
    policy = FetchPolicy(
        allow=("127.0.0.0/8",),
        seconds=5,
        ca_file=write_authority(tmp_path),
        max_bytes={"image": 200_000, "video": 1},
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    bench = Bench(store, open_storage(settings), policy, scratch)
    bell = asyncio.Event()
    unsubscribe = store.subscribe(bell.set)
    task = asyncio.create_task(bench.intake.run(bell, lambda: [MODEL]))
    yield bench
    unsubscribe()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await bench.intake.close()
    await bench.inspector.close()
    await store.close()
    assert [] == list(scratch.iterdir())


def url(port: int, path: str = "a.png") -> Source:
    return Source("url", f"https://127.0.0.1:{port}/{path}", "image")


async def test_a_fetched_file_is_there_before_the_claim(bench: Bench) -> None:
    async with serve(answer(png(50, 40))) as host:
        id_ = await bench.submit(start=url(host.port))
        assert (
            await bench.store.claim(Claim(W, (MODEL,))) is None or (await bench.record(id_)).inputs == "ready"
        )
        record = await bench.settled(id_)
    assert ("queued", "ready", 0) == (record.state, record.inputs, record.attempt)
    source = record.sources["start"]
    assert source.key == f"inputs/{id_}/1.png"
    assert source.content_type == "image/png"
    path = bench.storage.local_path(source.key)
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")


async def test_a_bad_file_fails_the_request_and_names_the_field(bench: Bench) -> None:
    cases = {
        "input_not_media": answer(b"<!doctype html><title>Log in</title>"),
        "input_too_large": answer(png(400, 400)),
    }
    for code, handler in cases.items():
        async with serve(handler) as host:
            record = await bench.settled(await bench.submit(end_image=url(host.port)))
        assert "failed" == record.state
        assert record.failure is not None
        assert (code, "end_image") == (record.failure.code, record.failure.field)
        assert "end_image" in record.failure.message
        assert 0 == record.attempt


async def test_truncated_and_missing_files(bench: Bench) -> None:
    async with serve(answer(png(50, 40)[:300])) as host:
        record = await bench.settled(await bench.submit(start=url(host.port)))
    assert record.failure is not None
    assert "start" == record.failure.field
    gone = await bench.settled(await bench.submit(start=Source("stored", "files/none.png", "image")))
    assert gone.failure is not None
    assert "input_gone" == gone.failure.code


async def test_a_slow_host_holds_up_neither_others_nor_itself_for_ever(bench: Bench) -> None:
    async def drip(_: Asked, write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while True:
            await write(b"x")
            await asyncio.sleep(0.05)

    async with serve(drip) as slow, serve(answer(png(9, 9))) as quick:
        late = await bench.submit(start=url(slow.port))
        soon = await bench.submit(start=url(quick.port))
        assert "ready" == (await bench.settled(soon)).inputs
        assert "fetching" == (await bench.record(late)).inputs
        record = await bench.settled(late)
    assert record.failure is not None
    assert "start" == record.failure.field


async def test_a_request_can_be_cancelled_while_its_files_are_fetched(bench: Bench) -> None:
    asked = asyncio.Event()
    go_on = asyncio.Event()

    async def wait(_: Asked, write: Write) -> None:
        asked.set()
        await go_on.wait()
        await answer(png(9, 9))(_, write)

    async with serve(wait) as host:
        id_ = await bench.submit(start=url(host.port))
        await asyncio.wait_for(asked.wait(), 10)
        assert await bench.store.claim(Claim(W, (MODEL,))) is None
        assert "cancelled" == await bench.store.cancel(id_, None)
        go_on.set()
        other = await bench.submit(start=url(host.port))
        assert "ready" == (await bench.settled(other)).inputs
    assert "cancelled" == (await bench.record(id_)).state


async def test_several_files_of_one_request(bench: Bench) -> None:
    await bench.storage.put_bytes("uploads/x/1", png(20, 10), "application/octet-stream")
    async with serve(answer(png(9, 9))) as host:
        id_ = await bench.submit(
            start=url(host.port),
            end=Source("stored", "uploads/x/1", "image"),
            sample=Source("sample", "Runcomfy_Example_1290_1.png", "image"),
        )
        record = await bench.settled(id_)
    assert [f"inputs/{id_}/1.png", f"inputs/{id_}/2.png", None] == [s.key for s in record.sources.values()]
    assert msgspec.json.encode(record.sources)
