"""Random lives of requests, on both stores, against a model in plain Python."""

import asyncio
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from rushes.queue.base import Beat, Claim, Store, Take
from rushes.requests.ids import KeyId, RequestId, WorkerId
from rushes.requests.record import Failure, Lease, LeaseMark, Progress, RemoteTask, Source
from rushes.requests.states import STATES, TERMINAL, State, after_lost_attempt, move
from support.stores import Place, SqlitePlace, make_place, new_request

T = TypeVar("T")
WHY = Failure("worker_lost", "m")
BOUND = 30.0
URL = {"a": Source("url", "https://e.org/a", "image")}
models = st.lists(st.sampled_from("abc"), unique=True, max_size=3).map(tuple)
workers = st.sampled_from(["w1", "w2", "w3"]).map(WorkerId)
remotes = st.sampled_from(["fal", "box"])
addresses = st.tuples(remotes, st.sampled_from(["", "here"]))


@dataclass
class Known:
    """What the model knows of one request. ``order`` stands for seq."""

    order: int
    account: str
    model: str
    priority: int
    inputs: str
    age: float = 0.0
    state: State = "queued"
    attempt: int = 0
    fence: int = 0
    beat: int = 0
    worker: str | None = None
    progress: Progress | None = None
    task: RemoteTask | None = None

    @property
    def line(self) -> tuple[int, int]:
        return -self.priority, self.order

    @property
    def waits(self) -> bool:
        """For a claim or a take."""
        return self.state == "queued" and self.inputs == "ready" and self.task is None

    @property
    def may_cost(self) -> bool:
        return self.state == "running" or self.task is not None

    @property
    def leased(self) -> bool:
        return self.state == "running" or (self.state == "queued" and self.inputs == "fetching")

    def holds(self, lease: Lease) -> bool:
        return self.leased and lease.fence == self.fence

    def end(self, event: Any) -> None:
        self.state = move(self.state, event)
        self.worker = None

    def requeue(self, *, counted: bool, limit: int = 0) -> State:
        """What losing (or giving back) the lease does."""
        if self.inputs == "fetching":
            self.inputs = "pending"
        elif counted and self.task is None:
            self.state = move(self.state, after_lost_attempt(self.attempt, limit))
        else:
            self.state = move(self.state, "release")
            self.attempt -= 1
        self.worker = None
        if self.state == "queued":
            self.progress = None
        return self.state


@dataclass
class Cost:
    """What the model knows of one time that a request was taken for a remote. ``usd`` is in hundredths."""

    request: RequestId
    key: str
    remote: str
    day: int
    usd: int
    fence: int
    """Of the lease that reserved it, then of the one that settled it."""
    settled: bool = False


class QueueMachine(RuleBasedStateMachine):
    place: ClassVar[Place]
    runner: ClassVar[asyncio.Runner]
    store: ClassVar[Store]

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[RequestId, Known] = {}
        self.leases: list[Lease] = []
        self.marks: list[LeaseMark] = []
        self.ended: dict[RequestId, State] = {}
        self.costs: list[Cost] = []
        self.run(self.place.clear())

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    def teardown(self) -> None:
        """Also what was reserved for nothing: it is in no sum."""
        if hasattr(self, "costs"):
            reserved = sorted((c.request, c.remote) for c in self.costs if not c.settled)
            assert reserved == sorted(self.run(self.place.reserved()))

    def of(self, lease: Lease) -> Known:
        return self.known[lease.request.id]

    # -- rules ------------------------------------------------------------------------------------------
    @rule(
        account=st.sampled_from("xyz"),
        model=st.sampled_from("abc"),
        priority=st.integers(-1, 1),
        fetch=st.sampled_from([False, False, False, True]),
        count=st.integers(1, 3),
    )
    def submit(self, account: str, model: str, priority: int, fetch: bool, count: int) -> None:
        for _ in range(count):
            new = new_request(
                account=account, key=account, model=model, priority=priority, sources=URL if fetch else {}
            )
            self.run(self.store.submit(new))
            self.known[new.id] = Known(
                len(self.known), account, model, priority, "pending" if fetch else "ready"
            )

    @rule()
    def grow_old(self) -> None:
        self.run(self.place.age(2 * BOUND))
        for known in self.known.values():
            known.age += 2 * BOUND

    @rule(
        worker=workers,
        among=models,
        warm=st.sampled_from([(), ("a",), ("b",), ("z",), ("a", "z", "b")]),
        limit=st.sampled_from([0, 0, 1, 2]),
    )
    def claim(self, worker: WorkerId, among: tuple[str, ...], warm: tuple[str, ...], limit: int) -> None:
        expected = self.next_of(among, warm, limit)
        lease = self.run(
            self.store.claim(Claim(worker, among, warm, warm_age_bound=BOUND, account_limit=limit, engine="e"))
        )
        assert expected == (lease and lease.request.id)
        if lease is not None:
            self.start(lease)

    def start(self, lease: Lease) -> None:
        known = self.of(lease)
        known.state = move(known.state, "claim")
        known.attempt += 1
        known.worker, known.progress = lease.worker, None
        assert (known.attempt, known.task) == (lease.request.attempt, lease.request.remote_task)
        self.hold(lease, "run")

    def hold(self, lease: Lease, purpose: str) -> None:
        known = self.of(lease)
        assert purpose == lease.purpose
        assert lease.fence > known.fence
        known.fence = lease.fence
        self.leases.append(lease)

    def next_of(self, among: tuple[str, ...], warm: tuple[str, ...], limit: int) -> RequestId | None:
        """The order of claims: the heads of the models' lines; the aged, then the warm, then the rest."""
        running = Counter(k.account for k in self.known.values() if k.state == "running")
        heads: dict[str, tuple[RequestId, Known]] = {}
        for id_, known in sorted(self.known.items(), key=lambda item: item[1].line):
            full = limit > 0 and running[known.account] >= limit
            if known.waits and known.model in among and not full:
                heads.setdefault(known.model, (id_, known))

        def rank(known: Known) -> int:
            if not warm:
                return 2
            return 0 if known.age > BOUND else 1 if known.model in warm else 2

        best = min(heads.values(), key=lambda head: (rank(head[1]), head[1].line), default=None)
        return None if best is None else best[0]

    @rule(among=models, limit=st.integers(0, 4))
    def waiting(self, among: tuple[str, ...], limit: int) -> None:
        line = sorted((k.line, id_) for id_, k in self.known.items() if k.waits and k.model in among)
        parts: Counter[tuple[str, str]] = Counter()
        expected = []
        for _, id_ in line:
            parts[part := (self.known[id_].account, self.known[id_].model)] += 1
            if parts[part] <= limit:
                expected.append(id_)
        assert expected == [r.id for r in self.run(self.store.waiting(among, limit))]

    def today(self) -> int:
        """As the store has it: in SQLite's tests the clock is ahead, in PostgreSQL's the requests are old."""
        return int(self.place._clock() // 86400) if isinstance(self.place, SqlitePlace) else 0

    def spent(self, key: str | None = None) -> int:
        return sum(c.usd for c in self.costs if c.day == self.today() and key in (None, c.key))

    @precondition(lambda self: self.known)
    @rule(
        data=st.data(),
        worker=workers,
        remote=remotes,
        usd=st.integers(0, 30),
        budget=st.sampled_from([0, 0, 20, 60]),
        key_budget=st.sampled_from([0, 0, 20, 40]),
        limit=st.sampled_from([0, 0, 1, 2]),
    )
    def take(
        self,
        data: st.DataObject,
        worker: WorkerId,
        remote: str,
        usd: int,
        budget: int,
        key_budget: int,
        limit: int,
    ) -> None:
        waiting = [id_ for id_, known in self.known.items() if known.waits]
        id_ = data.draw(st.sampled_from(waiting * 3 + list(self.known)))
        known, today = self.known[id_], self.today()

        def fits(used: int, most: int) -> bool:
            return most == 0 or (used < most and used + usd <= most)

        running = sum(k.state == "running" and k.account == known.account for k in self.known.values())
        expected = (
            "gone"
            if not known.waits
            else "account"
            if 0 < limit <= running
            else "budget"
            if not fits(self.spent(), budget)
            else "key_budget"
            if not fits(self.spent(known.account), key_budget)
            else None
        )
        answer = self.run(
            self.store.take(Take(id_, worker, remote, usd / 100, budget / 100, key_budget / 100, limit))
        )
        assert expected == (None if isinstance(answer, Lease) else answer)
        if isinstance(answer, Lease):
            self.costs.append(Cost(id_, known.account, remote, today, usd, answer.fence))
            self.start(answer)

    @rule(worker=workers, among=models, at=st.lists(addresses, unique=True, max_size=3))
    def resume(self, worker: WorkerId, among: tuple[str, ...], at: list[tuple[str, str]]) -> None:
        held = [
            id_
            for id_, k in self.known.items()
            if k.state == "queued" and k.task and k.model in among
            if k.task.phase == "submitting" or (k.task.remote, k.task.place) in at
        ]
        lease = self.run(self.store.resume(worker, at, among))
        assert (held or [None])[0] == (lease and lease.request.id)
        if lease is not None:
            task, engine = lease.request.remote_task, lease.request.engine
            assert task is not None
            assert task.phase == "submitting" or task.remote == engine
            self.start(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), at=addresses, phase=st.sampled_from([None, "submitting", "accepted", "accepted"]))
    def note(self, data: st.DataObject, at: tuple[str, str], phase: Any) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        known = self.of(lease)
        task = RemoteTask(at[0], phase, 1.5, "handle", at[1]) if phase else None
        runs = known.holds(lease) and known.state == "running"
        assert runs == self.run(self.store.note(lease, task))
        if runs:
            known.task = task

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(list(self.known)))
        known = self.known[id_]
        waits = known.state == "queued" and known.task is not None
        assert waits == self.run(self.store.abandon(id_, WHY))
        if waits:
            known.state = move(known.state, "refuse")

    @rule(among=st.lists(workers, unique=True, max_size=2))
    def running(self, among: list[WorkerId]) -> None:
        local = [k for k in self.known.values() if k.state == "running" and not k.task and k.worker in among]
        found = self.run(self.store.running(among))
        assert [(k.model, k.progress) for k in local] == [(r.model, r.progress) for r in found]

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), remote=remotes, usd=st.integers(0, 30), times=st.integers(1, 2))
    def settle(self, data: st.DataObject, remote: str, usd: int, times: int) -> None:
        """By the holder of the latest lease, ended or not, or of one that was lost."""
        lease = data.draw(st.sampled_from(self.leases))
        for _ in range(times):
            self.run(self.store.settle(lease, remote, usd / 100))
        known, id_ = self.of(lease), lease.request.id
        if lease.fence != known.fence:
            return
        latest = [c for c in self.costs if (c.request, c.remote) == (id_, remote)][-1:]
        if latest and (not latest[0].settled or latest[0].fence == lease.fence or known.task):
            latest[0].usd, latest[0].fence, latest[0].settled = usd, lease.fence, True
        elif usd:
            today = self.today()
            self.costs.append(Cost(id_, known.account, remote, today, usd, lease.fence, settled=True))

    @rule(worker=workers, among=models, limit=st.integers(0, 3))
    def claim_inputs(self, worker: WorkerId, among: tuple[str, ...], limit: int) -> None:
        expected = [
            id_
            for id_, k in self.known.items()
            if k.state == "queued" and k.inputs == "pending" and k.model in among
        ][:limit]
        leases = self.run(self.store.claim_inputs(worker, among, limit))
        assert expected == [lease.request.id for lease in leases]
        for lease in leases:
            known = self.of(lease)
            known.inputs, known.worker = "fetching", worker
            self.hold(lease, "inputs")

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), how=st.sampled_from(["succeed", "fail", "ready", "refuse", "lose", "release"]))
    def answer(self, data: st.DataObject, how: str) -> None:
        """By the holder of a lease that may be stale, and of either purpose."""
        lease = data.draw(st.sampled_from(self.leases))
        known = self.of(lease)
        held = known.holds(lease)
        runs = held and known.state == "running"
        fetches = held and known.state == "queued"
        match how:
            case "succeed":
                assert runs == self.run(self.store.succeed(lease, [], 0.5))
                if runs:
                    known.end("succeed")
            case "fail":
                assert runs == self.run(self.store.fail(lease, WHY))
                if runs:
                    known.end("fail")
            case "ready":
                assert fetches == self.run(self.store.inputs_ready(lease, URL))
                if fetches:
                    known.inputs, known.worker = "ready", None
            case "refuse":
                assert fetches == self.run(self.store.refuse(lease, WHY))
                if fetches:
                    known.end("refuse")
            case "lose":
                limit = data.draw(st.integers(1, 3))
                expected = known.requeue(counted=True, limit=limit) if held else None
                assert expected == self.run(self.store.lose(lease, WHY, limit))
            case _:
                if held:
                    known.requeue(counted=False)
                assert held == self.run(self.store.release(lease))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), fraction=st.sampled_from([None, 0.25, 0.5]))
    def beat(self, data: st.DataObject, fraction: float | None) -> None:
        chosen = data.draw(
            st.lists(st.sampled_from(self.leases), min_size=1, max_size=3, unique_by=lambda x: x.request.id)
        )
        progress = None if fraction is None else Progress(fraction, "sampling")
        lost = set()
        for lease in chosen:
            known = self.of(lease)
            if known.holds(lease):
                known.beat += 1
                known.progress = progress or known.progress
            else:
                lost.add(lease.request.id)
        assert lost == self.run(
            self.store.renew([Beat(lease.request.id, lease.fence, progress) for lease in chosen])
        )

    @rule()
    def look(self) -> None:
        """As a reaper does: remember the marks, for an `expire` that comes later."""
        self.marks = self.run(self.store.leases())
        live = {(id_, k.fence, k.worker) for id_, k in self.known.items() if k.leased}
        assert live == {(m.id, m.fence, m.worker) for m in self.marks}
        self.seen = {m.id: self.known[m.id].beat for m in self.marks}

    @precondition(lambda self: self.marks)
    @rule(limit=st.integers(1, 3))
    def expire(self, limit: int) -> None:
        due = [
            known
            for mark in self.marks
            if (known := self.known[mark.id]).leased
            and known.fence == mark.fence
            and known.beat == self.seen[mark.id]
        ]
        assert len(due) == self.run(self.store.expire(self.marks, WHY, limit))
        for known in due:
            known.requeue(counted=True, limit=limit)

    @rule(worker=workers, buried=st.booleans(), limit=st.integers(1, 3))
    def worker_ends(self, worker: WorkerId, buried: bool, limit: int) -> None:
        held = [k for k in self.known.values() if k.leased and k.worker == worker]
        call = self.store.bury(worker, WHY, limit) if buried else self.store.leave(worker)
        assert len(held) == self.run(call)
        for known in held:
            known.requeue(counted=buried, limit=limit)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(list(self.known)))
        known = self.known[id_]
        if known.state == "queued" and known.task is None:
            known.end("cancel")
        expected = "cancelled" if known.state == "cancelled" else "not_cancellable"
        assert expected == self.run(self.store.cancel(id_, None))

    @precondition(lambda self: self.known)
    @rule(data=st.data(), among=st.none() | models)
    def position(self, data: st.DataObject, among: tuple[str, ...] | None) -> None:
        id_ = data.draw(st.sampled_from(list(self.known)))
        known = self.known[id_]
        view = self.run(self.store.status(id_, None))
        assert view is not None
        assert (known.state, known.progress) == (view.state, view.progress)
        ahead = sum(
            k.state == "queued" and k.line < known.line and (among is None or k.model in among)
            for k in self.known.values()
        )
        assert 1 + ahead == self.run(self.store.position(view, among))

    # -- invariants -------------------------------------------------------------------------------------
    @invariant()
    def the_store_is_as_the_model(self) -> None:
        stored = {r.id: r for r in self.run(self.store.list_requests(limit=1000))}
        assert list(self.known) == list(stored)[::-1], "nothing is lost, the order of arrival is kept"
        for id_, known in self.known.items():
            row = stored[id_]
            assert (known.state, known.attempt, known.worker) == (row.state, row.attempt, row.worker)
            assert known.task == row.remote_task
            assert (known.state in TERMINAL) == (row.finished_at is not None)
            if known.state == "queued":
                assert known.inputs == row.inputs
            if id_ in self.ended:
                assert self.ended[id_] == row.state, "an outcome is for ever"
            elif row.state in TERMINAL:
                self.ended[id_] = row.state

    @invariant()
    def spending_agrees(self) -> None:
        """What is reserved for a request that has no task goes with its lease."""
        self.costs = [c for c in self.costs if c.settled or self.known[c.request].may_cost]
        keys = (None, "x", "y", "z")
        stored = [self.run(self.store.spent(key and KeyId(key))) for key in keys]
        assert [self.spent(key) for key in keys] == [round(usd * 100) for usd in stored]

    @invariant()
    def counts_agree(self) -> None:
        states = Counter(k.state for k in self.known.values())
        assert {state: states[state] for state in STATES} == self.run(self.store.counts())


@pytest.mark.parametrize(("kind", "examples"), [("sqlite", 250), ("postgres", 60)])
def test_random_lives(kind: str, examples: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    place = make_place(kind, tmp_path, request)
    with asyncio.Runner() as runner:
        store = runner.run(place.open())

        class Machine(QueueMachine):
            pass

        Machine.place, Machine.runner, Machine.store = place, runner, store
        try:
            run_state_machine_as_test(
                Machine,
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=40,
                    deadline=None,
                    derandomize=True,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(place.close())
