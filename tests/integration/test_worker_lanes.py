"""A slot whose engine takes several jobs at once: what overlaps, what ends alone, and who pays for whose end.

The engine's gates (files) say when which job goes on, so that no test depends on how fast anything is.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from rushes.requests.ids import RequestId
from rushes.requests.record import Failure, Request
from rushes.worker import attempt, serving, slot
from support.worker import Workbench, workbench

MANIFEST = """
name = "Gated"
description = "A model for tests."
categories = ["text-to-image"]
output = "image"
required = ["prompt"]
time_limit = {limit}
{graph}

[[inputs]]
name = "prompt"
title = "Prompt"
type = "string"
role = "prompt"

{weights}
"""
WEIGHT = """
[[engines.comfyui.weights]]
file = "{file}"
folder = "diffusion_models"
"""


def write_model(root: Path, name: str, *files: str, limit: float = 60) -> None:
    folder = root / "me" / name
    folder.mkdir(parents=True, exist_ok=True)
    weights = "".join(WEIGHT.format(file=file) for file in files)
    graph = 'graph = "graph.json"' if files else ""
    (folder / "model.toml").write_text(MANIFEST.format(limit=limit, graph=graph, weights=weights))
    (folder / "graph.json").write_text('{"1": {"class_type": "EmptyImage", "inputs": {}}}')
    (folder / "sample.json").write_text('{"prompt": "ok"}')


class Gates:
    """A workbench with an overlapping engine, and the gates that its jobs wait at."""

    def __init__(self, bench: Workbench, folder: Path) -> None:
        self.bench, self.folder = bench, folder
        self.start, self.ended = bench.start, bench.ended

    async def submit(self, prompt: str, model: str = "me/long") -> RequestId:
        return await self.bench.submit(prompt, model=model)

    def open(self, *names: str) -> None:
        for name in names:
            (self.folder / name).touch()

    async def reached(self, *names: str) -> None:
        await self.until(lambda: all((self.folder / f"{name}.here").exists() for name in names))

    async def until(self, there: Callable[[], bool], seconds: float = 30) -> None:
        async with asyncio.timeout(seconds):
            while not there():
                await asyncio.sleep(0.01)

    async def record(self, id_: RequestId) -> Request:
        record = await self.bench.store.get(id_)
        assert record is not None
        return record

    async def showing(self, id_: RequestId, stage: str) -> None:
        """Wait until the store shows this stage; a beat has come between, so the worker has had its time."""
        async with asyncio.timeout(30):
            while (progress := (await self.record(id_)).progress) is None or progress.stage != stage:
                await asyncio.sleep(0.01)

    async def until_claimed(self, id_: RequestId) -> None:
        async with asyncio.timeout(30):
            while (await self.record(id_)).state != "running":
                await asyncio.sleep(0.01)

    def runs(self) -> list[tuple[str, int]]:
        path = self.folder / "runs"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [(id_, int(attempt)) for id_, attempt in (line.split() for line in lines)]


@asynccontextmanager
async def gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> AsyncIterator[Gates]:
    folder, models = tmp_path / "gates", tmp_path / "models"
    folder.mkdir()
    monkeypatch.setenv("RUSHES_TEST_GATES", str(folder))
    monkeypatch.setenv("RUSHES_TEST_RUNS", str(folder / "runs"))
    write_model(models, "long")
    write_model(models, "short", limit=0.5)
    values = {"engine": "support.engines:OverlappingEngine", "models_dir": models, "models": "me/*"} | settings
    async with workbench(tmp_path, monkeypatch, **values) as bench:
        yield Gates(bench, folder)


def children() -> set[int]:
    """Process ids of this process's slots."""
    return {
        child.pid
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "slot" in child.cmdline()
    }


# -- what overlaps ----------------------------------------------------------------------------------------
async def test_the_next_job_comes_when_the_last_one_ends_soon_and_not_before(tmp_path, monkeypatch) -> None:
    async with gates(tmp_path, monkeypatch) as at:
        a = await at.submit("later wait a soon wait a2")
        b = await at.submit("begin wait b")
        c = await at.submit("ok")
        at.start()
        await at.showing(a, "later")
        assert "queued" == (await at.record(b)).state
        at.open("a")
        await at.reached("a2", "b")
        await at.showing(b, "begun")
        assert ["running", "running", "queued"] == [(await at.record(id_)).state for id_ in (a, b, c)]
        at.open("b", "a2")
        for id_ in (a, b, c):
            record = await at.ended(id_)
            assert ("succeeded", 1) == (record.state, record.attempt)
        assert [(a, 1), (b, 1), (c, 1)] == at.runs()


async def test_a_slot_with_nothing_to_do_comes_before_one_that_would_take_the_next_job_early(
    tmp_path, monkeypatch
) -> None:
    async with gates(tmp_path, monkeypatch, workers=2) as at:
        at.start()
        both = [await at.submit("wait one"), await at.submit("wait two")]
        await at.reached("one", "two")  # each slot is up: neither says that its job ends soon
        at.open("one", "two")
        for id_ in both:
            await at.ended(id_)
        for number in range(6):
            first, second = f"a{number}", f"b{number}"
            a = await at.submit(f"soon wait {first}")
            await at.reached(first)
            await at.showing(a, "soon")
            b = await at.submit(f"soon wait {second}")
            await at.reached(second)
            assert (at.folder / f"{first}.here").read_text() != (at.folder / f"{second}.here").read_text()
            at.open(first, second)
            for id_ in (a, b):
                assert "succeeded" == (await at.ended(id_)).state


async def test_the_next_job_comes_when_what_must_be_exclusive_is_over(tmp_path, monkeypatch) -> None:
    async with gates(tmp_path, monkeypatch) as at:
        a, b = await at.submit("later wait a ahead later wait a2"), await at.submit("wait b")
        at.start()
        await at.showing(a, "later")
        assert "queued" == (await at.record(b)).state
        at.open("a")
        await at.reached("a2", "b")  # which stays so, whatever is reported later
        at.open("a2", "b")
        assert ["succeeded", "succeeded"] == [(await at.ended(id_)).state for id_ in (a, b)]


# -- one model, some models -------------------------------------------------------------------------------
async def test_another_model_gets_another_process(tmp_path, monkeypatch) -> None:
    """As soon as all that the old one has in hand has ended, and none of it pays for that."""
    async with gates(tmp_path, monkeypatch, engine="support.engines:OneModelEngine") as at:
        write_model(tmp_path / "models", "other")
        a = await at.submit("ahead wait a")
        at.start()
        await at.reached("a")
        old = children()
        b = await at.submit("ahead wait b", "me/other")
        await at.until_claimed(b)
        c = await at.submit("wait c", "me/other")
        assert old == children()
        at.open("a")
        await at.reached("b", "c")
        new = children()
        assert (1, set()) == (len(new), old & new)
        assert (at.folder / "b.here").read_text() == (at.folder / "c.here").read_text()
        at.open("b", "c")
        records = [await at.ended(id_) for id_ in (a, b, c)]
        assert [("succeeded", 1)] * 3 == [(record.state, record.attempt) for record in records]


async def test_a_slot_takes_what_its_engine_can_work_on(tmp_path, monkeypatch) -> None:
    async with gates(tmp_path, monkeypatch, engine="support.engines:ChoosyEngine") as at:
        at.start()
        other, mine = await at.submit("ok", "me/short"), await at.submit("ok")
        assert "succeeded" == (await at.ended(mine)).state
        assert ("queued", [(mine, 1)]) == ((await at.record(other)).state, at.runs())
        async with asyncio.timeout(30):
            while [("me/long",)] != [worker.models for worker in await at.bench.store.workers()]:
                await asyncio.sleep(0.01)


async def test_the_next_job_comes_when_the_last_one_has_ended(tmp_path, monkeypatch) -> None:
    async with gates(tmp_path, monkeypatch) as at:
        a = await at.submit("soon wait a")
        b = await at.submit("later fail")
        c = await at.submit("wait c")
        at.start()
        await at.reached("c")
        assert ["running", "failed", "running"] == [(await at.record(id_)).state for id_ in (a, b, c)]
        at.open("a", "c")
        assert ["succeeded", "succeeded"] == [(await at.ended(id_)).state for id_ in (a, c)]


async def test_a_drain_lets_all_jobs_in_hand_end(tmp_path, monkeypatch) -> None:
    async with gates(tmp_path, monkeypatch, drain_seconds=60.0) as at:
        a, b = await at.submit("soon wait a"), await at.submit("soon wait b")
        c = await at.submit("ok")
        at.start()
        await at.reached("a", "b")
        stopping = asyncio.create_task(at.bench.stop())
        await asyncio.sleep(0)
        at.open("a", "b")
        await stopping
        records = [await at.record(id_) for id_ in (a, b, c)]
        assert [("succeeded", 1), ("succeeded", 1), ("queued", 0)] == [(r.state, r.attempt) for r in records]


async def test_a_drain_gives_back_what_does_not_end(tmp_path, monkeypatch) -> None:
    async with gates(tmp_path, monkeypatch, drain_seconds=0.2) as at:
        ids = [await at.submit("begin soon wait a"), await at.submit("begin soon wait b")]
        at.start()
        await at.reached("a", "b")
        await at.bench.stop()
        assert [("queued", 0)] * 2 == [(r.state, r.attempt) for r in [await at.record(id_) for id_ in ids]]
        assert set() == children()


async def test_a_slot_prefers_what_needs_no_other_weights(tmp_path, monkeypatch) -> None:
    models = tmp_path / "models"
    write_model(models, "wide", "high", "low", "vae")
    write_model(models, "narrow", "low", "vae")
    write_model(models, "other", "else", "vae")
    async with gates(tmp_path, monkeypatch, engine="support.engines:SharingEngine") as at:
        first = await at.submit("wait a", "me/wide")
        at.start()
        await at.reached("a")
        other, narrow = await at.submit("ok", "me/other"), await at.submit("wait b", "me/narrow")
        last = await at.submit("ok", "me/wide")
        at.open("a")
        await at.reached("b")
        at.open("b")
        for id_ in (other, last):
            await at.ended(id_)
        # After the narrow one nobody knows that the wide one's weights are still there.
        assert [(first, 1), (narrow, 1), (other, 1), (last, 1)] == at.runs()


# -- what ends alone --------------------------------------------------------------------------------------
async def test_a_lost_lease_ends_its_job_alone(tmp_path, monkeypatch) -> None:
    async with gates(tmp_path, monkeypatch) as at:
        a, b = await at.submit("begin soon wait a"), await at.submit("begin wait b")
        at.start()
        await at.reached("a", "b")
        pids = children()
        marks = [mark for mark in await at.bench.store.leases() if mark.id == b]
        assert 1 == await at.bench.store.expire(marks, Failure("worker_lost", "Lost."), 9)
        await at.until(lambda: (b, 2) in at.runs())
        at.open("a", "b")
        assert [("succeeded", 1), ("succeeded", 2)] == [
            (r.state, r.attempt) for r in [await at.ended(id_) for id_ in (a, b)]
        ]
        assert pids == children()


async def test_the_time_limit_ends_its_job_alone(tmp_path, monkeypatch) -> None:
    async with gates(tmp_path, monkeypatch) as at:
        a, b = await at.submit("begin soon wait a"), await at.submit("begin wait b", "me/short")
        at.start()
        record = await at.ended(b)
        assert record.failure is not None
        assert ("failed", "time_limit", 1) == (record.state, record.failure.code, record.attempt)
        at.open("a")
        record = await at.ended(a)
        assert ("succeeded", 1) == (record.state, record.attempt)


async def test_a_lost_job_does_not_cost_the_loading_of_its_model(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(slot, "ABORT_SECONDS", 0.2)
    async with gates(tmp_path, monkeypatch) as at:
        at.open("loaded.wait")
        a = await at.submit("ok")
        at.start()
        await at.showing(a, "loading")
        pids = children()
        marks = [mark for mark in await at.bench.store.leases() if mark.id == a]
        assert 1 == await at.bench.store.expire(marks, Failure("worker_lost", "Lost."), 9)
        await asyncio.sleep(1.0)  # several times what an abort may take
        assert pids == children()
        at.open("loaded")
        record = await at.ended(a)
        assert ("succeeded", 2, [(a, 2)]) == (record.state, record.attempt, at.runs())
        assert pids == children()


@pytest.mark.parametrize(("prompt", "attempts"), [("soon wait a", 1), ("begin soon wait a", 2)])
async def test_who_hears_no_abort_costs_the_process(tmp_path, monkeypatch, prompt, attempts) -> None:
    """The job beside it is tried again, and pays with an attempt only where it had begun."""
    monkeypatch.setattr(slot, "ABORT_SECONDS", 0.2)
    async with gates(tmp_path, monkeypatch) as at:
        a, b = await at.submit(prompt), await at.submit("begin deaf wait b", "me/short")
        at.start()
        await at.reached("a")
        pids = children()
        record = await at.ended(b)
        assert record.failure is not None
        assert "time_limit" == record.failure.code
        await at.until(lambda: (a, attempts) in at.runs()[2:])
        assert not pids & children()
        at.open("a")
        record = await at.ended(a)
        assert ("succeeded", attempts) == (record.state, record.attempt)


# -- who pays ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", ["crash", "exit"])
async def test_a_crash_costs_the_oldest_job_and_those_that_had_begun(tmp_path, monkeypatch, way) -> None:
    async with gates(tmp_path, monkeypatch, attempt_limit=2) as at:
        a, b = await at.submit(f"soon wait a {way}"), await at.submit("wait b")
        at.start()
        await at.reached("a", "b")
        at.open("a")
        record = await at.ended(a)
        assert record.failure is not None
        assert ("failed", "engine_crashed", 2) == (record.state, record.failure.code, record.attempt)
        at.open("b")
        record = await at.ended(b)
        assert ("succeeded", 1) == (record.state, record.attempt)


async def test_what_had_not_begun_goes_back_uncounted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(attempt, "GIVEN_BACK_FREE", 1000)
    async with gates(tmp_path, monkeypatch, attempt_limit=1) as at:
        a = await at.submit("unbegun a")
        at.start()
        await at.until(lambda: len(at.runs()) >= 3)
        at.open("a")
        record = await at.ended(a)
        assert ("succeeded", 1) == (record.state, record.attempt)
        assert {(a, 1)} == set(at.runs())


async def test_a_request_that_never_begins_ends_and_those_behind_it_go_on(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(serving, "RETRY_SECONDS", 0.01)
    async with gates(tmp_path, monkeypatch, attempt_limit=4) as at:
        stuck = await at.submit("unbegun never")
        others = [await at.submit("ok") for _ in range(3)]
        at.start()
        record = await at.ended(stuck)
        assert record.failure is not None
        assert ("failed", "gone", 4) == (record.state, record.failure.code, record.attempt)
        assert [1] * 5 + [2, 3, 4] == [attempt for id_, attempt in at.runs() if id_ == stuck]
        assert [("succeeded", 1)] * 3 == [(r.state, r.attempt) for r in [await at.ended(id_) for id_ in others]]
    # Nobody knows at first whether it is the request or the engine: each lost attempt costs a longer rest.
    assert ["0.01", "0.02"] == _pauses(capfd.readouterr().err)[:2]


async def test_an_engine_that_never_begins_is_left_alone_for_longer_and_longer(
    tmp_path, monkeypatch, capfd
) -> None:
    monkeypatch.setattr(serving, "GIVEN_BACK_LIMIT", 3)
    monkeypatch.setattr(serving, "RETRY_SECONDS", 0.01)
    async with gates(tmp_path, monkeypatch, attempt_limit=99) as at:
        a = await at.submit("unbegun a")
        at.start()
        log = ""

        def third_pause() -> bool:
            nonlocal log
            log += capfd.readouterr().err
            return log.count("slot pauses") >= 3

        await at.until(third_pause)
        at.open("a")
        assert "succeeded" == (await at.ended(a)).state
        assert ["0.01", "0.02", "0.04"] == _pauses(log)[:3]
        await at.ended(await at.submit("ok"))


def _pauses(log: str) -> list[str]:
    return [part.split("}")[0] for part in log.split('"slot pauses","slot":"slot-1","seconds":')[1:]]


async def test_an_engine_that_cannot_go_on_is_replaced_when_the_other_job_has_ended(
    tmp_path, monkeypatch
) -> None:
    async with gates(tmp_path, monkeypatch) as at:
        a, b = await at.submit("soon wait a replace a2"), await at.submit("begin soon wait b")
        at.start()
        await at.reached("a", "b")
        pids = children()
        at.open("a")
        await at.until((at.folder / "a2.gone").exists)
        await at.showing(b, "soon")
        at.open("a2", "b")
        records = [await at.ended(id_) for id_ in (a, b)]
        assert [("succeeded", 1)] * 2 == [(r.state, r.attempt) for r in records]
        assert [(a, 1), (b, 1), (a, 1)] == at.runs()
        assert not pids & children()


@pytest.mark.parametrize(("prompt", "attempts"), [("soon wait b", 1), ("begin soon wait b", 2)])
async def test_an_engine_that_cannot_go_on_is_replaced_in_any_case(
    tmp_path, monkeypatch, prompt, attempts
) -> None:
    monkeypatch.setattr(slot, "ABORT_SECONDS", 0.2)
    async with gates(tmp_path, monkeypatch) as at:
        a, b = await at.submit("soon wait a replace a2"), await at.submit(prompt)
        at.start()
        await at.reached("a", "b")
        pids = children()
        (at.folder / "b.here").unlink()
        at.open("a")
        await at.until(lambda: len(at.runs()) >= 3)
        at.open("a2")
        await at.reached("b")
        at.open("b")
        records = [await at.ended(id_) for id_ in (a, b)]
        assert [("succeeded", 1), ("succeeded", attempts)] == [(r.state, r.attempt) for r in records]
        assert not pids & children()


async def test_an_engine_that_does_not_start_uses_up_no_attempts(tmp_path, monkeypatch, capfd) -> None:
    async with gates(
        tmp_path, monkeypatch, engine="support.engines:never", engine_start_seconds=0.2, drain_seconds=60.0
    ) as at:
        a = await at.submit("ok")
        at.start()
        log = ""

        def given_up() -> bool:
            nonlocal log
            log += capfd.readouterr().err
            return log.count("The engine did not start in time.") >= 2

        await at.until(given_up)
        assert ("queued", 0) == ((await at.record(a)).state, (await at.record(a)).attempt)


async def test_a_worker_that_stops_does_not_wait_for_an_engine_to_start(tmp_path, monkeypatch) -> None:
    async with gates(
        tmp_path, monkeypatch, engine="support.engines:never", engine_start_seconds=600.0, drain_seconds=600.0
    ) as at:
        at.start()
        await at.until(lambda: bool(children()))
        await at.bench.stop()
        assert set() == children()
