"""The life of one job in ComfyUI: files up, graph in, its end awaited, files back, nothing left behind.

What ComfyUI's history says is the truth. Messages only make it be asked sooner, and show how far the work is.
"""

import asyncio
import contextlib
import time
import traceback
import uuid
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final

import msgspec

from rushes import log
from rushes.catalog.bindings import Binder
from rushes.catalog.model import FILE_ROLES
from rushes.catalog.workflow import Graph, Workflow
from rushes.engines.base import AHEAD_SECONDS, Job, Report
from rushes.engines.comfyui.events import ImageType
from rushes.engines.comfyui.failures import failed, is_out_of_memory, outcome, refused, without_values
from rushes.engines.comfyui.files import JobFiles
from rushes.engines.comfyui.line import PAUSE_SECONDS, Line, lost
from rushes.engines.comfyui.outputs import named_files
from rushes.engines.comfyui.patch import with_loras, with_prefix
from rushes.engines.comfyui.progress import Meter
from rushes.engines.comfyui.server import SILENCE_SECONDS, Refusal, Rejected, Unreachable
from rushes.errors import EngineError
from rushes.requests.record import Progress

_POLL_SECONDS: Final = 2.0
"""So long nothing may be heard of a prompt before it is asked for."""
_TELL_SECONDS: Final = 1.0
_TELL_LATER_SECONDS: Final = 0.02
"""Just after, not just before."""
_END_SECONDS: Final = 0.25
"""So long after it said how the work went ComfyUI should say that the prompt has ended."""
_FREE_SECONDS: Final = 0.25
"""ComfyUI frees memory between two prompts, at once where none waits: the next must not come before that."""
_FREE_TRIES: Final = 3
_PREVIEW_SECONDS: Final = 1.0
_OUTCOMES: Final = frozenset({"execution_success", "execution_error", "execution_interrupted"})
_SUFFIXES: Final = {"jpeg": "jpg", "png": "png"}


class Prepared(msgspec.Struct, frozen=True):
    """A model's workflow, read and compiled."""

    workflow: Workflow
    graph: Graph
    binder: Binder


class _Unclear(Exception):
    """What became of a submit is not known, but that ComfyUI does not have it."""


class Account:
    """What an unbroken socket told of one prompt, from before it was given to ComfyUI."""

    def __init__(self) -> None:
        self._outputs: dict[str, Any] = {}
        self._success = self._grew = False

    def message(self, type_: str, data: Mapping[str, Any]) -> None:
        if type_ == "executed" and data.get("node") == data.get("display_node", data.get("node")):
            self._outputs[str(data.get("node"))] = data.get("output")
        elif type_ == "executed":
            self._grew = True
        elif type_ == "execution_success":
            self._success = True

    def entry(self, wanted: Sequence[str]) -> Mapping[str, Any] | None:
        """As the history would have it; None where there is any doubt: after all but a plain success, where a
        wanted node has shown no output, and where nodes that were made at run time have: only the history says
        whose they are.
        """
        if (
            not self._success
            or self._grew
            or not all(isinstance(self._outputs.get(node), dict) for node in wanted)
        ):
            return None
        status = {"status_str": "success", "completed": True, "messages": []}
        return {"outputs": self._outputs, "status": status}


class Prompt:
    """Belongs to the event loop of ``line``, but for :attr:`job`."""

    def __init__(self, line: Line, job: Job, prepared: Prepared, report: Report) -> None:
        """Raises EngineError where the graph cannot be filled in."""
        self.job = job
        self._line, self._prepared, self._report = line, prepared, report
        self._loras = job.roles.get("loras") or ()
        self.files = JobFiles(line, job)
        self._graph = self._bound()
        self._meter: Meter | None = None
        self._task: asyncio.Task[Any] | None = None
        self._end: EngineError | None = None
        self._account: Account | None = None
        self._posting: asyncio.Future[str | Refusal] | None = None
        self._prompt_id = str(uuid.uuid4())
        self.ids: list[str] = []
        """Every id under which ComfyUI may have known it."""
        self._left: set[str] = set()
        """Those that it may still have in its queue."""
        self._posted = self._runs = False
        self._ended = False
        self._wake = asyncio.Event()
        self._poll_at = 0.0
        self._tell_at = 0.0
        self._pictured = 0.0
        self._said = Progress()

    async def run(self) -> None:
        """Have it made; :attr:`files` then has the outputs. Raises EngineError, and OSError of the disk."""
        self._task = asyncio.current_task()
        try:
            await self._work()
        except asyncio.CancelledError:
            if self._end is None:
                raise
            await self._let_go(self._end)
            raise self._end from None
        except Exception as problem:
            self._task = None  # this is its end
            error = self._in_words(problem)
            await self._let_go(error)
            if error is problem:
                raise
            raise error from problem
        else:
            self._task = None
            await self._let_go(None)
        finally:
            self._task = None  # too late to end it otherwise
            self._line.leave(self)
            for prompt_id in self.ids:
                self._line.forget(prompt_id)

    def end(self, error: EngineError) -> None:
        """End the run with ``error``, soon: ComfyUI must have let go of the prompt first, where it is there."""
        if self._end is None:
            self._end = error
            if self._task is not None:
                self._task.cancel()

    @property
    def began(self) -> bool:
        """Whether its work has, or may have, begun."""
        started = self._meter is not None and self._meter.started()
        return self._posted and (started or self._runs or self._line.is_first(self))

    def estimate(self) -> float | None:
        return None if self._meter is None else self._meter.estimate()

    # -- what the socket brings -------------------------------------------------------------------------
    def message(self, type_: str, data: dict[str, Any]) -> None:
        self._poll_at = time.monotonic() + (_END_SECONDS if type_ in _OUTCOMES else _POLL_SECONDS)
        progress = None if self._meter is None else self._meter.message(type_, data)
        if self._account is not None:
            self._account.message(type_, data)
        if type_ == "executing" and data.get("node") is None:
            self._ended = True
            self._line.leave(self)
            self._wake.set()
        elif type_ in _OUTCOMES:
            self._wake.set()
        if progress is not None:
            self._say(progress)

    def preview(self, type_: ImageType, image: bytes) -> None:
        now = time.monotonic()
        if now - self._pictured < _PREVIEW_SECONDS:
            return
        self._pictured = now
        folder = self.job.output_dir.parent
        with contextlib.suppress(OSError):  # a picture on the way is not worth a failure
            (folder / "preview.part").write_bytes(image)
            (folder / "preview.part").replace(folder / f"preview.{_SUFFIXES[type_]}")
            for other in _SUFFIXES.values():
                if other != _SUFFIXES[type_]:
                    (folder / f"preview.{other}").unlink(missing_ok=True)

    def missed(self) -> None:
        self._account = None
        self._poll_at = 0.0
        self._wake.set()

    # -- stages -----------------------------------------------------------------------------------------
    async def _work(self) -> None:
        if self._line.gone is not None:
            raise lost(self._line.gone, began=False, replace=True)
        if self._end is not None:
            raise self._end
        named = named_files(await self._make(), self._graph, self._prepared.workflow.outputs)
        if not named:
            raise EngineError("no_output", "The workflow ended without a file.")
        self._say(Progress(fraction=1.0, stage="collecting", eta=0.0))
        await self.files.fetch(named)

    def _bound(self) -> Graph:
        bound = self._prepared.binder.bind(self.job.input, self.job.roles, self.files.names)
        return with_loras(bound, self._prepared.workflow.loras, self._loras)

    async def _make(self) -> Mapping[str, Any]:
        """The history entry of a success."""
        meter = self._renew()
        self._say(Progress(stage="uploading" if self.job.files else "queued", eta=self.estimate()))
        if await self.files.upload():
            self._graph = self._bound()
        freed = unclear = False
        while True:
            try:
                entry = await self._once()
            except _Unclear as error:
                # Twice says that more than one connection broke: ComfyUI may fail on this very prompt.
                if unclear:
                    raise lost(str(error), began=True) from error
                unclear = True
                await asyncio.sleep(PAUSE_SECONDS)
                meter = self._renew()
                continue
            result, message = outcome(entry)
            if result == "success":
                meter.finished()
                return entry
            if result == "interrupted":
                text = "The work was interrupted in ComfyUI, not by this server."
                raise EngineError("interrupted", text, retryable=True)
            if result == "unknown":
                text = "ComfyUI does not say how the work went."
                raise EngineError("comfyui_unclear", text, retryable=True)
            self._log(message)
            if not is_out_of_memory(message):
                raise failed(message, self._graph)
            with contextlib.suppress(EngineError):  # one that is gone says so to the next call, too
                await self._line.insist(self._line.server.free, tries=_FREE_TRIES)
            if freed:
                raise failed(message, self._graph)
            freed = True
            await asyncio.sleep(_FREE_SECONDS)
            meter = self._renew()

    async def _once(self) -> Mapping[str, Any]:
        """Put the graph into ComfyUI's queue and await its end: the entry in the history."""
        prompt_id = self._prompt_id
        self._ended = self._posted = self._runs = False
        self._account = Account() if self._line.events.open.is_set() else None
        self._line.join(self)
        self._line.events.follow(prompt_id, self)
        try:
            accepted = await self._submit(with_prefix(self._graph, prompt_id), prompt_id)
            if accepted != prompt_id:  # servers before the end of 2025's summer choose the id themselves
                self._line.events.unfollow(prompt_id)
                self._prompt_id = accepted
                self._know_as(accepted)
                self._line.events.follow(accepted, self)
            if self._said.stage == "uploading":
                self._say(Progress(stage="queued", eta=self.estimate()))
            entry = await self._await_end()
            self._left -= {prompt_id, accepted}
            return entry
        finally:
            self._line.leave(self)
            self._line.events.unfollow(self._prompt_id)

    async def _submit(self, graph: Graph, prompt_id: str) -> str:
        server = self._line.server
        extra = self._line.extra_data(self.job.request_id, self.job.attempt, prompt_id)
        while True:
            self._posted = True
            self._know_as(prompt_id)
            self._posting = asyncio.ensure_future(server.submit(graph, prompt_id, extra))
            try:
                # Never given up half-way: who aborts must know whether there is something to take back.
                answer = await asyncio.shield(self._posting)
            except Unreachable as error:
                self._posted = error.sent
                if not error.sent:
                    self._left.discard(prompt_id)
                if self._line.gone is not None:
                    raise self._lost(self._line.gone) from error
                if not error.sent:
                    await asyncio.sleep(PAUSE_SECONDS)
                    continue
                log.event("comfyui_submit_unclear", request=self.job.request_id, error=str(error))
                found = await self._line.find(prompt_id)
                if found is None:
                    raise _Unclear(str(error)) from error
                return found
            if isinstance(answer, Refusal):
                raise await self._refused(answer, graph, prompt_id)
            return answer

    async def _refused(self, answer: Refusal, graph: Graph, prompt_id: str) -> EngineError:
        """The error; what is queued in spite of it is taken back before anything else can go wrong."""
        if answer.status != 200:
            self._left.discard(prompt_id)
        else:
            self._know_as(str(answer.body.get("prompt_id") or prompt_id))
            if await self._line.let_go(self._left):
                self._left.clear()
        error = refused(answer.status, answer.body, graph, self._prepared.binder.targets)
        log.event(
            "comfyui_refused",
            request=self.job.request_id,
            status=answer.status,
            reason=error.reason,
            answer=without_values(answer.body),
        )
        return error

    def _know_as(self, prompt_id: str) -> None:
        self._left.add(prompt_id)
        if prompt_id not in self.ids:
            self.ids.append(prompt_id)

    async def _await_end(self) -> Mapping[str, Any]:
        server, prompt_id = self._line.server, self._prompt_id
        now = time.monotonic()
        self._poll_at, self._tell_at = now + _POLL_SECONDS, self._next_tell(now)
        while True:
            told = await self._quiet()
            # The queue before the history: a prompt that ends in between is then found in the latter.
            if told and (entry := self._told()) is not None:
                return entry
            place = None if told else await self._line.insist(lambda: server.place(prompt_id))
            self._runs |= place == "running"
            if place is not None:
                continue
            entry = await self._line.insist(lambda: server.history(prompt_id))
            if entry is not None:
                if not told:
                    await self._doubt_the_socket()
                return entry
            if not told:
                self._left.discard(prompt_id)
                raise self._lost("the prompt is neither in its queue nor in its history")
            self._ended, self._poll_at = False, 0.0

    def _told(self) -> Mapping[str, Any] | None:
        """What the history will say, where the socket has told all of it: a question less that ComfyUI's one
        thread has to answer while the next prompt runs.
        """
        wanted = self._prepared.workflow.outputs
        return None if self._account is None or not wanted else self._account.entry(wanted)

    async def _quiet(self) -> bool:
        """Wait until the end is told (True), or it is time to ask."""
        while not self._ended:
            now = time.monotonic()
            if now >= self._poll_at:
                self._poll_at = now + _POLL_SECONDS
                return False
            due = min(self._poll_at, self._tell_at)
            if now >= self._tell_at:
                self._tell(now)
                continue
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(due - now):
                    await self._wake.wait()
        return True

    def _tell(self, now: float) -> None:
        """What time alone changes: nodes without steps say nothing while they run, nor do prompts that wait."""
        progress = None if self._meter is None else self._meter.tick()
        if progress is None and (left := self.estimate()) is not None:
            progress = msgspec.structs.replace(self._said, eta=left)
        if progress is not None:
            self._say(progress)
        self._tell_at = self._next_tell(now)

    def _next_tell(self, now: float) -> float:
        """In time for the worker to hand in the next job."""
        left = self._eta(self.estimate())
        if left is None or left <= AHEAD_SECONDS:
            return now + _TELL_SECONDS
        return now + min(_TELL_SECONDS, left - AHEAD_SECONDS + _TELL_LATER_SECONDS)

    async def _doubt_the_socket(self) -> None:
        """The end was found, not told. A socket that is open and does not tell it is deaf."""
        if not self._line.events.open.is_set():
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                while not self._ended:
                    self._wake.clear()
                    await self._wake.wait()
        if not self._ended:
            self._line.events.is_deaf()

    # -- endings ----------------------------------------------------------------------------------------
    async def _let_go(self, error: Exception | None) -> None:
        """Leave nothing in ComfyUI's queue. ``error``, where what is there could not be taken back, has the engine's
        process replaced: the next one is ready once it is gone. Raises nothing.
        """
        if not self._left:
            return
        if self._line.gone is None and self._posting is not None:
            with contextlib.suppress(Exception):  # what it says is known, or is asked now
                answer = await asyncio.wait_for(self._posting, SILENCE_SECONDS)
                self._know_as(answer if isinstance(answer, str) else self._prompt_id)
        if self._line.gone is None and not await self._line.let_go(self._left):
            log.event("comfyui_not_let_go", request=self.job.request_id, prompts=sorted(self._left))
            if isinstance(error, EngineError):
                error.replace = True

    def _in_words(self, problem: Exception) -> Exception:
        """What the worker is told: EngineError, or OSError of the disk."""
        if isinstance(problem, EngineError | OSError):
            return problem
        if isinstance(problem, Unreachable | Rejected):
            return lost(str(problem), began=True)
        # An answer of a shape that nobody has thought of. What ComfyUI does with the next one is open.
        log.event("comfyui_not_understood", request=self.job.request_id, traceback=traceback.format_exc())
        text = (
            "What ComfyUI answered could not be understood. The operator finds the reason in the worker's log."
        )
        return EngineError("comfyui_unclear", text, retryable=True)

    def _lost(self, why: str) -> EngineError:
        return lost(why, began=self.began, replace=self._line.gone is not None)

    # -- words ------------------------------------------------------------------------------------------
    def _say(self, progress: Progress) -> None:
        self._said = progress
        eta = self._eta(progress.eta)
        progress = msgspec.structs.replace(progress, eta=None if eta is None else round(eta, 2))
        self._report(progress)

    def _eta(self, own: float | None) -> float | None:
        """``own`` and what is left of the prompts before this one."""
        ahead = self._line.ahead(self)
        return None if own is None or ahead is None else own + ahead

    def _renew(self) -> Meter:
        """A fresh id for a fresh submit, and what counts its progress."""
        self._prompt_id = str(uuid.uuid4())
        self.files.prompt_ids.add(self._prompt_id)
        self._meter = Meter(
            with_prefix(self._graph, self._prompt_id),
            timings=self._line.timings,
            model=self.job.model.id,
            signature=_signature(self.job),
            now=time.monotonic,
        )
        return self._meter

    def _log(self, message: Mapping[str, Any]) -> None:
        """The whole of an error, for the operator; without the node's inputs, which hold the user's."""
        shown = {
            key: value for key, value in message.items() if key not in ("current_inputs", "current_outputs")
        }
        log.event("comfyui_failed", request=self.job.request_id, attempt=self.job.attempt, error=shown)


def _signature(job: Job) -> Hashable:
    """What says how long the work takes: every value but texts, files and the seed."""
    skipped = {"prompt", "negative_prompt", "seed", *FILE_ROLES}
    values = tuple(
        (field.name, job.input.get(field.name))
        for field in job.model.inputs
        if field.role not in skipped and (field.enum or field.type in ("integer", "float", "boolean"))
    )
    return (*values, len(job.roles.get("loras") or ()))
