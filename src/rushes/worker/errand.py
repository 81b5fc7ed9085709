"""One request at a remote engine: handed over at most once, polled to its end, its outputs fetched and stored here.

What keeps it from being paid for twice is written down before each step that costs: "submitting" before it is sent,
the remote's own id before the first poll. Who takes the request up after a crash finds either, and goes on from
there.
"""

import asyncio
import contextlib
import platform
import shutil
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from rushes import log
from rushes.catalog.load import Catalog
from rushes.catalog.model import FILE_ROLES, Model
from rushes.catalog.remotes import estimate_usd, remote_table
from rushes.catalog.roles import roles_of
from rushes.engines.base import Produced
from rushes.engines.remote.base import (
    Finished,
    RemoteEngine,
    RemoteInput,
    RemoteJob,
    RemoteRefused,
    RemoteUnavailable,
    SubmitUnknown,
    Underway,
)
from rushes.errors import EngineError, ManifestError, NotFound, StoreUnavailable
from rushes.media.addresses import parse_address
from rushes.media.fetch import FetchPolicy
from rushes.media.inspector import Inspector
from rushes.media.sniff import SNIFF_BYTES, sniff
from rushes.media.storage import Storage
from rushes.queue.base import Store
from rushes.requests.ids import RequestId
from rushes.requests.record import Failure, Lease, Output, Progress, RemoteTask, Source
from rushes.worker.breaker import Breaker
from rushes.worker.collecting import Collector
from rushes.worker.inputs import input_path
from rushes.worker.lease import Held, Leases
from rushes.worker.outputs import cost_usd, discard_outputs, log_end, store_outputs, until_written

FIRST_POLL_SECONDS: Final = 0.05
_POLL_GROWTH: Final = 1.5
"""The first polls come quickly, for what is done at once; each pause is so much longer, up to the engine's own."""
_LONGEST_POLL: Final = 30.0
"""Of what we choose ourselves; a remote may ask for more."""
GIVE_UP_SECONDS: Final = 24 * 3600.0
"""A remote that has given no answer about a job for so long has lost it."""
LOST_TIMES: Final = 5
LOST_SECONDS: Final = 60.0
"""A job is lost that a remote does not know so many times in a row, and for so long: one that was just taken may not
be everywhere yet, and what answers may be a part of it that has just started.
"""
_WRONG_TIMES: Final = 5
"""How often in a row an answer may be more than an engine can read."""
_PAUSE: Final = 5.0
"""After trouble of this machine's own."""
_STORE_ROUNDS: Final = 10
"""How often it is tried to store what nobody can be asked for again."""
FAULTS_FREE: Final = 3
"""How often a request may meet a fault of a remote that takes others, until each time costs it an attempt."""
FAULTS_ALONE: Final = 50
"""The same where there are no others: that may be the remote's fault, for hours."""
_REMEMBERED: Final = 4096
_CUT_SHORT: Final = "the worker ended before it was told"


class Tools(NamedTuple):
    """What every errand of a worker works with. ``clock`` gives seconds since the epoch."""

    store: Store
    storage: Storage
    catalog: Catalog
    leases: Leases
    inspector: Inspector
    policy: FetchPolicy
    scratch: Path
    attempt_limit: int
    stopping: asyncio.Event
    faults: "Faults"
    clock: Callable[[], float] = time.time


class Faults:
    """Which requests a remote could not even be given, though it is there: they may be at fault themselves."""

    def __init__(self) -> None:
        self._known: OrderedDict[RequestId, tuple[int, int, int]] = OrderedDict()
        """How often; how often of these while others went through; and how many had gone through by then."""

    def add(self, id_: RequestId, taken: int) -> bool:
        """One more fault; whether it counts against the request. ``taken``: how many the remote has taken, ever."""
        times, alone, before = self._known.pop(id_, (0, 0, taken))
        times, alone = times + (taken > before), alone + 1
        self._known[id_] = (times, alone, taken)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return times > FAULTS_FREE or alone > FAULTS_ALONE

    def __contains__(self, id_: object) -> bool:
        return id_ in self._known


def place_of(engine: RemoteEngine) -> str:
    """Where a remote is, see :class:`rushes.requests.record.RemoteTask`."""
    host = engine.origin.partition("://")[2].rpartition(":")[0] or engine.origin.partition("://")[2]
    address = parse_address(host.strip("[]"))
    near = host == "localhost" or (address is not None and address.is_loopback)
    return f"{engine.origin} on {platform.node()}" if near else engine.origin


async def run_errand(tools: Tools, engine: RemoteEngine, breaker: Breaker, lease: Lease, token: int) -> None:
    """See one lease to its end: an outcome, or back to the queue. Cancelled, it leaves all as it is: the request goes
    on from what was written down. ``token`` is the breaker's, 0 for a request that the remote has already.
    """
    current = asyncio.current_task()

    def give_up() -> None:
        if current is not None:
            current.cancel()

    held = tools.leases.hold(lease, give_up)
    folder = tools.scratch / f"{lease.request.id}-{lease.fence}"
    try:
        entry = tools.catalog.get(lease.request.model)
        if entry is None:
            await asyncio.sleep(_PAUSE)
            await until_written("release", lambda: tools.store.release(lease))
            return
        await _Errand(tools, engine, breaker, held, entry.model, token).run(folder)
    except asyncio.CancelledError:
        if not held.lost:
            raise
    finally:
        breaker.ended(token)
        tools.leases.drop(held)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


async def fail_submitting(tools: Tools, lease: Lease) -> None:
    """End a request whose submit a crash has cut short, at a remote that this worker need not have."""
    task = lease.request.remote_task
    assert task is not None
    failure = _unknown(task.remote, _CUT_SHORT)
    written = await until_written("failure", lambda: tools.store.fail(lease, failure))
    log_end(lease, task.remote, "failed" if written else "discarded", code=failure.code)


def _unknown(name: str, why: str) -> Failure:
    text = (
        f"Whether {name} has taken this request is not known: {why}. It was not sent again, so that it is not paid "
        "for twice. Submit it again if it is still wanted."
    )
    return Failure("remote_unknown", text)


class _Errand:
    def __init__(
        self, tools: Tools, engine: RemoteEngine, breaker: Breaker, held: Held, model: Model, token: int
    ) -> None:
        self._tools = tools
        self._store = tools.store
        self._engine = engine
        self._breaker = breaker
        self._token = token
        self._held = held
        self._lease = held.lease
        self._model = model
        self._task = held.lease.request.remote_task
        self._began = time.monotonic()

    async def run(self, folder: Path) -> None:
        """Every way out but cancellation ends with something written."""
        try:
            job = await self._prepare(folder)
            finished = await self._finished(job)
            if finished is None:
                await self._go_back()
                return
            self._show("fetching")
            collector = Collector(
                self._engine,
                self._model,
                job,
                self._handle,
                inspector=self._tools.inspector,
                policy=self._tools.policy,
            )
            produced, finished = await collector.collect(finished)
            self._show("storing")
            await self._succeed(job, finished, produced)
        except RemoteUnavailable as trouble:
            await self._not_taken(trouble)
        except SubmitUnknown as unknown:
            await self._unknown(unknown.why)
        except EngineError as error:
            await self._failed(error)
        except NotFound:
            text = "An input file is no longer in storage. Submit the request again."
            await self._fail(Failure("input_gone", text))
        except (StoreUnavailable, OSError) as error:
            # This machine's: its disk, its storage. What was handed over is polled by whoever comes next.
            self._log("errand interrupted", error=str(error))
            await asyncio.sleep(_PAUSE)
            await self._go_back()
        except Exception:
            self._log("errand failed", traceback=traceback.format_exc())
            text = "The server made a mistake with this request. The operator finds it in the log."
            await self._fail(Failure("internal_error", text))

    @property
    def _handle(self) -> str:
        return self._task.handle if self._task is not None else ""

    # -- handing it over --------------------------------------------------------------------------------
    async def _prepare(self, folder: Path) -> RemoteJob:
        request = self._lease.request
        (folder / "out").mkdir(parents=True)
        values: dict[str, Any] = msgspec.json.decode(request.input)
        files: dict[str, RemoteInput] = {}
        roles: dict[str, Any] = {}
        try:
            roles = roles_of(self._model, values)
        except ValueError:
            if self._task is None:  # else it is there, and the model may have changed since
                raise
        if self._task is None:
            files = {name: await self._file(source, folder) for name, source in request.sources.items()}
        return RemoteJob(
            request_id=request.id,
            model=self._model,
            input=values,
            roles={role: value for role, value in roles.items() if role not in FILE_ROLES},
            files=files,
            folder=folder,
            hops=request.hops,
        )

    async def _file(self, source: Source, folder: Path) -> RemoteInput:
        path = await input_path(self._tools.storage, source, folder)
        content_type = source.content_type or str(await asyncio.to_thread(_content_type, path))
        public = source.kind == "url" and source.value.startswith("https://")
        return RemoteInput(path=path, content_type=content_type, url=source.value if public else None)

    async def _finished(self, job: RemoteJob) -> Finished | None:
        """What came of it; None where this worker stops before there is anything."""
        if self._task is None:
            answer = await self._submit(job)
            if answer is not None:
                return answer
        elif self._task.phase == "submitting":
            raise SubmitUnknown(_CUT_SHORT)
        return await self._poll(job)

    async def _submit(self, job: RemoteJob) -> Finished | None:
        """The outcome, of a remote that answers with it; else None."""
        place = place_of(self._engine)
        task = RemoteTask(self._engine.name, "submitting", self._tools.clock(), place=place)
        await self._note(task)
        try:
            answer = await self._engine.submit(job)
        except RemoteRefused:
            self._breaker.accepted(self._token)  # it is well, and has said what it thinks of this one
            raise
        except SubmitUnknown as unknown:
            self._breaker.failed(self._token, "fault", time.monotonic(), why=unknown.why)
            raise
        except (StoreUnavailable, OSError) as error:
            self._log("submit interrupted", error=str(error))
            raise SubmitUnknown("this machine's own disk or network failed over it") from error
        self._breaker.accepted(self._token)
        if isinstance(answer, Finished):
            return answer
        await self._note(msgspec.structs.replace(task, phase="accepted", handle=answer.handle))
        self._log("remote took request")
        return None

    async def _note(self, task: RemoteTask | None) -> None:
        written = await until_written("remote task", lambda: self._store.note(self._lease, task))
        if not written:
            self._log("lease lost at a remote", handle=task.handle if task is not None else "")
            self._held.lost = True
            raise asyncio.CancelledError
        self._task = task

    # -- waiting for it ---------------------------------------------------------------------------------
    async def _poll(self, job: RemoteJob) -> Finished | None:
        pause, heard = FIRST_POLL_SECONDS, time.monotonic()
        lost: list[float] = []
        wrong, silent = 0, False
        while not await self._stops_within(pause):
            try:
                answer = await self._engine.poll(self._handle, job)
            except RemoteUnavailable as trouble:
                if trouble.trouble == "throttled":
                    self._breaker.throttled(time.monotonic(), why=trouble.why, retry_after=trouble.retry_after)
                if not silent:
                    silent = True
                    self._log("remote does not answer", trouble=trouble.trouble, error=trouble.why)
                    self._held.show(Progress(stage=f"no answer from {self._engine.name}"), None)
                if time.monotonic() - heard > GIVE_UP_SECONDS:
                    text = f"{self._engine.name} has not answered for a day. What became of the request is unknown."
                    raise RemoteRefused("remote_lost", text, billed=True) from None
                pause = self._later(pause * 2, trouble.retry_after)
                continue
            except EngineError as error:
                if error.reason != "remote_lost" or _is_lost(lost, time.monotonic()):
                    raise
                pause = self._later(pause * 2, None)
                continue
            except Exception:
                wrong += 1
                self._log("poll failed", traceback=traceback.format_exc())
                if wrong >= _WRONG_TIMES:
                    raise
                pause = self._later(pause * 2, None)
                continue
            if silent:
                silent = False
                self._log("remote answers again", seconds=round(time.monotonic() - heard, 1))
            heard, wrong = time.monotonic(), 0
            lost.clear()
            self._breaker.answered()
            if isinstance(answer, Finished):
                return answer
            await self._underway(answer)
            pause = max(min(pause * _POLL_GROWTH, self._engine.poll_seconds), answer.retry_after or 0.0)
        return None

    def _later(self, pause: float, retry_after: float | None) -> float:
        return max(min(_LONGEST_POLL, max(pause, self._engine.poll_seconds)), retry_after or 0.0)

    async def _underway(self, answer: Underway) -> None:
        self._held.show(answer.progress, None)
        limit = self._model.time_limit
        # By the time that passed here: the clocks of two machines need not agree.
        if time.monotonic() - self._began > limit:
            await self._engine.cancel(self._handle)
            text = f"{self._engine.name} took longer than {limit:g} seconds and was asked to stop."
            raise RemoteRefused("time_limit", text, billed=True)

    async def _stops_within(self, seconds: float) -> bool:
        """Wait so long; whether this worker stops."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._tools.stopping.wait()
        return self._tools.stopping.is_set()

    # -- the outcome ------------------------------------------------------------------------------------
    async def _succeed(self, job: RemoteJob, finished: Finished, produced: list[Produced]) -> None:
        outputs = await self._stored(produced)
        cost = finished.cost_usd if finished.cost_usd is not None else self._estimate(job)
        assert self._task is not None
        await self._note(msgspec.structs.replace(self._task, cost_usd=cost, engine=finished.engine))
        if cost is not None:
            await self._settle(cost)
        price = cost_usd(self._model, outputs)
        written = await until_written("outcome", lambda: self._store.succeed(self._lease, outputs, price))
        if not written:
            await discard_outputs(self._tools.storage, self._lease)
        seconds = time.monotonic() - self._began
        log_end(self._lease, self._engine.name, "succeeded" if written else "discarded", seconds=seconds)

    async def _stored(self, produced: Sequence[Produced]) -> list[Output]:
        """Into storage. What cannot be asked for again is tried for longer."""
        for left in reversed(range(1 if self._handle else _STORE_ROUNDS)):
            try:
                return await store_outputs(self._tools.storage, self._lease, produced)
            except (StoreUnavailable, OSError) as error:
                if self._handle:
                    raise
                self._log("outputs not stored", error=str(error))
                if left:
                    await asyncio.sleep(_PAUSE)
        text = "The outputs could not be stored: the operator's storage is full or cannot be reached."
        raise RemoteRefused("output_not_stored", text, billed=True)

    def _estimate(self, job: RemoteJob) -> float | None:
        try:
            table = remote_table(self._model, self._engine.kind)
        except ManifestError:
            return None
        return estimate_usd(table, self._model, job.roles) if table is not None else None

    async def _not_taken(self, trouble: RemoteUnavailable) -> None:
        """Nothing has happened there: somebody else may do it, or this remote later."""
        self._log("remote took nothing", trouble=trouble.trouble, error=trouble.why)
        self._breaker.failed(
            self._token,
            trouble.trouble,
            time.monotonic(),
            why=trouble.why,
            model=self._model.id,
            retry_after=trouble.retry_after,
        )
        await self._note(None)
        await self._settle(0.0)
        if trouble.trouble == "fault" and self._tools.faults.add(self._lease.request.id, self._breaker.taken):
            text = f"{self._engine.name} has a fault whenever it is given this request."
            await self._lose(Failure("remote_fault", text))
            return
        await self._go_back()

    async def _unknown(self, why: str) -> None:
        self._log("remote may have request", error=why)
        await self._fail(_unknown(self._engine.name, why))

    async def _failed(self, error: EngineError) -> None:
        billed = getattr(error, "billed", False)  # what we refuse ourselves was never sent
        if not billed:
            await self._settle(0.0)
        failure = Failure(error.reason, error.message, node=error.node, field=error.field)
        if not error.retryable or billed:  # what was paid for is not bought again
            await self._fail(failure)
            return
        await self._note(None)
        await self._lose(failure)

    async def _lose(self, failure: Failure) -> None:
        """Another attempt, here or elsewhere, up to the limit."""
        limit = self._tools.attempt_limit
        state = await until_written("loss", lambda: self._store.lose(self._lease, failure, limit))
        log_end(self._lease, self._engine.name, state or "discarded", code=failure.code)

    async def _fail(self, failure: Failure) -> None:
        written = await until_written("failure", lambda: self._store.fail(self._lease, failure))
        log_end(self._lease, self._engine.name, "failed" if written else "discarded", code=failure.code)

    async def _go_back(self) -> None:
        released = await until_written("release", lambda: self._store.release(self._lease))
        log_end(self._lease, self._engine.name, "given back" if released else "discarded")

    async def _settle(self, usd: float) -> None:
        await until_written("cost", lambda: self._store.settle(self._lease, self._engine.name, usd))

    def _show(self, stage: str) -> None:
        self._held.show(Progress(fraction=1.0, stage=stage), None)

    def _log(self, event: str, **fields: Any) -> None:
        log.event(event, request=self._lease.request.id, remote=self._engine.name, **fields)


def _is_lost(times: list[float], now: float) -> bool:
    """Whether a job that is unknown once more counts as lost. ``times``: the moments, in a row, at which it was."""
    times.append(now)
    return len(times) >= LOST_TIMES and now - times[0] >= LOST_SECONDS


def _content_type(path: Path) -> str:
    with path.open("rb") as file:
        found = sniff(file.read(SNIFF_BYTES))
    return found.content_type if found is not None else "application/octet-stream"
