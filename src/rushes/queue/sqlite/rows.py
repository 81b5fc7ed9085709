"""Rows to records. The JSON columns hold what msgspec writes for the record types."""

import json
from typing import Any

import msgspec

from rushes.requests.record import (
    Failure,
    File,
    Key,
    Output,
    Progress,
    RemoteState,
    RemoteTask,
    Request,
    Running,
    Source,
    WorkerRecord,
)

_sources = msgspec.json.Decoder(dict[str, Source])
_outputs = msgspec.json.Decoder(tuple[Output, ...])
_failure = msgspec.json.Decoder(Failure)
_remote_task = msgspec.json.Decoder(RemoteTask)
_remotes = msgspec.json.Decoder(tuple[RemoteState, ...])
progress_of = msgspec.json.Decoder(Progress).decode
encode = msgspec.json.Encoder().encode

_COLUMNS = (
    *("seq", "id", "account", "key_id", "model", "state", "priority", "attempt", "fence", "beat"),
    *("inputs", "worker", "engine", "progress", "created_at", "started_at", "finished_at"),
    *("cost_usd", "swept_at", "input", "sources", "outputs", "failure", "remote_task", "remote", "hops"),
)
_AT = {name: position for position, name in enumerate(_COLUMNS)}


def request(row: tuple[Any, ...]) -> Request:
    """A row of ``SELECT *`` from requests."""
    at = _AT
    progress, outputs, failure = row[at["progress"]], row[at["outputs"]], row[at["failure"]]
    remote_task = row[at["remote_task"]]
    return Request(
        seq=row[at["seq"]],
        id=row[at["id"]],
        account=row[at["account"]],
        key_id=row[at["key_id"]],
        model=row[at["model"]],
        state=row[at["state"]],
        priority=row[at["priority"]],
        attempt=row[at["attempt"]],
        inputs=row[at["inputs"]],
        input=row[at["input"]],
        sources=_sources.decode(row[at["sources"]]),
        created_at=row[at["created_at"]],
        started_at=row[at["started_at"]],
        finished_at=row[at["finished_at"]],
        worker=row[at["worker"]],
        engine=row[at["engine"]],
        progress=progress_of(progress) if progress else None,
        outputs=_outputs.decode(outputs) if outputs else (),
        failure=_failure.decode(failure) if failure else None,
        cost_usd=row[at["cost_usd"]],
        swept_at=row[at["swept_at"]],
        remote_task=_remote_task.decode(remote_task) if remote_task else None,
        hops=row[at["hops"]],
    )


def fence_of(row: tuple[Any, ...]) -> int:
    return int(row[_AT["fence"]])


def running(row: tuple[Any, ...]) -> Running:
    model, started_at, progress = row
    return Running(model, started_at, progress_of(progress) if progress else None)


def key(row: tuple[Any, ...]) -> Key:
    return Key(*row)


def file(row: tuple[Any, ...]) -> File:
    return File(*row)


def worker(row: tuple[Any, ...]) -> WorkerRecord:
    id_, host, pid, slots, models, engine, owner, wake_port, beat, started_at, remotes = row
    return WorkerRecord(
        id=id_,
        host=host,
        pid=pid,
        slots=slots,
        models=tuple(json.loads(models)),
        engine=engine,
        owner=owner,
        wake_port=wake_port,
        beat=beat,
        started_at=started_at,
        remotes=_remotes.decode(remotes),
    )
