"""Rushes as a server under measurement: `rushes serve`, as its users start it, and its store beside it."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from load import Shot, collect
from rushes.queue.base import Claim
from rushes.requests.ids import RequestId, WorkerId
from rushes.requests.record import WorkerRecord
from rushes.settings import Settings
from rushes.wiring import opened_store
from servers import HERE, INPUT, MODEL_PATH, Running, free_port

sys.path.append(str(HERE.parent / "tests"))

MODEL = MODEL_PATH.removeprefix("/v1/models/")
COMMAND = str(Path(sys.executable).with_name("rushes"))


@contextmanager
def database(store: str) -> Iterator[str]:
    """The database address of a new, empty store of this kind ("sqlite", "postgres"); "" for SQLite."""
    if store == "sqlite":
        yield ""
        return
    from support.postgres import postgres_server

    with postgres_server() as server:
        yield server.create_database()


class Rushes:
    """One data directory with one key; started and stopped as often as a measurement needs."""

    name = "Rushes"

    def __init__(self, folder: Path, database_url: str = "") -> None:
        self.folder, self.database_url = folder, database_url
        self.settings = Settings(data_dir=folder / "data", database_url=database_url)
        self.engine_log = folder / "engine.log"
        self.key = ""
        self.ids: dict[str, list[str]] = {"queued": [], "finished": []}

    def start(
        self,
        cpu: int | None = 0,
        *,
        workers: int = 0,
        engine: str = "noop",
        extra: dict[str, str] | None = None,
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        env = {name: value for name, value in os.environ.items() if not name.startswith("RUSHES_")}
        env |= {"RUSHES_ACCESS_LOG": "off", "RUSHES_ENGINE": engine, "RUSHES_CONFIG": ""}
        env |= {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
            "BENCH_ENGINE_LOG": str(self.engine_log),
            **(extra or {}),
        }
        if self.database_url:
            env["RUSHES_DATABASE_URL"] = self.database_url
        data = str(self.settings.data_dir)
        self.running = Running(
            [COMMAND, "serve", "--port", str(port), "--data-dir", data, "--workers", str(workers)],
            port=port,
            ready="/healthz",
            folder=self.folder,
            env=env,
            cpu=cpu,
        )
        if not self.key:
            argv = [COMMAND, "keys", "create", "--name", "bench", "--data-dir", data]
            made = subprocess.run(
                argv, capture_output=True, text=True, timeout=60, check=True, env={**os.environ, **env}
            )
            self.key = made.stdout.strip()

    def stop(self) -> None:
        self.running.stop()

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def submit(self) -> Shot:
        return Shot("POST", MODEL_PATH, self.headers(), json.dumps(INPUT))

    def polls(self, state: str) -> list[Shot]:
        return [Shot("GET", f"/v1/requests/{id_}/status", self.headers()) for id_ in spread(self.ids[state])]

    def submit_many(self, count: int) -> list[str]:
        """The ids of ``count`` new requests that were acknowledged over HTTP."""
        return [
            str(json.loads(body)["request_id"]) for body in collect(self.running.port, [self.submit()], count)
        ]

    def fill(self, *, finished: int, queued: int) -> None:
        """Store requests over HTTP; have the first ones finished through the store, as a worker would."""
        if finished:
            self.ids["finished"] += self.submit_many(finished)
            asyncio.run(self._finish(finished))
        if queued:
            self.ids["queued"] += self.submit_many(queued)

    async def _finish(self, count: int) -> None:
        worker = WorkerId("bench")
        async with opened_store(self.settings) as store:
            await store.join(WorkerRecord(worker, "bench", os.getpid(), 64, (MODEL,), "noop", ""))
            ended = 0

            async def work() -> None:
                nonlocal ended
                while (lease := await store.claim(Claim(worker, (MODEL,), warm=(MODEL,)))) is not None:
                    assert await store.succeed(lease, [], None)
                    ended += 1

            await asyncio.gather(*(work() for _ in range(64)))
            await store.leave(worker)
        assert ended == count, f"{ended} of {count} requests could be finished"

    def copy(self, folder: Path) -> "Rushes":
        """A copy of a stopped server on SQLite: the same key, the same requests."""
        assert not self.database_url
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("*.log"))
        other = Rushes(folder)
        other.key, other.ids = self.key, self.ids
        return other

    async def in_store(self, ids: Sequence[str]) -> list[tuple[float, int]]:
        """The in-process way of a status with its position: (seconds, position) of each."""
        from time import perf_counter

        found = []
        async with opened_store(self.settings) as store:
            for id_ in ids:
                start = perf_counter()
                view = await store.status(RequestId(id_), None)
                assert view is not None
                position = await store.position(view)
                found.append((perf_counter() - start, position))
        return found


def spread(ids: Sequence[str], most: int = 1000) -> list[str]:
    """At most so many of them, from all over."""
    step = max(1, len(ids) // most)
    return list(ids[::step])[:most]
