from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.postgres import PostgresServer
from support.server import Server

MakeServer = Callable[..., Server]


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> dict[str, str]:
    """Settings of an empty database of either kind; the ``postgres`` server is the suites' own."""
    if request.param == "sqlite":
        return {}
    server: PostgresServer = request.getfixturevalue("postgres")
    return {"database_url": server.create_database()}


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[MakeServer]:
    """Make servers; each is stopped, by force if need be, when the test ends."""
    made: list[Server] = []

    def make(name: str = "data", **settings: object) -> Server:
        server = Server(tmp_path / name, **settings)
        made.append(server)
        return server

    yield make
    for server in made:
        if server.process is not None and server.process.poll() is None:
            server.kill_everything()
