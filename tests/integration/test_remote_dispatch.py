"""Which of the requests that wait a worker hands to its remotes, and what must not keep it from that."""

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rushes.catalog import routing
from rushes.queue.base import Claim, Take
from rushes.requests.ids import AccountId, KeyId, RequestId, WorkerId, new_request_id
from rushes.requests.record import (
    Lease,
    NewRequest,
    Output,
    RemoteState,
    RemoteTask,
    Request,
    WorkerRecord,
)
from rushes.worker import dispatch, loop
from rushes.worker.line import LEAST_DEPTH
from rushes.worker.remotes import Remotes
from support.remote_engines import ScriptedRemote
from support.worker import T2I, Workbench, workbench

REMOTE_ONLY = {"workers": 0}
PRICED = "me/priced"
MANIFEST = """
name = "Priced"
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
role = "resolution"

[engines.dashscope]
model = "wan2.5-t2i-preview"
price_usd = 0.4
"""
GPU = WorkerId("gpu")


def priced(folder: Path, more: str = "", id_: str = PRICED) -> Path:
    model = folder / "models" / id_
    model.mkdir(parents=True)
    (model / "model.toml").write_text(MANIFEST.format(more=more))
    (model / "sample.json").write_text('{"prompt": "ok", "size": "64x64"}')
    return folder / "models"


def routes(*engines: str, **conditions: float) -> str:
    """The last one has the conditions."""
    more = "".join(f"{name} = {value}\n" for name, value in conditions.items())
    return "".join(f'[[routes]]\nengine = "{engine}"\n' for engine in engines) + more


async def submit(bench: Workbench, prompt: str = "ok", *, model: str = T2I, **given: Any) -> RequestId:
    """Of any key, account and number of hops."""
    text = msgspec.json.encode({"prompt": prompt, **given.pop("values", {})})
    account, key = AccountId(given.pop("account", "a")), KeyId(given.pop("key", "k"))
    new = NewRequest(new_request_id(), account, key, model, text, {}, **given)
    await bench.store.submit(new)
    return new.id


async def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


async def state(bench: Workbench, id_: RequestId) -> str:
    record = await bench.store.get(id_)
    assert record is not None
    return record.state


def gpu(*models: str, id_: str = GPU, slots: int = 1, remotes: tuple[RemoteState, ...] = ()) -> WorkerRecord:
    """A worker elsewhere, whose slots do what a test has them do."""
    return WorkerRecord(WorkerId(id_), "afar", 1, slots, models, "wan", "", remotes=remotes)


class Calls:
    """How often something of the store was called, and what it answered. It does its work all the same."""

    def __init__(self, bench: Workbench, name: str) -> None:
        self.answers: list[Any] = []
        self.given: list[tuple[Any, ...]] = []
        do: Callable[..., Awaitable[Any]] = getattr(bench.store, name)

        async def call(*given: Any, **named: Any) -> Any:
            answer = await do(*given, **named)
            self.given.append(given)
            self.answers.append(answer)
            return answer

        setattr(bench.store, name, call)

    def __len__(self) -> int:
        return len(self.answers)


def events(capfd: pytest.CaptureFixture[str], name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for line in capfd.readouterr().err.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [one for one in found if one.get("event") == name]


# -- one request that nobody can read -----------------------------------------------------------------------
async def test_a_request_that_cannot_be_read_fails_and_stops_no_other(tmp_path, monkeypatch) -> None:
    """It was submitted before its model changed."""
    remote = ScriptedRemote()
    models = priced(tmp_path)
    async with workbench(tmp_path, monkeypatch, remotes=[remote], models_dir=models, **REMOTE_ONLY) as bench:
        unreadable = await submit(bench, model=PRICED, values={"size": "portrait"})
        others = [await submit(bench, model=PRICED, values={"size": "64x64"}) for _ in range(2)]
        bench.start()
        assert ["succeeded"] * 2 == [(await bench.ended(id_)).state for id_ in others]
        record = await bench.ended(unreadable)
        assert ("failed", 0) == (record.state, remote.submits[unreadable])


async def test_one_that_must_not_cost_more_waits_and_is_told_of_once(tmp_path, monkeypatch, capfd) -> None:
    remote = ScriptedRemote()
    models = priced(tmp_path, routes("dashscope", max_cost_usd=1.0))
    async with workbench(tmp_path, monkeypatch, remotes=[remote], models_dir=models, **REMOTE_ONLY) as bench:
        unreadable = await submit(bench, model=PRICED, values={"size": "portrait"})
        looks = Calls(bench, "waiting")
        bench.start()
        for _ in range(3):
            id_ = await submit(bench, model=PRICED, values={"size": "64x64"})
            assert "succeeded" == (await bench.ended(id_)).state
        assert "queued" == await state(bench, unreadable)
        assert len(looks) >= 3
        assert [unreadable] == [one["request"] for one in events(capfd, "request not readable")]


async def test_an_engine_that_cannot_read_one_manifest_serves_the_others(tmp_path, monkeypatch) -> None:
    class Picky(ScriptedRemote):
        def serves(self, model: Any) -> bool:
            if model.id == PRICED:
                raise KeyError("input")
            return True

    models = priced(tmp_path)
    async with workbench(tmp_path, monkeypatch, remotes=[Picky()], models_dir=models, **REMOTE_ONLY) as bench:
        bench.start()
        left = await submit(bench, model=PRICED, values={"size": "64x64"})
        assert "succeeded" == (await bench.ended(await submit(bench))).state
        assert "queued" == await state(bench, left)


async def test_what_a_remote_has_for_a_model_that_is_gone_is_left_alone(tmp_path, monkeypatch) -> None:
    async with workbench(tmp_path, monkeypatch, remotes=[ScriptedRemote()], **REMOTE_ONLY) as bench:
        gone = await submit(bench, model="gone/model")
        lease = await bench.store.take(Take(gone, GPU, "dashscope"))
        assert isinstance(lease, Lease)
        place = ScriptedRemote.origin
        task = RemoteTask("dashscope", "accepted", time.time(), f"ok:{gone}", place)
        assert await bench.store.note(lease, task)
        assert await bench.store.release(lease)
        resumed = Calls(bench, "resume")
        bench.start()
        for _ in range(3):
            assert "succeeded" == (await bench.ended(await submit(bench))).state
        assert ({None}, "queued") == (set(resumed.answers), await state(bench, gone))
        assert await bench.store.cancel(gone, None) == "not_cancellable"


# -- those behind others that cannot go ---------------------------------------------------------------------
async def test_many_that_cannot_go_hide_nobody_behind_them(tmp_path, monkeypatch, capfd) -> None:
    """They were passed on too often already; the worker says so, once of each."""
    remote = ScriptedRemote("other", kind="runcomfy")
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **REMOTE_ONLY) as bench:
        stuck = [await submit(bench, hops=dispatch.MOST_HOPS) for _ in range(110)]
        last = await submit(bench)
        looks = Calls(bench, "waiting")
        bench.start()
        assert "succeeded" == (await bench.ended(last)).state
        depths = [limit for _, limit in looks.given]
        assert [8, 16, 32, 64, 128] == sorted(set(depths))
        told = events(capfd, "request stays")
        assert sorted(stuck) == sorted(one["request"] for one in told)
        assert {last} == set(remote.submits)


async def test_one_that_a_slot_may_take_is_not_called_stranded(tmp_path, monkeypatch, capfd) -> None:
    remote = ScriptedRemote("other", kind="runcomfy")
    async with workbench(
        tmp_path, monkeypatch, remotes=[remote], overflow_seconds=1e-6, lease_seconds=15.0, **REMOTE_ONLY
    ) as bench:
        await bench.store.join(gpu(T2I))
        await submit(bench, hops=dispatch.MOST_HOPS)
        looks = Calls(bench, "waiting")
        bench.start()
        await until(lambda: len(looks) >= 2)
        assert [] == events(capfd, "request stays")


# -- remotes of other workers -------------------------------------------------------------------------------
@contextlib.asynccontextmanager
async def two_remotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: ScriptedRemote) -> Any:
    """Ours comes second, after one with a single place, which a worker elsewhere has."""
    models = priced(tmp_path, routes("first", "second"))
    async with workbench(
        tmp_path, monkeypatch, remotes=[remote], models_dir=models, lease_seconds=15.0, **REMOTE_ONLY
    ) as bench:
        first = RemoteState("first", "dashscope", (PRICED,), 1)
        await bench.store.join(gpu(slots=0, remotes=(first,)))
        yield bench


async def test_what_another_remote_has_no_place_for_comes_to_ours(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "LEFT_SECONDS", 1e9)
    remote = ScriptedRemote("second")
    async with two_remotes(tmp_path, monkeypatch, remote) as bench:
        there = await submit(bench, model=PRICED, values={"size": "64x64"})
        assert isinstance(await bench.store.take(Take(there, GPU, "first")), Lease)
        here = await submit(bench, model=PRICED, values={"size": "64x64"})
        bench.start()
        assert ("succeeded", "second") == ((record := await bench.ended(here)).state, record.engine)


@pytest.mark.parametrize(("seconds", "expected"), [(1e9, "queued"), (0.1, "succeeded")])
async def test_what_another_remote_could_take_is_left_to_it_a_while(
    seconds: float, expected: str, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(dispatch, "LEFT_SECONDS", seconds)
    remote = ScriptedRemote("second")
    async with two_remotes(tmp_path, monkeypatch, remote) as bench:
        left = await submit(bench, model=PRICED, values={"size": "64x64"})
        looks = Calls(bench, "waiting")
        bench.start()
        if expected == "succeeded":
            await bench.ended(left)
        else:
            await until(lambda: len(looks) >= 3)
        assert (expected, remote.submits[left]) == (await state(bench, left), int(expected == "succeeded"))


# -- how long it would wait here ----------------------------------------------------------------------------
async def test_after_a_restart_what_waited_meanwhile_goes_to_the_slots(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], workers=2, overflow_seconds=60.0) as bench:
        bench.store._clock = lambda: time.time() - 3600  # nobody worked for an hour
        ids = [await submit(bench) for _ in range(12)]
        bench.store._clock = time.time
        bench.start()
        assert {"prompt"} == {(await bench.ended(id_)).engine for id_ in ids}
        assert 0 == remote.submits.total()


async def test_slots_that_are_free_and_take_nothing_lose_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(routing, "_TAKEN_SECONDS", 0.5)
    remote = ScriptedRemote()
    async with workbench(
        tmp_path, monkeypatch, remotes=[remote], overflow_seconds=0.5, lease_seconds=15.0, **REMOTE_ONLY
    ) as bench:
        await bench.store.join(gpu(T2I))
        bench.start()
        assert "dashscope" == (await bench.ended(await submit(bench))).engine


async def ran(bench: Workbench, seconds: float, *models: str) -> None:
    """So long each of them took, a while ago."""
    now = time.time() - 1000
    bench.store._clock = lambda: now
    for model in models:
        await submit(bench, model=model)
        lease = await bench.store.claim(Claim(GPU, (model,), engine="wan"))
        assert lease is not None
        now += seconds
        output = Output("outputs/x/1/1.png", "image", "image/png", 10, 64, 64)
        assert await bench.store.succeed(lease, [output], None)
    bench.store._clock = time.time


async def test_other_models_of_the_same_slots_stand_in_the_line(tmp_path, monkeypatch) -> None:
    """Also between two requests of one model, and though no remote of ours has them."""
    remote = ScriptedRemote(only=(T2I,))
    async with workbench(
        tmp_path,
        monkeypatch,
        remotes=[remote],
        models_dir=priced(tmp_path),
        overflow_seconds=60.0,
        lease_seconds=15.0,
        **REMOTE_ONLY,
    ) as bench:
        await bench.store.join(gpu(T2I, PRICED))
        await ran(bench, 10.0, T2I, PRICED)
        await submit(bench)
        assert await bench.store.claim(Claim(GPU, (T2I,), engine="wan")) is not None
        first = await submit(bench)
        for _ in range(10):
            await submit(bench, model=PRICED)
        last = await submit(bench)
        bench.start()
        assert ("succeeded", "dashscope") == ((record := await bench.ended(last)).state, record.engine)
        assert {last: 1} == dict(remote.submits)
        assert "queued" == await state(bench, first)


# -- what a look costs --------------------------------------------------------------------------------------
async def test_engines_read_each_manifest_once(tmp_path, monkeypatch) -> None:
    asked: list[str] = []

    class Asked(ScriptedRemote):
        def serves(self, model: Any) -> bool:
            asked.append(model.id)
            return super().serves(model)

    models = priced(tmp_path)
    async with workbench(tmp_path, monkeypatch, remotes=[Asked()], models_dir=models, **REMOTE_ONLY) as bench:
        looks = Calls(bench, "waiting")
        bench.start()
        for _ in range(3):
            await bench.ended(await submit(bench))
        assert len(looks) >= 3
        assert sorted(entry.model.id for entry in bench.catalog.entries()) == sorted(asked)
        priced(tmp_path, id_="me/later")
        later = await submit(bench, model="me/later", values={"size": "64x64"})
        assert "succeeded" == (await bench.ended(later)).state
        assert 1 == asked.count("me/later")


@pytest.fixture
def ringing() -> Iterator[Callable[[Workbench], None]]:
    """Somebody submits, cancels or ends something all the time."""
    tasks: list[asyncio.Task[None]] = []

    def begin(bench: Workbench) -> None:
        async def ring() -> None:
            while True:
                await bench.store.cancel(await submit(bench, model="no/such"), None)
                await asyncio.sleep(0.01)

        tasks.append(asyncio.create_task(ring()))

    yield begin
    for task in tasks:
        task.cancel()


async def test_looks_at_what_cannot_go_do_not_follow_every_bell(tmp_path, monkeypatch, ringing) -> None:
    remote = ScriptedRemote("other", kind="runcomfy")
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **REMOTE_ONLY) as bench:
        await submit(bench, hops=dispatch.MOST_HOPS)
        looks = Calls(bench, "waiting")
        bench.start()
        await until(lambda: len(looks) >= 1)
        began, before = time.monotonic(), len(looks)
        ringing(bench)
        await asyncio.sleep(1.5)
        assert len(looks) - before <= (time.monotonic() - began) / 0.2 + 1
        assert "succeeded" == (await bench.ended(await submit(bench))).state


async def test_models_that_no_request_may_leave_are_not_read(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    models = priced(tmp_path)
    async with workbench(
        tmp_path, monkeypatch, remotes=[remote], models_dir=models, lease_seconds=15.0, **REMOTE_ONLY
    ) as bench:
        await bench.store.join(gpu(T2I))
        left = [await submit(bench) for _ in range(LEAST_DEPTH)]
        looks = Calls(bench, "waiting")
        bench.start()
        id_ = await submit(bench, model=PRICED, values={"size": "64x64"})
        assert "succeeded" == (await bench.ended(id_)).state
        found: list[Request] = [one for answer in looks.answers for one in answer]
        assert {PRICED} == {one.model for one in found}
        assert {"queued"} == {await state(bench, one) for one in left}


async def test_an_account_at_its_limit_is_asked_for_once_a_look(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], account_limit=1, **REMOTE_ONLY) as bench:
        ids = [await submit(bench, "stay", account="busy") for _ in range(6)]
        looks, takes = Calls(bench, "waiting"), Calls(bench, "take")
        bench.start()
        await until(lambda: len(looks) >= 3)
        assert "succeeded" == (await bench.ended(await submit(bench, account="other"))).state
        assert takes.answers.count("account") <= len(looks)
        remote.gate.set()
        assert {"succeeded"} == {(await bench.ended(id_)).state for id_ in ids}


# -- what others are told -----------------------------------------------------------------------------------
@pytest.mark.parametrize(("least", "joins"), [(1e9, False), (0.0, True)])
async def test_a_pause_that_grows_is_not_told_at_every_step(
    least: float, joins: bool, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(loop, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(loop, "_WORDS_SECONDS", least)
    asked: list[RemoteState] = []

    def states(_: Remotes) -> tuple[RemoteState, ...]:
        """A remote that asks for another second in every answer."""
        count = len(asked)
        asked.append(RemoteState("fal", "fal", (T2I,), 8, "held", 1e9 + count, f"answer {count}"))
        return (asked[-1],)

    monkeypatch.setattr(Remotes, "states", states)
    async with workbench(
        tmp_path, monkeypatch, remotes=[ScriptedRemote()], lease_seconds=15.0, **REMOTE_ONLY
    ) as bench:
        told = Calls(bench, "join")
        bench.start()
        await until(lambda: len(asked) >= 30)
        assert joins is (len(told) > 1)


async def test_a_remote_that_is_ready_again_is_told_at_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loop, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(loop, "_WORDS_SECONDS", 1e9)
    now = [RemoteState("fal", "fal", (T2I,), 8, "held", 1e9, "429")]
    monkeypatch.setattr(Remotes, "states", lambda _: tuple(now))
    async with workbench(tmp_path, monkeypatch, remotes=[ScriptedRemote()], **REMOTE_ONLY) as bench:
        told = Calls(bench, "join")
        bench.start()
        await until(lambda: len(told) == 1)
        for change in ({"state": "ready"}, {"unknown": {T2I: "no such model"}}, {"models": ()}):
            before = len(told)
            now[:] = [msgspec.structs.replace(now[0], **change)]
            await until(lambda before=before: len(told) > before)
            assert now[0] == told.given[-1][0].remotes[0]
