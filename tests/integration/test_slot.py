"""One slot and its real child process, without a worker around it."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rushes.catalog.model import Model
from rushes.engines.base import Job
from rushes.errors import EngineError
from rushes.requests.record import Progress
from rushes.settings import Settings
from rushes.wiring import CHILD_SETTINGS, SLOT_COMMAND, encode_settings
from rushes.worker.slot import ChildLost, Slot
from support.server import TESTS

MODEL = Model("me/gated", "Gated", "", (), "image", (), (), Path("/models"), time_limit=60.0)


class Shown:
    """What was told of a job."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.previews: list[Path | None] = []
        self.news = asyncio.Event()

    def __call__(self, progress: Progress, preview: Path | None) -> None:
        self.stages.append(progress.stage)
        self.previews.append(preview)
        self.news.set()


def job(folder: Path, name: str, prompt: str) -> Job:
    output_dir = folder / name / "out"
    output_dir.mkdir(parents=True)
    return Job(name, 1, MODEL, {}, {"prompt": prompt}, {}, output_dir)


@asynccontextmanager
async def one_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str = "OverlappingEngine"
) -> AsyncIterator[Slot]:
    settings = Settings(data_dir=tmp_path / "data", engine=f"support.engines:{engine}")
    monkeypatch.setenv(CHILD_SETTINGS, encode_settings(settings))
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
    monkeypatch.setenv("RUSHES_TEST_GATES", str(tmp_path))
    slot = Slot(SLOT_COMMAND, 0, 60.0)
    await slot.ensure()
    try:
        yield slot
    finally:
        await slot.stop()


async def test_a_child_says_what_its_engine_can_do(tmp_path, monkeypatch) -> None:
    async with one_slot(tmp_path, monkeypatch) as slot:
        assert ("overlapping", 2) == (slot.engine, slot.lanes)
    async with one_slot(tmp_path, monkeypatch, "PromptEngine") as slot:
        assert ("prompt", 1) == (slot.engine, slot.lanes)


async def test_previews_are_told_with_the_progress(tmp_path, monkeypatch) -> None:
    async with one_slot(tmp_path, monkeypatch) as slot:
        shown = Shown()
        await slot.run(slot.take(), job(tmp_path, "a", "later preview soon begin"), shown)
        assert ["loading", "later", "previewed", "soon", "begun"] == shown.stages
        assert [None, None] == shown.previews[:2]
        assert tmp_path / "a" / "preview.png" == shown.previews[-1]


async def test_what_the_worker_acts_on_is_told_at_once(tmp_path, monkeypatch) -> None:
    """However soon after the last report: the first word of an end that is near, and of a beginning."""
    async with one_slot(tmp_path, monkeypatch) as slot:
        shown = Shown()
        await slot.run(slot.take(), job(tmp_path, "a", "later nearly started"), shown)
        assert ["loading", "later", "later", "later"] == shown.stages


async def test_a_job_nobody_wants_any_more_never_begins(tmp_path, monkeypatch) -> None:
    async with one_slot(tmp_path, monkeypatch) as slot:
        hand, shown = slot.take(), Shown()
        slot.abandon(hand, "lost")
        with pytest.raises(EngineError) as raised:
            await slot.run(hand, job(tmp_path, "a", "wait never"), shown)
        assert ("aborted", []) == (raised.value.reason, shown.stages)


async def test_a_job_is_aborted_and_the_slot_goes_on(tmp_path, monkeypatch) -> None:
    async with one_slot(tmp_path, monkeypatch) as slot:
        hand, shown = slot.take(), Shown()
        running = asyncio.create_task(slot.run(hand, job(tmp_path, "a", "wait never"), shown))
        await shown.news.wait()
        slot.abandon(hand, "lost")
        with pytest.raises(EngineError) as raised:
            await running
        slot.free(hand)
        assert "aborted" == raised.value.reason
        assert slot.is_fit()
        assert 1 == len(await slot.run(slot.take(), job(tmp_path, "b", "ok"), shown))


async def test_a_dead_child_takes_no_job(tmp_path, monkeypatch) -> None:
    async with one_slot(tmp_path, monkeypatch) as slot:
        await slot.kill("test")
        with pytest.raises(ChildLost) as raised:
            await slot.run(slot.take(), job(tmp_path, "a", "ok"), Shown())
        assert not raised.value.counted
        await slot.ensure()
        assert 1 == len(await slot.run(slot.take(), job(tmp_path, "b", "ok"), Shown()))


async def test_warm_is_the_model_of_the_newest_job_and_then_of_the_last_success(tmp_path, monkeypatch) -> None:
    async with one_slot(tmp_path, monkeypatch) as slot:
        assert slot.warm is None
        hand = slot.take()
        running = asyncio.create_task(slot.run(hand, job(tmp_path, "a", "wait gate"), Shown()))
        await asyncio.sleep(0)
        assert MODEL == slot.warm
        (tmp_path / "gate").touch()
        await running
        assert MODEL == slot.warm
        failing = slot.take()
        with pytest.raises(EngineError):
            await slot.run(failing, job(tmp_path, "b", "fail"), Shown())
        slot.free(failing)
        assert slot.warm is None
