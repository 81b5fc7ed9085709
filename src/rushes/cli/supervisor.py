"""The server's first process: it owns the data directory and the listening socket, and keeps the others alive.

It does no work of its own, so there is little in it that can fail. The socket is opened here and handed down:
while a gateway is replaced, connections wait in the queue of the socket instead of being refused.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from rushes import log
from rushes.errors import DirectoryInUse, SettingsError
from rushes.guard import SUPERVISOR
from rushes.media.scratch import clean_scratch
from rushes.requests.ids import uuid7
from rushes.settings import Settings
from rushes.wiring import CHILD_SETTINGS, DRAIN_SIGNAL, encode_settings, preflight

_BACKOFF: Final = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0)
_STABLE_SECONDS: Final = 10.0
_GIVE_UP: Final = 4
"""Failures in a row of a process that never came up: then it is not bad luck."""
_GRACE_SECONDS: Final = 15.0


@contextmanager
def owned_directory(folder: Path) -> Iterator[str]:
    """Own the data directory; answers the server's lasting id. Raises DirectoryInUse."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock: IO[str] = (folder / "serve.lock").open("a+")
    except OSError as error:
        raise SettingsError(f"the data directory {folder} cannot be used: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DirectoryInUse(
                f"another server runs on {folder}: stop it, or give this one a --data-dir of its own"
            ) from None
        identity = folder / "server-id"
        if not identity.exists():
            identity.write_text(uuid7(), "ascii")
        yield identity.read_text("ascii").strip()


def listen(host: str, port: int) -> socket.socket:
    """The listening socket. Raises SettingsError where the address cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host}:{port}: {error.strerror}; give another --host or --port"
        ) from None
    listener.set_inheritable(True)
    return listener


class Child:
    """One process of the server, started again whenever it ends unasked."""

    def __init__(
        self, role: str, arguments: list[str], settings: Settings, descriptors: tuple[int, ...]
    ) -> None:
        self.role = role
        self._command = [sys.executable, "-m", "rushes.wiring", role, *arguments]
        self._environment = os.environ | {
            CHILD_SETTINGS: encode_settings(settings),
            SUPERVISOR: str(os.getpid()),
        }
        self._descriptors = descriptors
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._settled = False
        # Without a gateway there is no server; without workers it still takes requests.
        self._vital = role == "gateway"

    async def keep(self) -> None:
        """Run it, again and again, until :meth:`stop`."""
        failures = 0
        while not self._is_stopping():
            began = time.monotonic()
            status = await self._run_once()
            if self._is_stopping():
                return
            stable = time.monotonic() - began > _STABLE_SECONDS
            self._settled = self._settled or stable
            failures = 0 if stable else failures + 1
            log.event("process ended", role=self.role, status=status, failures=failures)
            if failures >= _GIVE_UP and not self._settled and self._vital:
                raise SettingsError(f"the {self.role} does not start: see above for the reason")
            await asyncio.sleep(_BACKOFF[min(failures, len(_BACKOFF) - 1)])

    async def _run_once(self) -> int | str:
        """Its exit status, or why there is none."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                env=self._environment,
                pass_fds=self._descriptors,
                stdin=asyncio.subprocess.DEVNULL,
            )
        except OSError as error:
            return f"not started: {error}"
        return await self._process.wait()

    def _is_stopping(self) -> bool:
        return self._stopping

    async def stop(self, seconds: float) -> None:
        """Ask it to end, and end it after ``seconds``."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(seconds):
                await process.wait()
        except TimeoutError:
            self.kill()
            await process.wait()

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


async def supervise(settings: Settings, listener: socket.socket, server_id: str) -> None:
    """Run gateway and worker until SIGTERM or SIGINT; a second signal ends them at once."""
    children = [Child("gateway", [str(listener.fileno())], settings, (listener.fileno(),))]
    if settings.workers or settings.remotes:
        children.append(Child("worker", [server_id], settings, ()))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            for child in children:
                child.kill()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    keepers = [asyncio.create_task(child.keep()) for child in children]
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([stopped, *keepers], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    log.event("server stopping")
    # The worker first: while it finishes, clients go on polling, and what they submit is sent elsewhere.
    gateway, *workers = children
    gateway.signal(DRAIN_SIGNAL)
    await asyncio.gather(*(worker.stop(settings.drain_seconds + _GRACE_SECONDS) for worker in workers))
    await gateway.stop(_GRACE_SECONDS)
    for keeper in keepers:
        keeper.cancel()
    for outcome in await asyncio.gather(*keepers, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome


def run_server(settings: Settings) -> None:
    """All of `rushes serve`. Returns when the server has stopped."""
    with owned_directory(settings.data_dir) as server_id:
        asyncio.run(preflight(settings))
        clean_scratch(settings)
        with listen(settings.host, settings.port) as listener:
            note = settings.data_dir / "server.json"
            host, port = listener.getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            note.write_text(json.dumps({"url": url, "pid": os.getpid()}), "utf-8")
            try:
                asyncio.run(supervise(settings, listener, server_id))
            finally:
                note.unlink(missing_ok=True)
