from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.app import App, running_app


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[App]:
    async with running_app(tmp_path / "data") as running:
        yield running
