"""What a person waits for: the server to be ready, and an idle worker's engine to start."""

import http.client
import json
import random
import time
from pathlib import Path

from report import Bench, Row, median, p95
from rushes_server import Rushes, database
from servers import INPUT, MODEL_PATH

START_MS = 15.0
READY_SECONDS = 3.0
FIRST_SECONDS = 6.0


def latency(bench: Bench) -> None:
    """POST to engine start on an idle worker: from the client's clock before it to the engine's at its call."""
    for store, label in (("sqlite", "SQLite"), ("postgres", "PostgreSQL")):
        with database(store) as url:
            server = Rushes(bench.root / f"latency-{store}", url)
            server.start(cpu=None, workers=1, engine="recording_engine:factory")
            try:
                bench.say(f"latency: {bench.singles} requests, one by one, on {label}")
                found = [_one(server) for _ in range(bench.singles + 5)][5:]
            finally:
                server.stop()
        starts, answers = [s for s, _ in found], [a for _, a in found]
        value = f"median {median(starts):.1f} ms, p95 {p95(starts):.1f} ms; POST {median(answers):.1f} ms"
        what = f"POST to engine start, idle worker, no file to fetch, {label}"
        bench.add(Row("latency", what, value, f"<= {START_MS:.0f} ms", median(starts) <= START_MS))


def _one(server: Rushes) -> tuple[float, float]:
    """Milliseconds from before the POST to the engine's start, and to the answer of the POST."""
    connection = http.client.HTTPConnection("127.0.0.1", server.running.port, timeout=30)
    connection.connect()
    before = time.time_ns()
    connection.request(
        "POST",
        MODEL_PATH,
        json.dumps(INPUT),
        {**server.headers(), "Content-Type": "application/json"},
    )
    answer = json.loads(connection.getresponse().read())
    answered = time.time_ns()
    id_ = answer["request_id"]
    started = _engine_start(server.engine_log, id_)
    while True:  # until the worker is idle again
        connection.request("GET", f"/v1/requests/{id_}/status", headers=server.headers())
        if json.loads(connection.getresponse().read())["status"] == "completed":
            break
        time.sleep(0.01)
    connection.close()
    time.sleep(random.uniform(0.03, 0.13))  # not in step with any timer of the server
    return (started - before) / 1e6, (answered - before) / 1e6


def _engine_start(log: Path, id_: str) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = log.read_text("utf-8").splitlines() if log.exists() else []
        for line in reversed(lines):
            found, _, nanoseconds = line.split()
            if found == id_:
                return int(nanoseconds)
        time.sleep(0.002)
    raise SystemExit(f"bench: the engine never started request {id_}")


def startup(bench: Bench) -> None:
    """From the command to the first 200 of /healthz, with one slot of the default engine."""
    first: list[float] = []
    warm: list[float] = []
    for number in range(bench.rounds):
        bench.say(f"startup: round {number + 1} of {bench.rounds}")
        server = Rushes(bench.root / f"startup-{number}")
        # No compiled Python anywhere, the standard library's included: worse than any installed package meets.
        cache = {"PYTHONPYCACHEPREFIX": str(server.folder / "pycache"), "PYTHONDONTWRITEBYTECODE": ""}
        for times in (first, warm):
            server.start(cpu=None, workers=1, engine="draft", extra=cache)
            times.append(server.running.ready_seconds)
            server.stop()
    for name, times, target in (
        ("the very first start: no data, nothing compiled", first, FIRST_SECONDS),
        ("a later start", warm, READY_SECONDS),
    ):
        value = f"median {median(times):.2f} s, worst {max(times):.2f} s"
        bench.add(
            Row(
                "startup", f"`rushes serve` ready, {name}", value, f"<= {target:.0f} s", median(times) <= target
            )
        )
