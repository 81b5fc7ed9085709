"""What a worker does when its engine, its disk, its storage or the request itself misbehaves."""

import asyncio
import shutil
from pathlib import Path

import psutil
import pytest

from rushes.requests.record import Lease
from rushes.worker.lease import Leases
from support.worker import T2I, workbench

MANIFEST = """
name = "Odd"
description = "An odd model."
categories = ["text-to-image"]
output = "image"
required = ["prompt"]
{more}

[[inputs]]
name = "prompt"
title = "Prompt"
type = "string"
role = "prompt"

[[inputs]]
name = "size"
title = "Size"
type = "string"
role = "{role}"
"""


def write_model(root: Path, role: str, more: str = "") -> None:
    folder = root / "me" / "odd"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.toml").write_text(MANIFEST.format(role=role, more=more))
    (folder / "sample.json").write_text('{"prompt": "ok"}')


async def test_a_request_that_no_longer_fits_its_model_fails_alone(tmp_path, monkeypatch) -> None:
    write_model(tmp_path / "models", "resolution")
    async with workbench(tmp_path, monkeypatch, models_dir=tmp_path / "models") as bench:
        poison = await bench.submit(model="me/odd", size="720p")
        after = await bench.submit()
        bench.start()
        record = await bench.ended(poison)
        assert record.failure is not None
        assert ("failed", "internal_error", 1) == (record.state, record.failure.code, record.attempt)
        assert "succeeded" == (await bench.ended(after)).state
        assert bench.alive()


async def test_a_bad_scratch_disk_uses_up_no_attempts(tmp_path, monkeypatch) -> None:
    async with workbench(tmp_path, monkeypatch) as bench:
        ids = [await bench.submit() for _ in range(30)]
        bench.scratch.rmdir()
        bench.scratch.write_text("stands for a full or read-only disk")
        bench.start()

        async def given_back() -> bool:
            records = [await bench.store.get(id_) for id_ in ids]
            return any(record and record.started_at and record.state == "queued" for record in records)

        async with asyncio.timeout(20):
            while not await given_back():
                await asyncio.sleep(0.02)
        counts = await bench.store.counts()
        assert 0 == counts["failed"] + counts["succeeded"]
        bench.scratch.unlink()
        for id_ in ids:
            record = await bench.ended(id_)
            assert ("succeeded", 1) == (record.state, record.attempt)


async def test_storage_slower_than_the_lease_costs_no_attempts(tmp_path, monkeypatch) -> None:
    async with workbench(tmp_path, monkeypatch, lease_seconds=0.5) as bench:
        put_file = bench.storage.put_file

        async def slow(*arguments) -> int:
            await asyncio.sleep(2.0)
            return await put_file(*arguments)

        bench.storage.put_file = slow  # type: ignore[method-assign]
        ids = [await bench.submit() for _ in range(5)]
        bench.start()
        for id_ in ids:
            record = await bench.ended(id_)
            assert ("succeeded", 1) == (record.state, record.attempt)


@pytest.mark.parametrize("prompt", ["fork crash", "fork oom", "fork-away crash"])
async def test_a_child_that_dies_before_its_helper_is_noticed(tmp_path, monkeypatch, prompt) -> None:
    monkeypatch.setenv("RUSHES_TEST_HELPERS", str(tmp_path / "helpers"))
    async with workbench(tmp_path, monkeypatch, attempt_limit=1) as bench:
        id_ = await bench.submit(prompt)
        bench.start()
        record = await bench.ended(id_, 15)
        assert "failed" == record.state
        assert "succeeded" == (await bench.ended(await bench.submit())).state
    helpers = [int(pid) for pid in (tmp_path / "helpers").read_text().split()]
    assert helpers
    alive = [psutil.Process(pid) for pid in helpers if psutil.pid_exists(pid)]
    if "fork-away" in prompt:  # out of the group: not ours to end
        for process in alive:
            process.kill()
    else:
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


async def test_a_helper_out_of_the_group_cannot_hold_up_the_time_limit(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RUSHES_TEST_HELPERS", str(tmp_path / "helpers"))
    write_model(tmp_path / "models", "other", "time_limit = 1")
    async with workbench(tmp_path, monkeypatch, models_dir=tmp_path / "models") as bench:
        id_ = await bench.submit("fork-away hang", model="me/odd")
        bench.start()
        record = await bench.ended(id_, 15)
        assert record.failure is not None
        assert "time_limit" == record.failure.code
    for pid in (tmp_path / "helpers").read_text().split():
        psutil.Process(int(pid)).kill()


async def test_an_output_with_a_wild_name_is_stored(tmp_path, monkeypatch) -> None:
    async with workbench(tmp_path, monkeypatch) as bench:
        id_ = await bench.submit("wild")
        bench.start()
        record = await bench.ended(id_)
        assert ("succeeded", 1) == (record.state, record.attempt)
        assert record.outputs[0].key.endswith("/1.bin")


async def test_an_unexpected_error_in_delivery_fails_the_request_at_once(tmp_path, monkeypatch) -> None:
    async with workbench(tmp_path, monkeypatch) as bench:

        async def broken(*_) -> int:
            raise ValueError("a mistake of ours")

        bench.storage.put_file = broken  # type: ignore[method-assign]
        id_ = await bench.submit()
        bench.start()
        record = await bench.ended(id_)
        assert record.failure is not None
        assert ("internal_error", 1) == (record.failure.code, record.attempt)
        assert "mistake of ours" not in record.failure.message


async def test_files_of_finished_requests_leave_the_scratch_folder(tmp_path, monkeypatch) -> None:
    async with workbench(tmp_path, monkeypatch) as bench:
        ids = [await bench.submit(prompt) for prompt in ("ok", "fail", "crash", "ok")]
        bench.start()
        for id_ in ids:
            await bench.ended(id_)
    assert [] == list(bench.scratch.iterdir())
    shutil.rmtree(bench.scratch)


async def test_a_stale_lease_does_not_take_the_newer_one_along(tmp_path, monkeypatch) -> None:
    async with workbench(tmp_path, monkeypatch) as bench:
        from rushes.queue.base import Claim
        from rushes.requests.ids import WorkerId
        from rushes.requests.record import Failure

        await bench.submit()
        leases = Leases(bench.store, 5)
        lost: list[int] = []

        async def take() -> Lease:
            lease = await bench.store.claim(Claim(WorkerId("w"), (T2I,)))
            assert lease is not None
            leases.hold(lease, lambda: lost.append(lease.fence))
            return lease

        first = await take()
        await bench.store.lose(first, Failure("x", "x"), 9)
        second = await take()
        await leases.beat()
        assert [first.fence] == lost
        assert 1 == len(leases)
        assert await bench.store.succeed(second, [], None)


@pytest.mark.parametrize("prompt", ["nothing", "other-kind"])
async def test_what_an_engine_returns_is_looked_at(tmp_path, monkeypatch, prompt) -> None:
    async with workbench(tmp_path, monkeypatch) as bench:
        id_ = await bench.submit(prompt)
        bench.start()
        record = await bench.ended(id_)
        assert record.failure is not None
        assert ("failed", "engine_error", 1) == (record.state, record.failure.code, record.attempt)
        assert "The model should give an image" in record.failure.message
