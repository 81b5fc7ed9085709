"""The queue with much in it: the position of a request, and the drain, on each store."""

import asyncio
import http.client
import json
import time
from collections import Counter

from report import Bench, Row, median, p95
from rushes.queue.base import Store
from rushes.requests.ids import RequestId
from rushes.wiring import opened_store
from rushes_server import Rushes, database, spread

STORES = {"sqlite": "SQLite", "postgres": "PostgreSQL"}
POSITION_MS = 2.0
SLOTS = 4
DRAIN_SECONDS = 600.0

# Each move into a terminal state leaves a row here, whoever makes it: what counts outcomes does not make them.
AUDIT_SQLITE = """
CREATE TABLE bench_outcome (id TEXT NOT NULL, state TEXT NOT NULL);
CREATE TRIGGER bench_outcome AFTER UPDATE OF state ON requests
WHEN NEW.state IN ('succeeded', 'failed', 'cancelled')
BEGIN INSERT INTO bench_outcome VALUES (NEW.id, NEW.state); END;
"""
AUDIT_POSTGRES = """
CREATE TABLE bench_outcome (id text NOT NULL, state text NOT NULL);
CREATE FUNCTION bench_outcome() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN INSERT INTO bench_outcome VALUES (NEW.id, NEW.state); RETURN NULL; END $$;
CREATE TRIGGER bench_outcome AFTER UPDATE OF state ON requests
FOR EACH ROW WHEN (NEW.state IN ('succeeded', 'failed', 'cancelled')) EXECUTE FUNCTION bench_outcome();
"""
OUTCOMES = "SELECT id, count(*) FROM bench_outcome GROUP BY id"
SPAN = "SELECT min(started_at), max(finished_at) FROM requests"


def position(bench: Bench) -> None:
    for store, label in STORES.items():
        with database(store) as url:
            server = Rushes(bench.root / f"position-{store}", url)
            server.start(cpu=None)
            try:
                bench.say(f"position: queueing {bench.stored:,} requests on {label}")
                server.fill(finished=0, queued=bench.stored)
                ids = spread(server.ids["queued"], 500)
                http_ms = _over_http(server, ids)
                inside = asyncio.run(server.in_store(ids))
            finally:
                server.stop()
        places = [place for _, place in inside]
        assert places == sorted(set(places)), "positions must grow with arrival"
        assert places[0] == 1
        assert places[-1] <= bench.stored
        what = f"queue position at {bench.stored:,} queued, {label}"
        for way, ms in (("in process", [s * 1e3 for s, _ in inside]), ("status over HTTP", http_ms)):
            value = f"median {median(ms):.2f} ms, p95 {p95(ms):.2f} ms"
            ok = median(ms) <= POSITION_MS
            bench.add(Row("position", f"{what}, {way}", value, f"<= {POSITION_MS:.0f} ms", ok))


def _over_http(server: Rushes, ids: list[str]) -> list[float]:
    """Milliseconds of each status poll, one after another on one connection; the first ten warm it up."""
    connection = http.client.HTTPConnection("127.0.0.1", server.running.port, timeout=30)
    found = []
    for id_ in [*ids[:10], *ids]:
        start = time.perf_counter()
        connection.request("GET", f"/v1/requests/{id_}/status", headers=server.headers())
        body = connection.getresponse().read()
        found.append((time.perf_counter() - start) * 1e3)
        assert json.loads(body)["queue_position"] >= 1, body
    connection.close()
    return found[10:]


def drain(bench: Bench) -> None:
    for store, label in STORES.items():
        with database(store) as url:
            server = Rushes(bench.root / f"drain-{store}", url)
            bench.say(f"drain: queueing {bench.drained:,} requests on {label}")
            server.start(cpu=None)
            try:
                ids = server.submit_many(bench.drained)
            finally:
                server.stop()
            asyncio.run(_sql(server, AUDIT_POSTGRES if url else AUDIT_SQLITE))
            bench.say(f"drain: {SLOTS} slots on {label}")
            server.start(cpu=None, workers=SLOTS, engine="recording_engine:factory")
            try:
                states = asyncio.run(_until_ended(server, ids))
            finally:
                server.stop()
            outcomes = dict(asyncio.run(_sql(server, OUTCOMES)))
            ((first, last),) = asyncio.run(_sql(server, SPAN))
        runs = Counter(line.split()[0] for line in server.engine_log.read_text("utf-8").splitlines())
        lost = sum(states.get(id_) != "succeeded" for id_ in ids)
        twice = sum(count > 1 for count in outcomes.values())
        never = sum(id_ not in outcomes for id_ in ids)
        reruns = sum(runs[id_] != 1 for id_ in ids)
        what = f"{bench.drained:,} no-op requests, {SLOTS} slots, {label}"
        bench.add(Row("drain", f"{what}: rate", f"{bench.drained / (last - first):,.0f} per s", "reported"))
        value = f"{lost + never} lost, {twice} with two outcomes, {reruns} not run just once"
        bench.add(Row("drain", f"{what}: outcomes", value, "0, 0", not (lost or never or twice)))


async def _until_ended(server: Rushes, ids: list[str]) -> dict[str, str]:
    """Wait for the queue to be empty; the state of each request that the store knows."""
    async with opened_store(server.settings) as store:
        deadline = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < deadline:
            counts = await store.counts()
            if not counts["queued"] and not counts["running"]:
                break
            await asyncio.sleep(0.5)
        return await _states(store, ids)


async def _states(store: Store, ids: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for id_ in ids:
        view = await store.status(RequestId(id_), None)
        if view is not None:
            found[id_] = view.state
    return found


async def _sql(server: Rushes, text: str) -> list[tuple]:  # type: ignore[type-arg]
    """Run SQL of ours in the store's database, beside the store; the rows of a query."""
    query = text.startswith("SELECT")
    if server.database_url:
        import asyncpg

        connection = await asyncpg.connect(server.database_url)
        try:
            if query:
                return [tuple(row) for row in await connection.fetch(text)]
            await connection.execute(text)
            return []
        finally:
            await connection.close()
    import sqlite3

    with sqlite3.connect(server.settings.data_dir / "rushes.db", timeout=30) as db:
        if query:
            return db.execute(text).fetchall()
        db.executescript(text)
        return []
