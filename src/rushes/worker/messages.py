"""What a worker and its slots' child processes say to each other: one JSON object a line, over pipes."""

from pathlib import Path
from typing import Any, Literal

import msgspec

from rushes.engines.base import Job, Produced
from rushes.requests.record import Progress


class Ready(msgspec.Struct, tag="ready", tag_field="type", frozen=True):
    """The child has its engine and waits for a job."""

    engine: str


class Step(msgspec.Struct, tag="progress", tag_field="type", frozen=True):
    progress: Progress


class Done(msgspec.Struct, tag="done", tag_field="type", frozen=True):
    produced: list[Produced]


class Failed(msgspec.Struct, tag="failed", tag_field="type", frozen=True):
    """The engine gave up in an orderly way; the child is fit for the next job."""

    reason: Literal["engine", "unexpected"]
    code: str
    message: str
    node: str | None = None
    retryable: bool = False


Message = Ready | Step | Done | Failed


def _plain(value: object) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(type(value))


def _rich(type_: type, value: Any) -> Any:
    return Path(value) if issubclass(type_, Path) else value


_encoder = msgspec.json.Encoder(enc_hook=_plain)
_messages: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message, dec_hook=_rich)
_jobs = msgspec.json.Decoder(Job, dec_hook=_rich)


def line(value: Message | Job) -> bytes:
    return _encoder.encode(value) + b"\n"


def read_message(text: bytes) -> Message:
    return _messages.decode(text)


def read_job(text: bytes) -> Job:
    """Raises msgspec.ValidationError where parent and child do not speak the same version."""
    return _jobs.decode(text)
