"""The FastAPI + SQL reference: submit and status of the wire as a competent person would write them.

Not a straw man; each choice below was the faster of the usual ones on one core, or costs next to nothing:

- FastAPI on uvicorn with uvloop and httptools, one process, no access log.
- A pydantic model with the enums, bounds and defaults of vace-fun's input; unknown fields are refused. Answers
  are pydantic models too, which FastAPI writes with pydantic-core (its fastest way that keeps the documents).
- Standard sqlite3 without an ORM, prepared statements from its cache, one connection. Calls are made from the
  event loop: a read takes microseconds and a commit a fraction of a millisecond, less than a hop to a thread
  pool costs on one core (measured: see README.md).
- WAL with synchronous = FULL: one commit per submit, on the disk before the answer.
- The API key is looked up by its SHA-256 in the database at each call, so that revoking works at once.
- Ids are time-ordered with 64 random bits; queue position is a count over a partial index of the queued rows.

As a program: ``fastapi_sql.py init DB``, ``fill DB QUEUED FINISHED`` (prints ids as JSON) and
``serve DB PORT``; the key comes from PEER_KEY.
"""

import hashlib
import json
import os
import secrets
import sqlite3
import sys
import time
from typing import Annotated, Literal

import uvicorn
from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field

SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    hash BLOB PRIMARY KEY,
    account TEXT NOT NULL,
    revoked INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS requests (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    account TEXT NOT NULL,
    model TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'queued',
    input TEXT NOT NULL,
    created_at REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS queued ON requests (seq) WHERE state = 'queued';
"""
INSERT = "INSERT INTO requests (id, account, model, input, created_at) VALUES (?, ?, ?, ?, ?)"
MODEL = "community/wan-2-2/vace-fun"


class VaceFun(BaseModel):
    """The input schema of community/wan-2-2/vace-fun."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(alias="56_text")]
    image: Annotated[str, Field(alias="118_image")]
    resolution: Annotated[
        Literal[
            "480x480 (1:1)",
            "720x720 (1:1)",
            "480x720 (2:3)",
            "720x480 (3:2)",
            "540x960 (9:16)",
            "576x1024 (9:16)",
            "720x1280 (9:16)",
            "960x540 (16:9)",
            "1024x576 (16:9)",
            "1280x720 (16:9)",
        ],
        Field(alias="4_valuex3_value"),
    ] = "1024x576 (16:9)"
    frames: Annotated[Literal[81, 141], Field(alias="25_value")] = 81
    fps: Annotated[int, Field(alias="38_value", ge=12, le=24)] = 16
    seed: Annotated[int, Field(alias="98_seed")] = 96860978
    steps: Annotated[int, Field(alias="47_value", ge=2, le=40)] = 12
    guidance: Annotated[float, Field(alias="108_cfg", ge=0, le=10)] = 3.5
    shift: Annotated[float, Field(alias="41_value", ge=1, le=30)] = 8


class Submitted(BaseModel):
    request_id: str
    status_url: str
    result_url: str
    cancel_url: str


class Status(BaseModel):
    request_id: str
    status: str
    queue_position: int | None = None
    status_url: str
    result_url: str


def connect(path: str) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA cache_size = -65536")
    db.execute("PRAGMA mmap_size = 268435456")
    return db


def new_id() -> str:
    return f"{time.time_ns():016x}{secrets.token_hex(8)}"


def make_app(path: str, base: str) -> FastAPI:
    db = connect(path)
    app = FastAPI()
    bearer = HTTPBearer(auto_error=False)

    async def account(token: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> str:
        if token is not None:
            digest = hashlib.sha256(token.credentials.encode()).digest()
            row = db.execute("SELECT account FROM keys WHERE hash = ? AND NOT revoked", (digest,)).fetchone()
            if row is not None:
                return str(row[0])
        raise HTTPException(401, "the API key is missing or unknown")

    Account = Annotated[str, Depends(account)]  # noqa: N806 - a type

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/models/" + MODEL)
    async def submit(payload: VaceFun, account: Account) -> Submitted:
        id_ = new_id()
        db.execute(INSERT, (id_, account, MODEL, payload.model_dump_json(by_alias=True), time.time()))
        url = f"{base}/v1/requests/{id_}"
        return Submitted(
            request_id=id_, status_url=f"{url}/status", result_url=f"{url}/result", cancel_url=f"{url}/cancel"
        )

    @app.get("/v1/requests/{request_id}/status", response_model_exclude_none=True)
    async def status(request_id: str, account: Account) -> Status:
        row = db.execute(
            "SELECT seq, state FROM requests WHERE id = ? AND account = ?", (request_id, account)
        ).fetchone()
        if row is None:
            raise HTTPException(404, "no such request")
        seq, state = row
        position = None
        if state == "queued":
            ahead = db.execute("SELECT count(*) FROM requests WHERE state = 'queued' AND seq < ?", (seq,))
            position = 1 + ahead.fetchone()[0]
        url = f"{base}/v1/requests/{request_id}"
        return Status(
            request_id=request_id,
            status="in_queue" if state == "queued" else "completed",
            queue_position=position,
            status_url=f"{url}/status",
            result_url=f"{url}/result",
        )

    return app


def init(path: str) -> None:
    db = connect(path)
    db.executescript(SCHEMA)
    digest = hashlib.sha256(os.environ["PEER_KEY"].encode()).digest()
    db.execute("INSERT OR IGNORE INTO keys (hash, account) VALUES (?, 'bench')", (digest,))


def fill(path: str, queued: int, finished: int) -> dict[str, list[str]]:
    """Store requests as submits would have; finished ones first, as they would be."""
    db = connect(path)
    example = {"56_text": "a lone figure in the ruins. " * 50, "118_image": "Runcomfy_Example_1290_1.png"}
    text = VaceFun.model_validate(example).model_dump_json(by_alias=True)
    ids: dict[str, list[str]] = {"finished": [], "queued": []}
    db.execute("BEGIN")
    for state, count in (("finished", finished), ("queued", queued)):
        for _ in range(count):
            ids[state].append(new_id())
            db.execute(INSERT, (ids[state][-1], "bench", MODEL, text, time.time()))
    if finished:
        db.execute("UPDATE requests SET state = 'succeeded' WHERE seq <= ?", (finished,))
    db.execute("COMMIT")
    return ids


def main(command: str, path: str, *rest: str) -> None:
    if command == "init":
        init(path)
    elif command == "fill":
        print(json.dumps(fill(path, int(rest[0]), int(rest[1]))))
    elif command == "serve":
        port = int(rest[0])
        uvicorn.run(
            make_app(path, f"http://127.0.0.1:{port}"),
            host="127.0.0.1",
            port=port,
            loop="uvloop",
            http="httptools",
            access_log=False,
            log_level="warning",
        )
    else:
        raise SystemExit(f"unknown command {command!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
