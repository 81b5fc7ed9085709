"""Fixtures over both stores, for every suite."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from rushes.queue.base import Store
from support.postgres import PostgresServer, postgres_server
from support.stores import KINDS, Place, PostgresPlace, make_place


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """The server that tests share. One that a test kills is its own: ``postgres_server()``."""
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def suite_url(postgres: PostgresServer) -> str:
    return postgres.create_database()


@pytest_asyncio.fixture(params=KINDS)
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    """An empty database."""
    made = make_place(request.param, tmp_path, request)
    if isinstance(made, PostgresPlace):
        await made.clear()
    yield made
    await made.close()


@pytest_asyncio.fixture
async def store(place: Place) -> Store:
    """An opened handle on an empty database."""
    return await place.open()
