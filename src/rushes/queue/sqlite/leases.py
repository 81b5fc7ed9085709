"""The ends of leases without an outcome. Each runs inside one transaction of the writer."""

import sqlite3
from collections.abc import Sequence

from rushes.queue.sqlite import rows
from rushes.queue.sqlite.database import sql
from rushes.requests.ids import RequestId, WorkerId
from rushes.requests.record import Failure, LeaseMark
from rushes.requests.states import State, after_lost_attempt


class Loss:
    """What losing a lease does; see :meth:`rushes.queue.base.Store.lose`. ``now`` dates a failure."""

    def __init__(self, failure: Failure, attempt_limit: int, now: float) -> None:
        self._failure = rows.encode(failure)
        self._attempt_limit = attempt_limit
        self._now = now

    def lose(
        self, connection: sqlite3.Connection, id_: RequestId, fence: int, beat: int | None = None
    ) -> State | None:
        """With ``beat``, only where that is still the lease's."""
        held = {"id": id_, "fence": fence}
        row = connection.execute(sql("lease"), held).fetchone()
        if row is None or (beat is not None and row[2] != beat):
            return None
        state, attempt, _, at_remote = row
        if state == "running" and not at_remote and after_lost_attempt(attempt, self._attempt_limit) == "fail":
            connection.execute(sql("fail"), held | {"failure": self._failure, "now": self._now})
            return "failed"
        connection.execute(sql("requeue"), held | {"uncount": 0})
        return "queued"

    def expire(self, connection: sqlite3.Connection, marks: Sequence[LeaseMark]) -> int:
        """See :meth:`rushes.queue.base.Store.expire`."""
        return sum(self.lose(connection, mark.id, mark.fence, mark.beat) is not None for mark in marks)

    def bury(self, connection: sqlite3.Connection, worker: WorkerId) -> int:
        """See :meth:`rushes.queue.base.Store.bury`."""
        marks = _leases_of(connection, worker)
        for mark in marks:
            self.lose(connection, mark.id, mark.fence)
        connection.execute(sql("leave"), (worker,))
        return len(marks)


def leave(connection: sqlite3.Connection, worker: WorkerId) -> int:
    """See :meth:`rushes.queue.base.Store.leave`."""
    marks = _leases_of(connection, worker)
    for mark in marks:
        connection.execute(sql("requeue"), {"id": mark.id, "fence": mark.fence, "uncount": 1})
    connection.execute(sql("leave"), (worker,))
    return len(marks)


def _leases_of(connection: sqlite3.Connection, worker: WorkerId) -> list[LeaseMark]:
    return [LeaseMark(*row) for row in connection.execute(sql("leases_of"), (worker,)).fetchall()]
