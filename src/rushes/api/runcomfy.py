"""The native wire: RunComfy's Model API, as its documentation shows it.

States: what we call queued, running, succeeded, failed and cancelled reads in_queue, in_progress, completed
(for both) and cancelled on /status; /result tells succeeded from failed.
"""

from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import parse_qs

from rushes.api.http import WrongMethod, dumps, flag
from rushes.errors import NotFound
from rushes.requests.record import Key, Output, Request
from rushes.requests.states import State
from rushes.service.core import Service

STATUS: Final[dict[State, str]] = {
    "queued": "in_queue",
    "running": "in_progress",
    "succeeded": "completed",
    "failed": "completed",
    "cancelled": "cancelled",
}
RESULT: Final[dict[State, str]] = {
    "queued": "in_queue",
    "running": "in_progress",
    "succeeded": "succeeded",
    "failed": "failed",
    "cancelled": "cancelled",
}
METHODS: Final = {"status": "GET", "result": "GET", "cancel": "POST"}


class Native:
    """Each method answers an HTTP status and a JSON body, or raises a RushesError."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def submit(
        self, caller: Key, model_id: str, body: bytes, base_url: str, hops: int
    ) -> tuple[int, bytes]:
        id_ = await self._service.submit(caller, model_id, body, base_url=base_url, hops=hops)
        url = f"{base_url}/v1/requests/{id_}"
        answer = {
            "request_id": id_,
            "status_url": f"{url}/status",
            "result_url": f"{url}/result",
            "cancel_url": f"{url}/cancel",
        }
        return 200, dumps(answer)

    async def request(
        self, caller: Key, method: str, id_: str, verb: str, base_url: str, query: bytes
    ) -> tuple[int, bytes]:
        """``/v1/requests/{id}/{verb}``."""
        allowed = METHODS.get(verb)
        if allowed is None:
            raise NotFound("A request has /status, /result and /cancel.")
        if method not in (allowed, "HEAD") or (method == "HEAD" and allowed != "GET"):
            raise WrongMethod(f"/{verb} takes {allowed}.", "GET, HEAD" if allowed == "GET" else allowed)
        if verb == "status":
            return await self._status(caller, id_, base_url)
        if verb == "result":
            return await self._result(caller, id_, base_url, query)
        return await self._cancel(caller, id_)

    async def _status(self, caller: Key, id_: str, base_url: str) -> tuple[int, bytes]:
        status = await self._service.status(caller, id_)
        answer: dict[str, Any] = {"request_id": id_, "status": STATUS[status.view.state]}
        if status.position is not None:
            answer["queue_position"] = status.position
        progress = status.view.progress
        if status.view.state == "running" and progress is not None:
            answer["progress"] = round(progress.fraction, 4)
            answer["stage"] = progress.stage
            if progress.eta is not None:
                answer["eta"] = round(progress.eta, 1)
        answer["status_url"] = f"{base_url}/v1/requests/{id_}/status"
        answer["result_url"] = f"{base_url}/v1/requests/{id_}/result"
        return 200, dumps(answer)

    async def _result(self, caller: Key, id_: str, base_url: str, query: bytes) -> tuple[int, bytes]:
        request, position = await self._service.result(caller, id_)
        answer: dict[str, Any] = {
            "request_id": id_,
            "status": RESULT[request.state],
            "model_id": request.model,
            "created_at": _iso(request.created_at),
        }
        if position is not None:
            answer["queue_position"] = position
        if request.started_at is not None:
            answer["started_at"] = _iso(request.started_at)
        if request.finished_at is not None:
            answer["finished_at"] = _iso(request.finished_at)
        if request.engine and request.state in ("running", "succeeded", "failed"):
            answer["engine"] = request.engine
        if request.remote_task is not None and request.remote_task.engine and request.state == "succeeded":
            answer["remote_engine"] = request.remote_task.engine
        engine_cost = _engine_cost(request)
        if engine_cost is not None:
            answer["engine_cost_usd"] = engine_cost
        if request.state == "succeeded":
            answer |= self._output(request, base_url)
        if request.failure is not None:
            answer["error"] = {
                name: value
                for name in ("code", "message", "node", "field")
                if (value := getattr(request.failure, name)) is not None
            }
        if _flag(query, "include_cost"):
            price = request.cost_usd
            answer["cost"] = price if price is not None else engine_cost or 0.0
        return 200, dumps(answer)

    def _output(self, request: Request, base_url: str) -> dict[str, Any]:
        """The output as the schema has it. One file appears both alone and in its list: clients read either."""
        if request.swept_at is not None:
            return {"output": {}, "expired_at": _iso(request.swept_at)}
        output: dict[str, Any] = {}
        urls = [(file, self._service.output_url(file, base_url)) for file in request.outputs]
        for kind in ("image", "video"):
            of_kind = [url for file, url in urls if file.kind == kind]
            if of_kind:
                output[kind] = of_kind[0]
                output[f"{kind}s"] = of_kind
        return {"output": output, "files": [_described(file, url) for file, url in urls]}

    async def _cancel(self, caller: Key, id_: str) -> tuple[int, bytes]:
        outcome, view = await self._service.cancel(caller, id_)
        return 202, dumps({"request_id": id_, "status": STATUS[view.state], "outcome": outcome})


def _engine_cost(request: Request) -> float | None:
    """What a remote engine took for an ended request, in USD; None where none ran it, or none has told."""
    task = request.remote_task
    return task.cost_usd if task is not None and request.state in ("succeeded", "failed") else None


def _described(file: Output, url: str) -> dict[str, Any]:
    described = {
        "url": url,
        "content_type": file.content_type,
        "size": file.size,
        "width": file.width,
        "height": file.height,
    }
    if file.kind == "video":
        described |= {"frames": file.frames, "fps": file.fps, "duration": file.duration}
    return described


def _flag(query: bytes, name: str) -> bool:
    if not query:
        return False
    values = parse_qs(query.decode("latin-1"), keep_blank_values=True).get(name, [None])
    return flag(values[-1], name)


def _iso(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
