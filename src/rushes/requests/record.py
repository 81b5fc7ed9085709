"""What is known of a request, as plain data. Pure: nothing here reads or writes.

Times are seconds since the epoch (float). Sizes are bytes. Durations are seconds.
"""

from typing import Any, Literal

import msgspec

from rushes.requests.ids import AccountId, FileId, KeyId, RequestId, WorkerId
from rushes.requests.states import State

InputsState = Literal["pending", "fetching", "ready"]
"""Whether the input files are still to be fetched, are being fetched, or are there (or there are none)."""


class Source(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where one input file comes from, and, once fetched, where it lies.

    ``kind``: "url" (public HTTPS address in ``value``), "stored" (a key of our storage in ``value``: an
    upload, an earlier output, or the bytes of a data: URI), "sample" (a bare sample name in ``value``).
    ``key`` is the storage key of the checked and normalised copy, set when the inputs are ready; a sample
    needs none.
    """

    kind: Literal["url", "stored", "sample"]
    value: str
    media: Literal["image", "video"]
    key: str | None = None
    content_type: str | None = None


class NewRequest(msgspec.Struct, frozen=True):
    """A validated request on its way into the store."""

    id: RequestId
    account: AccountId
    key_id: KeyId
    model: str
    input: bytes
    """The input with its defaults, as JSON. Data URIs are shortened: the bytes lie in ``sources``."""
    sources: dict[str, Source]
    """Input files by field name."""
    priority: int = 0
    """Higher first."""
    hops: int = 0
    """How many servers have passed it on to this one; 0 from a client."""


class Progress(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far a running request is. ``fraction`` from 0 to 1; ``eta`` in seconds."""

    fraction: float = 0.0
    stage: str = ""
    step: int | None = None
    steps: int | None = None
    eta: float | None = None


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
    """One produced file, already in storage under ``key``."""

    key: str
    kind: Literal["image", "video"]
    content_type: str
    size: int
    width: int
    height: int
    frames: int = 1
    fps: float | None = None
    duration: float | None = None


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a request failed, in words for the user: no server paths, no traceback."""

    code: str
    message: str
    node: str | None = None
    field: str | None = None


class RemoteTask(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a remote engine has been asked to do for a request. A request that has one goes back to that remote, and
    to no other engine, until it is taken off again: it may have been paid for.
    """

    remote: str
    """The remote's name in the settings."""
    phase: Literal["submitting", "accepted"]
    """Written as "submitting" before it is sent: whoever finds it so cannot know whether it arrived."""
    submitted_at: float
    """By the worker's clock."""
    handle: str = ""
    """What polling needs; the remote's own id is in it."""
    place: str = ""
    """Where the remote is: its origin, with the machine's name where that is this machine. Workers may call different
    places by one name, and only those with the same can poll.
    """
    cost_usd: float | None = None
    """What the remote said that it cost, else what its price in the manifest makes of it; None while unknown."""
    engine: str = ""
    """What ran there, where the remote says so; "" where it does not."""


class Running(msgspec.Struct, frozen=True):
    """What a slot works on. ``started_at`` in seconds since the epoch."""

    model: str
    started_at: float
    progress: Progress | None


class Request(msgspec.Struct, frozen=True):
    """The whole record of a request, as the store has it."""

    seq: int
    """The order of arrival, ascending; first come, first served within a priority."""
    id: RequestId
    account: AccountId
    key_id: KeyId
    model: str
    state: State
    priority: int
    attempt: int
    """How often it was given to an engine; 0 before the first time."""
    inputs: InputsState
    input: bytes
    sources: dict[str, Source]
    created_at: float
    started_at: float | None = None
    """The start of the latest attempt."""
    finished_at: float | None = None
    worker: WorkerId | None = None
    engine: str | None = None
    progress: Progress | None = None
    outputs: tuple[Output, ...] = ()
    failure: Failure | None = None
    cost_usd: float | None = None
    swept_at: float | None = None
    """When retention removed its files."""
    remote_task: RemoteTask | None = None
    """At a remote engine, now or in the end."""
    hops: int = 0
    """See :class:`NewRequest`."""


class StatusView(msgspec.Struct, frozen=True):
    """The few columns that a status poll needs."""

    seq: int
    model: str
    state: State
    priority: int
    progress: Progress | None


class Lease(msgspec.Struct, frozen=True):
    """The right of one worker to decide one request's outcome, until ``fence`` moves on.

    ``purpose`` "run" for an attempt at an engine, "inputs" for fetching its files while it waits.
    """

    request: Request
    worker: WorkerId
    fence: int
    purpose: Literal["run", "inputs"]


class LeaseMark(msgspec.Struct, frozen=True):
    """One live lease as a reaper sees it. A mark whose ``beat`` stands still for too long has expired."""

    id: RequestId
    fence: int
    beat: int
    worker: WorkerId


class Key(msgspec.Struct, frozen=True):
    """An API key as stored: never the key itself."""

    id: KeyId
    account: AccountId
    name: str
    hash: bytes
    hint: str
    """The last four characters, to tell keys apart."""
    created_at: float
    revoked_at: float | None = None


class File(msgspec.Struct, frozen=True):
    """An uploaded file, checked and stored under ``key``."""

    id: FileId
    account: AccountId
    name: str
    key: str
    content_type: str
    size: int
    created_at: float


class RemoteState(msgspec.Struct, frozen=True, omit_defaults=True):
    """A remote engine as one worker has it."""

    name: str
    kind: str
    models: tuple[str, ...]
    """The ids of the models that it can run, of those that the worker serves."""
    capacity: int
    """Requests that the worker has there at once, at most."""
    state: Literal["ready", "held", "open"] = "ready"
    """"held": it asked for a pause; "open": its circuit breaker is open."""
    until: float | None = None
    """When it is tried again, in seconds since the epoch."""
    why: str = ""
    unknown: dict[str, str] = {}
    """Those of ``models`` that it did not know when it was last asked, by id, each with what it said. They are tried
    again some minutes later.
    """


class WorkerRecord(msgspec.Struct, frozen=True):
    """A process that has joined the queue. ``models`` are the ids that its slots serve now."""

    id: WorkerId
    host: str
    pid: int
    slots: int
    models: tuple[str, ...]
    engine: str
    owner: str
    """The supervising server's id, or "" for a worker started by itself."""
    wake_port: int = 0
    beat: int = 0
    started_at: float = 0.0
    remotes: tuple[RemoteState, ...] = ()


def duration_seconds(request: Request) -> float | None:
    """The time from the last start to the end; None before the end or where it never started."""
    if request.started_at is None or request.finished_at is None:
        return None
    return max(0.0, request.finished_at - request.started_at)


def as_builtin(value: msgspec.Struct | dict[str, Any]) -> Any:
    """A plain dict of a record, for JSON."""
    return msgspec.to_builtins(value)
