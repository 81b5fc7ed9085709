"""A real `rushes serve` in processes of its own, for tests that use, signal and kill them."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from rushes.queue.base import Store
from rushes.settings import Settings
from rushes.wiring import opened_store

PORTS = range(20000, 30000)
"""For :func:`free_port`. The kernel takes those of outgoing connections, and of port 0, from higher ones."""
_SHARE = 500
T2I = "wan-ai/wan-2-5/text-to-image"
TESTS = Path(__file__).parent.parent


def _ports() -> Iterator[int]:
    """Those of this test process, each once and then again; where to begin, other runs on this machine differ."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first, begin = worker * _SHARE % len(PORTS), random.randrange(_SHARE)
    while True:
        yield PORTS[first + begin % _SHARE]
        begin += 1


_next_port = _ports()


def free_port() -> int:
    """A port where nothing listens, for a server that is to be started there, or died and is to come back.

    Nobody else is given it meanwhile: neither a connection of any program, nor another test process.
    """
    while True:
        port = next(_next_port)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


def environment(**settings: object) -> dict[str, str]:
    """The environment for a server: ours without any RUSHES_ variable but those given."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RUSHES_")}
    plain["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [plain.get("PYTHONPATH")])])
    return plain | {f"RUSHES_{name.upper()}": str(value) for name, value in settings.items()}


def eventually(condition: Callable[[], Any], seconds: float = 30.0, what: str = "") -> Any:
    """Wait until ``condition`` holds; its value. Fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or condition}"
        time.sleep(0.02)


class Server:
    """Start with :meth:`start`; ``settings`` as for RUSHES_ variables, in lower case."""

    def __init__(self, data_dir: Path, *, arguments: tuple[str, ...] = (), **settings: object) -> None:
        self.data_dir = data_dir
        self.log = data_dir.parent / f"{data_dir.name}.log"
        self._arguments = arguments
        self.settings = {"engine": "support.engines:PromptEngine", "lease_seconds": 2, "drain_seconds": 5}
        self.settings |= settings
        self.key = ""
        self.url = ""
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Server":
        self.spawn()
        eventually(self._ready, 40, "the server is ready")
        self.take_key()
        return self

    def take_key(self) -> None:
        """The one that the first start has shown; a new one where another server was the first on this store."""
        if not self.key:
            _, _, shown = self.log.read_text().partition("API key, shown this once: ")
            self.key = shown.split()[0] if shown else self.command("keys", "create", "--name", "test").strip()

    def spawn(self) -> "subprocess.Popen[bytes]":
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rushes.cli.main", "serve", "--port", "0", *self._arguments],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                start_new_session=True,
            )
        return self.process

    @property
    def environment(self) -> dict[str, str]:
        return environment(data_dir=self.data_dir, **self.settings)

    def _ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        try:
            self.url = json.loads((self.data_dir / "server.json").read_text())["url"]
            return httpx.get(f"{self.url}/healthz", timeout=2, verify=False).status_code == 200
        except (OSError, ValueError, httpx.HTTPError):
            return False

    def command(self, *arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "rushes.cli.main", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        return done.stdout if status == 0 else done.stdout + done.stderr

    # -- talking ----------------------------------------------------------------------------------------
    def client(self, key: str | None = None) -> httpx.Client:
        """Without a look at certificates, of which there are none: it takes longer than most calls."""
        headers = {"Authorization": f"Bearer {key or self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, verify=False)

    def call(self, method: str, path: str, *, key: str | None = None, **more: Any) -> httpx.Response:
        with self.client(key) as client:
            return client.request(method, path, **more)

    def submit(self, prompt: str, model: str = T2I) -> str:
        with self.client() as client:
            answer = client.post(f"/v1/models/{model}", json={"prompt": prompt})
            assert answer.status_code == 200, answer.text
            return str(answer.json()["request_id"])

    def get(self, path: str) -> dict[str, Any]:
        with self.client() as client:
            answer = client.get(path)
            assert answer.status_code == 200, answer.text
            return dict(answer.json())

    def status(self, id_: str) -> dict[str, Any]:
        return self.get(f"/v1/requests/{id_}/status")

    def result(self, id_: str) -> dict[str, Any]:
        return self.get(f"/v1/requests/{id_}/result")

    def finished(self, id_: str, seconds: float = 40.0) -> dict[str, Any]:
        """The result, once it is there."""

        def ended() -> dict[str, Any] | None:
            try:
                result = self.result(id_)
            except httpx.HTTPError:
                return None
            return result if result["status"] in ("succeeded", "failed", "cancelled") else None

        return dict(eventually(ended, seconds, f"{id_} has an outcome"))

    def running(self, id_: str) -> None:
        eventually(lambda: self.status(id_)["status"] == "in_progress", 30, f"{id_} runs")

    # -- processes --------------------------------------------------------------------------------------
    def processes(self, role: str) -> list[psutil.Process]:
        """The server's live processes of a role: gateway, worker, slot."""
        assert self.process is not None
        found = []
        for process in self._family():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if "rushes.wiring" in line and line[line.index("rushes.wiring") + 1] == role:
                found.append(process)
        return found

    def one(self, role: str) -> psutil.Process:
        return eventually(lambda: self.processes(role), 20, f"a {role} process")[0]

    def _family(self) -> Iterator[psutil.Process]:
        assert self.process is not None
        try:
            root = psutil.Process(self.process.pid)
            yield root
            yield from root.children(recursive=True)
        except psutil.NoSuchProcess:
            return

    def kill_everything(self) -> None:
        """kill -9 of every process of the server at once."""
        family = list(self._family())
        for process in family:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=10)
        assert self.process is not None
        self.process.wait(10)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        if self.process is None or self.process.poll() is not None:
            return self.process.returncode if self.process else 0
        family = list(self._family())
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill_everything()
            raise
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive, alive
        return status

    # -- the store --------------------------------------------------------------------------------------
    def with_store(self, use: Callable[[Store], Any]) -> Any:
        """Open the server's store from here and have it used."""
        settings = Settings(data_dir=self.data_dir, database_url=str(self.settings.get("database_url", "")))

        async def run() -> Any:
            async with opened_store(settings) as store:
                return await use(store)

        return asyncio.run(run())
