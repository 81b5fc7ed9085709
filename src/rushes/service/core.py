"""submit · status · result · cancel, and what a wire needs beside them. No HTTP, no SQL, no engine.

Every wire (RunComfy's, and those to come) translates to these calls and translates their answers.
"""

import asyncio
import hmac
import time
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec
import orjson

from rushes import log
from rushes.catalog.load import Catalog, Entry
from rushes.errors import (
    InvalidIdentifier,
    InvalidInput,
    MediaError,
    NotFound,
    RateLimited,
    RushesError,
    StoreUnavailable,
    Unauthorized,
)
from rushes.media import links
from rushes.media.fetch import FetchPolicy
from rushes.media.storage import Storage
from rushes.queue.base import Store
from rushes.requests.ids import AccountId, RequestId, is_request_id, new_request_id
from rushes.requests.limits import RateLimiter
from rushes.requests.record import Key, NewRequest, Output, Request, Source, StatusView, WorkerRecord
from rushes.service.keys import key_hash
from rushes.service.outlook import lane_of
from rushes.service.sources import OUTPUT_ROUTE, Sources, upload_key
from rushes.settings import Settings

_WORKERS_SECONDS: Final = 1.0
_LARGE_BODY: Final = 256 * 1024
"""Bytes from which a body is checked in a thread, so that the loop goes on meanwhile."""


class Status(msgspec.Struct, frozen=True):
    """A request's state, and its place in the queue while it waits (1 for the next one)."""

    view: StatusView
    position: int | None


class Service:
    """What a request can have done to it. ``secret`` signs links to outputs."""

    def __init__(
        self,
        settings: Settings,
        *,
        store: Store,
        storage: Storage,
        catalog: Catalog,
        policy: FetchPolicy,
        secret: bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._store = store
        self._storage = storage
        self._catalog = catalog
        self._clock = clock
        self._secret = secret
        self._sources = Sources(store, storage, policy, secret)
        self._limiter = RateLimiter(settings.rate_limit)
        self._draining = False
        self._lanes: dict[str, list[str] | None] = {}
        self._lanes_at = float("-inf")
        self._workers: list[WorkerRecord] = []

    # -- who is asking ----------------------------------------------------------------------------------
    async def authenticate(self, key: str) -> Key:
        """The key's record. Raises Unauthorized where there is none, or where it was revoked."""
        hash_ = key_hash(key)
        found = await self._store.find_key(hash_)
        if found is None or not hmac.compare_digest(found.hash, hash_) or found.revoked_at is not None:
            raise Unauthorized
        return found

    # -- the catalog ------------------------------------------------------------------------------------
    @property
    def catalog(self) -> Catalog:
        """What there is, as of the last look; see :meth:`follow_catalog`."""
        return self._catalog

    async def follow_catalog(self) -> None:
        """Take up what changes on the disk, every second, until cancelled. Reading happens in a thread."""
        while True:
            await asyncio.sleep(1.0)
            try:
                if await asyncio.to_thread(self._catalog.refresh):
                    for problem in self._catalog.broken:
                        log.event("model not usable", error=problem.message)
            except Exception as error:
                log.event("catalog not read", error=repr(error))

    def model(self, model_id: str) -> Entry:
        """Raises NotFound, with what to do about it."""
        entry = self.catalog.get(model_id)
        if entry is None:
            raise NotFound(f"There is no model {model_id[:200]!r} here. GET /v1/models lists those there are.")
        return entry

    # -- the request's way ------------------------------------------------------------------------------
    def drain(self) -> None:
        """The server is stopping: take no more submits, go on answering everything else."""
        self._draining = True

    async def admit(self, caller: Key) -> None:
        """Count one submit against the key's rate.

        Raises RateLimited, with the time to wait; StoreUnavailable while the server is stopping.
        """
        if self._draining:
            raise StoreUnavailable("The server is stopping. Nothing was accepted; try again.", retry_after=5.0)
        wait = self._limiter.take(caller.id, self._clock())
        if wait:
            raise RateLimited(retry_after=wait)

    async def submit(
        self, caller: Key, model_id: str, body: bytes, *, base_url: str, priority: int = 0, hops: int = 0
    ) -> RequestId:
        """Validate and store. When this returns, the request survives whatever happens next.

        Call :meth:`admit` first, before the body is read. Raises NotFound (model), MalformedRequest,
        InvalidInput (all failing fields), QueueFull, StoreUnavailable.
        """
        entry = self.model(model_id)
        if len(body) > _LARGE_BODY:
            valid = await asyncio.to_thread(entry.validator.validate, body)
        else:
            valid = entry.validator.validate(body)
        id_ = new_request_id()
        text = valid.json
        sources: dict[str, Source] = {}
        if valid.files:
            shown = dict(valid.input)
            sources = await self._resolve(id_, entry, valid.files, shown, caller.account, base_url)
            if shown != valid.input:
                text = orjson.dumps(shown)
        new = NewRequest(id_, caller.account, caller.id, model_id, text, sources, priority, hops)
        try:
            await self._store.submit(new, queue_limit=self._settings.queue_limit)
        except RushesError:
            await self._forget_uploads(new)
            raise
        return id_

    async def _forget_uploads(self, new: NewRequest) -> None:
        """What a data URI brought is of no use without its request."""
        prefix = f"uploads/{new.id}"
        if any(source.value.startswith(f"{prefix}/") for source in new.sources.values()):
            await self._storage.delete_prefix(prefix)

    async def _resolve(
        self,
        id_: RequestId,
        entry: Entry,
        files: dict[str, str],
        shown: dict[str, Any],
        account: AccountId,
        base_url: str,
    ) -> dict[str, Source]:
        kinds = entry.model.files()
        sources: dict[str, Source] = {}
        detail: list[dict[str, Any]] = []
        for number, (name, value) in enumerate(files.items(), 1):
            try:
                sources[name], shown[name] = await self._sources.resolve(
                    value,
                    kinds[name],
                    account=account,
                    base_url=base_url,
                    upload_key=upload_key(id_, number),
                )
            except MediaError as error:
                detail.append({"loc": [name], "msg": f"{name}: {error.message}", "type": error.reason})
        if detail:
            await self._storage.delete_prefix(f"uploads/{id_}")
            raise InvalidInput.listing(detail)
        return sources

    async def status(self, caller: Key, id_: str) -> Status:
        """Raises InvalidIdentifier, NotFound (unknown, or another account's)."""
        request_id = _request_id(id_)
        view = await self._store.status(request_id, caller.account)
        if view is None:
            raise _unknown()
        if view.state != "queued":
            return Status(view, None)
        return Status(view, await self._store.position(view, await self._lane(view.model)))

    async def result(self, caller: Key, id_: str) -> tuple[Request, int | None]:
        """The whole record, and the position while queued. Raises as :meth:`status`."""
        found = await self._store.get(_request_id(id_), caller.account)
        if found is None:
            raise _unknown()
        if found.state != "queued":
            return found, None
        view = StatusView(found.seq, found.model, found.state, found.priority, None)
        return found, await self._store.position(view, await self._lane(found.model))

    async def cancel(self, caller: Key, id_: str) -> tuple[Literal["cancelled", "not_cancellable"], StatusView]:
        """Cancel while queued. Raises as :meth:`status`."""
        request_id = _request_id(id_)
        outcome = await self._store.cancel(request_id, caller.account)
        view = await self._store.status(request_id, caller.account)
        if outcome is None or view is None:
            raise _unknown()
        return outcome, view

    async def _lane(self, model: str) -> list[str] | None:
        """The models that compete with this one: those of every worker that serves it. None: all."""
        now = self._clock()
        if now - self._lanes_at > _WORKERS_SECONDS:
            self._workers = await self._store.workers()
            self._lanes = {}
            self._lanes_at = now
        if model not in self._lanes:
            if any(model in remote.models for worker in self._workers for remote in worker.remotes) and not any(
                model in worker.models for worker in self._workers
            ):
                self._lanes[model] = [model]
            else:
                everything = {entry.model.id for entry in self._catalog.entries()}
                self._lanes[model] = lane_of(model, self._workers, everything)
        return self._lanes[model]

    # -- outputs ----------------------------------------------------------------------------------------
    def output_url(self, output: Output, base_url: str) -> str:
        """A fresh signed link, valid for the time in the settings."""
        expires = int(time.time()) + self._settings.output_url_seconds
        return f"{base_url}{OUTPUT_ROUTE}{output.key}?{links.sign(self._secret, output.key, expires)}"

    def may_read(self, key: str, expires: int, signature: str) -> bool:
        return links.verify(self._secret, key, expires, signature, time.time())


def _request_id(text: str) -> RequestId:
    if not is_request_id(text):
        raise InvalidIdentifier(f"{text[:80]!r} is no request id: it has the form of a UUID in lower case.")
    return RequestId(text)


def _unknown() -> NotFound:
    return NotFound("There is no request with this id for this key.")
