"""Fixtures of all suites."""

pytest_plugins = ["support.store_fixtures"]
