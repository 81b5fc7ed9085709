"""The ComfyUI engine: what the worker calls, in threads, over one event loop that drives one ComfyUI."""

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import uvloop

from rushes import log
from rushes.catalog.bindings import Binder
from rushes.catalog.model import Model
from rushes.catalog.workflow import read_graph, workflow_of
from rushes.engines.base import Job, Produced, Report
from rushes.engines.comfyui.events import Events
from rushes.engines.comfyui.files import output_dir_of
from rushes.engines.comfyui.line import PAUSE_SECONDS, Line, lost
from rushes.engines.comfyui.outputs import produced
from rushes.engines.comfyui.process import ComfyProcess
from rushes.engines.comfyui.prompt import Prepared, Prompt
from rushes.engines.comfyui.server import Server, Unreachable
from rushes.engines.comfyui.watch import Watch
from rushes.errors import EngineError, ManifestError

T = TypeVar("T")
_CLOSE_SECONDS: Final = 5.0
_SOCKET_SECONDS: Final = 10.0
_PROBE_SECONDS: Final = 15.0
_REMIND_SECONDS: Final = 30.0


class _Known(msgspec.Struct, frozen=True):
    """A workflow, and what it was read from."""

    model: Model
    files: tuple[tuple[int, int], ...]
    prepared: Prepared


class ComfyUIEngine:
    """Drives one ComfyUI, for as long as that lives. While one prompt runs, the next is already in its queue."""

    name = "comfyui"
    lanes = 3

    def __init__(
        self,
        url: str,
        *,
        identity: str,
        variants: Sequence[str] = (),
        process: ComfyProcess | None = None,
        start_seconds: float = 300.0,
    ) -> None:
        """Blocks until ComfyUI answers, and nothing that an earlier engine of this ``identity`` left runs there.

        Raises EngineError after ``start_seconds``, or when ``process`` ends.
        """
        self._identity, self._variants, self._process = identity, tuple(variants), process
        self._server = Server(url, client_id=uuid.uuid4().hex)
        self._url = self._server.url
        """Without name and password: as it may be logged."""
        self._events = Events(self._server, lost=self._socket_lost)
        self._line = Line(self._server, self._events, identity=identity, folders=process)
        self._watch = Watch(self._server, self._events, process, self._gone)
        self._closing = False
        self._known: dict[str, _Known] = {}
        self._known_lock = threading.Lock()
        self._prompts: dict[tuple[str, int], Prompt] = {}
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rushes-comfyui", daemon=True)
        self._thread.start()
        try:
            self._call(self._open(start_seconds))
        except BaseException:
            self.close()
            raise

    def warm(self, model: Model) -> None:
        """Nothing: ComfyUI loads what a prompt needs when it runs it, and shows that as progress."""

    def run(self, job: Job, report: Report) -> list[Produced]:
        """Have ComfyUI run the model's workflow on the job's input. ``report`` is called in another thread."""
        prepared = self._prepare(job.model)
        prompt = Prompt(self._line, job, prepared, report)
        key = (job.request_id, job.attempt)
        self._prompts[key] = prompt
        try:
            prompt.files.place()
            self._call(prompt.run())
            paths = prompt.files.copied()
        finally:
            self._prompts.pop(key, None)
            prompt.files.clear(tuple(prompt.files.prompt_ids))
        found = [file for path in paths if (file := produced(path)) is not None]
        if not found:
            raise EngineError("no_output", "The workflow made files, but neither an image nor a video.")
        return found

    def abort(self, request_id: str, attempt: int) -> None:
        """End the job with EngineError ``aborted`` as soon as ComfyUI has let go of its prompt."""
        prompt = self._prompts.get((request_id, attempt))
        if prompt is not None:
            error = EngineError("aborted", "The request was ended before it was done.")
            self._loop.call_soon_threadsafe(prompt.end, error)

    def close(self) -> None:
        """End what runs here, and let go of the connection. ComfyUI itself goes on."""
        if self._thread.is_alive():
            with contextlib.suppress(Exception):
                asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(_CLOSE_SECONDS)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_SECONDS)
        if not self._loop.is_running():
            self._loop.close()

    # -- in the calling thread --------------------------------------------------------------------------
    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _prepare(self, model: Model) -> Prepared:
        """The model's workflow, compiled anew only where its folder has changed."""
        with self._known_lock:
            known = self._known.get(model.id)
            if known is not None and known.files == _stamps(model, known.prepared) and known.model == model:
                return known.prepared
            try:
                workflow = workflow_of(model, self._variants)
                graph = read_graph(model, workflow)
                prepared = Prepared(workflow, graph, Binder(model, workflow, graph))
            except ManifestError as error:
                log.event("comfyui_workflow_unusable", model=model.id, error=error.message)
                text = "The model's workflow cannot be used. The operator finds the reason in the worker's log."
                raise EngineError("workflow_unusable", text) from error
            self._known[model.id] = _Known(model, _stamps(model, prepared), prepared)
            return prepared

    # -- in the event loop ------------------------------------------------------------------------------
    async def _open(self, seconds: float) -> None:
        await self._server.open()
        until = time.monotonic() + seconds
        await self._ready(until)
        await self._clear_left_overs(until)
        self._events.start()
        with contextlib.suppress(TimeoutError):  # without it the end of a prompt is found by asking
            await asyncio.wait_for(self._events.open.wait(), _SOCKET_SECONDS)
        self._watch.start()

    async def _close(self) -> None:
        self._closing = True
        self._gone("it is closed")
        for part in (self._watch, self._events, self._line, self._server):
            await part.close()

    async def _ready(self, until: float) -> None:
        """Wait until ComfyUI answers what it is, and which nodes it has: it has loaded its custom nodes then."""
        remind = time.monotonic() + _REMIND_SECONDS / 6
        while True:
            try:
                stats = await self._server.system_stats(seconds=_PROBE_SECONDS)
                await self._server.object_info()
            except Unreachable as error:
                why = str(error)
            else:
                self._line.output_dir = output_dir_of(self._url, stats, self._process)
                return
            if self._process is not None and not self._process.alive():
                text = "ComfyUI ended while it was starting; what it said is in the worker's log."
                raise EngineError("comfyui_start_failed", text, retryable=True, began=False, replace=True)
            now = time.monotonic()
            if now > until:
                text = f"ComfyUI at {self._url} does not answer: {why}"
                raise EngineError("comfyui_unreachable", text, retryable=True, began=False, replace=True)
            if now > remind:
                remind = now + _REMIND_SECONDS
                log.event("comfyui_awaited", url=self._url, error=why)
            await asyncio.sleep(PAUSE_SECONDS)

    async def _clear_left_overs(self, until: float) -> None:
        """Take back what a dead process of this slot left in the queue: it may run for hours, for nobody."""
        entries = await self._line.insist(self._server.queue_entries)
        for entry in entries:
            about = entry.extra_data.get("rushes")
            if isinstance(about, dict) and about.get("slot") == self._identity:
                log.event(
                    "comfyui_left_over",
                    url=self._url,
                    request=about.get("request"),
                    prompt=entry.prompt_id,
                )
                try:
                    taking = self._line.take_back((entry.prompt_id,))
                    await asyncio.wait_for(taking, max(1.0, until - time.monotonic()))
                except TimeoutError as error:
                    text = f"ComfyUI at {self._url} does not let go of a prompt of an earlier worker."
                    raise EngineError(
                        "comfyui_busy", text, retryable=True, began=False, replace=True
                    ) from error

    def _socket_lost(self) -> None:
        self._watch.look()

    def _gone(self, why: str) -> None:
        """There is no ComfyUI any more. What runs ends; nothing more begins."""
        if self._line.gone is not None:
            return
        self._line.gone = why
        if not self._closing:
            log.event("comfyui_gone", url=self._url, why=why)
        # All of them are asked before any ends: who was first in line is not to be seen afterwards.
        errors = [
            (prompt, lost(why, began=prompt.began, replace=True)) for prompt in tuple(self._prompts.values())
        ]
        for prompt, error in errors:
            prompt.end(error)


def _stamps(model: Model, prepared: Prepared) -> tuple[tuple[int, int], ...]:
    """What tells that the files of a model's folder are still the same ones."""
    graph = prepared.workflow.graph or model.graph or ""
    return tuple(_stamp(model.folder / name) for name in ("model.toml", graph))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_size)
