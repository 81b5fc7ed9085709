"""The asynchronous client: the same operations as :mod:`rushes.client.sync`, awaited.

::

    from rushes.client.aio import AsyncClient

    async with AsyncClient() as client:
        result = await client.run("wan-ai/wan-2-5/text-to-image", {"prompt": "a lighthouse at dusk"})
        paths = await client.save(result, "out")
"""

import asyncio
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

import httpx

from rushes.client import _http as transport
from rushes.client import _save as saving
from rushes.client._core import DEFAULT_TIMEOUT, Core, Effect, Fetch, Flow, Pause, Send
from rushes.client._pace import DEFAULT_RETRIES, Lost, Retries
from rushes.client._wire import Reply
from rushes.client.types import (
    Cancellation,
    FileRef,
    ModelInfo,
    ModelPage,
    Result,
    Status,
    Submitted,
)

T = TypeVar("T")
OnStatus = Callable[[Status], object]
"""Called with every poll's answer; where it returns an awaitable, that is awaited."""


class AsyncClient:
    """A server that speaks this wire, for asyncio. See :class:`rushes.client.sync.Client`.

    ``http`` is an ``httpx.AsyncClient`` of your own, which then stays yours to close.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        retries: int = DEFAULT_RETRIES,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        self._core = Core(base_url, api_key, timeout=timeout, retries=Retries(retries))
        self._http = http or httpx.AsyncClient(**transport.options())
        self._owned = http is None

    @property
    def base_url(self) -> str:
        return self._core.server.base_url

    @property
    def has_key(self) -> bool:
        return self._core.server.api_key is not None

    async def aclose(self) -> None:
        if self._owned:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def submit(self, model_id: str, input: Mapping[str, Any]) -> Submitted:  # noqa: A002 - the wire's word
        """Hand in a request; returns as soon as it is accepted.

        Never sent twice where the first may have been accepted: then ConnectionFailed has ``sent`` True.
        """
        return await self._drive(self._core.submit(model_id, input))

    async def status(self, request: str | Submitted) -> Status:
        return await self._drive(self._core.status(request))

    async def result(self, request: str | Submitted, *, include_cost: bool = False) -> Result:
        """The outcome, or the present state before it; a failed request raises nothing here."""
        return await self._drive(self._core.result(request, include_cost=include_cost))

    async def cancel(self, request: str | Submitted) -> Cancellation:
        """Take a waiting request back. One that runs or has ended stays: see ``cancelled`` of the answer."""
        return await self._drive(self._core.cancel(request))

    async def wait(
        self,
        request: str | Submitted,
        *,
        on_status: OnStatus | None = None,
        timeout: float | None = None,
        include_cost: bool = False,
    ) -> Result:
        """Poll until the request has succeeded.

        Raises RequestFailed, RequestCancelled, or WaitTimeout after ``timeout`` seconds. Cancelling the task
        ends the wait alone; :meth:`cancel` takes the request back.
        """
        flow = self._core.wait(request, timeout=timeout, include_cost=include_cost)
        return await self._drive(flow, on_status)

    async def run(
        self,
        model_id: str,
        input: Mapping[str, Any],  # noqa: A002
        *,
        on_status: OnStatus | None = None,
        timeout: float | None = None,
    ) -> Result:
        """:meth:`submit`, then :meth:`wait`."""
        request = await self.submit(model_id, input)
        return await self.wait(request, on_status=on_status, timeout=timeout)

    async def upload(
        self,
        source: "str | Path | BinaryIO",
        *,
        name: str | None = None,
        content_type: str | None = None,
    ) -> FileRef:
        """Store a file on the server; put the ``url`` of the answer into an input.

        ``source`` is a path, or an open binary file, which is read from its start and stays open.
        """
        with transport.opened(source, name) as (file, known_name):
            return await self._drive(self._core.upload(file, known_name, content_type))

    async def models(
        self,
        search: str | None = None,
        category: str | None = None,
        limit: int | None = None,
        offset: int | None = None,
    ) -> ModelPage:
        query = {"search": search, "category": category, "limit": limit, "offset": offset}
        return await self._drive(self._core.models(query))

    async def model(self, model_id: str) -> ModelInfo:
        return await self._drive(self._core.model(model_id))

    async def download(self, url: str, path: str | Path, *, overwrite: bool = False) -> Path:
        """Stream a file to ``path``, under a temporary name until it is whole.

        The key goes along only to this client's own server. Raises FileExistsError unless ``overwrite``.
        """
        target = Path(path)
        if target.exists() and not overwrite:
            raise FileExistsError(f"{target} exists")
        with saving.part(target.parent, target.name) as part:
            await self._drive(self._core.download(url, part.sink))
            return part.keep(target, overwrite=overwrite)

    async def save(self, result: Result, directory: str | Path = ".") -> list[Path]:
        """Download every output once, as ``{request_id}-{n}.{ending}``; ``_2`` follows where that exists."""
        folder = Path(directory)
        paths = []
        for number, output in enumerate(result.outputs(), start=1):
            base = saving.stem(result.request_id, number)
            with saving.part(folder, base) as part:
                fetched = await self._drive(self._core.download(output.url, part.sink))
                suffix = saving.ending(output.url, fetched.content_type)
                paths.append(part.keep_beside(saving.numbered(folder, base, suffix)))
        return paths

    async def _drive(self, flow: Flow[T], on_status: OnStatus | None = None) -> T:
        try:
            effect = next(flow)
            while True:
                try:
                    outcome = await self._perform(effect, on_status)
                except Lost as lost:
                    effect = flow.throw(lost)
                else:
                    effect = flow.send(outcome)
        except StopIteration as end:
            value: T = end.value
            return value

    async def _perform(self, effect: Effect, on_status: OnStatus | None) -> Reply | None:
        match effect:
            case Send(call, timeout):
                with transport.losses():
                    answer = await self._http.request(**transport.arguments(call, timeout))
                return transport.reply(answer, answer.content)
            case Fetch():
                return await self._fetch(effect)
            case Pause(seconds):
                await asyncio.sleep(seconds)
                return None
            case _:
                if on_status is not None:
                    told = on_status(effect.status)
                    if inspect.isawaitable(told):
                        await told
                return None

    async def _fetch(self, effect: Fetch) -> Reply:
        download = transport.Download(effect)
        with transport.losses(download):
            async with self._http.stream(**download.arguments) as answer:
                if not download.begin(answer):
                    return transport.reply(answer, await answer.aread())
                async for chunk in answer.aiter_bytes():
                    await asyncio.to_thread(download.write, chunk)
        return transport.reply(answer, received=download.received)
