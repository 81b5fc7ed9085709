"""What a remote engine is: a model that runs where it lives, driven over HTTP.

Remote engines live in the worker's own process, on its event loop: they wait, and compute nothing. One is made for
each configured remote (:mod:`rushes.engines.remote.configured`); it knows nothing of the queue or of storage. The
worker stores what :meth:`RemoteEngine.submit` answers before it polls for the first time, so that a restart goes on
polling and never submits, and pays, twice.
"""

from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from rushes.catalog.model import Model
from rushes.errors import EngineError
from rushes.requests.record import Progress

Trouble = Literal["unreachable", "throttled", "fault", "key", "funds", "model"]
"""Why a remote takes nothing now: no connection; too many requests (429); a fault of its own (5xx); it refuses our
key; the account there has no money left; it does not know the model. The last three are the operator's to mend."""


class RemoteInput(msgspec.Struct, frozen=True):
    """One input file: checked, upright, images as PNG."""

    path: Path
    content_type: str
    url: str | None = None
    """The public https address that the user gave, where it was one: what is there now may differ."""


class RemoteJob(msgspec.Struct, frozen=True):
    """One request on its way to a remote. ``input`` has all values by field name, ``roles`` by role (see
    :class:`rushes.engines.base.Job`; file roles are left out), ``files`` the input files by field name.
    """

    request_id: str
    model: Model
    input: dict[str, Any]
    roles: dict[str, Any]
    files: dict[str, RemoteInput]
    folder: Path
    """A folder of the job's own, for outputs that come with an answer; the worker removes it."""
    hops: int = 0
    """How many servers have passed the request on to this one."""


class Accepted(msgspec.Struct, frozen=True):
    """The remote has the job. ``handle`` is all that polling needs, as text; it is kept with the request."""

    handle: str


class Underway(msgspec.Struct, frozen=True):
    """The job waits or runs there."""

    progress: Progress = Progress()
    retry_after: float | None = None
    """Seconds after which the remote wants to be asked again; None where it does not say."""


class RemoteFile(msgspec.Struct, frozen=True):
    """One output: an address to fetch it from, or a file that came with the answer."""

    url: str | None = None
    path: Path | None = None
    keyed: bool = False
    """The address wants the same headers as the remote's API. They go to the remote's own origin only."""
    size: tuple[int, int] | None = None
    """The width and height in pixels that were asked for, where the remote may give others: once the picture is
    checked it is brought to exactly this size, see :func:`rushes.engines.remote.outputs.conform`. For images only.
    """


class Finished(msgspec.Struct, frozen=True):
    """The job succeeded there. ``cost_usd`` is what the remote says that it cost; None where it does not say."""

    files: tuple[RemoteFile, ...]
    cost_usd: float | None = None
    engine: str = ""
    """What ran there, where the remote says so."""


class RemoteRefused(EngineError):
    """The remote will not do this job, or could not: the request fails. ``reason`` is ``remote_refused`` (its input),
    ``content_refused`` (moderation), ``remote_failed`` (it tried), ``remote_lost`` (it does not know the job any
    more). ``retryable`` where another attempt, perhaps elsewhere, may help. ``billed`` False where the remote is
    known not to charge for it.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        field: str | None = None,
        retryable: bool = False,
        billed: bool = False,
    ) -> None:
        self.billed = billed
        super().__init__(reason, message, field=field, retryable=retryable)


class RemoteUnavailable(Exception):
    """The remote took nothing, or gave no answer about a job that it has. Nothing is decided by it.

    ``why`` is for the operator and holds no key. ``retry_after`` in seconds, where the remote said.
    """

    def __init__(self, trouble: Trouble, why: str, *, retry_after: float | None = None) -> None:
        self.trouble, self.why, self.retry_after = trouble, why, retry_after
        super().__init__(why)


class SubmitUnknown(Exception):
    """The job was sent and no answer came: nobody knows whether the remote has it. It is not sent again."""

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(why)


class RemoteEngine(Protocol):
    """One configured remote. All methods are called on the worker's event loop, for many jobs at once."""

    name: str
    """As configured, by default the kind: results, logs and routes name it so."""
    kind: str
    origin: str
    """Scheme, host and port of its API: ``https://queue.example``. Outputs at this origin may be fetched though it
    is private, and with :meth:`headers`."""
    poll_seconds: float
    """The usual pause between two polls."""

    def serves(self, model: Model) -> bool:
        """Whether the model's manifest says how this kind of remote runs it."""

    def headers(self) -> dict[str, str]:
        """What :attr:`RemoteFile.keyed` addresses want."""

    async def submit(self, job: RemoteJob) -> Accepted | Finished:
        """Hand the job over. Raises RemoteRefused, RemoteUnavailable (it was not taken), SubmitUnknown."""

    async def poll(self, handle: str, job: RemoteJob) -> Underway | Finished:
        """How it gets on; also gives fresh addresses where those of a finished job have expired. Raises
        RemoteRefused, RemoteUnavailable (ask again).
        """

    async def cancel(self, handle: str) -> None:
        """Ask the remote to end the job, once; what comes of it does not matter. Never raises."""

    async def close(self) -> None: ...
