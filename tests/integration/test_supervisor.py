"""The supervisor keeps what it can alive, says what it cannot, and leaves the living their folders."""

import asyncio
import sys
from pathlib import Path

import pytest

from rushes.cli import supervisor
from rushes.cli.supervisor import Child, owned_directory
from rushes.errors import DirectoryInUse, SettingsError
from rushes.media.scratch import clean_scratch, scratch_folder, scratch_root
from rushes.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data")


async def until(condition, seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_process_that_cannot_be_made_is_tried_again(settings: Settings, tmp_path: Path) -> None:
    child = Child("worker", ["owner"], settings, ())
    made = tmp_path / "made"
    command = child._command
    child._command = [str(tmp_path / "no such program")]
    keeping = asyncio.create_task(child.keep())
    await asyncio.sleep(0.2)
    assert not keeping.done()
    child._command = [command[0], "-c", f"open({str(made)!r}, 'w'); import time; time.sleep(60)"]
    await until(made.exists)
    await child.stop(5)
    await keeping


async def test_a_gateway_that_never_comes_up_is_given_up_and_a_worker_is_not(
    settings: Settings, monkeypatch
) -> None:
    monkeypatch.setattr(supervisor, "_BACKOFF", (0.01,))
    for role, given_up in (("gateway", True), ("worker", False)):
        child = Child(role, [], settings, ())
        child._command = [sys.executable, "-c", "raise SystemExit(3)"]
        keeping = asyncio.create_task(child.keep())
        _, waiting = await asyncio.wait([keeping], timeout=10 if given_up else 1.5)
        if given_up:
            with pytest.raises(SettingsError, match="does not start"):
                await keeping
        else:
            assert waiting
            await child.stop(5)
            keeping.cancel()


def test_a_data_directory_has_one_owner_and_a_lasting_id(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    refused = pytest.raises(DirectoryInUse, match="another server")
    with owned_directory(folder) as first, refused, owned_directory(folder):
        pass
    with owned_directory(tmp_path / "data") as again:
        assert first == again


def test_only_folders_of_the_dead_are_cleared_away(settings: Settings) -> None:
    dead = scratch_root(settings) / "work-dead"
    dead.mkdir()
    dead.with_suffix(".lock").touch()
    orphan = scratch_root(settings) / "work-orphan"
    orphan.mkdir()
    with scratch_folder(settings) as alive:
        (alive / "file").write_text("x")
        clean_scratch(settings)
        assert (alive / "file").exists()
        assert {alive.name, f"{alive.name}.lock"} == {path.name for path in scratch_root(settings).iterdir()}
    assert [] == list(scratch_root(settings).iterdir())
