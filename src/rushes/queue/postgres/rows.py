"""Rows to records and back. Pure: no database is imported; a row is anything that answers ``row["column"]``.

Structured columns (sources, outputs, progress, failure, remote_task, remotes) are JSON in ``bytea``, not ``jsonb``:
PostgreSQL's ``jsonb`` and ``text`` refuse the character NUL, which JSON and users' file names may hold.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

import msgspec

from rushes.requests.ids import AccountId, FileId, KeyId, RequestId, WorkerId
from rushes.requests.record import (
    Failure,
    File,
    InputsState,
    Key,
    LeaseMark,
    Output,
    Progress,
    RemoteState,
    RemoteTask,
    Request,
    Running,
    Source,
    StatusView,
    WorkerRecord,
)


class Row(Protocol):
    """A row of an answer, by column name: asyncpg.Record is such."""

    def __getitem__(self, name: str, /) -> Any: ...


encode: Final = msgspec.json.Encoder().encode
_sources: Final = msgspec.json.Decoder(dict[str, Source]).decode
_outputs: Final = msgspec.json.Decoder(tuple[Output, ...]).decode
_progress: Final = msgspec.json.Decoder(Progress).decode
_failure: Final = msgspec.json.Decoder(Failure).decode
_remote_task: Final = msgspec.json.Decoder(RemoteTask).decode
_remotes: Final = msgspec.json.Decoder(tuple[RemoteState, ...]).decode


def encode_progress(progress: Progress | None) -> bytes | None:
    return None if progress is None else encode(progress)


def inputs_state(sources: Mapping[str, Source]) -> InputsState:
    """Whether there is anything to fetch: a source without a key that is no sample."""
    waiting = any(s.key is None and s.kind != "sample" for s in sources.values())
    return "pending" if waiting else "ready"


def storage_keys(sources: Mapping[str, Source], outputs: Iterable[Output] = ()) -> list[str]:
    """The storage keys that a request names: of uploads, of checked copies and of outputs; sorted, once each.

    Retention may not touch what these name. A name with a NUL is no storage key and is left out.
    """
    names = {s.key for s in sources.values() if s.key is not None}
    names |= {s.value for s in sources.values() if s.kind == "stored"}
    names |= {o.key for o in outputs}
    return sorted(n for n in names if "\0" not in n)


def request(row: Row) -> Request:
    progress, outputs, failure = row["progress"], row["outputs"], row["failure"]
    worker, remote_task = row["worker"], row["remote_task"]
    return Request(
        seq=row["seq"],
        id=RequestId(row["id"]),
        account=AccountId(row["account"]),
        key_id=KeyId(row["key_id"]),
        model=row["model"],
        state=row["state"],
        priority=row["priority"],
        attempt=row["attempt"],
        inputs=row["inputs"],
        input=row["input"],
        sources=_sources(row["sources"]),
        created_at=row["created_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        worker=None if worker is None else WorkerId(worker),
        engine=row["engine"],
        progress=None if progress is None else _progress(progress),
        outputs=() if outputs is None else _outputs(outputs),
        failure=None if failure is None else _failure(failure),
        cost_usd=row["cost_usd"],
        swept_at=row["swept_at"],
        remote_task=None if remote_task is None else _remote_task(remote_task),
        hops=row["hops"],
    )


def status_view(row: Row) -> StatusView:
    progress = row["progress"]
    return StatusView(
        row["seq"],
        row["model"],
        row["state"],
        row["priority"],
        None if progress is None else _progress(progress),
    )


def running(row: Row) -> Running:
    progress = row["progress"]
    return Running(row["model"], row["started_at"], None if progress is None else _progress(progress))


def lease_mark(row: Row) -> LeaseMark:
    return LeaseMark(RequestId(row["id"]), row["fence"], row["beat"], WorkerId(row["worker"]))


def key(row: Row) -> Key:
    return Key(
        id=KeyId(row["id"]),
        account=AccountId(row["account"]),
        name=row["name"],
        hash=row["hash"],
        hint=row["hint"],
        created_at=row["created_at"],
        revoked_at=row["revoked_at"],
    )


def file(row: Row) -> File:
    return File(
        id=FileId(row["id"]),
        account=AccountId(row["account"]),
        name=row["name"].decode(),
        key=row["key"],
        content_type=row["content_type"],
        size=row["size"],
        created_at=row["created_at"],
    )


def worker(row: Row) -> WorkerRecord:
    return WorkerRecord(
        id=WorkerId(row["id"]),
        host=row["host"],
        pid=row["pid"],
        slots=row["slots"],
        models=tuple(row["models"]),
        engine=row["engine"],
        owner=row["owner"],
        wake_port=row["wake_port"],
        beat=row["beat"],
        started_at=row["started_at"],
        remotes=_remotes(row["remotes"]),
    )
