"""Retention removes what is due and nothing that a live request needs."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from rushes.errors import StoreUnavailable
from rushes.requests.ids import AccountId, FileId, new_request_id
from rushes.requests.record import File
from rushes.worker.sweep import Sweeper
from support.app import VACE, App, running_app
from support.engines import png

DAY = 86400.0


@pytest.fixture
async def app(tmp_path: Path):
    async with running_app(tmp_path / "data") as running:
        yield running


async def exists(app: App, key: str) -> bool:
    return key in [meta.key async for meta in app.storage.list()]


async def test_nothing_goes_without_a_retention(app: App) -> None:
    await app.submit()
    output = await app.produce(await app.claim())
    assert 0 == await Sweeper(app.store, app.storage, 0).sweep(time.time() + 1000 * DAY)
    assert await exists(app, output.key)


async def test_what_is_due_goes_and_the_record_stays(app: App) -> None:
    id_ = await app.submit()
    output = await app.produce(await app.claim())
    await app.storage.put_bytes(f"inputs/{id_}/1.png", b"x", "image/png")
    waiting = await app.submit()
    sweeper = Sweeper(app.store, app.storage, 7)
    assert 0 == await sweeper.sweep(time.time() + 6 * DAY)
    assert await exists(app, output.key)
    assert 1 == await sweeper.sweep(time.time() + 8 * DAY)
    assert not await exists(app, output.key)
    assert not await exists(app, f"inputs/{id_}/1.png")
    result = (await app.http.get(f"/v1/requests/{id_}/result")).json()
    assert ("succeeded", {}) == (result["status"], result["output"])
    assert "in_queue" == (await app.http.get(f"/v1/requests/{waiting}/status")).json()["status"]
    assert 0 == await sweeper.sweep(time.time() + 9 * DAY)


async def test_an_output_that_is_a_live_requests_input_stays(app: App) -> None:
    first = await app.submit()
    output = await app.produce(await app.claim(), png(8, 8))
    url = (await app.http.get(f"/v1/requests/{first}/result")).json()["output"]["image"]
    answer = await app.http.post(f"/v1/models/{VACE}", json={"56_text": "x", "118_image": url})
    second = answer.json()["request_id"]
    sweeper = Sweeper(app.store, app.storage, 1)
    assert 0 == await sweeper.sweep(time.time() + 2 * DAY)
    assert await exists(app, output.key)
    assert "cancelled" == (await app.http.post(f"/v1/requests/{second}/cancel")).json()["outcome"]
    assert 2 == await sweeper.sweep(time.time() + 2 * DAY)
    assert not await exists(app, output.key)


async def test_uploads_stay_while_a_live_request_names_them(app: App) -> None:
    used, idle = [(await app.http.post("/v1/files", content=png(n, n))).json()["id"] for n in (8, 9)]
    answer = await app.http.post(f"/v1/models/{VACE}", json={"56_text": "x", "118_image": used})
    id_ = answer.json()["request_id"]
    sweeper = Sweeper(app.store, app.storage, 1)
    assert 1 == await sweeper.sweep(time.time() + 2 * DAY)
    assert 404 == (await app.http.get(f"/v1/files/{idle}")).status_code
    assert 200 == (await app.http.get(f"/v1/files/{used}")).status_code
    await app.http.post(f"/v1/requests/{id_}/cancel")
    assert 2 == await sweeper.sweep(time.time() + 2 * DAY)
    assert [] == [meta.key async for meta in app.storage.list("files")]


async def test_many_needed_files_do_not_hide_others_that_are_due(app: App) -> None:
    """A batch in which everything is still needed must not end the sweep."""
    old = time.time() - 5 * DAY
    for number in range(120):
        key = f"files/needed-{number}.png"
        await app.store.add_file(
            File(FileId(f"file_{number}"), AccountId("default"), "", key, "image/png", 1, old)
        )
        answer = await app.http.post(f"/v1/models/{VACE}", json={"56_text": "x", "118_image": f"file_{number}"})
        assert 200 == answer.status_code
    await app.storage.put_bytes("files/due.png", b"x", "image/png")
    await app.store.add_file(
        File(FileId("file_due"), AccountId("default"), "", "files/due.png", "image/png", 1, old + 1)
    )
    assert 1 == await Sweeper(app.store, app.storage, 1).sweep(time.time())
    assert not await exists(app, "files/due.png")


async def test_a_submit_in_the_middle_of_a_sweep_is_refused(app: App) -> None:
    """The files of what is marked are as good as gone: nobody may still be told that they are there."""
    first = await app.submit()
    await app.produce(await app.claim(), png(8, 8))
    url = (await app.http.get(f"/v1/requests/{first}/result")).json()["output"]["image"]
    answers = []

    class Meanwhile(type(app.storage)):  # type: ignore[misc]
        async def delete_prefix(self, prefix: str) -> int:
            body = {"56_text": "x", "118_image": url}
            answers.append(await app.http.post(f"/v1/models/{VACE}", json=body))
            return await super().delete_prefix(prefix)

    storage = Meanwhile(app.storage._store, app.storage._folder)
    assert 1 == await Sweeper(app.store, storage, 1).sweep(time.time() + 2 * DAY)
    assert answers
    assert [422] * len(answers) == [answer.status_code for answer in answers]
    assert "input_gone" == answers[0].json()["detail"][0]["type"]


async def test_what_a_crash_left_behind_is_found(app: App) -> None:
    swept, kept, live = [await app.submit() for _ in range(3)]
    await app.produce(await app.claim())
    assert [swept] == [request.id for request in await app.store.sweep(time.time() + 1, 1)]  # and then it died
    output = await app.produce(await app.claim())
    unknown = new_request_id()
    upload = (await app.http.post("/v1/files", content=png(8, 8))).json()["id"]
    lost = f"files/file_{unknown}.png"
    strays = [f"uploads/{unknown}/1", f"inputs/{swept}/1.png", f"outputs/{unknown}/1/1.png", lost]
    others = [f"inputs/{live}/1.png", f"inputs/{kept}/1.png", "outputs/not-ours/1.png", "files/ours.png", "x/1"]
    for key in (*strays, *others):
        await app.storage.put_bytes(key, b"x", "image/png")
    sweeper = Sweeper(app.store, app.storage, 0.5)
    assert 0 == await sweeper.tidy(time.time())
    before = await keys(app)
    sweeper = Sweeper(app.store, app.storage, 0.5)
    assert 5 == await sweeper.tidy(time.time() + 1.1 * DAY)
    gone = {*strays, next(key for key in before if key.startswith(f"outputs/{swept}/"))}
    assert before - gone == await keys(app)
    assert output.key in await keys(app)
    assert upload in {Path(key).stem for key in await keys(app)}
    assert 0 == await Sweeper(app.store, app.storage, 0).tidy(time.time() + 1000 * DAY)
    assert 0 == await Sweeper(app.store, app.storage, 3).tidy(time.time() + 2 * DAY)


async def test_the_walk_goes_on_where_it_stopped_and_covers_everything(app: App) -> None:
    for _ in range(12):
        id_ = new_request_id()
        for number in range(100):
            path = app.storage.local_path(f"uploads/{id_}/{number}")
            assert path is not None
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    sweeper = Sweeper(app.store, app.storage, 1)
    now = time.time() + 2 * DAY
    assert [500, 500, 200, 0] == [await sweeper.tidy(now) for _ in range(4)]
    assert set() == await keys(app)
    late = app.storage.local_path(f"uploads/{new_request_id()}/1")
    assert late is not None
    late.parent.mkdir(parents=True)
    late.touch()
    assert [0, 1] == [await sweeper.tidy(now + seconds) for seconds in (1, 4000)]


async def keys(app: App) -> set[str]:
    return {meta.key async for meta in app.storage.list()}


async def test_files_that_storage_would_not_remove_are_removed_later(app: App) -> None:
    await app.submit()
    output = await app.produce(await app.claim())
    upload = (await app.http.post("/v1/files", content=png(8, 8))).json()["id"]

    class Away(type(app.storage)):  # type: ignore[misc]
        away = True

        async def delete(self, key: str) -> None:
            if self.away:
                raise StoreUnavailable("away")
            await super().delete(key)

    storage = Away(app.storage._store, app.storage._folder)
    sweeper = Sweeper(app.store, storage, 1)
    now = time.time() + 2 * DAY
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await sweeper.sweep(now)
    assert await exists(app, output.key)
    storage.away = False
    assert 1 == await sweeper.sweep(now)
    assert set() == await keys(app)
    assert 404 == (await app.http.get(f"/v1/files/{upload}")).status_code


async def test_nothing_ends_the_sweeper(app: App, capfd: pytest.CaptureFixture[str]) -> None:
    class Broken(type(app.store)):  # type: ignore[misc]
        async def sweep(self, before: float, limit: int) -> list[object]:
            raise ZeroDivisionError("a mistake")

    store = Broken(Path(os.devnull))
    running = asyncio.create_task(Sweeper(store, app.storage, 1e-9).run())
    text = ""
    async with asyncio.timeout(30):
        while text.count("a mistake") < 2:
            await asyncio.sleep(0.05)
            text += capfd.readouterr().err
    assert not running.done()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
