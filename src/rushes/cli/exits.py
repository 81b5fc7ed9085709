"""The exit statuses of every command, one per thing that a script may want to tell apart."""

from enum import IntEnum
from typing import Final

from rushes import errors as server
from rushes.client import errors as client


class Exit(IntEnum):
    """What a finished command says to its caller."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    UNAUTHORIZED = 4
    INVALID = 5
    NOT_FOUND = 6
    CANCELLED = 7
    LIMITED = 8
    SERVER = 9
    INTERRUPTED = 130
    PIPE = 141


MEANING: Final[dict[Exit, str]] = {
    Exit.OK: "done",
    Exit.FAILED: "the request failed, or the command did",
    Exit.USAGE: "the command line or a setting makes no sense",
    Exit.UNREACHABLE: "the server or the store cannot be reached",
    Exit.UNAUTHORIZED: "no API key, or one that is not accepted",
    Exit.INVALID: "the input does not fit the model",
    Exit.NOT_FOUND: "no such model, request or file",
    Exit.CANCELLED: "the request was cancelled by someone else",
    Exit.LIMITED: "too many calls or too many waiting requests",
    Exit.SERVER: "the server failed or refused, or the request has not ended yet",
    Exit.INTERRUPTED: "Ctrl-C",
    Exit.PIPE: "the reader of standard output went away",
}

_CLASSES: Final[tuple[tuple[type[Exception], Exit], ...]] = (
    (client.ConnectionFailed, Exit.UNREACHABLE),
    (client.Unauthorized, Exit.UNAUTHORIZED),
    (client.NotFound, Exit.NOT_FOUND),
    (client.InvalidInput, Exit.INVALID),
    (client.RateLimited, Exit.LIMITED),
    (client.ApiError, Exit.SERVER),
    (client.RequestFailed, Exit.FAILED),
    (client.RequestCancelled, Exit.CANCELLED),
    (client.WaitTimeout, Exit.SERVER),
    (server.StoreUnavailable, Exit.UNREACHABLE),
    (server.Unauthorized, Exit.UNAUTHORIZED),
    (server.Forbidden, Exit.UNAUTHORIZED),
    (server.NotFound, Exit.NOT_FOUND),
    (server.InvalidIdentifier, Exit.NOT_FOUND),
    (server.InvalidInput, Exit.INVALID),
    (server.MalformedRequest, Exit.INVALID),
    (server.MediaError, Exit.INVALID),
    (server.BodyTooLarge, Exit.INVALID),
    (server.RateLimited, Exit.LIMITED),
    (server.QueueFull, Exit.LIMITED),
    (server.SettingsError, Exit.USAGE),
    (server.InternalError, Exit.SERVER),
)


def status_of(error: BaseException) -> Exit:
    """The exit status that an error stands for; 1 where it has none of its own."""
    if isinstance(error, KeyboardInterrupt):
        return Exit.INTERRUPTED
    return next((status for kind, status in _CLASSES if isinstance(error, kind)), Exit.FAILED)


def listing() -> str:
    """All statuses, one to a line, for help pages."""
    return "\n".join(f"{status.value:>4}  {text}" for status, text in MEANING.items())
