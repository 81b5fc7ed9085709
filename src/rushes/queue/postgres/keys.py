"""API keys, with a short memory: every HTTP request looks one up."""

from collections.abc import Callable
from typing import Final

from rushes.queue.postgres import rows
from rushes.queue.postgres.connection import Database
from rushes.requests.record import Key

_REMEMBERED: Final = 4096


class KeyCache:
    """Found keys are remembered for ``seconds``; unknown ones are not, so that a new key works at once."""

    def __init__(self, database: Database, *, clock: Callable[[], float], seconds: float) -> None:
        self._database = database
        self._clock = clock
        self._seconds = seconds
        self._found: dict[bytes, tuple[float, Key]] = {}

    async def add(self, key: Key) -> None:
        values = (key.id, key.account, key.name, key.hash, key.hint, key.created_at, key.revoked_at)
        await self._database.rows("add_key", *values)

    async def find(self, hash_: bytes) -> Key | None:
        now = self._clock()
        known = self._found.get(hash_)
        if known is not None and now - known[0] < self._seconds:
            return known[1]
        row = await self._database.row("find_key", hash_, again=True)
        if row is None:
            return None
        if len(self._found) >= _REMEMBERED:
            self._found.clear()
        key = rows.key(row)
        self._found[hash_] = now, key
        return key

    async def all(self) -> list[Key]:
        return [rows.key(row) for row in await self._database.rows("list_keys", again=True)]

    async def revoke(self, id_or_name: str) -> Key | None:
        named = [rows.key(row) for row in await self._database.rows("keys_named", id_or_name, again=True)]
        fitting = [k for k in named if k.id == id_or_name] or [k for k in named if k.revoked_at is None]
        if len(fitting) > 1:
            raise ValueError(f"{len(fitting)} keys are named {id_or_name!r}: give the id")
        if not fitting:
            return None
        row = await self._database.row("revoke_key", fitting[0].id, again=True)
        self._found.clear()
        return rows.key(row)
