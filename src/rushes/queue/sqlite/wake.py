"""Waking sleepers in other processes: a datagram on the loopback device to every port in the workers table.

The datagram says nothing and proves nothing: whoever gets one looks into the database. A lost one costs at
most the time to the next look at ``PRAGMA data_version``, which is every quarter of a second.
"""

import asyncio
import socket
import sqlite3
from collections.abc import Callable
from typing import Final

from rushes.queue.sqlite.database import sql

LOOK_SECONDS: Final = 0.25


class Doorbell:
    """One process's end. Callbacks run on the loop that made it."""

    def __init__(self, reader: sqlite3.Connection) -> None:
        self._reader = reader
        self._loop = asyncio.get_running_loop()
        self._callbacks: dict[object, Callable[[], None]] = {}
        self._socket: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._version = 0
        self._sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sender.setblocking(False)
        self.port = 0

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            self._socket.bind(("127.0.0.1", 0))
            self.port = self._socket.getsockname()[1]
            self._loop.add_reader(self._socket, self._rung)
            self._version = self._data_version()
            self._timer = self._loop.call_later(LOOK_SECONDS, self._look)
        token = object()
        self._callbacks[token] = callback
        return lambda: self._callbacks.pop(token, None) and None

    def ring(self, connection: sqlite3.Connection) -> None:
        """Wake every joined process. Runs on the writer's thread, after its commit."""
        for (port,) in connection.execute(sql("wake_ports")).fetchall():
            if port != self.port:
                try:
                    self._sender.sendto(b"!", ("127.0.0.1", port))
                except OSError:
                    continue
        if self._callbacks:
            self._loop.call_soon_threadsafe(self._call)

    def close(self) -> None:
        self._callbacks.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._socket.close()
        self._sender.close()

    def _rung(self) -> None:
        assert self._socket is not None
        try:
            while self._socket.recv(16):
                pass
        except OSError:
            pass
        self._call()

    def _look(self) -> None:
        self._timer = self._loop.call_later(LOOK_SECONDS, self._look)
        version = self._data_version()
        if version != self._version:
            self._version = version
            self._call()

    def _data_version(self) -> int:
        try:
            return int(self._reader.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error:
            return self._version

    def _call(self) -> None:
        for callback in tuple(self._callbacks.values()):
            callback()
