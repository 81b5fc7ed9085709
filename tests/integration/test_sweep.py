"""Retention removes what is due and nothing that a live request needs."""

import time
from pathlib import Path

import pytest

from rushes.requests.ids import AccountId, FileId
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
