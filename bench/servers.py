"""The servers under measurement: each started as its users start it, on loopback, in a folder of its own.

A server's processes all stand on the core that is asked for (they inherit it), and are ended by their ids.
"""

import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from load import Shot, collect, pinned

HERE = Path(__file__).resolve().parent
PEERS = HERE / ".peers"
PROMPT = (
    "A dramatic, wide-angle tracking shot captures a lone figure in heavy tactical gear standing amidst the "
    "desolate ruins of a post-apocalyptic landscape during golden hour. The camera slowly dollies in from a "
    "low angle, gradually shifting focus from the vast, debris-strewn terrain to the figure, highlighting his "
    "resolute posture and intricate suit details. The sky is painted with streaks of clouds and contrails."
)
"""A prompt of ordinary length."""
INPUT = {"56_text": PROMPT, "118_image": "Runcomfy_Example_1290_1.png"}
MODEL_PATH = "/v1/models/community/wan-2-2/vace-fun"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def peer_python() -> Path:
    """The interpreter of the peers' own virtual environment, made on first use and when its pins change."""
    wanted = HERE / "peers" / "requirements.txt"
    digest = hashlib.sha256(wanted.read_bytes()).hexdigest()
    venv, stamp = PEERS / "venv", PEERS / "stamp"
    python = venv / "bin" / "python"
    if not (python.exists() and stamp.exists() and stamp.read_text("utf-8") == digest):
        print("bench: installing the peers into bench/.peers/venv", file=sys.stderr)
        shutil.rmtree(venv, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", str(wanted)],
            check=True,
            timeout=900,
        )
        stamp.write_text(digest, "utf-8")
    return python


class _Process(NamedTuple):
    parent: int
    session: int
    started: str
    ticks: int
    """Processor time used, in clock ticks."""


def _process_table() -> dict[int, _Process]:
    table: dict[int, _Process] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text("utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            ticks = int(fields[11]) + int(fields[12])
            table[int(entry.name)] = _Process(int(fields[1]), int(fields[3]), fields[19], ticks)
    return table


class Running:
    """A started server: a process group, the port it answers on, its output in ``log``."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        port: int,
        ready: str,
        folder: Path,
        env: Mapping[str, str],
        cpu: int | None,
        patience: float = 60.0,
    ) -> None:
        """Start and wait until ``ready`` answers 2xx. ``ready_seconds`` is how long that took."""
        self.port = port
        self.log = folder / f"server-{port}.log"
        self._out: IO[bytes] = self.log.open("wb")
        start = time.perf_counter()
        self.process = subprocess.Popen(
            pinned(cpu, argv),
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            cwd=folder,
            start_new_session=True,
        )
        try:
            self._wait(ready, start + patience)
        except BaseException:
            self.stop(patience=5)
            raise
        self.ready_seconds = time.perf_counter() - start

    def _wait(self, path: str, deadline: float) -> None:
        while time.perf_counter() < deadline:
            if self.process.poll() is not None:
                raise SystemExit(f"bench: the server ended at once:\n{self.tail()}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.01)
        raise SystemExit(f"bench: the server did not become ready:\n{self.tail()}")

    def tail(self) -> str:
        return self.log.read_text("utf-8", "replace")[-3000:]

    def processes(self) -> dict[int, _Process]:
        """The server's live processes: its descendants, and all of its session."""
        table = _process_table()
        found = {pid for pid, row in table.items() if row.session == self.process.pid}
        while more := {pid for pid, row in table.items() if row.parent in found} - found:
            found |= more
        return {pid: table[pid] for pid in found}

    def cpu_seconds(self) -> float:
        """Processor time that the server's live processes have used."""
        return sum(row.ticks for row in self.processes().values()) / os.sysconf("SC_CLK_TCK")

    def listener(self) -> int:
        """The process that holds the listening socket; where several inherited it, the youngest."""
        inodes = set()
        for line in Path("/proc/net/tcp").read_text("utf-8").splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and int(columns[1].rpartition(":")[2], 16) == self.port:
                inodes.add(f"socket:[{columns[9]}]")
        holders = []
        for pid in self.processes():
            try:
                links = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
            except OSError:
                continue
            if links & inodes:
                holders.append(pid)
        return max(holders)

    def stop(self, patience: float = 60.0, *, quietly: bool = False) -> None:
        """End it as its users would, then, where that takes too long, by force."""
        before = self.processes()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                if not quietly:
                    print(f"bench: killed a server that did not stop in {patience:.0f} s", file=sys.stderr)
        table = _process_table()
        for pid, row in before.items():
            if pid in table and table[pid].started == row.started:  # not a later process with the same number
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
        self._out.close()


def resident_mib(pid: int) -> float:
    """What a process holds in memory, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


class Server(Protocol):
    """One server under measurement: what its polls and its submits look like."""

    name: str
    running: Running

    def start(self, cpu: int | None = 0) -> None: ...

    def stop(self) -> None: ...

    def submit(self) -> Shot: ...

    def polls(self, state: str) -> list[Shot]:
        """Status polls of requests that are "queued" or "finished"."""


class FastApiSql:
    """bench/peers/fastapi_sql.py."""

    name = "FastAPI + SQL"

    def __init__(self, folder: Path, queued: int = 50, finished: int = 50) -> None:
        self.folder, self.queued, self.finished = folder, queued, finished
        self.key = secrets.token_urlsafe(32)
        self.ids: dict[str, list[str]] = {}

    def start(self, cpu: int | None = 0) -> None:
        self.folder.mkdir(parents=True)
        program = [str(peer_python()), str(HERE / "peers" / "fastapi_sql.py")]
        env = {**os.environ, "PEER_KEY": self.key}
        database, port = str(self.folder / "requests.db"), free_port()
        subprocess.run([*program, "init", database], env=env, check=True, timeout=60)
        filled = subprocess.run(
            [*program, "fill", database, str(self.queued), str(self.finished)],
            env=env,
            check=True,
            timeout=300,
            capture_output=True,
        )
        self.ids = json.loads(filled.stdout)
        self.running = Running(
            [*program, "serve", database, str(port)],
            port=port,
            ready="/healthz",
            folder=self.folder,
            env=env,
            cpu=cpu,
        )

    def stop(self) -> None:
        self.running.stop()

    def submit(self) -> Shot:
        return Shot("POST", MODEL_PATH, {"Authorization": f"Bearer {self.key}"}, json.dumps(INPUT))

    def polls(self, state: str) -> list[Shot]:
        headers = {"Authorization": f"Bearer {self.key}"}
        return [Shot("GET", f"/v1/requests/{i}/status", headers) for i in self.ids[state]]


class BentoTask:
    """bench/peers/bentoml_task: `bentoml serve`, its task store on a memory file system where there is one."""

    name = "BentoML task"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        memory = Path("/dev/shm")
        self.store = (memory if memory.is_dir() else folder) / f"bench-{secrets.token_hex(8)}.db"

    def start(self, cpu: int | None = 0) -> None:
        (self.folder / "home").mkdir(parents=True)
        port = free_port()
        env = {
            "BENTOML_HOME": str(self.folder / "home"),
            "BENTOML_DO_NOT_TRACK": "True",
            "BENTOML_RESULT_STORE": str(self.store),
            "PEER_TASK_SECONDS": "3600",  # submits alone: the tasks' own work would compete with them
        }
        argv = [str(peer_python()), "-m", "bentoml", "serve", "service:VaceFun", "--quiet"]
        argv += ["--working-dir", str(HERE / "peers" / "bentoml_task"), "--host", "127.0.0.1", "-p", str(port)]
        self.running = Running(
            argv, port=port, ready="/readyz", folder=self.folder, env=env, cpu=cpu, patience=120.0
        )
        self.ids = [json.loads(b)["task_id"] for b in collect(port, [self.submit()], 100)]

    def stop(self) -> None:
        self.running.stop(patience=2, quietly=True)  # it would wait for its tasks
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.store}{suffix}").unlink(missing_ok=True)

    def submit(self) -> Shot:
        body = {"text": INPUT["56_text"], "image": INPUT["118_image"]}
        return Shot("POST", "/generate/submit", {}, json.dumps(body))

    def polls(self, state: str) -> list[Shot]:
        del state  # the same work for it (see README.md); its tasks are all waiting
        return [Shot("GET", f"/generate/status?task_id={i}") for i in self.ids]
