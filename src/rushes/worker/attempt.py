"""One attempt at one request: inputs at hand, engine run, outcome written."""

import asyncio
import shutil
import time
import traceback
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from rushes import log
from rushes.catalog.load import Catalog
from rushes.catalog.model import Model
from rushes.catalog.roles import roles_of
from rushes.engines.base import Job, Produced
from rushes.errors import EngineError, NotFound, StoreUnavailable
from rushes.media.storage import Storage
from rushes.queue.base import Store
from rushes.requests.ids import RequestId
from rushes.requests.record import Failure, Lease, Progress
from rushes.worker.inputs import input_path
from rushes.worker.lease import Held, Leases
from rushes.worker.outputs import cost_usd, discard_outputs, log_end, store_outputs, until_written
from rushes.worker.slot import ChildLost, Hand, Slot

Deliver = Callable[[], Awaitable[None]]
GIVEN_BACK_FREE: Final = 4
"""How often an engine may give one request back without having begun, until each time costs an attempt. Else one that
it can never begin with would come back for ever, before those that wait behind it."""
_SMALL_BYTES: Final = 1 << 20
_REMEMBERED: Final = 4096
"""Of how many requests it is known how often they were given back."""


class NotStarted(Exception):
    """This machine could not even begin: its disk, its engine's process or the storage is at fault, not the
    request.
    """


class GivenBack(Exception):
    """The engine had not begun with the request: it went back to the queue. ``counted``: not for the first time, so
    it cost an attempt, perhaps the last one.
    """

    def __init__(self, *, counted: bool = False) -> None:
        self.counted = counted
        super().__init__()


class Attempts:
    """Runs attempts. Storing a video overlaps with the slot's next job: see :meth:`run`."""

    def __init__(
        self,
        *,
        store: Store,
        storage: Storage,
        catalog: Catalog,
        leases: Leases,
        scratch: Path,
        attempt_limit: int,
    ) -> None:
        self._store = store
        self._storage = storage
        self._catalog = catalog
        self._leases = leases
        self._scratch = scratch
        self._attempt_limit = attempt_limit
        self._given_back: OrderedDict[RequestId, int] = OrderedDict()

    async def run(self, slot: Slot, hand: Hand, lease: Lease) -> Deliver | None:
        """Have the slot work on ``lease``, in its place ``hand``. Answers what is left to do once the place is free
        again (store the files, write the outcome), or None where the outcome is written already.

        Raises NotStarted after having given the request back, its attempt uncounted: the caller pauses. Raises
        GivenBack where only this one went back.
        """
        entry = self._catalog.get(lease.request.model)
        if entry is None:
            await self.release(lease)
            return None
        model = entry.model
        folder = self._scratch / f"{lease.request.id}-{lease.fence}"
        held = self._leases.hold(lease, lambda: slot.abandon(hand, "the lease was lost"))
        began = time.monotonic()
        left = None
        try:
            job = await self._prepare(slot, lease, model, folder)
            produced = await slot.run(hand, job, held.show)
            held.on_lost = None
            held.progress = Progress(fraction=1.0, stage="storing")

            async def deliver() -> None:
                await self._deliver(held, model, produced, folder, slot.engine, began)

            left = deliver
        except (ChildLost, EngineError) as error:
            await self._engine_gave_up(held, error, slot.engine)
        except NotFound:
            gone = "An input file is no longer in storage. Submit the request again."
            await self._fail(held, Failure("input_gone", gone), slot.engine)
        except NotStarted:
            await self.release(lease)
            raise
        except Exception:
            log.event("attempt failed", request=lease.request.id, traceback=traceback.format_exc())
            text = "The server made a mistake with this request. The operator finds it in the log."
            await self._fail(held, Failure("internal_error", text), slot.engine)
        finally:
            if left is None:
                self._leases.drop(held)
                await _clear(folder)
        return left

    async def release(self, lease: Lease) -> None:
        """Put the request back as it was before it was claimed."""
        await until_written("release", lambda: self._store.release(lease))

    async def _engine_gave_up(self, held: Held, error: ChildLost | EngineError, engine: str) -> None:
        """Write what follows. Raises GivenBack where it began with nothing, NotStarted where the disk is at fault."""
        if isinstance(error, ChildLost):
            failure, again, began = Failure(error.code, error.message), True, error.counted
        else:
            failure = Failure(error.reason, error.message, node=error.node, field=error.field)
            again, began = error.retryable, error.began
        if again and not began:
            # Who was brought down by a neighbour is not at fault, however often.
            counted = isinstance(error, EngineError) and self._is_stubborn(held.lease.request.id)
            if counted:
                await self._lose(held, failure, engine)
            else:
                await self._give_back(held, engine, failure.code)
            raise GivenBack(counted=counted) from error
        if again:
            await self._lose(held, failure, engine)
        else:
            await self._fail(held, failure, engine)
        if failure.code == "worker_storage":
            raise NotStarted("the engine could not read or write its files") from error

    def _is_stubborn(self, id_: RequestId) -> bool:
        """Whether the engine has given this request back too often to go on uncounted; this time counts."""
        times = self._given_back[id_] = self._given_back.pop(id_, 0) + 1
        if len(self._given_back) > _REMEMBERED:
            self._given_back.popitem(last=False)
        return times > GIVEN_BACK_FREE

    async def _prepare(self, slot: Slot, lease: Lease, model: Model, folder: Path) -> Job:
        """Everything up to the engine's start. Raises NotStarted for faults of this machine."""
        try:
            job = await self._job(lease, model, folder)
            await slot.ensure(model)
        except (StoreUnavailable, OSError, ChildLost) as error:
            log.event("attempt not started", request=lease.request.id, error=str(error))
            raise NotStarted(str(error)) from error
        return job

    async def _job(self, lease: Lease, model: Model, folder: Path) -> Job:
        output_dir = folder / "out"
        folder.mkdir()
        output_dir.mkdir()
        request = lease.request
        values: dict[str, Any] = msgspec.json.decode(request.input)
        files = {
            name: await input_path(self._storage, source, folder) for name, source in request.sources.items()
        }
        roles = roles_of(model, values)
        roles |= {field.role: files[field.name] for field in model.inputs if field.name in files}
        return Job(
            request_id=request.id,
            attempt=request.attempt,
            model=model,
            input=values,
            roles=roles,
            files=files,
            output_dir=output_dir,
        )

    async def _deliver(
        self, held: Held, model: Model, produced: list[Produced], folder: Path, engine: str, began: float
    ) -> None:
        lease = held.lease
        try:
            try:
                outputs = await store_outputs(self._storage, lease, produced)
            except (StoreUnavailable, OSError) as error:
                text = "The outputs could not be stored: the operator's storage is full or cannot be reached."
                await self._lose(held, Failure("output_not_stored", text), engine)
                log.event("outputs not stored", request=lease.request.id, error=str(error))
                return
            except Exception:
                log.event("delivery failed", request=lease.request.id, traceback=traceback.format_exc())
                text = "The server made a mistake with the outputs. The operator finds it in the log."
                await self._fail(held, Failure("internal_error", text), engine)
                return
            cost = cost_usd(model, outputs)
            written = await until_written("outcome", lambda: self._store.succeed(lease, outputs, cost))
            if not written:
                await discard_outputs(self._storage, lease)
            log_end(lease, engine, "succeeded" if written else "discarded", seconds=time.monotonic() - began)
        finally:
            self._leases.drop(held)
            await _clear(folder, produced)

    async def _fail(self, held: Held, failure: Failure, engine: str) -> None:
        lease = held.lease
        written = await until_written("failure", lambda: self._store.fail(lease, failure))
        log_end(lease, engine, "failed" if written else "discarded", code=failure.code)

    async def _give_back(self, held: Held, engine: str, code: str) -> None:
        lease = held.lease
        released = await until_written("release", lambda: self._store.release(lease))
        log_end(lease, engine, "given back" if released else "discarded", code=code)

    async def _lose(self, held: Held, failure: Failure, engine: str) -> None:
        """The attempt gave no outcome through no fault of the request's: another one, up to the limit."""
        lease = held.lease
        state = await until_written("loss", lambda: self._store.lose(lease, failure, self._attempt_limit))
        log_end(lease, engine, state or "discarded", code=failure.code)


async def _clear(folder: Path, produced: Sequence[Produced] = ()) -> None:
    """Remove an attempt's folder. Mostly there is nothing in it but what was ``produced``: to hand so little over to
    another thread takes several times as long as to do it. To remove large files takes longer.
    """
    try:
        for file in produced:
            found = file.path.lstat()
            if file.path.parent.parent == folder and (found.st_nlink > 1 or found.st_size <= _SMALL_BYTES):
                file.path.unlink()
        (folder / "out").rmdir()
        folder.rmdir()
    except OSError:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
