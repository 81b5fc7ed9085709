"""A worker with a remote engine: nothing is handed over twice, nothing accepted is lost."""

import asyncio
import platform
import time
from pathlib import Path

import msgspec
import pytest

from rushes.queue.base import Take
from rushes.requests.ids import RequestId, WorkerId
from rushes.requests.record import Failure, RemoteTask, Request
from rushes.worker.errand import place_of
from support.remote_engines import ScriptedRemote
from support.worker import T2I, Workbench, workbench

REMOTE_ONLY = {"workers": 0}
LOCAL = {"engine": "support.engines:PromptEngine"}


async def reached(bench: Workbench, id_: RequestId, phase: str, seconds: float = 20) -> Request:
    """The request, once its remote task is in this phase."""
    deadline = time.monotonic() + seconds
    while True:
        record = await bench.store.get(id_)
        assert record is not None
        if record.remote_task is not None and record.remote_task.phase == phase:
            return record
        assert time.monotonic() < deadline, record
        await asyncio.sleep(0.01)


async def test_a_request_goes_there_and_comes_back_with_its_file(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **REMOTE_ONLY) as bench:
        bench.start()
        record = await bench.ended(await bench.submit("slow"))
        assert ("succeeded", "dashscope", 1) == (record.state, record.engine, record.attempt)
        (output,) = record.outputs
        assert ("image", "image/png", 48, 32) == (output.kind, output.content_type, output.width, output.height)
        stored = b"".join([part async for part in bench.storage.stream(output.key)])
        assert (True, output.size) == (stored.startswith(b"\x89PNG"), len(stored))
        assert {record.id: 1} == dict(remote.submits)
        assert record.remote_task is not None
        assert f"slow:{record.id}" == record.remote_task.handle
    assert [] == list(bench.scratch.iterdir())


async def test_a_remote_that_answers_at_once(tmp_path, monkeypatch) -> None:
    async with workbench(tmp_path, monkeypatch, remotes=[ScriptedRemote()], **REMOTE_ONLY) as bench:
        bench.start()
        record = await bench.ended(await bench.submit("at-once"))
        assert "succeeded" == record.state
        assert record.remote_task is not None
        assert 0.5 == record.remote_task.cost_usd
        assert 0.5 == await bench.store.spent(None)


async def test_progress_shows_while_it_runs_there(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **REMOTE_ONLY) as bench:
        bench.start()
        id_ = await bench.submit("stay")
        async with asyncio.timeout(20):
            while True:
                view = await bench.store.status(id_, None)
                if view is not None and view.progress is not None:
                    break
                await asyncio.sleep(0.02)
        assert "waiting there" == view.progress.stage
        assert "not_cancellable" == await bench.store.cancel(id_, None)
        remote.gate.set()
        assert "succeeded" == (await bench.ended(id_)).state


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ("refuse", "remote_refused"),
        ("moderate", "content_refused"),
        ("fail", "remote_failed"),
        ("unknown", "remote_unknown"),
    ],
)
async def test_how_it_fails(prompt: str, code: str, tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **REMOTE_ONLY) as bench:
        bench.start()
        record = await bench.ended(await bench.submit(prompt))
        assert record.failure is not None
        assert ("failed", code, 1) == (record.state, record.failure.code, remote.submits[record.id])
        assert "succeeded" == (await bench.ended(await bench.submit("ok"))).state


async def test_a_failure_there_that_may_be_tried_again_is(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **REMOTE_ONLY) as bench:
        bench.start()
        record = await bench.ended(await bench.submit("retry"))
        assert ("succeeded", 2, 2) == (record.state, record.attempt, remote.submits[record.id])


async def test_what_was_not_taken_waits_uncounted_and_goes_there_later(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **REMOTE_ONLY) as bench:
        bench.start()
        record = await bench.ended(await bench.submit("throttle"))
        assert ("succeeded", 1, 2) == (record.state, record.attempt, remote.submits[record.id])


async def test_a_request_that_breaks_a_remote_lets_the_others_through(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(
        tmp_path, monkeypatch, remotes=[remote], remote_limit=1, attempt_limit=2, **REMOTE_ONLY
    ) as bench:
        bench.start()
        poison = await bench.submit("poison")
        for _ in range(7):
            assert "succeeded" == (await bench.ended(await bench.submit("ok"))).state
        record = await bench.ended(poison, 60)
        assert record.failure is not None
        assert ("failed", "remote_fault") == (record.state, record.failure.code)


async def test_polls_that_fail_lose_nothing(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **REMOTE_ONLY) as bench:
        bench.start()
        id_ = await bench.submit("lost-poll")
        record = await bench.ended(id_)
        assert ("succeeded", 1) == (record.state, remote.submits[record.id])


async def test_an_expired_output_is_asked_for_again(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **REMOTE_ONLY) as bench:
        bench.start()
        record = await bench.ended(await bench.submit("expire"))
        assert ("succeeded", 1) == (record.state, remote.submits[record.id])


async def test_a_restart_goes_on_polling_and_submits_nothing_again(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **REMOTE_ONLY) as bench:
        bench.start()
        id_ = await bench.submit("stay")
        await reached(bench, id_, "accepted")
        await bench.stop()
        record = await bench.store.get(id_)
        assert record is not None
        assert ("queued", 0) == (record.state, record.attempt)
        remote.gate.set()
        bench.start()
        record = await bench.ended(id_)
        assert ("succeeded", 1, 1) == (record.state, record.attempt, remote.submits[id_])


async def test_a_stop_lets_a_submit_come_to_its_end(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **REMOTE_ONLY) as bench:
        bench.start()
        id_ = await bench.submit("held")
        await remote.submitting.wait()
        stopping = asyncio.create_task(bench.stop())
        await reached(bench, id_, "submitting")
        remote.hold.set()
        await stopping
        record = await bench.store.get(id_)
        assert record is not None
        assert record.remote_task is not None
        assert ("queued", "accepted") == (record.state, record.remote_task.phase)
        bench.start()
        assert ("succeeded", 1) == ((await bench.ended(id_)).state, remote.submits[id_])


async def taken(bench: Workbench, phase: str, place: str = ScriptedRemote.origin) -> RequestId:
    """A request that a worker which is no more had at the remote, at this place."""
    id_ = await bench.submit("ok")
    lease = await bench.store.take(Take(id_, WorkerId("gone"), "dashscope", reserve_usd=0.25))
    assert not isinstance(lease, str)
    task = RemoteTask("dashscope", "submitting", time.time(), place=place)
    assert await bench.store.note(lease, task)
    if phase == "accepted":
        assert await bench.store.note(
            lease, msgspec.structs.replace(task, phase="accepted", handle=f"ok:{id_}")
        )
    await bench.store.bury(WorkerId("gone"), Failure("worker_lost", "gone"), 1)
    return id_


async def test_nobody_knows_what_became_of_a_submit_that_a_crash_cut_short(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **LOCAL) as bench:
        id_ = await taken(bench, "submitting")
        bench.start()
        record = await bench.ended(id_)
        assert record.failure is not None
        assert ("failed", "remote_unknown", 0) == (record.state, record.failure.code, remote.submits[id_])
        assert 0.25 == await bench.store.spent(None)  # for all that is known, it was paid for


async def test_what_a_dead_worker_handed_over_is_polled_by_the_next(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **LOCAL) as bench:
        id_ = await taken(bench, "accepted")
        bench.start()
        record = await bench.ended(id_)
        assert ("succeeded", "dashscope", 0) == (record.state, record.engine, remote.submits[id_])


async def test_what_is_at_another_place_of_that_name_is_left_to_those_who_know_it(
    tmp_path, monkeypatch
) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **LOCAL) as bench:
        there = await taken(bench, "accepted", "https://other.example")
        bench.start()
        assert "succeeded" == (await bench.ended(await bench.submit("ok"))).state
        record = await bench.store.get(there)
        assert record is not None
        assert ("queued", 0) == (record.state, remote.polls[there])


async def test_a_submit_that_was_cut_short_is_told_by_any_worker(tmp_path, monkeypatch) -> None:
    async with workbench(tmp_path, monkeypatch, remotes=[ScriptedRemote("other")], **LOCAL) as bench:
        id_ = await taken(bench, "submitting")
        bench.start()
        record = await bench.ended(id_)
        assert record.failure is not None
        assert ("remote_unknown", True) == (
            record.failure.code,
            "Whether dashscope has" in record.failure.message,
        )


@pytest.mark.parametrize(
    ("origin", "near"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://localhost:8000", True),
        ("https://localhost", True),
        ("http://[::1]:8000", True),
        ("https://queue.fal.run", False),
        ("http://10.0.0.5:8000", False),
    ],
)
def test_what_is_on_this_machine_is_another_place_on_another(origin: str, near: bool) -> None:
    remote = ScriptedRemote()
    remote.origin = origin
    assert (f"{origin} on {platform.node()}" if near else origin) == place_of(remote)


async def test_a_job_that_is_not_known_there_yet_is_not_lost(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **REMOTE_ONLY) as bench:
        bench.start()
        record = await bench.ended(await bench.submit("late"))
        assert ("succeeded", 1) == (record.state, remote.submits[record.id])


async def test_an_answer_that_cannot_be_read_does_not_end_what_was_paid_for(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **REMOTE_ONLY) as bench:
        bench.start()
        record = await bench.ended(await bench.submit("garble"))
        assert ("succeeded", 1) == (record.state, remote.submits[record.id])


async def test_polls_that_fail_keep_nobody_else_away(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **REMOTE_ONLY) as bench:
        bench.start()
        stuck = await bench.submit("silent")
        async with asyncio.timeout(30):
            while remote.polls[stuck] < 4:
                await asyncio.sleep(0.02)
        assert "succeeded" == (await bench.ended(await bench.submit("ok"))).state
        (worker,) = await bench.store.workers()
        assert "ready" == worker.remotes[0].state


async def test_a_remote_that_does_not_answer_is_told_of_once(tmp_path, monkeypatch, capfd) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **REMOTE_ONLY) as bench:
        bench.start()
        id_ = await bench.submit("silent")
        async with asyncio.timeout(30):
            while True:
                view = await bench.store.status(id_, None)
                if view is not None and view.progress is not None and "no answer" in view.progress.stage:
                    break
                await asyncio.sleep(0.05)
        assert "succeeded" == (await bench.ended(await bench.submit("lost-poll"))).state
    said = capfd.readouterr().err
    assert (2, 1) == (said.count('"remote does not answer"'), said.count('"remote answers again"'))


async def test_what_came_at_once_waits_for_a_storage_that_is_away(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **REMOTE_ONLY) as bench:
        place = bench.settings.data_dir / "files"
        place.mkdir(parents=True, exist_ok=True)
        (place / "outputs").write_text("stands for a storage that takes nothing")
        bench.start()
        id_ = await bench.submit("at-once")
        await reached(bench, id_, "submitting")
        async with asyncio.timeout(40):
            while True:
                view = await bench.store.status(id_, None)
                if view is not None and view.progress is not None and view.progress.stage == "storing":
                    break
                await asyncio.sleep(0.05)
        (place / "outputs").unlink()
        record = await bench.ended(id_, 60)
        assert ("succeeded", 1) == (record.state, remote.submits[id_])


async def test_a_slot_leaves_alone_what_is_at_a_remote(tmp_path, monkeypatch) -> None:
    async with workbench(tmp_path, monkeypatch, **LOCAL) as bench:  # the remote is configured no more
        there = await taken(bench, "accepted")
        bench.start()
        assert "succeeded" == (await bench.ended(await bench.submit("ok"))).state
        record = await bench.store.get(there)
        assert record is not None
        assert "queued" == record.state


async def test_an_idle_slot_comes_before_a_remote(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], overflow_seconds=30.0, **LOCAL) as bench:
        bench.start()
        records = [await bench.ended(await bench.submit("ok")) for _ in range(5)]
        assert ({"prompt"}, 0) == ({record.engine for record in records}, remote.submits.total())


async def test_full_slots_overflow_and_nothing_runs_twice(tmp_path, monkeypatch) -> None:
    runs = tmp_path / "runs"
    monkeypatch.setenv("RUSHES_TEST_RUNS", str(runs))
    monkeypatch.setenv("RUSHES_TEST_GATES", str(tmp_path))
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], overflow_seconds=0.3, **LOCAL) as bench:
        bench.start()
        first = await bench.submit("until gate")
        ids = [await bench.submit("ok") for _ in range(12)]
        records = [await bench.ended(id_) for id_ in ids]
        assert {"dashscope"} == {record.engine for record in records}
        (tmp_path / "gate").touch()
        assert "prompt" == (await bench.ended(first)).engine
        assert [1] * 12 == [remote.submits[id_] for id_ in ids]
        assert [f"{first} 1"] == runs.read_text().splitlines()


async def test_a_worker_has_so_many_there_and_no_more(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], remote_limit=2, **REMOTE_ONLY) as bench:
        bench.start()
        ids = [await bench.submit("stay") for _ in range(5)]
        for id_ in ids[:2]:
            await reached(bench, id_, "accepted")
        assert (2, 3) == ((await bench.store.counts())["running"], (await bench.store.counts())["queued"])
        remote.gate.set()
        assert {"succeeded"} == {(await bench.ended(id_)).state for id_ in ids}
        assert 5 == remote.submits.total()


PRICED = """
name = "Priced"
output = "image"
required = ["prompt"]
[[inputs]]
name = "prompt"
title = "Prompt"
type = "string"
role = "prompt"
[engines.dashscope]
model = "wan2.5-t2i-preview"
price_usd = 0.4
"""


def priced(folder: Path, more: str = "") -> Path:
    model = folder / "models" / "me" / "priced"
    model.mkdir(parents=True)
    (model / "model.toml").write_text(PRICED + more)
    (model / "sample.json").write_text('{"prompt": "ok"}')
    return folder / "models"


async def test_a_budget_is_never_overspent(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(
        tmp_path,
        monkeypatch,
        remotes=[remote],
        models_dir=priced(tmp_path),
        budget_usd_per_day=1.0,
        **REMOTE_ONLY,
    ) as bench:
        ids = [await bench.submit("ok", model="me/priced") for _ in range(5)]
        bench.start()
        async with asyncio.timeout(20):
            while (await bench.store.counts())["succeeded"] < 2:
                await asyncio.sleep(0.02)
        await bench.stop()
        assert (2, 3) == (remote.submits.total(), (await bench.store.counts())["queued"])
        assert pytest.approx(0.8) == await bench.store.spent(None)
        assert len(ids) == 5


async def test_routes_decide_which_accounts_go_there(tmp_path, monkeypatch) -> None:
    routes = '[[routes]]\nengine = "dashscope"\naccounts = ["film-*"]\n'
    remote = ScriptedRemote()
    models = priced(tmp_path)
    file = models / "me" / "priced" / "model.toml"
    file.write_text(file.read_text().replace("[[inputs]]", f"{routes}[[inputs]]", 1))
    async with workbench(tmp_path, monkeypatch, remotes=[remote], models_dir=models, **LOCAL) as bench:
        bench.start()
        other = await bench.submit("ok", model="me/priced")
        assert "succeeded" == (await bench.ended(await bench.submit("ok"))).state  # the worker is up
        record = await bench.store.get(other)
        assert record is not None
        assert ("queued", 0) == (record.state, remote.submits.total())


async def test_what_was_passed_on_often_enough_is_not_passed_on_again(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote(kind="runcomfy")
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **REMOTE_ONLY) as bench:
        bench.start()
        tired = await bench.submit("ok", hops=3)
        assert "succeeded" == (await bench.ended(await bench.submit("ok", hops=2))).state
        record = await bench.store.get(tired)
        assert record is not None
        assert ("queued", 0) == (record.state, remote.submits[tired])


async def test_the_draft_engine_steps_back_where_a_remote_serves(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote(only=(T2I,))
    async with workbench(tmp_path, monkeypatch, remotes=[remote], engine="draft") as bench:
        bench.start()
        record = await bench.ended(await bench.submit("a red kite over the sea"))
        assert "dashscope" == record.engine
        (worker,) = await bench.store.workers()
        assert T2I not in worker.models
        assert [(remote.name, (T2I,))] == [(state.name, state.models) for state in worker.remotes]


async def test_others_see_that_a_remote_does_not_answer(tmp_path, monkeypatch) -> None:
    remote = ScriptedRemote()
    async with workbench(tmp_path, monkeypatch, remotes=[remote], **REMOTE_ONLY) as bench:
        bench.start()
        await bench.submit("unreachable")
        async with asyncio.timeout(20):
            while True:
                (worker,) = await bench.store.workers() or [None]
                if worker is not None and worker.remotes[0].state == "open":
                    break
                await asyncio.sleep(0.05)
        (state,) = worker.remotes
        assert "connection refused" == state.why
        assert state.until is not None
        assert (1, 0) == ((await bench.store.counts())["queued"], (await bench.store.counts())["failed"])
