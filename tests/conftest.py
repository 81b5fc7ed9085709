"""Fixtures of all suites, and how they run side by side."""

import os
from pathlib import Path
from typing import Final

import pytest

pytest_plugins = ["support.store_fixtures"]

PROCESSES: Final = 2
"""That tests run in, side by side, each a file at a time; more have not been tried."""

# They and what they start share the cores: more threads of computing would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """None, which is this process alone, where files, tests or words are named: to start others would take longer."""
    whole = all(Path(argument).is_dir() for argument in config.args)
    return PROCESSES if whole and not config.option.keyword and config.option.capture != "no" else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first and those of the many short tests last, so that the processes end at the same time."""
    order = {"wan": -1, "unit": 1}
    items.sort(key=lambda item: order.get(item.path.parent.name, 0))
