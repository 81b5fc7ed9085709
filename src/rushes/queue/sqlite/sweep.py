"""Retention's writes. Each runs inside one transaction of the writer, so no submit comes between its steps."""

import sqlite3
from collections.abc import Sequence

import msgspec

from rushes.queue.sqlite import rows
from rushes.queue.sqlite.database import sql
from rushes.requests.record import File, Request


def sweep(connection: sqlite3.Connection, before: float, limit: int, now: float) -> list[Request]:
    """See :meth:`rushes.queue.base.Store.sweep`."""
    values = {"before": before, "limit": limit, "now": now}
    swept = [rows.request(row) for row in connection.execute(sql("sweep"), values).fetchall()]
    keys = [(output.key,) for request in swept for output in request.outputs]
    connection.executemany(sql("keep_swept"), keys)
    return sorted(swept, key=lambda request: (request.finished_at, request.seq))


def sweep_files(connection: sqlite3.Connection, before: float, limit: int) -> list[File]:
    """See :meth:`rushes.queue.base.Store.sweep_files`."""
    values = {"before": before, "limit": limit}
    swept = [rows.file(row) for row in connection.execute(sql("sweep_files"), values).fetchall()]
    connection.executemany(sql("keep_swept"), [(file.key,) for file in swept])
    return sorted(swept, key=lambda file: (file.created_at, file.id))


def were_swept(connection: sqlite3.Connection, keys: Sequence[str]) -> set[str]:
    """Those of ``keys`` that retention has taken."""
    found = connection.execute(sql("were_swept"), (msgspec.json.encode(keys).decode(),)).fetchall()
    return {key for (key,) in found}
