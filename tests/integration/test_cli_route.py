"""`rushes models route`: what it says of a store as workers leave it."""

import asyncio
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rushes.cli.exits import Exit
from rushes.cli.main import execute
from rushes.queue.base import Claim, Take
from rushes.queue.sqlite.store import SqliteStore
from rushes.requests.ids import AccountId, KeyId, RequestId, WorkerId, new_request_id
from rushes.requests.record import Lease, NewRequest, Output, RemoteState, RemoteTask, WorkerRecord
from rushes.service.keys import new_key

CLIP = "studio/clip"
OTHER = "studio/other"
MANIFEST = """
name = "Clip"
description = "A clip."
output = "video"
required = ["prompt"]

[[inputs]]
name = "prompt"
title = "Prompt"
type = "string"
role = "prompt"

[[inputs]]
name = "frames"
title = "Frames"
type = "integer"
role = "frames"
minimum = 1
maximum = 640
default = 80

[[inputs]]
name = "fps"
title = "FPS"
type = "integer"
role = "fps"
minimum = 1
maximum = 60
default = 16

[engines.fal]
model = "fal-ai/clip"
price_usd = 0.02
price_unit = "second"

[engines.fal.input]
prompt = "prompt"
"""
ROUTES = """
[[routes]]
engine = "local"

[[routes]]
engine = "fal"
queue_eta_above = 60
"""
ME = WorkerId("me")
PAST = 1_700_000_000.0


class Place:
    """A server's folder, and what was done to its store. ``now`` is the store's clock while it is written to."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.now = time.time()
        self._capfd = capfd

    def manifest(self, routes: str = "", id_: str = CLIP) -> None:
        model = self.folder / "models" / id_
        model.mkdir(parents=True, exist_ok=True)
        (model / "model.toml").write_text(f"{MANIFEST}{routes}")
        (model / "sample.json").write_text('{"prompt": "waves"}')

    def write(self, *steps: Callable[[SqliteStore], Awaitable[Any]]) -> list[Any]:
        async def run() -> list[Any]:
            store = SqliteStore(self.folder / "rushes-data" / "rushes.db", clock=lambda: self.now)
            await store.open()
            try:
                return [await step(store) for step in steps]
            finally:
                await store.close()

        return asyncio.run(run())

    def explain(self, *words: str) -> dict[str, Any]:
        assert 0 == execute(["models", "route", CLIP, "--json", *words])
        found: dict[str, Any] = json.loads(self._capfd.readouterr().out)
        return found

    def told(self, *words: str) -> tuple[str, str]:
        """What people read, on both outputs."""
        assert 0 == execute(["models", "route", CLIP, *words])
        printed = self._capfd.readouterr()
        return printed.out, printed.err


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Place:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("RUSHES_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RUSHES_MODELS_DIR", str(tmp_path / "models"))
    place = Place(tmp_path, capfd)
    place.manifest(ROUTES)
    place.manifest(id_=OTHER)
    return place


def worker(id_: str = ME, engine: str = "wan", slots: int = 1, **given: Any) -> Callable[[SqliteStore], Any]:
    """A live worker of this process joins."""
    record = WorkerRecord(
        id=WorkerId(id_),
        host=given.pop("host", platform.node()),
        pid=given.pop("pid", os.getpid()),
        slots=slots,
        models=given.pop("models", (CLIP, OTHER)),
        engine=engine,
        owner="",
        **given,
    )
    return lambda store: store.join(record)


def fal(**given: Any) -> tuple[RemoteState, ...]:
    told = {"name": "fal", "kind": "fal", "models": (CLIP,), "capacity": 2, **given}
    return (RemoteState(**told),)


def submit(model: str = CLIP, account: str = "default", key: str = "k") -> Callable[[SqliteStore], Any]:
    async def run(store: SqliteStore) -> RequestId:
        id_ = new_request_id()
        values = json.dumps({"prompt": "waves", "frames": 80, "fps": 16}).encode()
        await store.submit(NewRequest(id_, AccountId(account), KeyId(key), model, values, {}))
        return id_

    return run


async def claim(store: SqliteStore) -> Lease:
    lease = await store.claim(Claim(ME, (CLIP, OTHER), engine="wan"))
    assert lease is not None
    return lease


def ran(place: Place, seconds: float, count: int = 3) -> None:
    """So many requests took so long, a while ago."""

    async def one(store: SqliteStore) -> None:
        await submit()(store)
        lease = await claim(store)
        place.now += seconds
        output = Output("outputs/x/1/1.mp4", "video", "video/mp4", 10, 64, 64, 80, 16.0, 5.0)
        assert await store.succeed(lease, [output], None)

    place.now = PAST
    place.write(worker(), *[one] * count)
    place.now = time.time()


def at_fal(key: str = "k", usd: float = 0.1) -> Callable[[SqliteStore], Any]:
    """A request that runs at fal."""

    async def run(store: SqliteStore) -> Lease:
        taken = await store.take(Take(await submit(key=key)(store), ME, "fal", reserve_usd=usd))
        assert isinstance(taken, Lease)
        assert await store.note(taken, RemoteTask("fal", "accepted", time.time(), handle="r-1"))
        return taken

    return run


# where a request would go


def test_without_a_worker_it_would_wait(place: Place) -> None:
    place.write()
    out, _ = place.told()
    assert "It would wait: no worker is live. `rushes serve` or `rushes worker` starts one." in out
    assert [] == place.explain()["workers"]


def test_a_free_slot_takes_it_at_once(place: Place) -> None:
    place.write(worker(remotes=fal()))
    found = place.explain()
    assert ("It would run on wan at once.", "local") == (found["conclusion"], found["engine"])
    assert [True, False] == [one["takes"] for one in found["routes"]]


def test_a_remote_takes_what_would_wait_too_long(place: Place) -> None:
    ran(place, 100.0)
    place.write(worker(remotes=fal()), submit(), claim, submit(), submit())
    found = place.explain()
    assert "fal" == found["engine"]
    assert (1, 0, 2, 3, 100.0) == tuple(
        found["line"][name] for name in ("slots", "free", "waiting", "position", "request_seconds")
    )
    assert 290 < found["line"]["eta_seconds"] <= 300
    assert found["conclusion"].startswith("It would run on fal: ")
    assert "takes over above 60 s; about $0.10" in found["conclusion"]
    out, err = place.told()
    lines = out.splitlines()
    assert ["route", "engine", "only", "takes", "it", "why"] == lines[0].split()
    assert ["1", "local", "no"] == lines[1].split()[:3]
    assert "2      fal     wait above 60 s  yes" in lines[2]
    assert found["conclusion"] in lines
    assert "" == err


def test_what_would_begin_soon_stays(place: Place) -> None:
    ran(place, 10.0)
    place.write(worker(remotes=fal()), submit(), claim, submit())
    found = place.explain()
    assert "local" == found["engine"]
    assert found["conclusion"].startswith("It would wait for a slot of wan, as number 2 in the line: about ")


def test_nobody_knows_how_long_the_first_one_takes(place: Place) -> None:
    place.write(worker(remotes=fal()), submit(), claim)
    expected = "It would wait for a slot of wan, as number 1 in the line: nobody knows yet how long one takes."
    assert expected == place.explain()["conclusion"]


def test_other_models_of_the_same_slots_are_in_the_line(place: Place) -> None:
    ran(place, 100.0)
    place.write(worker(remotes=fal()), submit(OTHER), claim, submit(OTHER))
    assert (2, "fal") == ((found := place.explain())["line"]["position"], found["engine"])


def test_without_routes_a_remote_has_what_nothing_here_serves(place: Place) -> None:
    place.manifest()
    place.write(worker(slots=0, models=(), remotes=fal()))
    found = place.explain()
    assert ("fal", ["local", "fal"]) == (found["engine"], [one["engine"] for one in found["routes"]])


def test_the_draft_engine_is_named_as_what_it_is(place: Place) -> None:
    place.manifest()
    place.write(worker(engine="draft"))
    found = place.explain()
    assert "draft" == found["engine"]
    what = "the draft engine, which makes drafts for testing, not generations."
    assert f"It would run at once on {what}" == found["conclusion"]
    place.write(submit(), claim, submit())
    assert f"It would wait, as number 2 in the line, for {what}" == place.explain()["conclusion"]


def test_routes_may_let_drafts_go_first(place: Place) -> None:
    """Slots take what they may: a free one for drafts does not wait for another engine's."""
    place.manifest('[[routes]]\nengine = "local"\n[[routes]]\nengine = "draft"\n')
    place.write(worker(), worker("d", engine="draft"))
    assert "It would run on wan at once." == place.explain()["conclusion"]
    place.write(submit(), claim)
    expected = "It would run on the draft engine at once: the routes name it, and wan has no free slot."
    assert expected == place.explain()["conclusion"]


# why not


@pytest.mark.parametrize("state", ["open", "held"])
def test_a_remote_that_is_not_asked_is_told_with_the_reason(place: Place, state: str) -> None:
    until = time.time() + 3600
    place.write(worker(slots=0, models=(), remotes=fal(state=state, until=until, why="fal does not answer")))
    found = place.explain()
    assert None is found["engine"]
    assert found["conclusion"].startswith("It would wait: ")
    assert "fal does not answer" in found["conclusion"]
    out, _ = place.told()
    clock = time.strftime("%H:%M:%S", time.localtime(until))
    assert f"{state} until {clock}  fal does not answer" in out.splitlines()[-1]


def test_a_pause_that_is_over_holds_nobody(place: Place) -> None:
    place.write(worker(slots=0, models=(), remotes=fal(state="held", until=time.time() - 1, why="429")))
    found = place.explain()
    assert ("fal", "ready") == (found["engine"], found["remotes"][0]["state"])


def test_a_full_remote_takes_nothing(place: Place) -> None:
    place.write(worker(slots=0, models=(), remotes=fal()), at_fal())
    assert ("fal", 1) == ((found := place.explain())["engine"], found["remotes"][0]["capacity"])
    place.write(at_fal())
    found = place.explain()
    assert (None, 0) == (found["engine"], found["remotes"][0]["capacity"])
    assert "fal has as many as it may" in found["conclusion"]


@pytest.mark.parametrize(
    ("told", "places"),
    [
        ({}, 4),
        ({"state": "open", "until": 1.0}, 4),  # until a moment that is over
        ({"state": "open"}, 2),
        ({"models": (OTHER,)}, 2),
    ],
)
def test_places_of_several_workers_add_up(place: Place, told: dict[str, Any], places: int) -> None:
    """Of those that could take it."""
    place.write(
        worker(slots=0, models=(), remotes=fal()), worker("w2", slots=0, models=(), remotes=fal(**told))
    )
    found = place.explain()
    assert (places, "ready", ["me", "w2"]) == (
        found["remotes"][0]["capacity"],
        found["remotes"][0]["state"],
        found["workers"],
    )


def test_a_worker_that_is_full_is_not_helped_by_one_whose_breaker_is_open(place: Place) -> None:
    broken = fal(state="open", why="fal does not answer")
    place.write(
        worker(slots=0, models=(), remotes=fal(capacity=1)),
        worker("w2", slots=0, models=(), remotes=broken),
        at_fal(),
    )
    assert "fal has as many as it may" in place.explain()["conclusion"]


def test_that_it_has_waited_for_a_free_slot_only_workers_know(place: Place) -> None:
    """A request that came now would not have: the free slot counts."""
    place.now = PAST
    place.write(submit())
    place.now = time.time()
    place.write(worker(slots=3, remotes=fal()))
    assert ("local", 2) == ((found := place.explain())["engine"], found["line"]["position"])


def test_budgets_of_the_day_and_of_the_key(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    _, record = new_key("studio", "films")
    place.write(
        worker(slots=0, models=(), remotes=fal()),
        lambda store: store.add_key(record),
        at_fal(record.id, usd=0.15),
    )
    monkeypatch.setenv("RUSHES_BUDGET_USD_PER_DAY", "1")
    monkeypatch.setenv("RUSHES_KEY_BUDGET_USD_PER_DAY", "0.2")
    found = place.explain()
    assert ("fal", 0.85, 0.2, None) == (
        found["engine"],
        pytest.approx(found["budget_left_usd"]),
        found["key_budget_left_usd"],
        found["key"],
    )
    out, _ = place.told("--key", "studio")
    assert "the key's budget has $0.05 left" in out
    assert "Left of the day's budget: $0.85.\nLeft of the key's budget: $0.05.\n" in out
    assert None is place.explain("--key", record.id)["engine"]
    monkeypatch.setenv("RUSHES_BUDGET_USD_PER_DAY", "0.1")
    assert "the day's budget is spent" in place.explain()["conclusion"]


def test_the_input_decides_what_it_costs(place: Place) -> None:
    place.manifest('[[routes]]\nengine = "fal"\nmax_cost_usd = 0.3\n')
    place.write(worker(slots=0, models=(), remotes=fal()))
    assert ("fal", 0.1) == ((found := place.explain())["engine"], found["remotes"][0]["cost_usd"])
    dear = place.explain("-i", "frames=320")
    assert (None, 0.4, 320) == (dear["engine"], dear["remotes"][0]["cost_usd"], dear["input"]["frames"])
    assert "max_cost_usd is $0.30" in dear["conclusion"]


def test_accounts_and_keys_of_them(place: Place) -> None:
    place.manifest('[[routes]]\nengine = "fal"\naccounts = ["film-*"]\n')
    _, record = new_key("noir", "film-noir")
    place.write(worker(slots=0, models=(), remotes=fal()), lambda store: store.add_key(record))
    assert "not for the account default" in place.explain()["conclusion"]
    assert "fal" == place.explain("--account", "film-noir")["engine"]
    by_key = place.explain("--key", "noir")
    assert ("fal", "film-noir", record.id) == (by_key["engine"], by_key["account"], by_key["key"])


def test_an_account_that_has_as_many_as_it_may(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_ACCOUNT_LIMIT", "1")
    place.write(worker(slots=2, remotes=fal()), submit(), claim)
    found = place.explain()
    expected = "the account default has 1 request running, as many as it may (RUSHES_ACCOUNT_LIMIT)."
    assert (f"It would wait: {expected}", None) == (found["conclusion"], found["engine"])
    assert "local" == place.explain("--account", "other")["engine"]


# who is there


def test_a_worker_of_this_machine_that_has_ended_counts_no_more(place: Place) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    place.write(worker(pid=child.pid), worker("afar", host="another-machine", pid=child.pid, slots=2))
    found = place.explain()
    assert (["afar"], ["me"], 2) == (found["workers"], found["workers_gone"], found["line"]["slots"])
    _, err = place.told()
    assert f"The worker me of this machine has ended (there is no process {child.pid}): left out." in err


def test_remotes_that_only_the_settings_name(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_REMOTES", "fal, box=openai-video@http://10.0.0.5:8000/v1")
    place.write(worker(remotes=fal()))
    assert ["box"] == place.explain()["remotes_without_worker"]
    assert "RUSHES_REMOTES names box, and no live worker has told of it." in place.told()[1]


# what cannot be explained


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["no/such"], Exit.NOT_FOUND, "There is no model 'no/such'"),
        ([CLIP, "--key", "nobody"], Exit.NOT_FOUND, "There is no live key 'nobody'"),
        ([CLIP, "-i", "frames=9999"], Exit.INVALID, "frames"),
        ([CLIP, "-i", "frames=many"], Exit.USAGE, "must be a whole number"),
        ([CLIP, "-i", "frame=3"], Exit.INVALID, "did you mean frames"),
    ],
)
def test_what_makes_no_sense_is_refused(
    place: Place, capfd: pytest.CaptureFixture[str], words: list[str], status: Exit, said: str
) -> None:
    place.write()
    assert status == execute(["models", "route", *words])
    assert said in capfd.readouterr().err


def test_a_revoked_key_and_two_of_one_name(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    keys = [new_key("twin")[1] for _ in range(2)]
    gone = new_key("gone")[1]
    place.write(
        *(lambda store, key=key: store.add_key(key) for key in (*keys, gone)),
        lambda store: store.revoke_key("gone"),
    )
    assert Exit.NOT_FOUND == execute(["models", "route", CLIP, "--key", "gone"])
    assert Exit.USAGE == execute(["models", "route", CLIP, "--key", "twin"])
    assert "2 keys are named 'twin'; give the id of one" in capfd.readouterr().err


def test_no_store_is_made(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    assert Exit.USAGE == execute(["models", "route", CLIP])
    assert "there is no store at" in capfd.readouterr().err
    assert not (place.folder / "rushes-data").exists()


def test_the_page_shows_what_is_printed(place: Place) -> None:
    ran(place, 100.0)
    place.write(worker(remotes=fal(capacity=8)), submit(), claim, submit(), submit())
    page = Path(__file__).parents[2] / "docs" / "remotes.md"
    _, _, rest = page.read_text().partition("$ rushes models route studio/clip\n")
    assert place.told()[0] == rest.partition("```")[0]
