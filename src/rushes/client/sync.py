"""The synchronous client.

::

    from rushes.client.sync import Client

    with Client() as client:
        result = client.run("wan-ai/wan-2-5/text-to-image", {"prompt": "a lighthouse at dusk"})
        paths = client.save(result, "out")
"""

import time
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


class Client:
    """A server that speaks this wire. May be shared by threads.

    ``base_url`` (with or without ``/v1``) and ``api_key`` default to ``RUSHES_BASE_URL`` and
    ``RUSHES_API_KEY``. ``timeout`` is in seconds, for each connect, read and write. ``retries`` is
    how often a call is tried again where that does no harm. ``http`` is an ``httpx.Client`` of your own,
    which then stays yours to close. Raises ValueError for an address or a key that cannot be one.

    Every method raises :class:`rushes.client.errors.ConnectionFailed` or a
    :class:`rushes.client.errors.ApiError`.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        retries: int = DEFAULT_RETRIES,
        http: httpx.Client | None = None,
    ) -> None:
        self._core = Core(base_url, api_key, timeout=timeout, retries=Retries(retries))
        self._http = http or httpx.Client(**transport.options())
        self._owned = http is None

    @property
    def base_url(self) -> str:
        return self._core.server.base_url

    @property
    def has_key(self) -> bool:
        return self._core.server.api_key is not None

    def close(self) -> None:
        if self._owned:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def submit(self, model_id: str, input: Mapping[str, Any]) -> Submitted:  # noqa: A002 - the wire's word
        """Hand in a request; returns as soon as it is accepted.

        Never sent twice where the first may have been accepted: then ConnectionFailed has ``sent`` True.
        """
        return self._drive(self._core.submit(model_id, input))

    def status(self, request: str | Submitted) -> Status:
        return self._drive(self._core.status(request))

    def result(self, request: str | Submitted, *, include_cost: bool = False) -> Result:
        """The outcome, or the present state before it; a failed request raises nothing here."""
        return self._drive(self._core.result(request, include_cost=include_cost))

    def cancel(self, request: str | Submitted) -> Cancellation:
        """Take a waiting request back. One that runs or has ended stays: see ``cancelled`` of the answer."""
        return self._drive(self._core.cancel(request))

    def wait(
        self,
        request: str | Submitted,
        *,
        on_status: Callable[[Status], object] | None = None,
        timeout: float | None = None,
        include_cost: bool = False,
    ) -> Result:
        """Poll until the request has succeeded; ``on_status`` is called with every poll's answer.

        Raises RequestFailed, RequestCancelled, or WaitTimeout after ``timeout`` seconds.
        """
        flow = self._core.wait(request, timeout=timeout, include_cost=include_cost)
        return self._drive(flow, on_status)

    def run(
        self,
        model_id: str,
        input: Mapping[str, Any],  # noqa: A002
        *,
        on_status: Callable[[Status], object] | None = None,
        timeout: float | None = None,
    ) -> Result:
        """:meth:`submit`, then :meth:`wait`."""
        return self.wait(self.submit(model_id, input), on_status=on_status, timeout=timeout)

    def upload(
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
            return self._drive(self._core.upload(file, known_name, content_type))

    def models(
        self,
        search: str | None = None,
        category: str | None = None,
        limit: int | None = None,
        offset: int | None = None,
    ) -> ModelPage:
        query = {"search": search, "category": category, "limit": limit, "offset": offset}
        return self._drive(self._core.models(query))

    def model(self, model_id: str) -> ModelInfo:
        return self._drive(self._core.model(model_id))

    def download(self, url: str, path: str | Path, *, overwrite: bool = False) -> Path:
        """Stream a file to ``path``, under a temporary name until it is whole.

        The key goes along only to this client's own server. Raises FileExistsError unless ``overwrite``.
        """
        target = Path(path)
        if target.exists() and not overwrite:
            raise FileExistsError(f"{target} exists")
        with saving.part(target.parent, target.name) as part:
            self._drive(self._core.download(url, part.sink))
            return part.keep(target, overwrite=overwrite)

    def save(self, result: Result, directory: str | Path = ".") -> list[Path]:
        """Download every output once, as ``{request_id}-{n}.{ending}``; ``_2`` follows where that exists."""
        folder = Path(directory)
        paths = []
        for number, output in enumerate(result.outputs(), start=1):
            base = saving.stem(result.request_id, number)
            with saving.part(folder, base) as part:
                fetched = self._drive(self._core.download(output.url, part.sink))
                suffix = saving.ending(output.url, fetched.content_type)
                paths.append(part.keep_beside(saving.numbered(folder, base, suffix)))
        return paths

    def _drive(self, flow: Flow[T], on_status: Callable[[Status], object] | None = None) -> T:
        try:
            effect = next(flow)
            while True:
                try:
                    outcome = self._perform(effect, on_status)
                except Lost as lost:
                    effect = flow.throw(lost)
                else:
                    effect = flow.send(outcome)
        except StopIteration as end:
            value: T = end.value
            return value

    def _perform(self, effect: Effect, on_status: Callable[[Status], object] | None) -> Reply | None:
        match effect:
            case Send(call, timeout):
                with transport.losses():
                    answer = self._http.request(**transport.arguments(call, timeout))
                return transport.reply(answer, answer.content)
            case Fetch():
                return self._fetch(effect)
            case Pause(seconds):
                time.sleep(seconds)
                return None
            case _:
                if on_status is not None:
                    on_status(effect.status)
                return None

    def _fetch(self, effect: Fetch) -> Reply:
        download = transport.Download(effect)
        with (
            transport.losses(download),
            self._http.stream(**download.arguments) as answer,
        ):
            if not download.begin(answer):
                return transport.reply(answer, answer.read())
            for chunk in answer.iter_bytes():
                download.write(chunk)
        return transport.reply(answer, received=download.received)
