"""One request at a remote engine: handed over at most once, polled to its end, its outputs fetched and stored here.

What keeps it from being paid for twice is written down before each step that costs: "submitting" before it is sent,
the remote's own id before the first poll. Who takes the request up after a crash finds either, and goes on from
there.
"""

import asyncio
import contextlib
import shutil
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
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
    RemoteFile,
    RemoteInput,
    RemoteJob,
    RemoteRefused,
    RemoteUnavailable,
    SubmitUnknown,
    Underway,
)
from rushes.engines.remote.outputs import OutputNotFetched, conform, fetch_output
from rushes.errors import EngineError, ManifestError, MediaError, NotFound, StoreUnavailable
from rushes.media.fetch import FetchPolicy
from rushes.media.inspect import VideoInfo
from rushes.media.inspector import Inspector
from rushes.media.sniff import SNIFF_BYTES, sniff
from rushes.media.storage import Storage
from rushes.queue.base import Store
from rushes.requests.ids import RequestId
from rushes.requests.record import Failure, Lease, Progress, RemoteTask, Source
from rushes.worker.breaker import Breaker
from rushes.worker.inputs import input_path
from rushes.worker.lease import Held, Leases
from rushes.worker.outputs import cost_usd, discard_outputs, log_end, store_outputs, until_written

FIRST_POLL_SECONDS: Final = 0.05
_POLL_GROWTH: Final = 1.5
"""The first polls come quickly, for what is done at once; each pause is so much longer, up to the engine's own."""
_LONGEST_POLL: Final = 30.0
GIVE_UP_SECONDS: Final = 24 * 3600.0
"""A remote that has given no answer about a job for so long has lost it."""
_FRESH_ADDRESSES: Final = 5
"""How often a finished job is asked for other addresses of its outputs."""
_PAUSE: Final = 1.0
FAULTS_FREE: Final = 3
"""How often a request may meet a fault of a remote that takes others, until each time costs it an attempt."""
_REMEMBERED: Final = 4096


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
    """Which requests a remote could not even be given, though it took others: those may be at fault themselves."""

    def __init__(self) -> None:
        self._known: OrderedDict[RequestId, tuple[int, int]] = OrderedDict()
        """How often, and how many others had been taken by then."""

    def add(self, id_: RequestId, taken: int) -> int:
        """One more fault; how often it was this one's, for all that is known, while others went through."""
        times, before = self._known.pop(id_, (0, taken))
        times += taken > before
        self._known[id_] = (times, taken)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return times

    def __contains__(self, id_: object) -> bool:
        return id_ in self._known


async def run_errand(tools: Tools, engine: RemoteEngine, breaker: Breaker, lease: Lease) -> None:
    """See one lease to its end: an outcome, or back to the queue. Cancelled, it leaves all as it is: the request goes
    on from what was written down.
    """
    entry = tools.catalog.get(lease.request.model)
    if entry is None:
        await asyncio.sleep(_PAUSE)
        await until_written("release", lambda: tools.store.release(lease))
        return
    current = asyncio.current_task()

    def give_up() -> None:
        if current is not None:
            current.cancel()

    held = tools.leases.hold(lease, give_up)
    folder = tools.scratch / f"{lease.request.id}-{lease.fence}"
    try:
        await _Errand(tools, engine, breaker, held, entry.model).run(folder)
    except asyncio.CancelledError:
        if not held.lost:
            raise
    finally:
        if lease.request.remote_task is None:
            breaker.ended()
        tools.leases.drop(held)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


class _Errand:
    def __init__(self, tools: Tools, engine: RemoteEngine, breaker: Breaker, held: Held, model: Model) -> None:
        self._tools = tools
        self._store = tools.store
        self._engine = engine
        self._breaker = breaker
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
            produced, finished = await self._collect(job, finished)
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
            log.event("errand interrupted", request=self._lease.request.id, error=str(error))
            await asyncio.sleep(_PAUSE)
            await self._go_back()
        except Exception:
            log.event("errand failed", request=self._lease.request.id, traceback=traceback.format_exc())
            text = "The server made a mistake with this request. The operator finds it in the log."
            await self._fail(Failure("internal_error", text))

    # -- handing it over --------------------------------------------------------------------------------
    async def _prepare(self, folder: Path) -> RemoteJob:
        request = self._lease.request
        (folder / "out").mkdir(parents=True)
        values: dict[str, Any] = msgspec.json.decode(request.input)
        roles = {role: value for role, value in roles_of(self._model, values).items() if role not in FILE_ROLES}
        files = {name: await self._file(source, folder) for name, source in request.sources.items()}
        return RemoteJob(
            request_id=request.id,
            model=self._model,
            input=values,
            roles=roles,
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
            raise SubmitUnknown("the worker ended while it handed the request over")
        return await self._poll(job)

    async def _submit(self, job: RemoteJob) -> Finished | None:
        """The outcome, of a remote that answers with it; else None."""
        task = RemoteTask(self._engine.name, "submitting", self._tools.clock())
        await self._note(task)
        try:
            answer = await self._engine.submit(job)
        except EngineError:
            self._breaker.accepted()  # it is well, and has said what it thinks of this one
            raise
        except SubmitUnknown as unknown:
            self._breaker.failed("fault", time.monotonic(), why=unknown.why)
            raise
        self._breaker.accepted()
        if isinstance(answer, Finished):
            return answer
        await self._note(msgspec.structs.replace(task, phase="accepted", handle=answer.handle))
        request, remote = self._lease.request.id, self._engine.name
        log.event("remote took request", request=request, remote=remote, handle=answer.handle)
        return None

    async def _note(self, task: RemoteTask | None) -> None:
        written = await until_written("remote task", lambda: self._store.note(self._lease, task))
        if not written:
            handle = task.handle if task is not None else ""
            request, remote = self._lease.request.id, self._engine.name
            log.event("lease lost at a remote", request=request, remote=remote, handle=handle)
            self._held.lost = True
            raise asyncio.CancelledError
        self._task = task

    # -- waiting for it ---------------------------------------------------------------------------------
    async def _poll(self, job: RemoteJob) -> Finished | None:
        task = self._task
        assert task is not None
        pause, heard = FIRST_POLL_SECONDS, time.monotonic()
        while not await self._stops_within(pause):
            try:
                answer = await self._engine.poll(task.handle, job)
            except RemoteUnavailable as trouble:
                self._breaker.failed(
                    trouble.trouble, time.monotonic(), why=trouble.why, retry_after=trouble.retry_after
                )
                if time.monotonic() - heard > GIVE_UP_SECONDS:
                    text = f"{self._engine.name} has not answered for a day. What became of the request is unknown."
                    raise RemoteRefused("remote_lost", text, billed=True) from None
                pause = min(
                    _LONGEST_POLL, max(trouble.retry_after or 0.0, self._engine.poll_seconds, pause * 2)
                )
                continue
            heard = time.monotonic()
            self._breaker.answered()
            if isinstance(answer, Finished):
                return answer
            await self._underway(answer, task)
            pause = min(pause * _POLL_GROWTH, self._engine.poll_seconds)
            pause = min(_LONGEST_POLL, max(pause, answer.retry_after or 0.0))
        return None

    async def _underway(self, answer: Underway, task: RemoteTask) -> None:
        self._held.show(answer.progress, None)
        limit = self._model.time_limit
        if self._tools.clock() - task.submitted_at > limit:
            await self._engine.cancel(task.handle)
            text = f"{self._engine.name} took longer than {limit:g} seconds and was asked to stop."
            raise RemoteRefused("time_limit", text, billed=True)

    async def _stops_within(self, seconds: float) -> bool:
        """Wait so long; whether this worker stops."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._tools.stopping.wait()
        return self._tools.stopping.is_set()

    # -- its outputs ------------------------------------------------------------------------------------
    async def _collect(self, job: RemoteJob, finished: Finished) -> tuple[list[Produced], Finished]:
        """Fetch them all, from other addresses where those have expired. The last answer is the one that counts."""
        pause = _PAUSE
        for left in reversed(range(_FRESH_ADDRESSES)):
            try:
                return await self._files(job, finished), finished
            except OutputNotFetched as error:
                request, remote = job.request_id, self._engine.name
                log.event("output not fetched", request=request, remote=remote, error=error.message)
                handle = self._task.handle if self._task is not None else ""
                if not left or not (error.retryable or error.expired):
                    # It was made, and paid for: to have it made again is for the user to say.
                    raise RemoteRefused(error.reason, error.message, billed=True) from None
            await asyncio.sleep(pause)
            pause *= 2
            if handle:
                with contextlib.suppress(RemoteUnavailable):
                    again = await self._engine.poll(handle, job)
                    finished = again if isinstance(again, Finished) else finished
        raise AssertionError

    async def _files(self, job: RemoteJob, finished: Finished) -> list[Produced]:
        made = [await self._file_of(job, number, file) for number, file in enumerate(finished.files, 1)]
        if self._model.output not in [one.kind for one in made]:
            text = f"{self._engine.name} finished without {self._model.output}."
            raise RemoteRefused("remote_failed", text, billed=True)
        return made

    async def _file_of(self, job: RemoteJob, number: int, file: RemoteFile) -> Produced:
        fetched = await fetch_output(
            file,
            job.folder / "out" / f"{number}.file",
            engine_origin=self._engine.origin,
            headers=self._engine.headers(),
            policy=self._tools.policy,
        )
        path = fetched.path
        try:
            info = await self._tools.inspector.check(path, fetched.kind)
            if file.size is not None and info.kind == "image":
                await conform(path, file.size)
                return Produced(path, "image", "image/png", *file.size)
        except MediaError as error:
            name = self._engine.name
            log.event("output not usable", request=job.request_id, remote=name, error=error.message)
            text = f"{name} gave a file that cannot be read."
            raise OutputNotFetched(text, cause=error.reason, expired=False, retryable=False) from None
        if isinstance(info, VideoInfo):
            return Produced(
                path, "video", info.content_type, info.width, info.height, frames=info.frames, fps=info.fps
            )
        return Produced(path, "image", info.content_type, info.width, info.height)

    # -- the outcome ------------------------------------------------------------------------------------
    async def _succeed(self, job: RemoteJob, finished: Finished, produced: list[Produced]) -> None:
        outputs = await store_outputs(self._tools.storage, self._lease, produced)
        cost = finished.cost_usd if finished.cost_usd is not None else self._estimate(job)
        task = self._task
        assert task is not None
        await self._note(msgspec.structs.replace(task, cost_usd=cost))
        if cost is not None:
            await self._settle(cost)
        price = cost_usd(self._model, outputs)
        written = await until_written("outcome", lambda: self._store.succeed(self._lease, outputs, price))
        if not written:
            await discard_outputs(self._tools.storage, self._lease)
        seconds = time.monotonic() - self._began
        log_end(self._lease, self._engine.name, "succeeded" if written else "discarded", seconds=seconds)

    def _estimate(self, job: RemoteJob) -> float | None:
        try:
            table = remote_table(self._model, self._engine.kind)
        except ManifestError:
            return None
        return estimate_usd(table, self._model, job.roles) if table is not None else None

    async def _not_taken(self, trouble: RemoteUnavailable) -> None:
        """Nothing has happened there: somebody else may do it, or this remote later."""
        request, remote = self._lease.request.id, self._engine.name
        log.event(
            "remote took nothing", request=request, remote=remote, trouble=trouble.trouble, error=trouble.why
        )
        self._breaker.failed(
            trouble.trouble,
            time.monotonic(),
            why=trouble.why,
            model=self._model.id,
            retry_after=trouble.retry_after,
        )
        await self._note(None)
        await self._settle(0.0)
        id_ = self._lease.request.id
        if trouble.trouble == "fault" and self._tools.faults.add(id_, self._breaker.taken) > FAULTS_FREE:
            text = f"{self._engine.name} has a fault whenever it is given this request, and takes others."
            await self._lose(Failure("remote_fault", text))
            return
        await self._go_back()

    async def _unknown(self, why: str) -> None:
        name = self._engine.name
        log.event("remote may have request", request=self._lease.request.id, remote=name, error=why)
        text = (
            f"Whether {name} has taken this request is not known: {why}. It was not sent again, so that it is not "
            "paid for twice. Submit it again if it is still wanted."
        )
        await self._fail(Failure("remote_unknown", text))

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


def _content_type(path: Path) -> str:
    with path.open("rb") as file:
        found = sniff(file.read(SNIFF_BYTES))
    return found.content_type if found is not None else "application/octet-stream"
