"""What a worker and its slots' child processes say to each other: one JSON object a line, over pipes.

A ``ticket`` is the number by which both mean one job: a child may have several in hand, and a request may be in it
twice (an attempt that is being ended, and the next).
"""

from pathlib import Path
from typing import Any, Final

import msgspec

from rushes.engines.base import Job, Produced
from rushes.requests.record import Progress

ABORTED: Final = "aborted"
"""The code of a job that ended because nobody wants it any more. Never an outcome: who ends it knows why."""


LOADING: Final = "loading"
"""The stage of a job whose model the engine is made ready for."""

FAREWELL_SECONDS: Final = 2.0
"""How long a child whose input has ended takes at most to have its engine end what is in hand."""


class Run(msgspec.Struct, tag="run", tag_field="type", frozen=True):
    """To the child: work on this."""

    ticket: int
    job: Job


class Abort(msgspec.Struct, tag="abort", tag_field="type", frozen=True):
    """To the child: end this job soon. It is answered as every job is; a ticket that is over is no error."""

    ticket: int


class Starting(msgspec.Struct, tag="starting", tag_field="type", frozen=True):
    """The child makes its engine yet, and gets on with it: it may take another while."""

    message: str


class Ready(msgspec.Struct, tag="ready", tag_field="type", frozen=True):
    """The child has its engine and waits for jobs, up to ``lanes`` at once. ``aborts``: it hears an Abort."""

    engine: str
    lanes: int = 1
    aborts: bool = False
    one_model: bool = False
    """It takes jobs of one model only, that of the first."""
    models: tuple[str, ...] | None = None
    """The only models that it can work on; None: it cannot tell."""


class Unready(msgspec.Struct, tag="unready", tag_field="type", frozen=True):
    """The engine could not be made; the child ends."""

    message: str


class Step(msgspec.Struct, tag="progress", tag_field="type", frozen=True):
    """How far a job is; ``preview`` is the newest picture of it, where the engine leaves any."""

    ticket: int
    progress: Progress
    preview: Path | None = None
    ahead: bool = False
    """The next job may come now."""


class Done(msgspec.Struct, tag="done", tag_field="type", frozen=True):
    ticket: int
    produced: list[Produced]


class Failed(msgspec.Struct, tag="failed", tag_field="type", frozen=True):
    """The engine gave up on a job in an orderly way; the child is fit for the next, unless ``replace``."""

    ticket: int
    code: str
    message: str
    node: str | None = None
    retryable: bool = False
    began: bool = True
    replace: bool = False
    field: str | None = None


Order = Run | Abort
Message = Starting | Ready | Unready | Step | Done | Failed


def _plain(value: object) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(type(value))


def _rich(type_: type, value: Any) -> Any:
    return Path(value) if issubclass(type_, Path) else value


_encoder = msgspec.json.Encoder(enc_hook=_plain)
_messages: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message, dec_hook=_rich)
_orders: msgspec.json.Decoder[Order] = msgspec.json.Decoder(Order, dec_hook=_rich)


def line(value: Message | Order) -> bytes:
    """One line, whatever is in it: text of an engine's libraries may have halves of characters (lone surrogates),
    which cannot be sent and become question marks.
    """
    try:
        return _encoder.encode(value) + b"\n"
    except UnicodeEncodeError:
        return _encoder.encode(_sendable(msgspec.to_builtins(value, enc_hook=_plain))) + b"\n"


def _sendable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_sendable(key): _sendable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_sendable(item) for item in value]
    return value


def read_message(text: bytes) -> Message:
    """Raises msgspec.DecodeError where this is none."""
    return _messages.decode(text)


def read_order(text: bytes) -> Order:
    """Raises msgspec.DecodeError where parent and child do not speak the same version."""
    return _orders.decode(text)
