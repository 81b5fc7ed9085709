"""What the two transports share: how a call becomes httpx arguments, and how its errors are read."""

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Final

import httpx

from rushes.client._core import Fetch
from rushes.client._pace import Lost
from rushes.client._wire import Call, Reply, starts_at

LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")
USER_AGENT: Final = "rushes-client"


def options() -> dict[str, Any]:
    """Arguments of an httpx client: proxies as the environment says, but never to this machine itself."""
    return {
        "verify": _trust(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")),
        "mounts": {f"all://{host}": None for host in LOOPBACK},
        "headers": {"User-Agent": USER_AGENT},
        "follow_redirects": False,
    }


@lru_cache(maxsize=4)
def _trust(file: str | None, folder: str | None) -> ssl.SSLContext:
    """Whom to trust, as httpx reads it from these variables; kept, because loading it takes long."""
    return httpx.create_ssl_context()


def arguments(call: Call, timeout: float) -> dict[str, Any]:
    """Arguments of ``request`` and ``stream`` for a call."""
    made: dict[str, Any] = {
        "method": call.method,
        "url": call.url,
        "headers": dict(call.headers),
        "timeout": httpx.Timeout(timeout, connect=min(timeout, 10.0)),
    }
    if call.content is not None:
        made["content"] = call.content
    if call.upload is not None:
        made["files"] = {"file": (call.upload.name, call.upload.source, call.upload.content_type)}
    return made


def reply(answer: httpx.Response, body: bytes = b"", received: int | None = None) -> Reply:
    headers = {name.lower(): value for name, value in answer.headers.items()}
    return Reply(answer.status_code, headers, body, str(answer.url), received)


class Download:
    """An answer on its way into a file."""

    def __init__(self, effect: Fetch) -> None:
        self._effect = effect
        self.received = effect.offset
        self.headers: dict[str, str] = {}
        # redirects are followed for files alone; httpx drops the key where they lead to another origin
        self.arguments = arguments(effect.call, effect.timeout) | {"follow_redirects": True}

    def begin(self, answer: httpx.Response) -> bool:
        """Make the file ready for the answer's body; False where the answer is no file."""
        self.headers = {name.lower(): value for name, value in answer.headers.items()}
        start = starts_at(answer.status_code, self.headers, self._effect.offset)
        if start is None:
            return False
        self._effect.sink.seek(start)
        self._effect.sink.truncate()
        self.received = start
        return True

    def write(self, chunk: bytes) -> None:
        self._effect.sink.write(chunk)
        self.received += len(chunk)


@contextmanager
def losses(download: Download | None = None) -> Iterator[None]:
    """Turn httpx's errors into :class:`Lost`, with what had arrived of a download."""
    try:
        yield
    except httpx.InvalidURL as error:
        raise Lost(f"bad address: {error}", sent=False) from None
    except httpx.RequestError as error:
        before = httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout | httpx.ProxyError
        raise Lost(
            _reason(error),
            sent=not isinstance(error, before | httpx.UnsupportedProtocol),
            received=download.received if download else 0,
            headers=download.headers if download else None,
        ) from error


@contextmanager
def opened(source: str | Path | BinaryIO, name: str | None) -> Iterator[tuple[BinaryIO, str]]:
    """The file to upload and its bare name; closed at the end only where it was opened here."""
    if isinstance(source, str | Path):
        path = Path(source)
        with path.open("rb") as file:
            yield file, name or path.name
    else:
        known = getattr(source, "name", None)
        yield source, name or (PurePath(known).name if isinstance(known, str) else "upload")


def _reason(error: httpx.RequestError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    return str(error) or type(error).__name__
