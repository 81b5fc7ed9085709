"""The gateway in this process, over a real store and real storage, with a worker played by the test."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from rushes.api.app import make_app
from rushes.catalog.load import Catalog
from rushes.media.fetch import policy_from
from rushes.media.inspector import Inspector
from rushes.media.storage import Storage, open_storage
from rushes.queue.base import Claim, Store
from rushes.queue.sqlite.store import SqliteStore
from rushes.requests.ids import WorkerId
from rushes.requests.record import Lease, Output
from rushes.service.core import Service
from rushes.service.keys import new_key
from rushes.settings import Settings

BASE = "http://rushes.test"
VACE = "community/wan-2-2/vace-fun"
T2I = "wan-ai/wan-2-5/text-to-image"
SAMPLE = "Runcomfy_Example_1290_1.png"
WORKER = WorkerId("w")


class App:
    """``http`` speaks with a key of the account "default"; ``stranger`` with one of another account."""

    def __init__(
        self, store: Store, storage: Storage, http: httpx.AsyncClient, stranger: httpx.AsyncClient
    ) -> None:
        self.store, self.storage, self.http, self.stranger = store, storage, http, stranger

    async def submit(self, **given: object) -> str:
        answer = await self.http.post(f"/v1/models/{T2I}", json={"prompt": "a harbour at dawn", **given})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["request_id"])

    async def claim(self) -> Lease:
        lease = await self.store.claim(Claim(WORKER, (T2I, VACE), engine="draft"))
        assert lease is not None
        return lease

    async def produce(self, lease: Lease, content: bytes = b"0123456789", kind: str = "image") -> Output:
        """Store an output as a worker does and write the outcome."""
        name, type_ = ("1.png", "image/png") if kind == "image" else ("1.mp4", "video/mp4")
        key = f"outputs/{lease.request.id}/{lease.fence}/{name}"
        await self.storage.put_bytes(key, content, type_)
        output = Output(
            key=key,
            kind="image" if kind == "image" else "video",
            content_type=type_,
            size=len(content),
            width=1440,
            height=810,
            frames=1 if kind == "image" else 81,
            fps=None if kind == "image" else 16.0,
            duration=None if kind == "image" else 81 / 16,
        )
        assert await self.store.succeed(lease, [output], 0.25)
        return output


@asynccontextmanager
async def running_app(folder: Path, **given: object) -> AsyncIterator[App]:
    settings = Settings(data_dir=folder, **{"access_log": False, **given})  # type: ignore[arg-type]
    store = SqliteStore(folder / "rushes.db")
    await store.open()
    storage = open_storage(settings)
    inspector = Inspector()
    scratch = folder / "scratch"
    scratch.mkdir()
    service = Service(
        settings,
        store=store,
        storage=storage,
        catalog=Catalog.load(settings.models_dir),
        policy=policy_from(settings),
        secret=await store.secret("links"),
    )
    app = make_app(
        settings, service=service, store=store, storage=storage, inspector=inspector, scratch=scratch
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    clients = []
    for account in ("default", "other"):
        key, record = new_key(account, account)
        await store.add_key(record)
        headers = {"Authorization": f"Bearer {key}"}
        clients.append(httpx.AsyncClient(transport=transport, base_url=BASE, headers=headers))
    try:
        yield App(store, storage, *clients)
    finally:
        for client in clients:
            await client.aclose()
        await inspector.close()
        await store.close()
