"""Taking requests for remotes, and what that costs. Each runs inside one transaction of the writer, so that nobody
else takes or spends between its steps.
"""

import sqlite3
from typing import Any, Literal

from rushes.queue.base import Take
from rushes.queue.spending import fits, utc_day
from rushes.queue.sqlite import rows
from rushes.queue.sqlite.database import sql
from rushes.requests.ids import WorkerId
from rushes.requests.record import Lease

Taken = tuple[Any, ...] | Literal["gone", "account", "budget", "key_budget"]


def take(connection: sqlite3.Connection, take: Take, now: float) -> Taken:
    """The row as it is then; see :meth:`rushes.queue.base.Store.take`."""
    found = connection.execute(sql("takeable"), {"id": take.id}).fetchone()
    if found is None:
        return "gone"
    seq, key_id, running = found
    if 0 < take.account_limit <= running:
        return "account"
    at = {"id": take.id, "remote": take.remote, "day": utc_day(now), "key_id": key_id}
    if take.budget_usd and not fits(_amount(connection, "spent", at), take.reserve_usd, take.budget_usd):
        return "budget"
    if take.key_budget_usd and not fits(
        _amount(connection, "spent_by_key", at), take.reserve_usd, take.key_budget_usd
    ):
        return "key_budget"
    values = {"worker": take.worker, "engine": take.remote, "now": now, "seq": seq}
    row: tuple[Any, ...] = connection.execute(sql("claim"), values).fetchone()
    connection.execute(sql("reserve"), at | {"fence": rows.fence_of(row), "usd": take.reserve_usd})
    return row


def resume(
    connection: sqlite3.Connection, worker: WorkerId, wanted: dict[str, str], now: float
) -> tuple[Any, ...] | None:
    """The row as it is then; see :meth:`rushes.queue.base.Store.resume`."""
    found = connection.execute(sql("resume_head"), wanted).fetchone()
    if found is None:
        return None
    values = {"worker": worker, "now": now, "seq": found[0]}
    row: tuple[Any, ...] = connection.execute(sql("resume"), values).fetchone()
    return row


def settle(connection: sqlite3.Connection, lease: Lease, remote: str, usd: float, now: float) -> None:
    """See :meth:`rushes.queue.base.Store.settle`."""
    values = {"id": lease.request.id, "fence": lease.fence, "remote": remote, "usd": usd}
    settled = connection.execute(sql("settle"), values).rowcount
    if not settled and usd:
        connection.execute(sql("settle_unreserved"), values | {"day": utc_day(now)})


def _amount(connection: sqlite3.Connection, name: str, values: dict[str, Any]) -> float:
    (usd,) = connection.execute(sql(name), values).fetchone()
    return float(usd)
