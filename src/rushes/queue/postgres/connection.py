"""Connections to PostgreSQL: a pool, bounds in time for everything, and one way to say "unavailable".

Every trouble that a later try may mend becomes StoreUnavailable; a statement that is wrong stays what it is.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import asyncpg

from rushes.errors import SettingsError, StoreUnavailable
from rushes.queue.postgres.queries import migrations, sql

T = TypeVar("T")

LOST: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,  # "connection is closed", "pool is closing"
    asyncpg.exceptions.OperatorInterventionError,  # shut down, crashed, starting up, cancelled
)
"""What is raised when a connection was lost or a time bound passed: whether it was done is not known."""
REFUSED: Final = (
    asyncpg.exceptions.InsufficientResourcesError,  # disk full, too many connections
    asyncpg.exceptions.PostgresSystemError,  # the server's own input or output failed
    asyncpg.exceptions.ReadOnlySQLTransactionError,
    asyncpg.exceptions.InvalidAuthorizationSpecificationError,
    asyncpg.exceptions.InvalidCatalogNameError,
    asyncpg.exceptions.TransactionRollbackError,  # deadlock, serialisation
)
"""What is raised when the server answered and has done nothing."""
UNAVAILABLE: Final = (*LOST, *REFUSED)

MIGRATION_LOCK: Final = 0x72757368
"""The advisory lock under which the schema is brought up to date: "rush" in ASCII."""


def unavailable(error: BaseException) -> StoreUnavailable:
    return StoreUnavailable(f"PostgreSQL cannot be used now: {str(error) or type(error).__name__}")


class Database:
    """A pool of connections to one database. ``timeout`` bounds every statement, in seconds."""

    def __init__(self, url: str, *, connections: int, timeout: float) -> None:
        self._url = url
        self._connections = connections
        self._timeout = timeout
        self._pool: asyncpg.Pool | None = None

    async def connect(self) -> Any:
        """One connection outside of the pool."""
        return await asyncpg.connect(self._url, **self._options())

    async def open(self) -> None:
        try:
            self._pool = await asyncpg.create_pool(
                self._url,
                min_size=1,
                max_size=self._connections,
                init=_prepare,
                reset=_nothing,
                **self._options(),
            )
            async with self._lent() as connection:
                await migrate(connection)
        except UNAVAILABLE as error:
            await self.close()
            raise unavailable(error) from error
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            await asyncio.wait_for(pool.close(), self._timeout)
        except UNAVAILABLE:
            pool.terminate()

    async def rows(self, name: str, *values: Any, again: bool = False) -> list[Any]:
        """The rows of ``sql/<name>.sql``; see :meth:`use` for ``again``."""
        text = sql(name)

        async def fetch(connection: Any) -> list[Any]:
            found: list[Any] = await connection.fetch(text, *values)
            return found

        return await self.use(fetch, again=again)

    async def row(self, name: str, *values: Any, again: bool = False) -> Any:
        """The first row, or None."""
        found = await self.rows(name, *values, again=again)
        return found[0] if found else None

    async def use(self, action: Callable[[Any], Awaitable[T]], *, again: bool = False) -> T:
        """Run an action on a connection. With ``again``, once more on a fresh one where the first was lost:
        for actions that do no harm when done twice. Raises StoreUnavailable.
        """
        try:
            return await self._use(action)
        except ValueError:  # asyncpg's own InterfaceError for a value that does not fit its column
            raise
        except UNAVAILABLE as error:
            # A server that is not there, or that let the time pass, would not do better at once.
            if not again or isinstance(error, TimeoutError | ConnectionRefusedError):
                raise unavailable(error) from error
        try:
            return await self._use(action)
        except UNAVAILABLE as error:
            raise unavailable(error) from error

    async def _use(self, action: Callable[[Any], Awaitable[T]]) -> T:
        async with self._lent() as connection:
            return await action(connection)

    @asynccontextmanager
    async def _lent(self) -> AsyncIterator[Any]:
        pool = self._pool
        if pool is None:
            raise StoreUnavailable("The store is not open.")
        connection = await pool.acquire(timeout=self._timeout)
        try:
            yield connection
        except (TimeoutError, asyncio.CancelledError):
            # The server may be stuck in the statement: a connection in that state is not lent again, and
            # nobody waits for its cancellation.
            connection.terminate()
            raise
        finally:
            await pool.release(connection)

    def _options(self) -> dict[str, Any]:
        return {
            "timeout": self._timeout,
            "command_timeout": self._timeout,
            "server_settings": {"application_name": "rushes"},
        }


async def migrate(connection: Any, steps: Sequence[tuple[int, str, str]] | None = None) -> None:
    """Apply the migrations that are missing, all or none, while others wait.

    Raises SettingsError where the database is of a newer Rushes: waiting would not help.
    """
    steps = migrations() if steps is None else steps
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", MIGRATION_LOCK)
        if await connection.fetchval("SELECT to_regclass('migrations') IS NULL"):
            await connection.execute(
                "CREATE TABLE migrations (number integer PRIMARY KEY, name text NOT NULL, "
                "applied_at timestamptz NOT NULL DEFAULT now())"
            )
        done = await connection.fetchval("SELECT coalesce(max(number), 0) FROM migrations")
        newest = steps[-1][0]
        if done > newest:
            raise SettingsError(
                f"The database has schema {done}, this Rushes knows schema {newest}: "
                "it belongs to a newer version. Upgrade Rushes here, or use another database."
            )
        for number, name, text in steps:
            if number > done:
                await connection.execute(text)
                await connection.execute("INSERT INTO migrations (number, name) VALUES ($1, $2)", number, name)


async def _prepare(connection: Any) -> None:
    """Two things that no statement here may depend on the server's defaults or luck for.

    What is acknowledged has to survive a crash, also where the server does not wait for the disk by default.
    And the planner's statistics of a queue are always old (it was empty a minute ago), so it may take a scan
    and a sort for cheap where an index holds the order: measured 172 ms instead of 1 ms for a claim.
    """
    await connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false) "
        "WHERE current_setting('synchronous_commit') = 'off'"
    )
    await connection.execute(
        "SELECT set_config(name, 'off', false) FROM unnest(ARRAY["
        "'enable_seqscan', 'enable_hashjoin', 'enable_mergejoin', 'jit']) AS s (name)"
    )


async def _nothing(_connection: Any) -> None:
    """Statements here leave nothing behind in a session, so giving it back needs no round trip."""
