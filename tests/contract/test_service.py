"""The service under concurrency, where a wire test would need luck."""

import asyncio
from pathlib import Path

from rushes.errors import StoreUnavailable
from rushes.requests.ids import WorkerId
from rushes.requests.record import WorkerRecord
from support.app import T2I, VACE, App, running_app


async def test_polls_at_once_all_get_their_position(app: App) -> None:
    ids = [await app.submit() for _ in range(4)]
    workers = app.store.workers

    async def slow() -> list[WorkerRecord]:
        await asyncio.sleep(0.05)
        return await workers()

    app.store.workers = slow  # type: ignore[method-assign]
    answers = await asyncio.gather(*(app.http.get(f"/v1/requests/{id_}/status") for id_ in ids))
    assert [(200, n) for n in (1, 2, 3, 4)] == [(a.status_code, a.json()["queue_position"]) for a in answers]


async def test_a_store_that_is_away_for_a_moment_is_no_mistake_of_ours(app: App) -> None:
    id_ = await app.submit()
    workers = app.store.workers

    async def away() -> list[WorkerRecord]:
        raise StoreUnavailable

    app.store.workers = away  # type: ignore[method-assign]
    assert 503 == (await app.http.get(f"/v1/requests/{id_}/status")).status_code
    app.store.workers = workers  # type: ignore[method-assign]
    assert 1 == (await app.http.get(f"/v1/requests/{id_}/status")).json()["queue_position"]


async def test_a_position_counts_the_models_of_the_same_workers(tmp_path: Path) -> None:
    async with running_app(tmp_path / "data") as app:
        await app.http.post(
            f"/v1/models/{VACE}", json={"56_text": "x", "118_image": "Runcomfy_Example_1290_1.png"}
        )
        id_ = await app.submit()
        for name, models in (("a", (T2I,)), ("b", (VACE,))):
            record = WorkerRecord(WorkerId(name), "host", 1, 1, models, "draft", "")
            await app.store.join(record)
        assert 1 == (await app.http.get(f"/v1/requests/{id_}/status")).json()["queue_position"]
    async with running_app(tmp_path / "other") as app:
        await app.http.post(
            f"/v1/models/{VACE}", json={"56_text": "x", "118_image": "Runcomfy_Example_1290_1.png"}
        )
        id_ = await app.submit()
        await app.store.join(WorkerRecord(WorkerId("c"), "host", 1, 1, (T2I, VACE), "draft", ""))
        assert 2 == (await app.http.get(f"/v1/requests/{id_}/status")).json()["queue_position"]
