"""One slot and its real child process, without a worker around it."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
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


ENGINES = '''
import math
import os
import threading
import time
from pathlib import Path

from rushes.errors import EngineError
from rushes.requests.record import Progress
from support.engines import OverlappingEngine, Produced, PromptEngine

FOLDER = Path(os.environ["RUSHES_TEST_GATES"])


class Elsewhere(OverlappingEngine):
    """Has something running elsewhere, which only an abort ends."""

    def _obey(self, job, report, aborted):
        report(Progress(0.5, "running"))
        (FOLDER / f"{job.request_id}.running").touch()
        aborted.wait()
        (FOLDER / f"{job.request_id}.running").unlink()
        raise EngineError("aborted", "Aborted.")


class Silent(PromptEngine):
    """One lane, and never a word."""

    def run(self, job, report):
        time.sleep(3600)


class Odd(PromptEngine):
    """What an engine's libraries may come up with."""

    def run(self, job, report):
        report(Progress(math.nan, "nowhere"))
        report(Progress(0.5, "half a \\udc80"))
        if job.roles["prompt"] == "name":
            path = job.output_dir / "\\udc80.png"
            path.write_bytes(b"x")
            return [Produced(path, "image", "image/png", 1, 1)]
        raise EngineError("odd", "half a \\ud83d", node="\\udc80", field="a\\udc80")
'''


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


def job(folder: Path, name: str, prompt: str, limit: float = 60.0) -> Job:
    output_dir = folder / name / "out"
    output_dir.mkdir(parents=True)
    model = msgspec.structs.replace(MODEL, time_limit=limit)
    return Job(name, 1, model, {}, {"prompt": prompt}, {}, output_dir)


@asynccontextmanager
async def one_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str = "OverlappingEngine"
) -> AsyncIterator[Slot]:
    (tmp_path / "slot_engines.py").write_text(ENGINES)
    name = engine if ":" in engine else f"support.engines:{engine}"
    settings = Settings(data_dir=tmp_path / "data", engine=name)
    monkeypatch.setenv(CHILD_SETTINGS, encode_settings(settings))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(tmp_path)]), prepend=os.pathsep)
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


# -- time limits ------------------------------------------------------------------------------------------
async def test_no_time_runs_while_a_job_only_waits_for_an_older_one(tmp_path, monkeypatch) -> None:
    async with one_slot(tmp_path, monkeypatch) as slot:
        older = asyncio.create_task(slot.run(slot.take(), job(tmp_path, "a", "begin wait gate"), Shown()))
        await asyncio.sleep(0)
        hand = slot.take()
        waiting = asyncio.create_task(slot.run(hand, job(tmp_path, "b", "wait never", limit=0.2), Shown()))
        await asyncio.wait([waiting], timeout=1.0)
        assert hand.clock is None
        assert not waiting.done()
        (tmp_path / "gate").touch()
        assert 1 == len(await older)
        # Its turn now; still it does not begin.
        with pytest.raises(EngineError) as raised:
            await waiting
        assert ("not_begun", True, True) == (
            raised.value.reason,
            raised.value.retryable,
            raised.value.began,
        )
        assert slot.is_fit()


async def test_the_time_of_a_job_begins_anew_when_it_begins(tmp_path, monkeypatch) -> None:
    async with one_slot(tmp_path, monkeypatch) as slot:
        hand, shown = slot.take(), Shown()
        running = asyncio.create_task(
            slot.run(hand, job(tmp_path, "a", "later wait gate begin wait gate2"), shown)
        )
        while "later" not in shown.stages:
            await asyncio.sleep(0.01)
        assert hand.clock is not None
        waiting_until = hand.clock.when()
        (tmp_path / "gate").touch()
        while "begun" not in shown.stages:
            await asyncio.sleep(0.01)
        assert hand.clock.when() > waiting_until
        (tmp_path / "gate2").touch()
        assert 1 == len(await running)
        assert hand.clock.cancelled()


@pytest.mark.parametrize(
    ("engine", "prompt"), [("OverlappingEngine", "begin wait never"), ("slot_engines:Silent", "")]
)
async def test_what_has_begun_fails_at_its_time_limit(tmp_path, monkeypatch, engine, prompt) -> None:
    """With one lane, that is at once."""
    async with one_slot(tmp_path, monkeypatch, engine) as slot:
        with pytest.raises(EngineError) as raised:
            await slot.run(slot.take(), job(tmp_path, "a", prompt, limit=0.2), Shown())
        assert ("time_limit", False) == (raised.value.reason, raised.value.retryable)


# -- farewells --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seconds", [0.0, 2.0])
async def test_what_runs_elsewhere_is_ended_before_a_slot_stops(tmp_path, monkeypatch, seconds) -> None:
    async with one_slot(tmp_path, monkeypatch, "slot_engines:Elsewhere") as slot:
        names = ("a", "b")
        tasks = [asyncio.create_task(slot.run(slot.take(), job(tmp_path, name, ""), Shown())) for name in names]
        while not all((tmp_path / f"{name}.running").exists() for name in names):
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await slot.stop(seconds)
        assert [] == list(tmp_path.glob("*.running"))


async def test_a_child_that_hears_no_abort_is_ended_when_its_slot_stops(tmp_path, monkeypatch) -> None:
    async with one_slot(tmp_path, monkeypatch) as slot:
        running = asyncio.create_task(
            slot.run(slot.take(), job(tmp_path, "a", "begin deaf wait never"), Shown())
        )
        while not (tmp_path / "never.here").exists():
            await asyncio.sleep(0.01)
        await slot.stop(0.0)
        assert not slot.is_fit()
        assert slot._child is not None
        assert slot._child.status is not None
        with pytest.raises(ChildLost):
            await running


# -- odd words --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("prompt", "reason", "words"),
    [("", "odd", "half a ?"), ("name", "engine_error", "The engine made a file whose name is not UTF-8.")],
)
async def test_what_cannot_be_sent_does_not_end_the_child(tmp_path, monkeypatch, prompt, reason, words) -> None:
    async with one_slot(tmp_path, monkeypatch, "slot_engines:Odd") as slot:
        for name in ("a", "b"):
            shown = Shown()
            with pytest.raises(EngineError) as raised:
                await slot.run(slot.take(), job(tmp_path, name, prompt), shown)
            assert (reason, words) == (raised.value.reason, raised.value.message)
            assert "half a ?" == shown.stages[-1]
            assert slot.is_fit()


STARTING = """
import json, sys, time

silent = "silent" in sys.argv
until = time.monotonic() + 4
while time.monotonic() < until or silent:
    print(json.dumps({"type": "starting", "message": "still at it"}), flush=True)
    time.sleep(3600 if silent else 0.05)
print(json.dumps({"type": "ready", "engine": "late"}), flush=True)
sys.stdin.read()
"""


async def test_a_start_may_take_long_where_it_gets_on(tmp_path) -> None:
    """Each word gives it the whole time anew."""
    (tmp_path / "child.py").write_text(STARTING)
    slot = Slot((sys.executable, str(tmp_path / "child.py")), 0, 1.5)
    await slot.ensure()
    assert "late" == slot.engine
    await slot.stop()


async def test_a_start_that_falls_silent_is_ended(tmp_path) -> None:
    (tmp_path / "child.py").write_text(STARTING)
    slot = Slot((sys.executable, str(tmp_path / "child.py"), "silent"), 0, 0.5)
    with pytest.raises(ChildLost) as raised:
        await slot.ensure()
    assert "engine_start_failed" == raised.value.code
