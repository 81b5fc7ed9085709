"""The group-commit writer: one thread, one connection; whatever arrived meanwhile shares one transaction.

A commit costs one flush to the disk however many operations it holds, so grouping is what makes durable
submits cheap. A result is handed out only after the commit: what was acknowledged is on the disk.
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from rushes.errors import RushesError, StoreUnavailable
from rushes.queue.sqlite import database

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], Any]
_GROUP_LIMIT: Final = 256


class _Job:
    __slots__ = ("error", "future", "operation", "result", "wakes")

    def __init__(self, operation: Operation, future: "asyncio.Future[Any]", *, wakes: bool) -> None:
        self.operation, self.future, self.wakes = operation, future, wakes
        self.result: Any = None
        self.error: BaseException | None = None


class Writer:
    """Runs operations in the order of their arrival. ``after_commit`` is called on the writer's thread with
    its connection after each transaction that holds an operation which wakes others.
    """

    def __init__(self, path: Path, after_commit: Callable[[sqlite3.Connection], None]) -> None:
        self._path = path
        self._after_commit = after_commit
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._connection = database.connect(path)
        database.migrate(self._connection, path)
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="rushes-sqlite-writer", daemon=True)
        self._thread.start()

    def run(self, operation: Callable[[sqlite3.Connection], T], *, wakes: bool = False) -> "asyncio.Future[T]":
        """Have ``operation`` run inside a transaction; the future ends after the commit.

        The operation may run twice (when a neighbour in its group failed): it must touch nothing but the
        connection. Raises StoreUnavailable when the transaction could not be committed.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        if self._closed:
            future.set_exception(StoreUnavailable("the store is closed"))
            return future
        self._jobs.put(_Job(operation, future, wakes=wakes))
        return future

    def close(self) -> None:
        """Commit what was handed in, then end the thread and the connection."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            self._thread.join()
            self._connection.close()

    def _work(self) -> None:
        running = True
        while running:
            first = self._jobs.get()
            group: list[_Job] = []
            while first is not None:
                group.append(first)
                if len(group) == _GROUP_LIMIT or self._jobs.empty():
                    break
                first = self._jobs.get()
            running = first is not None
            if group:
                self._commit(group)

    def _commit(self, group: list[_Job]) -> None:
        error, culprit = self._transaction(group)
        if culprit is not None and len(group) > 1:
            # One bad operation must not take its neighbours down: each alone.
            for job in group:
                job.error, _ = self._transaction([job])
        elif error is not None:
            # The database itself cannot be written to: the same for all, and not tried for each again.
            for job in group:
                job.error = error
        if any(job.wakes and job.error is None for job in group):
            # Where this fails, the slow poll of the sleepers finds the work a moment later.
            with contextlib.suppress(sqlite3.Error, OSError):
                self._after_commit(self._connection)
        # Where the loop is gone, everybody who could read the results is gone too.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_deliver, group)

    def _transaction(self, group: list[_Job]) -> tuple[BaseException | None, _Job | None]:
        """Why it failed, and the operation that made it fail, where it was one."""
        connection = self._connection
        culprit = None
        try:
            database.begin(connection)
            for job in group:
                culprit = job
                job.result = job.operation(connection)
            culprit = None
            connection.execute("COMMIT")
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            return _as_store_error(error), culprit
        return None, None


def _as_store_error(error: BaseException) -> BaseException:
    if isinstance(error, RushesError):
        return error
    if isinstance(error, sqlite3.OperationalError):
        return StoreUnavailable(f"the database cannot be written to: {error}")
    return error


def _deliver(group: list[_Job]) -> None:
    for job in group:
        if job.future.done():
            continue
        if job.error is not None:
            job.future.set_exception(job.error)
        else:
            job.future.set_result(job.result)
